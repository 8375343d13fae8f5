/*
 * shohin_cuda.c: runs a model's kernels on the first GPU that the CUDA driver shows.
 *
 * Needs the driver's library alone, which it loads itself: a program can be linked on a machine
 * without it, and says so where there is none. The module and the weights are shared by all
 * instances of a model and leave with the last of them. An instance has its arena, its inputs and
 * outputs on the GPU, and a stream; all places are fixed at creation, so its launches are recorded
 * once as a graph, which a run starts as a whole.
 */
#define _GNU_SOURCE

#include "shohin_driver.h"
#include "shohin_runtime.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#ifndef SHOHIN_NAME
#error "compile shohin_cuda.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

#define DRIVER_LIBRARY "libcuda.so.1"

/* What all instances of the model share. */
typedef struct shared_state {
    int32_t users;
    void *library;
    cu_driver driver;
    cu_device device;
    cu_context context;
    bool is_current; /* the context, when all this is opened or closed */
    cu_module module;
    cu_function *functions; /* one per launch */
    cu_pointer weights;
} shared_state;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static shared_state shared;

struct shohin_instance {
    const shohin_model *model;
    atomic_flag in_use;
    cu_stream stream;
    cu_graph_exec graph; /* NULL where the driver records none: kernels are launched one by one */
    cu_pointer arena;
    cu_pointer *inputs;
    cu_pointer *outputs;
    cu_pointer *arguments; /* of all launches, in the model's order */
};

/* ---------------------------------------------------------------- failures */

static shohin_status fail(shohin_status status, const char *first, const char *second,
                          const char *third, const char *fourth) {
    const char *const parts[] = {first, second, third, fourth, NULL};
    return RUNTIME(fail)(status, parts);
}

static shohin_status fail_without_memory(const char *where, const char *purpose, size_t bytes) {
    char digits[SHOHIN_DIGITS];
    const char *const parts[] = {"out of memory", where, ": ", RUNTIME(decimal)(digits, bytes),
                                 " bytes for ", purpose, NULL};
    return RUNTIME(fail)(SHOHIN_OUT_OF_MEMORY, parts);
}

/* Turns what the driver reported into a status. */
static shohin_status check(cu_result result, const char *action) {
    if (result == 0) {
        return SHOHIN_OK;
    }
    const char *text = NULL;
    if (shared.driver.error_text == NULL || shared.driver.error_text(result, &text) != 0 ||
        text == NULL) {
        text = "unknown error";
    }
    const shohin_status status =
        result == CU_OUT_OF_MEMORY ? SHOHIN_OUT_OF_MEMORY : SHOHIN_DEVICE_FAILURE;
    return fail(status, "CUDA driver: ", action, ": ", text);
}

/* ---------------------------------------------------------------- the driver */

static bool find_functions(const char **missing) {
    /* POSIX makes pointers of `dlsym` fit for functions; C alone does not. */
#define FIND(MEMBER, NAME, ARGUMENTS)                                                            \
    *(void **)&shared.driver.MEMBER = dlsym(shared.library, NAME);                               \
    if (shared.driver.MEMBER == NULL) {                                                          \
        *missing = NAME;                                                                         \
        return false;                                                                            \
    }
    SHOHIN_DRIVER_FUNCTIONS(FIND)
#undef FIND
    return true;
}

