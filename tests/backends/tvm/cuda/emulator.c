/*
 * A CUDA driver without a GPU: runs kernels that were compiled for the processor.
 *
 * The threads of a block are coroutines, which change at barriers and at exchanges of a warp, so
 * that a kernel that lacks a barrier reads what is not written yet. Memory of the "GPU" is filled
 * with NaN when it is allocated. Environment variables make it fail:
 *
 *   EMULATED_GPUS        how many there are (1)
 *   EMULATED_CAPABILITY  ten times the compute capability (90)
 *   EMULATED_CUDA        version of CUDA, as drivers count (13000)
 *   EMULATED_LOADS       0: it finds no kernels for the GPU in any image
 *   EMULATED_MEMORY      bytes that can be allocated
 *   EMULATED_GRAPHS      0: it records no graphs
 *   EMULATED_LOG         a file that is told of what is still allocated at the end
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum { MOST_THREADS = 1024, STACK_BYTES = 64 << 10, WARP = 32, SHARED_WORDS = 8, MOST_ARGUMENTS = 512 };

typedef struct {
    int x, y, z;
} index3;

typedef struct {
    const char *name;
    void (*run)(void **arguments);
    int arguments;
} emulated_kernel;

extern const emulated_kernel emulated_kernels[]; /* generated; a NULL name ends it */

index3 emulated_thread, emulated_block;

typedef struct {
    int arrived, members;
    unsigned generation;
} barrier;

static ucontext_t scheduler, threads[MOST_THREADS];
static char *stacks;
static int finished[MOST_THREADS], current, thread_count;
static barrier block_barrier, warp_barriers[MOST_THREADS / WARP];
static unsigned exchange[MOST_THREADS][SHARED_WORDS];
static const emulated_kernel *running;
static void **running_arguments;

static void yield(void) {
    const int own = current;
    swapcontext(&threads[own], &scheduler);
    current = own;
    emulated_thread.x = own;
}

static void meet(barrier *one) {
    const unsigned generation = one->generation;
    if (++one->arrived == one->members) {
        one->arrived = 0;
        ++one->generation;
        return;
    }
    while (one->generation == generation) {
        yield();
    }
}

void emulated_block_barrier(void) { meet(&block_barrier); }

/* Shares words with the warp, and gives those of all its threads; without words, waits. */
const unsigned *emulated_share(const unsigned *words, int count) {
    static unsigned packed[MOST_THREADS / WARP][WARP * SHARED_WORDS];
    const int warp = current / WARP;
    for (int i = 0; i < count; ++i) {
        packed[warp][current % WARP * count + i] = words[i];
    }
    meet(&warp_barriers[warp]);
    return packed[warp];
}

unsigned emulated_shuffle_xor(unsigned value, int apart) {
    const int own = current;
    exchange[own][0] = value;
    meet(&warp_barriers[own / WARP]);
    const unsigned found = exchange[own ^ apart][0];
    meet(&warp_barriers[own / WARP]);
    return found;
}

static void thread_main(void) {
    running->run(running_arguments);
    finished[current] = 1;
    swapcontext(&threads[current], &scheduler);
}

static void run_block(void) {
    for (int i = 0; i < thread_count; ++i) {
        getcontext(&threads[i]);
        threads[i].uc_stack.ss_sp = stacks + (size_t)i * STACK_BYTES;
        threads[i].uc_stack.ss_size = STACK_BYTES;
        threads[i].uc_link = NULL;
        makecontext(&threads[i], thread_main, 0);
        finished[i] = 0;
    }
    memset(warp_barriers, 0, sizeof warp_barriers);
    for (int i = 0; i < thread_count; ++i) {
        ++warp_barriers[i / WARP].members;
    }
    block_barrier = (barrier){0, thread_count, 0};
    for (int left = thread_count; left > 0;) {
        for (int i = 0; i < thread_count; ++i) {
            if (!finished[i]) {
                current = i;
                emulated_thread = (index3){i, 0, 0};
                swapcontext(&scheduler, &threads[i]);
                left -= finished[i];
            }
        }
    }
}

