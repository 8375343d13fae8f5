/*
 * shohin_runtime.c: runs the steps of a model on a fixed group of threads.
 *
 * The caller of a run is thread 0 and leads; the other threads ("workers") belong to the
 * instance. Steps run in order. A step that is split ("parallel") is one fork and one join: its
 * items are dealt out in one share per thread, each share in a few chunks. A thread works off its
 * own share first, which keeps the same weights in the same cache from run to run, and then helps
 * with the shares of others. Nobody waits for a thread that has not begun: a worker that is still
 * asleep, or whose processor is taken by something else, only finds less to do. What is computed
 * does not depend on who computes it. Steps that are not split run on the leader between a join
 * and the next fork, so they need no synchronisation of their own.
 *
 * A fork writes the ticket of the step into the `claim` of every share, with the next chunk's
 * number below it; claiming a chunk is one atomic addition, whose result says of which step it
 * is. A claim beyond the last chunk gives nothing to do. A thread that has computed chunks of a
 * share adds their number to the share's `done`; the leader waits until all chunks are done.
 *
 * Ordering: what was written before a fork is visible to whoever claims a chunk through the
 * release/acquire pair on `claim`; what chunks wrote is visible to the leader through the pair on
 * `done`, and to other threads through the leader's next fork.
 */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_getaffinity */
#elif defined(__APPLE__)
#define _DARWIN_C_SOURCE /* _SC_NPROCESSORS_ONLN */
#else
#define _POSIX_C_SOURCE 200809L
#endif

#include "shohin_runtime.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <time.h>
#include <unistd.h>

#ifndef SHOHIN_NAME
#error "compile shohin_runtime.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

enum {
    ARENA_ALIGNMENT = 64,
    HUGE_PAGE = 2 << 20,
    /* Two 64-byte lines: x86 fetches lines in pairs, and some ARM cores have 128-byte lines. */
    CACHE_LINE = 128,
    /* musl gives threads 128 KiB by default, too little for kernels with local tiles. */
    WORKER_STACK_BYTES = 2 << 20,
    /* Polls before a wait inside a run gives its processor away: some tens of microseconds. */
    POLLS_BEFORE_YIELD = 2048,
    /* The same when there are more threads than processors: the awaited thread needs this one. */
    POLLS_BEFORE_YIELD_CROWDED = 16,
    /* How long a worker stays awake after a run, so that a prompt next run starts quickly. */
    LINGER_NANOSECONDS = 50 * 1000,
    POLLS_PER_CLOCK_READING = 32,
    /* Chunks of a share: enough that a thread that comes free finds something to help with. */
    CHUNKS_PER_SHARE = 4
};

/* One thread's part of the step that runs. */
typedef struct share {
    _Alignas(CACHE_LINE) atomic_ullong claim; /* ticket << 32 | next chunk */
    _Alignas(CACHE_LINE) atomic_uint done;    /* chunks computed since creation; wraps around */
    unsigned expected;                        /* what `done` will be; the leader's alone */
} share;

typedef struct worker {
    pthread_t thread;
    shohin_instance *instance;
    int32_t index; /* 1 .. threads - 1: which share of each step is its own */
} worker;

struct shohin_instance {
    /* Written by the leader only and polled by all workers, hence alone on their line. */
    _Alignas(CACHE_LINE) atomic_uint ticket; /* of the last fork; see `next_ticket` */
    atomic_uint run;                         /* odd while a run is going on */

    _Alignas(CACHE_LINE) atomic_flag in_use;
    atomic_bool stop;
    atomic_int asleep; /* workers that block on `wake` or are about to */
    pthread_mutex_t mutex;
    pthread_cond_t wake;

    /* Fixed at creation. */
    const shohin_model *model;
    int32_t threads;
    int32_t polls_before_yield;
    int64_t linger_nanoseconds;
    int32_t *parts;    /* per step: how many threads share it; 0: nothing to do */
    int32_t *parallel; /* the steps with more than one part, in order */
    int32_t parallel_count;
    unsigned ticket_limit; /* tickets are below it; a multiple of parallel_count */
    share *shares;         /* one per thread */
    worker *workers;       /* threads - 1 */
    int32_t started; /* workers whose thread exists */

    /* Rewritten by each run, before the first fork. */
    shohin_frame frame;
    const void **inputs;
    void **outputs;

