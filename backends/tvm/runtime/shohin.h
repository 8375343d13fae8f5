/*
 * shohin.h: the public interface of a compiled model.
 *
 * A model compiled under the name NAME offers the functions that
 * SHOHIN_DECLARE_MODEL(NAME) declares:
 *
 *     #include "shohin.h"
 *     SHOHIN_DECLARE_MODEL(net);
 *
 *     shohin_instance *instance;
 *     shohin_status status = net_create(0, &instance);
 *     if (status != SHOHIN_OK) { puts(net_last_error()); return 1; }
 *     const void *inputs[] = {image};
 *     void *outputs[] = {scores};
 *     status = net_run(instance, inputs, outputs);
 *     net_destroy(instance);
 *
 * Every symbol carries the model's name, so several models can be linked into one program.
 * A program may hold any number of instances, and different threads may use different instances at
 * the same time.
 *
 * The header needs nothing but the C standard headers below; it is valid C99 and C++11.
 */
#ifndef SHOHIN_H
#define SHOHIN_H

#include <stddef.h>
#include <stdint.h>

/* Changes whenever a structure or a function of this header changes incompatibly. */
#define SHOHIN_ABI_VERSION 2u

/* An instance uses at most this many threads; a larger request is lowered to it. */
#define SHOHIN_MAX_THREADS 256

/* The models are built with hidden visibility: only what this header declares is exported. */
#if defined(__GNUC__)
#define SHOHIN_API __attribute__((visibility("default")))
#else
#define SHOHIN_API
#endif

#ifdef __cplusplus
#define SHOHIN_EXTERN extern "C" SHOHIN_API
extern "C" {
#else
#define SHOHIN_EXTERN extern SHOHIN_API
#endif

/* Element types. The values are part of the binary interface. */
typedef enum shohin_dtype {
    SHOHIN_FLOAT32 = 0,
    SHOHIN_FLOAT16 = 1,
    SHOHIN_INT64 = 2,
    SHOHIN_INT32 = 3,
    SHOHIN_INT16 = 4,
    SHOHIN_INT8 = 5,
    SHOHIN_UINT8 = 6,
    SHOHIN_BOOL = 7 /* one byte, 0 or 1 */
} shohin_dtype;

/* What a function reports. The values are part of the binary interface. */
typedef enum shohin_status {
    SHOHIN_OK = 0,
    SHOHIN_INVALID_ARGUMENT = 1, /* a pointer that must not be NULL is NULL */
    SHOHIN_OUT_OF_MEMORY = 2,
    SHOHIN_THREAD_FAILURE = 3, /* the system refused to start a thread */
    SHOHIN_BUSY = 4,            /* the instance is in use by another thread; nothing was done */
    SHOHIN_DAMAGED_WEIGHTS = 5, /* the coded weights in the binary are not what they should be */
    SHOHIN_WRONG_SIZE = 6,      /* an array is not as large as the model's; nothing was done */
    SHOHIN_UNSUPPORTED_PROCESSOR = 7, /* it lacks what the model was compiled for */
    SHOHIN_NO_DEVICE = 8,     /* no driver of the GPU, or no GPU */
    SHOHIN_DEVICE_FAILURE = 9 /* the GPU's driver reported a failure */
} shohin_status;

/* One input or output: a dense array in C (row-major) order, little endian. */
typedef struct shohin_tensor_info {
    const char *name;
    shohin_dtype dtype;
    int32_t rank;
    const int64_t *shape; /* rank elements; may be NULL when rank is 0 */
    size_t bytes;         /* the size of the whole array */
} shohin_tensor_info;

/* What is known about a model without creating an instance. Lives as long as the program. */
typedef struct shohin_info {
    uint32_t abi_version; /* SHOHIN_ABI_VERSION of the header that the model was built with */
    const char *name;
    const char *version;      /* of shohin, that made it */
    const char *target;       /* what it was compiled for, e.g. "cpu{arch=x86-64-v3 threads=2}" */
    const char *content_hash; /* of the program it was compiled from, in hexadecimal digits */
    const char *metadata;     /* a JSON object */
    int32_t input_count;
    int32_t output_count;
    const shohin_tensor_info *inputs;
    const shohin_tensor_info *outputs;
    size_t arena_bytes;    /* working memory that each instance allocates */
    size_t constant_bytes; /* weights, in memory that all instances share */
    int32_t step_count;
    int32_t batch; /* 0: no batch axis; else the size of axis 0 of every input and output */
} shohin_info;

/* The working memory and threads for one run at a time. */
typedef struct shohin_instance shohin_instance;

#ifdef __cplusplus
}
#endif

/*
 * Declares the functions of the model NAME (a macro as NAME is expanded first).
 *
 * NAME_info         Describes the model. Never NULL.
 * NAME_create       Creates an instance that runs on `threads` threads, the caller's among them;
 *                   0 or less means as many as there are processors to run on. Threads that no
 *                   step of the model could use are not started. A model for a GPU takes the
 *                   first that the driver shows, whatever the number. On failure *out is NULL.
 * NAME_run          Runs the model once. `inputs` and `outputs` hold one pointer per tensor in
 *                   the order of NAME_info(). Any alignment is accepted; a pointer that is less
 *                   aligned than the kernels need (64 bytes always suffices) costs a copy.
 *                   Outputs must not overlap each other or the inputs. Returns SHOHIN_BUSY when
 *                   another thread is inside NAME_run or NAME_profile with this instance.
 * NAME_run_sized    NAME_run that first compares the sizes of the arrays, in bytes and in the
 *                   order of the pointers, with those of the model.
 * NAME_profile      NAME_run that also stores the wall-clock milliseconds of each of the
 *                   step_count steps.
 * NAME_step_label   The name of a step; NULL when there is no such step.
 * NAME_destroy      Ends the threads and frees the memory. NULL is allowed. The instance must
 *                   not be in use.
 * NAME_status_text  A status as English text. Never NULL.
 * NAME_last_error   What went wrong in the last call of this thread that returned anything but
 *                   SHOHIN_OK, in detail: which array, which instructions, how many bytes. Empty
 *                   before; never NULL. Belongs to the model, and changes with the next failure.
 *
 * A child process made by fork() has no worker threads: create its instances after the fork.
 */
#define SHOHIN_DECLARE_MODEL(NAME) SHOHIN_DECLARE_MODEL_(NAME)
#define SHOHIN_DECLARE_MODEL_(NAME)                                                              \
    SHOHIN_EXTERN const shohin_info *NAME##_info(void);                                          \
    SHOHIN_EXTERN shohin_status NAME##_create(int32_t threads, shohin_instance **out);           \
    SHOHIN_EXTERN shohin_status NAME##_run(shohin_instance *instance, const void *const *inputs, \
                                           void *const *outputs);                                \
    SHOHIN_EXTERN shohin_status NAME##_run_sized(                                                \
        shohin_instance *instance, const void *const *inputs, const size_t *input_bytes,         \
        void *const *outputs, const size_t *output_bytes);                                       \
    SHOHIN_EXTERN shohin_status NAME##_profile(shohin_instance *instance,                        \
                                               const void *const *inputs, void *const *outputs,  \
                                               double *milliseconds_per_step);                   \
    SHOHIN_EXTERN const char *NAME##_step_label(int32_t step);                                   \
    SHOHIN_EXTERN void NAME##_destroy(shohin_instance *instance);                                \
    SHOHIN_EXTERN const char *NAME##_status_text(shohin_status status);                          \
    SHOHIN_EXTERN const char *NAME##_last_error(void)

#endif