static void run_kernel(const emulated_kernel *kernel, const unsigned *grid, unsigned block,
                       void **arguments) {
    if (stacks == NULL) {
        stacks = malloc((size_t)MOST_THREADS * STACK_BYTES);
    }
    running = kernel;
    running_arguments = arguments;
    thread_count = (int)block;
    for (unsigned z = 0; z < grid[2]; ++z) {
        for (unsigned y = 0; y < grid[1]; ++y) {
            for (unsigned x = 0; x < grid[0]; ++x) {
                emulated_block = (index3){(int)x, (int)y, (int)z};
                run_block();
            }
        }
    }
}

/* ---------------------------------------------------------------- the driver */

typedef struct {
    const emulated_kernel *kernel;
    unsigned grid[3], block;
    void *arguments[MOST_ARGUMENTS];
} record;

typedef struct {
    int recording, count;
    record records[1024];
} stream;

static long allocated, held, modules, streams, contexts, graphs, events;

static long setting(const char *name, long usual) {
    const char *text = getenv(name);
    return text == NULL ? usual : atol(text);
}

__attribute__((destructor)) static void report(void) {
    const char *path = getenv("EMULATED_LOG");
    FILE *file = path == NULL ? NULL : fopen(path, "w");
    if (file != NULL) {
        fprintf(file, "allocated %ld modules %ld streams %ld contexts %ld graphs %ld events %ld\n",
                allocated, modules, streams, contexts, graphs, events);
        fclose(file);
    }
}