    /* Aligned stand-ins for misaligned pointers of the user; NULL until needed. */
    void **input_stages;
    void **output_stages;
};

/* ---------------------------------------------------------------- failures */

/* Up to three texts; NULL ends them sooner. */
static shohin_status fail(shohin_status status, const char *first, const char *second,
                          const char *third) {
    const char *const parts[] = {first, second, third, NULL};
    return RUNTIME(fail)(status, parts);
}

/* A failure of which no more is known than the status. */
static shohin_status fail_plainly(shohin_status status) {
    return fail(status, RUNTIME(status_text)(status), NULL, NULL);
}

static shohin_status fail_without_memory(const char *purpose, size_t bytes) {
    char digits[SHOHIN_DIGITS];
    const char *const parts[] = {"out of memory: ", RUNTIME(decimal)(digits, bytes),
                                 " bytes for ", purpose, NULL};
    return RUNTIME(fail)(SHOHIN_OUT_OF_MEMORY, parts);
}

/* ---------------------------------------------------------------- waiting */

/* Tells the processor that this is a polling loop. */
static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    /* `yield` does nothing on most cores; `isb` stalls about as long as `pause` on x86. */
    __asm__ volatile("isb" ::: "memory");
#elif defined(__arm__)
    __asm__ volatile("yield" ::: "memory");
#elif defined(__riscv)
    __asm__ volatile(".4byte 0x0100000f" ::: "memory"); /* `pause`, a hint of older assemblers */
#else
    atomic_signal_fence(memory_order_seq_cst);
#endif
}

static int64_t now_nanoseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (int64_t)time.tv_sec * 1000000000 + time.tv_nsec;
}

/* One round of waiting for another thread. Yields in the end: it may need this processor. */
static inline void wait_a_little(int32_t *polls, int32_t polls_before_yield) {
    if (*polls < polls_before_yield) {
        ++*polls;
        relax();
    } else {
        sched_yield();
    }
}

/* ---------------------------------------------------------------- steps */

static int32_t smaller(int32_t a, int32_t b) { return a < b ? a : b; }

/* The first item of a part of [0, extent); part sizes differ by at most one. */
static int32_t part_begin(int32_t extent, int32_t part, int32_t parts) {
    return (int32_t)((int64_t)extent * part / parts);
}

/* Items and chunks of a thread's share of a step; no chunks beyond the step's parts. */
typedef struct span {
    int32_t begin;
    int32_t items;
    int32_t chunks;
} span;

static span share_span(const shohin_instance *instance, int32_t step, int32_t index) {
    const int32_t parts = instance->parts[step];
    span found = {0, 0, 0};
    if (index < parts) {
        const int32_t extent = instance->model->steps[step].extent;
        found.begin = part_begin(extent, index, parts);
        found.items = part_begin(extent, index + 1, parts) - found.begin;
        found.chunks = smaller(found.items, CHUNKS_PER_SHARE);
    }
    return found;
}

/* Tickets say which step they are for: the number of the parallel step is the remainder. */
static int32_t step_of(const shohin_instance *instance, unsigned ticket) {
    return instance->parallel[ticket % (unsigned)instance->parallel_count];
}

static unsigned next_ticket(const shohin_instance *instance, unsigned ticket) {
    return ticket + 1 == instance->ticket_limit ? 0 : ticket + 1;
}

/*
 * Computes chunks of one share until none is left. All are of one step: the leader does not go on
 * to the next before those of this thread are counted as done.
 */
static void work_off(shohin_instance *instance, int32_t index) {
    share *own = &instance->shares[index];
    unsigned done = 0;
    for (;;) {
        const unsigned long long claim =
            atomic_fetch_add_explicit(&own->claim, 1, memory_order_acquire);
        const int32_t step = step_of(instance, (unsigned)(claim >> 32));
        const int32_t chunk = (int32_t)(claim & 0x7fffffffu);
        const span work = share_span(instance, step, index);
        if (chunk >= work.chunks) {
            break;
        }
        const int32_t begin = work.begin + part_begin(work.items, chunk, work.chunks);
        const int32_t end = work.begin + part_begin(work.items, chunk + 1, work.chunks);
        instance->model->steps[step].function(&instance->frame, begin, end);
        ++done;
    }
    if (done > 0) {
        atomic_fetch_add_explicit(&own->done, done, memory_order_release);
    }
}