static shohin_status open_driver(void) {
    shared.library = dlopen(DRIVER_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (shared.library == NULL) {
        return fail(SHOHIN_NO_DEVICE, "there is no CUDA driver: ", dlerror(),
                    "; install NVIDIA's driver for the GPU", NULL);
    }
    const char *missing = NULL;
    if (!find_functions(&missing)) {
        return fail(SHOHIN_NO_DEVICE, "the CUDA driver is too old: it lacks ", missing,
                    "; install a newer one", NULL);
    }
    const cu_result started = shared.driver.init(0);
    int count = 0;
    if (started == CU_NO_DEVICE ||
        (started == 0 && shared.driver.device_count(&count) == 0 && count == 0)) {
        return fail(SHOHIN_NO_DEVICE, "the CUDA driver shows no GPU", NULL, NULL, NULL);
    }
    const shohin_status status = check(started, "start");
    return status != SHOHIN_OK ? status : check(shared.driver.device(&shared.device, 0), "GPU 0");
}

/* Refuses a driver that does not know the form of the kernels. */
static shohin_status check_version(const shohin_device_code *code) {
    int found = 0;
    const shohin_status status = check(shared.driver.version(&found), "version");
    if (status != SHOHIN_OK || found / 1000 >= code->cuda) {
        return status;
    }
    char major[SHOHIN_DIGITS], minor[SHOHIN_DIGITS], needed[SHOHIN_DIGITS];
    const char *const parts[] = {"the CUDA driver is too old: it knows CUDA ",
                                 RUNTIME(decimal)(major, (uint64_t)(found / 1000)), ".",
                                 RUNTIME(decimal)(minor, (uint64_t)(found % 1000 / 10)),
                                 "; the model needs one for CUDA ",
                                 RUNTIME(decimal)(needed, (uint64_t)code->cuda), NULL};
    return RUNTIME(fail)(SHOHIN_NO_DEVICE, parts);
}

/* Refuses a GPU that is older than what the kernels were compiled for. */
static shohin_status check_device(const shohin_device_code *code) {
    int major = 0, minor = 0;
    shohin_status status = check(
        shared.driver.device_attribute(&major, CU_ATTRIBUTE_CAPABILITY_MAJOR, shared.device),
        "capability");
    if (status == SHOHIN_OK) {
        status = check(
            shared.driver.device_attribute(&minor, CU_ATTRIBUTE_CAPABILITY_MINOR, shared.device),
            "capability");
    }
    if (status != SHOHIN_OK || 10 * major + minor >= code->capability) {
        return status;
    }
    char name[128] = "GPU 0", found[SHOHIN_DIGITS];
    (void)shared.driver.device_name(name, sizeof name, shared.device);
    const char *const parts[] = {"the GPU ", name, " is sm_",
                                 RUNTIME(decimal)(found, (uint64_t)(10 * major + minor)),
                                 "; the model was compiled for ", code->arch, NULL};
    return RUNTIME(fail)(SHOHIN_UNSUPPORTED_PROCESSOR, parts);
}

/* ---------------------------------------------------------------- what instances share */

static shohin_status load_functions(const shohin_model *model) {
    const int32_t count = model->info.step_count;
    shared.functions = calloc(count > 0 ? (size_t)count : 1, sizeof *shared.functions);
    if (shared.functions == NULL) {
        return fail_without_memory("", "the table of kernels", (size_t)count);
    }
    const cu_result loaded = shared.driver.load(&shared.module, model->device->image);
    if (loaded == CU_NO_BINARY_FOR_GPU || loaded == CU_UNSUPPORTED_PTX_VERSION ||
        loaded == CU_INVALID_IMAGE) {
        return fail(SHOHIN_UNSUPPORTED_PROCESSOR, "the CUDA driver has no kernels for this GPU in a "
                    "model compiled for ", model->device->arch,
                    "; compile it for the GPU, or install a newer driver", NULL);
    }
    shohin_status status = check(loaded, "loading the kernels");
    for (int32_t i = 0; status == SHOHIN_OK && i < count; ++i) {
        const char *kernel = model->device->launches[i].kernel;
        status =
            check(shared.driver.function(&shared.functions[i], shared.module, kernel), kernel);
    }
    return status;
}

/* The weights in memory of the processor; `decoded` is to be freed. */
static shohin_status find_weights(const shohin_model *model, const char **weights,
                                  char **decoded) {
    const size_t bytes = model->info.constant_bytes;
    *weights = model->constants;
    if (model->decode == NULL || bytes == 0) {
        return SHOHIN_OK;
    }
    *decoded = calloc(1, bytes);
    if (*decoded == NULL) {
        return fail_without_memory("", "weights", bytes);
    }
    *weights = *decoded;
    const shohin_status status =
        model->decode(model->coded, model->coded_bytes, *decoded, bytes, 1);
    return status == SHOHIN_OK ? status
                               : fail(status, RUNTIME(status_text)(status), NULL, NULL, NULL);
}

static shohin_status allocate(cu_pointer *memory, const char *purpose, size_t bytes) {
    const cu_result result = shared.driver.allocate(memory, bytes > 0 ? bytes : 1);
    return result == CU_OUT_OF_MEMORY ? fail_without_memory(" on the GPU", purpose, bytes)
                                      : check(result, purpose);
}

/* Copies to the GPU, and waits until all has arrived there: streams of instances do not wait. */
static shohin_status upload(cu_pointer to, const char *from, size_t bytes) {
    cu_stream stream = NULL;
    shohin_status status =
        check(shared.driver.create_stream(&stream, CU_STREAM_NON_BLOCKING), "stream");
    if (status != SHOHIN_OK) {
        return status;
    }
    status = check(shared.driver.upload_later(to, from, bytes, stream), "weights");
    const shohin_status arrived = check(shared.driver.wait(stream), "weights");
    (void)shared.driver.destroy_stream(stream);
    return status == SHOHIN_OK ? arrived : status;
}

static shohin_status upload_weights(const shohin_model *model) {
    const char *weights = NULL;
    char *decoded = NULL;
    shohin_status status = find_weights(model, &weights, &decoded);
    if (status == SHOHIN_OK) {
        status = allocate(&shared.weights, "weights", model->info.constant_bytes);
    }
    if (status == SHOHIN_OK && model->info.constant_bytes > 0) {
        status = upload(shared.weights, weights, model->info.constant_bytes);
    }
    free(decoded);
    return status;
}

/* Frees whatever there is; the context is current if there is one. */
static void close_shared(void) {
    if (shared.weights != 0) {
        (void)shared.driver.free(shared.weights);
    }
    if (shared.module != NULL) {
        (void)shared.driver.unload(shared.module);
    }
    if (shared.is_current) {
        cu_context context;
        (void)shared.driver.pop(&context);
    }
    if (shared.context != NULL) {
        (void)shared.driver.release(shared.device);
    }
    free(shared.functions);
    /* The library stays: drivers do not like to be unloaded. */
    memset(&shared, 0, sizeof shared);
}

/* Leaves the context current if all goes well. */
static shohin_status open_shared(const shohin_model *model) {
    shohin_status status = open_driver();
    if (status == SHOHIN_OK) {
        status = check_version(model->device);
    }
    if (status == SHOHIN_OK) {
        status = check_device(model->device);
    }
    if (status == SHOHIN_OK) {
        status = check(shared.driver.retain(&shared.context, shared.device), "context");
    }
    if (status == SHOHIN_OK) {
        status = check(shared.driver.push(shared.context), "context");
    }
    shared.is_current = status == SHOHIN_OK && shared.context != NULL;
    if (status == SHOHIN_OK) {
        status = load_functions(model);
    }
    if (status == SHOHIN_OK) {
        status = upload_weights(model);
    }
    if (status != SHOHIN_OK) {
        close_shared();
    }
    return status;
}

/* Counts a user, the first of whom loads everything. Leaves the context current. */
static shohin_status acquire_shared(const shohin_model *model) {
    pthread_mutex_lock(&mutex);
    const shohin_status status =
        shared.users == 0 ? open_shared(model) : check(shared.driver.push(shared.context), "context");
    if (status == SHOHIN_OK) {
        ++shared.users;
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* Takes the context that the caller made current from the thread. */
static void release_shared(void) {
    pthread_mutex_lock(&mutex);
    if (--shared.users == 0) {
        close_shared();
    } else {
        cu_context context;
        (void)shared.driver.pop(&context);
    }
    pthread_mutex_unlock(&mutex);
}

/* ---------------------------------------------------------------- launches */

static cu_pointer address(const shohin_instance *instance, const shohin_argument *argument) {
    switch (argument->place) {
    case SHOHIN_IN_CONSTANTS:
        return shared.weights + argument->offset;
    case SHOHIN_IN_INPUT:
        return instance->inputs[argument->index] + argument->offset;
    case SHOHIN_IN_OUTPUT:
        return instance->outputs[argument->index] + argument->offset;
    default:
        return instance->arena + argument->offset;
    }
}

static shohin_status launch(shohin_instance *instance, int32_t step) {
    const shohin_device_code *code = instance->model->device;
    const shohin_launch *one = &code->launches[step];
    void *pointers[SHOHIN_MOST_ARGUMENTS];
    for (int32_t i = 0; i < one->argument_count; ++i) {
        pointers[i] = &instance->arguments[one->first_argument + i];
    }
    return check(shared.driver.launch(shared.functions[step], one->grid[0], one->grid[1], 1,
                                      one->threads, 1, 1, 0, instance->stream, pointers, NULL),
                 one->label);
}

static shohin_status launch_all(shohin_instance *instance) {
    shohin_status status = SHOHIN_OK;
    for (int32_t i = 0; status == SHOHIN_OK && i < instance->model->info.step_count; ++i) {
        status = launch(instance, i);
    }
    return status;
}

/* Records all launches; where that fails, they are made one by one in every run. */
static void record_graph(shohin_instance *instance) {
    cu_graph graph = NULL;
    if (instance->model->info.step_count == 0 ||
        shared.driver.begin_capture(instance->stream, CU_CAPTURE_THREAD_LOCAL) != 0) {
        return;
    }
    const shohin_status status = launch_all(instance);
    if (shared.driver.end_capture(instance->stream, &graph) != 0 || graph == NULL) {
        return;
    }
    if (status != SHOHIN_OK || shared.driver.instantiate(&instance->graph, graph, 0) != 0) {
        instance->graph = NULL;
    }
    (void)shared.driver.destroy_graph(graph);
}

/* Launches the steps one by one, with the time of each between two events. */
static shohin_status launch_timed(shohin_instance *instance, double *milliseconds) {
    const int32_t count = instance->model->info.step_count;
    cu_event *events = calloc((size_t)count + 1, sizeof *events);
    if (events == NULL) {
        return fail_without_memory("", "a table of events", (size_t)count);
    }
    shohin_status status = SHOHIN_OK;
    for (int32_t i = 0; status == SHOHIN_OK && i <= count; ++i) {
        status = check(shared.driver.create_event(&events[i], CU_EVENT_DEFAULT), "event");
    }
    for (int32_t i = 0; status == SHOHIN_OK && i <= count; ++i) {
        status = check(shared.driver.record(events[i], instance->stream), "event");
        if (status == SHOHIN_OK && i < count) {
            status = launch(instance, i);
        }
    }
    if (status == SHOHIN_OK) {
        status = check(shared.driver.wait(instance->stream), "running the kernels");
    }
    for (int32_t i = 0; status == SHOHIN_OK && i < count; ++i) {
        float time = 0;
        status = check(shared.driver.elapsed(&time, events[i], events[i + 1]), "event");
        milliseconds[i] = (double)time;
    }
    for (int32_t i = 0; i <= count; ++i) {
        if (events[i] != NULL) {
            (void)shared.driver.destroy_event(events[i]);
        }
    }
    free(events);
    return status;
}

/* ---------------------------------------------------------------- runs */

static shohin_status copy_inputs(shohin_instance *instance, const void *const *inputs) {
    const shohin_info *info = &instance->model->info;
    shohin_status status = SHOHIN_OK;
    for (int32_t i = 0; status == SHOHIN_OK && i < info->input_count; ++i) {
        if (info->inputs[i].bytes > 0) {
            status = check(shared.driver.upload_later(instance->inputs[i], inputs[i],
                                                      info->inputs[i].bytes, instance->stream),
                           "copying an input");
        }
    }
    return status;
}

static shohin_status copy_outputs(shohin_instance *instance, void *const *outputs) {
    const shohin_info *info = &instance->model->info;
    shohin_status status = SHOHIN_OK;
    for (int32_t i = 0; status == SHOHIN_OK && i < info->output_count; ++i) {
        if (info->outputs[i].bytes > 0) {
            status = check(shared.driver.download_later(outputs[i], instance->outputs[i],
                                                        info->outputs[i].bytes, instance->stream),
                           "copying an output");
        }
    }
    return status;
}

static shohin_status run_current(shohin_instance *instance, const void *const *inputs,
                                 void *const *outputs, double *milliseconds) {
    shohin_status status = copy_inputs(instance, inputs);
    if (status == SHOHIN_OK && milliseconds != NULL) {
        status = launch_timed(instance, milliseconds);
    } else if (status == SHOHIN_OK && instance->graph != NULL) {
        status = check(shared.driver.launch_graph(instance->graph, instance->stream),
                       "starting the kernels");
    } else if (status == SHOHIN_OK) {
        status = launch_all(instance);
    }
    if (status == SHOHIN_OK) {
        status = copy_outputs(instance, outputs);
    }
    /* The caller's arrays are in use until the stream is done, whatever went wrong. */
    const shohin_status finished =
        check(shared.driver.wait(instance->stream), "running the kernels");
    return status == SHOHIN_OK ? finished : status;
}

static shohin_status run_checked(shohin_instance *instance, const void *const *inputs,
                                 void *const *outputs, double *milliseconds) {
    if (instance == NULL) {
        return fail(SHOHIN_INVALID_ARGUMENT, "the instance is NULL", NULL, NULL, NULL);
    }
    shohin_status status = RUNTIME(check_pointers)(&instance->model->info, inputs, outputs);
    if (status != SHOHIN_OK) {
        return status;
    }
    if (atomic_flag_test_and_set_explicit(&instance->in_use, memory_order_acquire)) {
        return fail(SHOHIN_BUSY, RUNTIME(status_text)(SHOHIN_BUSY), NULL, NULL, NULL);
    }
    status = check(shared.driver.push(shared.context), "context");
    if (status == SHOHIN_OK) {
        status = run_current(instance, inputs, outputs, milliseconds);
        cu_context context;
        (void)shared.driver.pop(&context);
    }
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
        return fail(SHOHIN_INVALID_ARGUMENT, "the array of milliseconds is NULL", NULL, NULL, NULL);
    }
    return run_checked(instance, inputs, outputs, milliseconds_per_step);
}

shohin_status RUNTIME(run_sized)(shohin_instance *instance, const void *const *inputs,
                                 const size_t *input_bytes, void *const *outputs,
                                 const size_t *output_bytes) {
    const shohin_status status =
        instance == NULL
            ? SHOHIN_OK
            : RUNTIME(check_sizes)(&instance->model->info, input_bytes, output_bytes);
    return status == SHOHIN_OK ? run_checked(instance, inputs, outputs, NULL) : status;
}

/* ---------------------------------------------------------------- creation */

static void free_all(cu_pointer *arrays, int32_t count) {
    for (int32_t i = 0; arrays != NULL && i < count; ++i) {
        if (arrays[i] != 0) {
            (void)shared.driver.free(arrays[i]);
        }
    }
    free(arrays);
}

/* Frees whatever there is; the context is current. */
static void free_instance(shohin_instance *instance) {
    if (instance->graph != NULL) {
        (void)shared.driver.destroy_ready(instance->graph);
    }
    if (instance->stream != NULL) {
        (void)shared.driver.destroy_stream(instance->stream);
    }
    if (instance->arena != 0) {
        (void)shared.driver.free(instance->arena);
    }
    free_all(instance->inputs, instance->model->info.input_count);
    free_all(instance->outputs, instance->model->info.output_count);
    free(instance->arguments);
    free(instance);
}

static shohin_status allocate_tensors(cu_pointer **arrays, const char *kind,
                                      const shohin_tensor_info *tensors, int32_t count) {
    *arrays = calloc(count > 0 ? (size_t)count : 1, sizeof **arrays);
    if (*arrays == NULL) {
        return fail_without_memory("", kind, (size_t)count);
    }
    shohin_status status = SHOHIN_OK;
    for (int32_t i = 0; status == SHOHIN_OK && i < count; ++i) {
        status = allocate(&(*arrays)[i], kind, tensors[i].bytes);
    }
    return status;
}

/* Where the arrays of every launch are. */
static shohin_status find_arguments(shohin_instance *instance) {
    const shohin_device_code *code = instance->model->device;
    int32_t count = 0;
    for (int32_t i = 0; i < instance->model->info.step_count; ++i) {
        count += code->launches[i].argument_count;
    }
    instance->arguments = calloc(count > 0 ? (size_t)count : 1, sizeof *instance->arguments);
    if (instance->arguments == NULL) {
        return fail_without_memory("", "the table of arguments", (size_t)count);
    }
    for (int32_t i = 0; i < count; ++i) {
        instance->arguments[i] = address(instance, &code->arguments[i]);
    }
    return SHOHIN_OK;
}

static shohin_status fill_instance(shohin_instance *instance) {
    const shohin_info *info = &instance->model->info;
    shohin_status status =
        check(shared.driver.create_stream(&instance->stream, CU_STREAM_NON_BLOCKING), "stream");
    if (status == SHOHIN_OK) {
        status = allocate(&instance->arena, "working memory", info->arena_bytes);
    }
    if (status == SHOHIN_OK && info->arena_bytes > 0) {
        status = check(
            shared.driver.clear_later(instance->arena, 0, info->arena_bytes, instance->stream),
            "arena");
    }
    if (status == SHOHIN_OK) {
        status = check(shared.driver.wait(instance->stream), "arena");
    }
    if (status == SHOHIN_OK) {
        status = allocate_tensors(&instance->inputs, "inputs", info->inputs, info->input_count);
    }
    if (status == SHOHIN_OK) {
        status =
            allocate_tensors(&instance->outputs, "outputs", info->outputs, info->output_count);
    }
    if (status == SHOHIN_OK) {
        status = find_arguments(instance);
    }
    if (status == SHOHIN_OK) {
        record_graph(instance);
    }
    return status;
}

shohin_status RUNTIME(create)(const shohin_model *model, int32_t threads, shohin_instance **out) {
    (void)threads;
    if (out == NULL) {
        return fail(SHOHIN_INVALID_ARGUMENT, "the place for the instance is NULL", NULL, NULL, NULL);
    }
    *out = NULL;
    shohin_status status = acquire_shared(model);
    if (status != SHOHIN_OK) {
        return status;
    }
    shohin_instance *instance = calloc(1, sizeof *instance);
    if (instance == NULL) {
        release_shared();
        return fail_without_memory("", "an instance", sizeof *instance);
    }
    instance->model = model;
    atomic_flag_clear(&instance->in_use);
    status = fill_instance(instance);
    if (status != SHOHIN_OK) {
        free_instance(instance);
        release_shared();
        return status;
    }
    cu_context context;
    (void)shared.driver.pop(&context);
    *out = instance;
    return SHOHIN_OK;
}

void RUNTIME(destroy)(shohin_instance *instance) {
    if (instance == NULL || shared.driver.push(shared.context) != 0) {
        return;
    }
    free_instance(instance);
    release_shared();
}

const char *RUNTIME(step_label)(const shohin_model *model, int32_t step) {
    return step >= 0 && step < model->info.step_count ? model->device->launches[step].label : NULL;
}
