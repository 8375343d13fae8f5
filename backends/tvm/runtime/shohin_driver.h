/*
 * shohin_driver.h: what is used of the CUDA driver's interface, loaded when it is first needed.
 *
 * Types and values are those of NVIDIA's cuda.h, declared here so that nothing of CUDA's toolkit is
 * needed to build or to run a model.
 */
#ifndef SHOHIN_DRIVER_H
#define SHOHIN_DRIVER_H

#include <stddef.h>
#include <stdint.h>

typedef int cu_result; /* 0: success */
typedef int cu_device;
typedef uint64_t cu_pointer; /* to memory of the GPU */
typedef struct cu_context_object *cu_context;
typedef struct cu_module_object *cu_module;
typedef struct cu_function_object *cu_function;
typedef struct cu_stream_object *cu_stream;
typedef struct cu_event_object *cu_event;
typedef struct cu_graph_object *cu_graph;
typedef struct cu_graph_exec_object *cu_graph_exec;

enum {
    CU_OUT_OF_MEMORY = 2,
    CU_NO_DEVICE = 100,
    CU_NO_BINARY_FOR_GPU = 209,
    CU_UNSUPPORTED_PTX_VERSION = 222,
    CU_INVALID_IMAGE = 200,
    CU_STREAM_NON_BLOCKING = 1,
    CU_CAPTURE_THREAD_LOCAL = 1,
    CU_EVENT_DEFAULT = 0,
    CU_ATTRIBUTE_CAPABILITY_MAJOR = 75,
    CU_ATTRIBUTE_CAPABILITY_MINOR = 76
};

/* name in the driver, result, arguments */
#define SHOHIN_DRIVER_FUNCTIONS(FUNCTION)                                                        \
    FUNCTION(init, "cuInit", (unsigned flags))                                                   \
    FUNCTION(version, "cuDriverGetVersion", (int *version))                                      \
    FUNCTION(device_count, "cuDeviceGetCount", (int *count))                                     \
    FUNCTION(device, "cuDeviceGet", (cu_device * device, int number))                            \
    FUNCTION(device_name, "cuDeviceGetName", (char *name, int room, cu_device device))           \
    FUNCTION(device_attribute, "cuDeviceGetAttribute", (int *value, int which, cu_device device)) \
    FUNCTION(retain, "cuDevicePrimaryCtxRetain", (cu_context * context, cu_device device))       \
    FUNCTION(release, "cuDevicePrimaryCtxRelease_v2", (cu_device device))                        \
    FUNCTION(push, "cuCtxPushCurrent_v2", (cu_context context))                                  \
    FUNCTION(pop, "cuCtxPopCurrent_v2", (cu_context * context))                                  \
    FUNCTION(load, "cuModuleLoadData", (cu_module * module, const void *image))                  \
    FUNCTION(unload, "cuModuleUnload", (cu_module module))                                       \
    FUNCTION(function, "cuModuleGetFunction",                                                    \
             (cu_function * function, cu_module module, const char *name))                       \
    FUNCTION(allocate, "cuMemAlloc_v2", (cu_pointer * memory, size_t bytes))                     \
    FUNCTION(free, "cuMemFree_v2", (cu_pointer memory))                                          \
    FUNCTION(clear_later, "cuMemsetD8Async",                                                     \
             (cu_pointer memory, unsigned char value, size_t bytes, cu_stream stream))           \
    FUNCTION(upload_later, "cuMemcpyHtoDAsync_v2",                                               \
             (cu_pointer to, const void *from, size_t bytes, cu_stream stream))                  \
    FUNCTION(download_later, "cuMemcpyDtoHAsync_v2",                                             \
             (void *to, cu_pointer from, size_t bytes, cu_stream stream))                        \
    FUNCTION(create_stream, "cuStreamCreate", (cu_stream * stream, unsigned flags))              \
    FUNCTION(destroy_stream, "cuStreamDestroy_v2", (cu_stream stream))                           \
    FUNCTION(wait, "cuStreamSynchronize", (cu_stream stream))                                    \
    FUNCTION(launch, "cuLaunchKernel",                                                           \
             (cu_function function, unsigned grid_x, unsigned grid_y, unsigned grid_z,           \
              unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,       \
              cu_stream stream, void **arguments, void **extra))                                 \
    FUNCTION(begin_capture, "cuStreamBeginCapture_v2", (cu_stream stream, int mode))             \
    FUNCTION(end_capture, "cuStreamEndCapture", (cu_stream stream, cu_graph * graph))            \
    FUNCTION(instantiate, "cuGraphInstantiateWithFlags",                                         \
             (cu_graph_exec * ready, cu_graph graph, unsigned long long flags))                  \
    FUNCTION(launch_graph, "cuGraphLaunch", (cu_graph_exec ready, cu_stream stream))             \
    FUNCTION(destroy_ready, "cuGraphExecDestroy", (cu_graph_exec ready))                         \
    FUNCTION(destroy_graph, "cuGraphDestroy", (cu_graph graph))                                  \
    FUNCTION(create_event, "cuEventCreate", (cu_event * event, unsigned flags))                  \
    FUNCTION(destroy_event, "cuEventDestroy_v2", (cu_event event))                               \
    FUNCTION(record, "cuEventRecord", (cu_event event, cu_stream stream))                        \
    FUNCTION(elapsed, "cuEventElapsedTime", (float *milliseconds, cu_event from, cu_event to))   \
    FUNCTION(error_text, "cuGetErrorString", (cu_result error, const char **text))

#define SHOHIN_DRIVER_MEMBER(MEMBER, NAME, ARGUMENTS) cu_result(*MEMBER) ARGUMENTS;

typedef struct cu_driver {
    SHOHIN_DRIVER_FUNCTIONS(SHOHIN_DRIVER_MEMBER)
} cu_driver;

#endif