/* Computes what is left of the step that runs, beginning with a thread's own share. */
static void work_off_all(shohin_instance *instance, int32_t index) {
    for (int32_t i = 0; i < instance->threads; ++i) {
        work_off(instance, (index + i) % instance->threads);
    }
}

/* ---------------------------------------------------------------- workers */

/* Whether a run goes on, or the instance is destroyed. */
static bool is_wanted(shohin_instance *instance) {
    return (atomic_load(&instance->run) & 1) != 0 || atomic_load(&instance->stop);
}

/* Polls for a short while for the next run. False: none came. */
static bool linger(shohin_instance *instance) {
    if (instance->linger_nanoseconds == 0) {
        return is_wanted(instance);
    }
    const int64_t deadline = now_nanoseconds() + instance->linger_nanoseconds;
    do {
        for (int32_t poll = 0; poll < POLLS_PER_CLOCK_READING; ++poll) {
            if (is_wanted(instance)) {
                return true;
            }
            relax();
        }
    } while (now_nanoseconds() < deadline);
    return false;
}

/*
 * Blocks until the next run. The worker announces itself in `asleep` and then reads `run`; the
 * leader writes `run` and then reads `asleep`. All four are sequentially consistent, so at least
 * one of the two sees the other, and no wake-up is lost.
 */
static void sleep_until_wanted(shohin_instance *instance) {
    pthread_mutex_lock(&instance->mutex);
    atomic_fetch_add(&instance->asleep, 1);
    while (!is_wanted(instance)) {
        pthread_cond_wait(&instance->wake, &instance->mutex);
    }
    atomic_fetch_sub(&instance->asleep, 1);
    pthread_mutex_unlock(&instance->mutex);
}

/* Helps with the steps of the run that goes on, until it ends. */
static void help(shohin_instance *instance, int32_t index, unsigned *ticket) {
    int32_t polls = 0;
    while ((atomic_load_explicit(&instance->run, memory_order_acquire) & 1) != 0) {
        const unsigned current = atomic_load_explicit(&instance->ticket, memory_order_acquire);
        if (current == *ticket) {
            wait_a_little(&polls, instance->polls_before_yield);
            continue;
        }
        work_off_all(instance, index);
        *ticket = current;
        polls = 0;
    }
}

static void *worker_main(void *argument) {
    worker *self = argument;
    shohin_instance *instance = self->instance;
    unsigned ticket = instance->ticket_limit - 1;
    for (;;) {
        if (!linger(instance)) {
            sleep_until_wanted(instance);
        }
        if (atomic_load(&instance->stop)) {
            return NULL;
        }
        help(instance, self->index, &ticket);
    }
}

static void wake_sleepers(shohin_instance *instance) {
    if (atomic_load(&instance->asleep) > 0) {
        pthread_mutex_lock(&instance->mutex);
        pthread_cond_broadcast(&instance->wake);
        pthread_mutex_unlock(&instance->mutex);
    }
}

/* ---------------------------------------------------------------- the leader */

/* Offers the chunks of a step to all threads. */
static void fork_step(shohin_instance *instance, int32_t step) {
    const unsigned last = atomic_load_explicit(&instance->ticket, memory_order_relaxed);
    const unsigned ticket = next_ticket(instance, last);
    for (int32_t i = 0; i < instance->threads; ++i) {
        share *one = &instance->shares[i];
        one->expected += (unsigned)share_span(instance, step, i).chunks;
        atomic_store_explicit(&one->claim, (unsigned long long)ticket << 32, memory_order_release);
    }
    atomic_store_explicit(&instance->ticket, ticket, memory_order_release);
}

/* Waits for the chunks that others have claimed and not finished. */
static void join_step(shohin_instance *instance) {
    for (int32_t i = 0; i < instance->threads; ++i) {
        const share *one = &instance->shares[i];
        int32_t polls = 0;
        while (atomic_load_explicit(&one->done, memory_order_acquire) != one->expected) {
            wait_a_little(&polls, instance->polls_before_yield);
        }
    }
}

static void run_step(shohin_instance *instance, int32_t step) {
    if (instance->parts[step] > 1) {
        fork_step(instance, step);
        work_off_all(instance, 0);
        join_step(instance);
    } else if (instance->parts[step] == 1) {
        const shohin_step *work = &instance->model->steps[step];
        work->function(&instance->frame, 0, work->extent);
    }
}