int cuInit(unsigned flags) { return setting("EMULATED_GPUS", 1) == 0 ? 100 : (int)flags; }
int cuDriverGetVersion(int *version) {
    return *version = (int)setting("EMULATED_CUDA", 13000), 0;
}
int cuDeviceGetCount(int *count) { return *count = (int)setting("EMULATED_GPUS", 1), 0; }
int cuDeviceGet(int *device, int number) { return *device = number, 0; }
int cuDeviceGetName(char *name, int room, int device) {
    (void)device;
    snprintf(name, (size_t)room, "Emulated");
    return 0;
}
int cuDeviceGetAttribute(int *value, int which, int device) {
    (void)device;
    const int capability = (int)setting("EMULATED_CAPABILITY", 90);
    *value = which == 75 ? capability / 10 : capability % 10;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    ++contexts;
    return *context = &contexts, 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { return --contexts, device; }
int cuCtxPushCurrent_v2(void *context) { return context == NULL ? 201 : (++held, 0); }
int cuCtxPopCurrent_v2(void **context) { return --held, *context = &contexts, 0; }
int cuModuleLoadData(void **module, const void *image) {
    uint32_t magic;
    memcpy(&magic, image, sizeof magic);
    if (magic != 0xba55ed50 || setting("EMULATED_LOADS", 1) == 0) {
        return magic != 0xba55ed50 ? 200 : 209;
    }
    ++modules;
    return *module = &modules, 0;
}
int cuModuleUnload(void *module) { return (void)module, --modules, 0; }
int cuModuleGetFunction(const emulated_kernel **function, void *module, const char *name) {
    (void)module;
    for (const emulated_kernel *one = emulated_kernels; one->name != NULL; ++one) {
        if (strcmp(one->name, name) == 0) {
            return *function = one, 0;
        }
    }
    return 500;
}
int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
    if (allocated + (long)bytes > setting("EMULATED_MEMORY", 1L << 40)) {
        return 2;
    }
    char *found = malloc(bytes + 256);
    *(size_t *)found = bytes;
    allocated += (long)bytes;
    memset(found + 256, 0xff, bytes);
    return *memory = (uint64_t)(uintptr_t)(found + 256), 0;
}
int cuMemFree_v2(uint64_t memory) {
    char *found = (char *)(uintptr_t)memory - 256;
    allocated -= (long)*(size_t *)found;
    free(found);
    return 0;
}
int cuMemsetD8Async(uint64_t memory, unsigned char value, size_t bytes, void *on) {
    (void)on;
    memset((void *)(uintptr_t)memory, value, bytes);
    return 0;
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *on) {
    (void)on;
    memcpy((void *)(uintptr_t)to, from, bytes);
    return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *on) {
    (void)on;
    memcpy(to, (void *)(uintptr_t)from, bytes);
    return 0;
}
int cuStreamCreate(stream **made, unsigned flags) {
    (void)flags;
    ++streams;
    return *made = calloc(1, sizeof **made), 0;
}
int cuStreamDestroy_v2(stream *one) { return free(one), --streams, 0; }
int cuStreamSynchronize(stream *one) { return (void)one, 0; }
int cuLaunchKernel(const emulated_kernel *function, unsigned grid_x, unsigned grid_y,
                   unsigned grid_z, unsigned block_x, unsigned block_y, unsigned block_z,
                   unsigned shared_bytes, stream *on, void **arguments, void **extra) {
    const unsigned grid[3] = {grid_x, grid_y, grid_z};
    if (block_x == 0 || block_x > MOST_THREADS || block_y != 1 || block_z != 1 ||
        shared_bytes != 0 || extra != NULL || grid_x == 0 || grid_y == 0 || grid_z == 0 ||
        grid_y > 65535 || grid_z > 65535) {
        return 1;
    }
    if (!on->recording) {
        run_kernel(function, grid, block_x, arguments);
        return 0;
    }
    record *one = &on->records[on->count++];
    one->kernel = function;
    one->block = block_x;
    memcpy(one->grid, grid, sizeof grid);
    for (int i = 0; i < function->arguments; ++i) {
        one->arguments[i] = *(void **)arguments[i]; /* the values, as drivers keep them */
    }
    return 0;
}
int cuStreamBeginCapture_v2(stream *on, int mode) {
    (void)mode;
    if (setting("EMULATED_GRAPHS", 1) == 0) {
        return 801;
    }
    on->recording = 1;
    on->count = 0;
    return 0;
}
int cuStreamEndCapture(stream *on, stream **graph) {
    on->recording = 0;
    *graph = malloc(sizeof **graph);
    memcpy(*graph, on, sizeof **graph);
    return ++graphs, 0;
}
int cuGraphInstantiateWithFlags(stream **ready, stream *graph, unsigned long long flags) {
    (void)flags;
    *ready = malloc(sizeof **ready);
    memcpy(*ready, graph, sizeof **ready);
    return ++graphs, 0;
}
int cuGraphLaunch(stream *ready, stream *on) {
    (void)on;
    for (int i = 0; i < ready->count; ++i) {
        record *one = &ready->records[i];
        void *pointers[MOST_ARGUMENTS];
        for (int j = 0; j < one->kernel->arguments; ++j) {
            pointers[j] = &one->arguments[j];
        }
        run_kernel(one->kernel, one->grid, one->block, pointers);
    }
    return 0;
}
int cuGraphExecDestroy(stream *ready) { return free(ready), --graphs, 0; }
int cuGraphDestroy(stream *graph) { return free(graph), --graphs, 0; }
int cuEventCreate(void **event, unsigned flags) {
    (void)flags;
    ++events;
    return *event = malloc(1), 0;
}
int cuEventDestroy_v2(void *event) { return free(event), --events, 0; }
int cuEventRecord(void *event, void *on) { return (void)event, (void)on, 0; }
int cuEventElapsedTime(float *time, void *from, void *to) {
    return (void)from, (void)to, *time = 0.25f, 0;
}
int cuGetErrorString(int error, const char **text) {
    static char words[32];
    snprintf(words, sizeof words, "emulated error %d", error);
    return *text = words, 0;
}