/* Tells the workers that a run begins or ends. Only the leader writes `run`. */
static void flip_run(shohin_instance *instance) {
    if (instance->parallel_count > 0) {
        atomic_store(&instance->run, atomic_load(&instance->run) + 1);
    }
}

/* Runs all steps; `milliseconds` (one per step) may be NULL. */
static void run_steps(shohin_instance *instance, double *milliseconds) {
    const int32_t count = instance->model->info.step_count;
    /* Before any leading unsplit steps, so that they hide the time to wake up. */
    flip_run(instance);
    wake_sleepers(instance);
    for (int32_t step = 0; step < count; ++step) {
        const int64_t start = milliseconds == NULL ? 0 : now_nanoseconds();
        run_step(instance, step);
        if (milliseconds != NULL) {
            milliseconds[step] = (double)(now_nanoseconds() - start) * 1e-6;
        }
    }
    flip_run(instance);
}

/* ---------------------------------------------------------------- inputs and outputs */

/*
 * Zeroed memory; NULL when there is none.
 *
 * Much of it comes in huge pages where the system has some: images are read in wide strides, and
 * the neighbouring lines of small pages may share the same few places of a cache.
 */
static void *allocate(size_t alignment, size_t bytes) {
    const bool large = bytes >= HUGE_PAGE;
    void *memory = NULL;
    const size_t aligned = large && alignment < HUGE_PAGE ? HUGE_PAGE : alignment;
    if (posix_memalign(&memory, aligned, bytes > 0 ? bytes : 1) != 0) {
        return NULL;
    }
#if defined(MADV_HUGEPAGE)
    if (large) {
        (void)madvise(memory, bytes / HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE);
    }
#endif
    memset(memory, 0, bytes);
    return memory;
}

static bool is_aligned(const void *pointer, size_t alignment) {
    return alignment <= 1 || ((uintptr_t)pointer & (alignment - 1)) == 0;
}

/* Makes sure that there is a stand-in of the given size. */
static bool prepare_stage(void **stage, size_t alignment, size_t bytes) {
    if (*stage == NULL) {
        *stage = allocate(alignment > ARENA_ALIGNMENT ? alignment : ARENA_ALIGNMENT, bytes);
    }
    return *stage != NULL;
}

/* Chooses the memory that the kernels read. */
static shohin_status bind_inputs(shohin_instance *instance, const void *const *inputs) {
    const shohin_model *model = instance->model;
    for (int32_t i = 0; i < model->info.input_count; ++i) {
        const size_t alignment = model->input_alignment[i];
        const size_t bytes = model->info.inputs[i].bytes;
        instance->inputs[i] = inputs[i];
        if (is_aligned(inputs[i], alignment)) {
            continue;
        }
        if (!prepare_stage(&instance->input_stages[i], alignment, bytes)) {
            return fail_without_memory("a copy of a misaligned input", bytes);
        }
        memcpy(instance->input_stages[i], inputs[i], bytes);
        instance->inputs[i] = instance->input_stages[i];
    }
    return SHOHIN_OK;
}

/* Chooses the memory that the kernels write. */
static shohin_status bind_outputs(shohin_instance *instance, void *const *outputs) {
    const shohin_model *model = instance->model;
    for (int32_t i = 0; i < model->info.output_count; ++i) {
        const size_t alignment = model->output_alignment[i];
        instance->outputs[i] = outputs[i];
        if (is_aligned(outputs[i], alignment)) {
            continue;
        }
        if (!prepare_stage(&instance->output_stages[i], alignment,
                           model->info.outputs[i].bytes)) {
            return fail_without_memory("a copy of a misaligned output",
                                       model->info.outputs[i].bytes);
        }
        instance->outputs[i] = instance->output_stages[i];
    }
    return SHOHIN_OK;
}

/* Copies what the kernels wrote to stand-ins to where the user wants it. */
static void deliver_outputs(const shohin_instance *instance, void *const *outputs) {
    for (int32_t i = 0; i < instance->model->info.output_count; ++i) {
        if (instance->outputs[i] != outputs[i]) {
            memcpy(outputs[i], instance->outputs[i], instance->model->info.outputs[i].bytes);
        }
    }
}

static shohin_status run_locked(shohin_instance *instance, const void *const *inputs,
                                void *const *outputs, double *milliseconds) {
    shohin_status status = bind_inputs(instance, inputs);
    if (status == SHOHIN_OK) {
        status = bind_outputs(instance, outputs);
    }
    if (status != SHOHIN_OK) {
        return status;
    }
    run_steps(instance, milliseconds);
    deliver_outputs(instance, outputs);
    return SHOHIN_OK;
}

static shohin_status run_checked(shohin_instance *instance, const void *const *inputs,
                                 void *const *outputs, double *milliseconds) {
    if (instance == NULL) {
        return fail(SHOHIN_INVALID_ARGUMENT, "the instance is NULL", NULL, NULL);
    }
    shohin_status status = RUNTIME(check_pointers)(&instance->model->info, inputs, outputs);
    if (status != SHOHIN_OK) {
        return status;
    }
    if (atomic_flag_test_and_set_explicit(&instance->in_use, memory_order_acquire)) {
        return fail_plainly(SHOHIN_BUSY);
    }
    status = run_locked(instance, inputs, outputs, milliseconds);
    atomic_flag_clear_explicit(&instance->in_use, memory_order_release);
    return status;
}

shohin_status RUNTIME(run)(shohin_instance *instance, const void *const *inputs,
                           void *const *outputs) {
    return run_checked(instance, inputs, outputs, NULL);
}

shohin_status RUNTIME(profile)(shohin_instance *instance, const void *const *inputs,
                               void *const *outputs, double *milliseconds_per_step) {
    if (milliseconds_per_step == NULL) {
        return fail(SHOHIN_INVALID_ARGUMENT, "the array of milliseconds is NULL", NULL, NULL);
    }
    return run_checked(instance, inputs, outputs, milliseconds_per_step);
}

shohin_status RUNTIME(run_sized)(shohin_instance *instance, const void *const *inputs,
                                 const size_t *input_bytes, void *const *outputs,
                                 const size_t *output_bytes) {
    shohin_status status = SHOHIN_OK;
    if (instance != NULL) {
        status = RUNTIME(check_sizes)(&instance->model->info, input_bytes, output_bytes);
    }
    return status == SHOHIN_OK ? run_checked(instance, inputs, outputs, NULL) : status;
}

/* ---------------------------------------------------------------- weights */

/* Coded weights are decoded for the first instance and kept until the last one is destroyed. */
static pthread_mutex_t weights_mutex = PTHREAD_MUTEX_INITIALIZER;
static char *decoded_weights;
static int32_t weights_users;

static shohin_status decode_weights(const shohin_model *model, int32_t threads) {
    const size_t bytes = model->info.constant_bytes;
    decoded_weights = allocate(ARENA_ALIGNMENT, bytes);
    if (decoded_weights == NULL) {
        return fail_without_memory("weights", bytes);
    }
    const shohin_status status =
        model->decode(model->coded, model->coded_bytes, decoded_weights, bytes, threads);
    if (status != SHOHIN_OK) {
        free(decoded_weights);
        return fail_plainly(status);
    }
    return SHOHIN_OK;
}

/* Finds the weights, or makes them. */
static shohin_status acquire_weights(const shohin_model *model, int32_t threads,
                                     const char **weights) {
    *weights = model->constants;
    if (model->decode == NULL) {
        return SHOHIN_OK;
    }
    pthread_mutex_lock(&weights_mutex);
    const shohin_status status =
        weights_users == 0 ? decode_weights(model, threads) : SHOHIN_OK;
    if (status == SHOHIN_OK) {
        ++weights_users;
        *weights = decoded_weights;
    }
    pthread_mutex_unlock(&weights_mutex);
    return status;
}

static void release_weights(const shohin_model *model) {
    if (model->decode == NULL) {
        return;
    }
    pthread_mutex_lock(&weights_mutex);
    if (--weights_users == 0) {
        free(decoded_weights);
    }
    pthread_mutex_unlock(&weights_mutex);
}

/* ---------------------------------------------------------------- creation */

/* The processors that this process may use. */
static int32_t processor_count(void) {
#if defined(__linux__)
    cpu_set_t set; /* respects taskset and cpusets, which the online count does not */
    if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) {
        return (int32_t)CPU_COUNT(&set);
    }
#endif
    const long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : online > SHOHIN_MAX_THREADS ? SHOHIN_MAX_THREADS : (int32_t)online;
}

static int32_t part_count(const shohin_step *step, int32_t threads) {
    if (step->extent <= 0) {
        return 0;
    }
    const int32_t parts = smaller(threads, smaller(step->max_parts, step->extent));
    return parts > 1 ? parts : 1;
}

/* Splits the steps, and lowers the number of threads to what the most split step uses. */
static void plan_steps(shohin_instance *instance, int32_t threads) {
    int32_t most = 1;
    for (int32_t step = 0; step < instance->model->info.step_count; ++step) {
        const int32_t parts = part_count(&instance->model->steps[step], threads);
        instance->parts[step] = parts;
        if (parts > 1) {
            instance->parallel[instance->parallel_count++] = step;
        }
        most = parts > most ? parts : most;
    }
    instance->threads = most;
    if (instance->parallel_count > 0) {
        const unsigned count = (unsigned)instance->parallel_count;
        instance->ticket_limit = UINT32_MAX / count * count;
        atomic_init(&instance->ticket, instance->ticket_limit - 1);
    }
}

/* The shares, with nothing to claim before the first fork. */
static bool allocate_shares(shohin_instance *instance) {
    instance->shares = allocate(CACHE_LINE, (size_t)instance->threads * sizeof *instance->shares);
    for (int32_t i = 0; instance->shares != NULL && i < instance->threads; ++i) {
        const unsigned ticket = atomic_load(&instance->ticket);
        atomic_init(&instance->shares[i].claim, (unsigned long long)ticket << 32 | 0x40000000u);
        atomic_init(&instance->shares[i].done, 0);
    }
    return instance->shares != NULL;
}

static void *allocate_table(int32_t count, size_t element_bytes) {
    return calloc(count > 0 ? (size_t)count : 1, element_bytes);
}

static bool allocate_tables(shohin_instance *instance) {
    const shohin_info *info = &instance->model->info;
    instance->parts = allocate_table(info->step_count, sizeof *instance->parts);
    instance->parallel = allocate_table(info->step_count, sizeof *instance->parallel);
    instance->inputs = allocate_table(info->input_count, sizeof *instance->inputs);
    instance->outputs = allocate_table(info->output_count, sizeof *instance->outputs);
    instance->input_stages = allocate_table(info->input_count, sizeof *instance->input_stages);
    instance->output_stages = allocate_table(info->output_count, sizeof *instance->output_stages);
    return instance->parts != NULL && instance->parallel != NULL && instance->inputs != NULL &&
           instance->outputs != NULL && instance->input_stages != NULL &&
           instance->output_stages != NULL;
}

static void free_stages(void **stages, int32_t count) {
    for (int32_t i = 0; stages != NULL && i < count; ++i) {
        free(stages[i]);
    }
    free(stages);
}

static void free_memory(shohin_instance *instance) {
    free_stages(instance->input_stages, instance->model->info.input_count);
    free_stages(instance->output_stages, instance->model->info.output_count);
    free((void *)instance->inputs);
    free(instance->outputs);
    free(instance->parts);
    free(instance->parallel);
    free(instance->workers);
    free(instance->shares);
    free(instance->frame.arena);
    free(instance);
}

/* Everything but the threads. NULL: out of memory. */
static shohin_instance *allocate_instance(const shohin_model *model, int32_t threads) {
    shohin_instance *instance = allocate(CACHE_LINE, sizeof *instance);
    if (instance == NULL) {
        return NULL;
    }
    instance->model = model;
    atomic_init(&instance->ticket, 0);
    atomic_init(&instance->run, 0);
    atomic_init(&instance->stop, false);
    atomic_init(&instance->asleep, 0);
    atomic_flag_clear(&instance->in_use);
    instance->frame.arena = allocate(ARENA_ALIGNMENT, model->info.arena_bytes);
    if (instance->frame.arena == NULL || !allocate_tables(instance)) {
        free_memory(instance);
        return NULL;
    }
    plan_steps(instance, threads);
    instance->workers =
        allocate(CACHE_LINE, (size_t)(instance->threads - 1) * sizeof *instance->workers);
    if (instance->workers == NULL || !allocate_shares(instance)) {
        free_memory(instance);
        return NULL;
    }
    instance->frame.inputs = instance->inputs;
    instance->frame.outputs = instance->outputs;
    return instance;
}

static void stop_workers(shohin_instance *instance) {
    atomic_store(&instance->stop, true);
    wake_sleepers(instance);
    for (int32_t i = 0; i < instance->started; ++i) {
        pthread_join(instance->workers[i].thread, NULL);
    }
}

static bool start_worker(shohin_instance *instance, int32_t index, const pthread_attr_t *how) {
    worker *self = &instance->workers[index - 1];
    self->instance = instance;
    self->index = index;
    if (pthread_create(&self->thread, how, worker_main, self) != 0) {
        return false;
    }
    ++instance->started;
    return true;
}

/* Starts the threads; the caller stops those that were started if it fails. */
static bool start_all_workers(shohin_instance *instance) {
    pthread_attr_t how;
    if (pthread_attr_init(&how) != 0) {
        return false;
    }
    /* Threads inherit the signal mask: signals are to be handled by the program's own threads,
       but for those that an instruction raises, which concern the thread that it is in. */
    sigset_t others, previous;
    sigfillset(&others);
    sigdelset(&others, SIGSEGV);
    sigdelset(&others, SIGBUS);
    sigdelset(&others, SIGFPE);
    sigdelset(&others, SIGILL);
    pthread_sigmask(SIG_SETMASK, &others, &previous);
    bool good = pthread_attr_setstacksize(&how, WORKER_STACK_BYTES) == 0;
    for (int32_t index = 1; good && index < instance->threads; ++index) {
        good = start_worker(instance, index, &how);
    }
    pthread_sigmask(SIG_SETMASK, &previous, NULL);
    pthread_attr_destroy(&how);
    return good;
}

/* The threads and what they block on. Leaves nothing behind when it fails. */
static bool start_threads(shohin_instance *instance) {
    if (pthread_mutex_init(&instance->mutex, NULL) != 0) {
        return false;
    }
    if (pthread_cond_init(&instance->wake, NULL) != 0) {
        pthread_mutex_destroy(&instance->mutex);
        return false;
    }
    if (instance->threads == 1 || start_all_workers(instance)) {
        return true;
    }
    stop_workers(instance);
    pthread_cond_destroy(&instance->wake);
    pthread_mutex_destroy(&instance->mutex);
    return false;
}

/* Polling helps only while every thread has a processor of its own. */
static void choose_waiting(shohin_instance *instance, int32_t processors) {
    const bool crowded = instance->threads > processors;
    instance->polls_before_yield = crowded ? POLLS_BEFORE_YIELD_CROWDED : POLLS_BEFORE_YIELD;
    instance->linger_nanoseconds = crowded ? 0 : LINGER_NANOSECONDS;
}

static shohin_status check_processor(const shohin_model *model) {
    char missing[256];
    if (RUNTIME(missing)(model->needs, missing, sizeof missing) == 0) {
        return SHOHIN_OK;
    }
    const char *const parts[] = {"this processor lacks ", missing, "; the model was compiled for ",
                                 model->processor, NULL};
    return RUNTIME(fail)(SHOHIN_UNSUPPORTED_PROCESSOR, parts);
}

shohin_status RUNTIME(create)(const shohin_model *model, int32_t threads, shohin_instance **out) {
    if (out == NULL) {
        return fail(SHOHIN_INVALID_ARGUMENT, "the place for the instance is NULL", NULL, NULL);
    }
    *out = NULL;
    const shohin_status suited = check_processor(model);
    if (suited != SHOHIN_OK) {
        return suited;
    }
    const int32_t processors = processor_count();
    const int32_t wanted = smaller(threads <= 0 ? processors : threads, SHOHIN_MAX_THREADS);
    shohin_instance *instance = allocate_instance(model, wanted);
    if (instance == NULL) {
        return fail_without_memory("working memory", model->info.arena_bytes);
    }
    const shohin_status status =
        acquire_weights(model, smaller(wanted, processors), &instance->frame.constants);
    if (status != SHOHIN_OK) {
        free_memory(instance);
        return status;
    }
    choose_waiting(instance, processors);
    if (!start_threads(instance)) {
        release_weights(model);
        free_memory(instance);
        return fail_plainly(SHOHIN_THREAD_FAILURE);
    }
    *out = instance;
    return SHOHIN_OK;
}

void RUNTIME(destroy)(shohin_instance *instance) {
    if (instance == NULL) {
        return;
    }
    stop_workers(instance);
    pthread_cond_destroy(&instance->wake);
    pthread_mutex_destroy(&instance->mutex);
    release_weights(instance->model);
    free_memory(instance);
}

const char *RUNTIME(step_label)(const shohin_model *model, int32_t step) {
    return step >= 0 && step < model->info.step_count ? model->steps[step].label : NULL;
}
