/*
 * shohin_runtime.h: the contract between a generated model and the runtime.
 *
 * A generated source file defines the kernels, one constant shohin_model, and the public
 * functions by means of SHOHIN_DEFINE_MODEL(NAME, model). The runtime's files are compiled once per
 * model with -DSHOHIN_NAME=NAME: their symbols carry the model's name as well, so that the objects
 * of two models never clash, even when they come from different versions of these files.
 */
#ifndef SHOHIN_RUNTIME_H
#define SHOHIN_RUNTIME_H

#include "shohin.h"

#if defined(__GNUC__)
#define SHOHIN_HIDDEN __attribute__((visibility("hidden")))
#else
#define SHOHIN_HIDDEN
#endif

/* What a step may touch. The same for all steps of one run. */
typedef struct shohin_frame {
    char *arena;               /* 64-byte aligned; zero at creation, never cleared afterwards */
    const char *constants;     /* shohin_model.constants, or what they were decoded to */
    const void *const *inputs; /* aligned as shohin_model.input_alignment says */
    void *const *outputs;      /* aligned as shohin_model.output_alignment says */
} shohin_frame;

/*
 * Computes the indices [begin, end) of a step. Calls for disjoint ranges of the same step run at
 * the same time, so they must not write to the same memory. Everything that earlier steps wrote
 * is visible. A call has at least 1 MiB of stack.
 */
typedef void (*shohin_step_function)(const shohin_frame *frame, int32_t begin, int32_t end);

typedef struct shohin_step {
    shohin_step_function function;
    int32_t extent;    /* the step covers [0, extent); a step with extent 0 is never called */
    int32_t max_parts; /* the most ranges it may be split into; 1 or less: not at all */
    const char *label;
} shohin_step;

/*
 * Makes info.constant_bytes of weights from their coded form on so many threads. `weights` is
 * zeroed memory. See shohin_decode.c.
 */
typedef shohin_status (*shohin_decoder)(const unsigned char *coded, size_t coded_bytes,
                                        char *weights, size_t weight_bytes, int32_t threads);

/* Which memory of the GPU an argument of a kernel lies in. */
typedef enum shohin_place {
    SHOHIN_IN_ARENA = 0,
    SHOHIN_IN_CONSTANTS = 1,
    SHOHIN_IN_INPUT = 2,
    SHOHIN_IN_OUTPUT = 3
} shohin_place;

typedef struct shohin_argument {
    shohin_place place;
    int32_t index; /* of the input or output */
    size_t offset;
} shohin_argument;

/* One step of a model for a GPU: a grid of blocks of threads. */
typedef struct shohin_launch {
    const char *kernel; /* its symbol in the image */
    uint32_t grid[2]; /* blocks along x and y */
    uint32_t threads; /* of a block */
    int32_t first_argument;
    int32_t argument_count;
    const char *label;
} shohin_launch;

/* What a model for a GPU has instead of steps. */
typedef struct shohin_device_code {
    const unsigned char *image; /* a fat binary */
    const char *arch;           /* that it was compiled for, e.g. "sm_80" */
    int32_t capability;         /* ten times the least compute capability, e.g. 80 */
    int32_t cuda;               /* major version that the driver must know, e.g. 13 */
    const shohin_launch *launches; /* info.step_count */
    const shohin_argument *arguments;

} shohin_device_code;

typedef struct shohin_model {
    shohin_info info;
    const shohin_step *steps; /* info.step_count; NULL for a GPU */
    const shohin_device_code *device; /* NULL for a processor */
    const char *constants;    /* NULL where they are coded */
    shohin_decoder decode;    /* NULL where they are not */
    const unsigned char *coded;
    size_t coded_bytes;
    const char *processor; /* name of what it was compiled for */
    const char *needs;     /* instruction sets, as Linux calls them, with spaces; NULL: none */
    const size_t *input_alignment; /* one per tensor, powers of two; NULL when there is none */
    const size_t *output_alignment;
} shohin_model;

/* The most arrays that a kernel of a GPU takes. */
enum { SHOHIN_MOST_ARGUMENTS = 500 };

/* Room for a decimal number and the zero behind it. */
enum { SHOHIN_DIGITS = 21 };

/* The runtime's own functions. Trailing arguments as in the public functions of shohin.h. */
#define SHOHIN_DECLARE_RUNTIME(NAME) SHOHIN_DECLARE_RUNTIME_(NAME)
#define SHOHIN_DECLARE_RUNTIME_(NAME)                                                             \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_create(const shohin_model *model, int32_t threads,  \
                                                     shohin_instance **out);                      \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_run(                                                \
        shohin_instance *instance, const void *const *inputs, void *const *outputs);              \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_run_sized(                                          \
        shohin_instance *instance, const void *const *inputs, const size_t *input_bytes,          \
        void *const *outputs, const size_t *output_bytes);                                        \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_profile(                                            \
        shohin_instance *instance, const void *const *inputs, void *const *outputs,               \
        double *milliseconds_per_step);                                                           \
    SHOHIN_HIDDEN const char *NAME##_shohin_step_label(const shohin_model *model, int32_t step);  \
    SHOHIN_HIDDEN void NAME##_shohin_destroy(shohin_instance *instance);                          \
    SHOHIN_HIDDEN const char *NAME##_shohin_status_text(shohin_status status);                    \
    SHOHIN_HIDDEN const char *NAME##_shohin_last_error(void);                                     \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_check_pointers(                                     \
        const shohin_info *info, const void *const *inputs, void *const *outputs);                \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_check_sizes(                                        \
        const shohin_info *info, const size_t *input_bytes, const size_t *output_bytes);          \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_fail(shohin_status status,                          \
                                                   const char *const *parts);                     \
    SHOHIN_HIDDEN const char *NAME##_shohin_decimal(char digits[SHOHIN_DIGITS], uint64_t value);  \
    SHOHIN_HIDDEN size_t NAME##_shohin_missing(const char *needs, char *text, size_t room);       \
    SHOHIN_HIDDEN shohin_status NAME##_shohin_decode(const unsigned char *coded,                  \
                                                     size_t coded_bytes, char *weights,           \
                                                     size_t weight_bytes, int32_t threads)

/* Defines the public functions of the model NAME, which `MODEL` (a shohin_model) describes. */
#define SHOHIN_DEFINE_MODEL(NAME, MODEL) SHOHIN_DEFINE_MODEL_(NAME, MODEL)
#define SHOHIN_DEFINE_MODEL_(NAME, MODEL)                                                         \
    SHOHIN_DECLARE_MODEL_(NAME);                                                                  \
    SHOHIN_DECLARE_RUNTIME_(NAME);                                                                \
    const shohin_info *NAME##_info(void) { return &(MODEL).info; }                                \
    shohin_status NAME##_create(int32_t threads, shohin_instance **out) {                         \
        return NAME##_shohin_create(&(MODEL), threads, out);                                      \
    }                                                                                             \
    shohin_status NAME##_run(shohin_instance *instance, const void *const *inputs,                \
                             void *const *outputs) {                                              \
        return NAME##_shohin_run(instance, inputs, outputs);                                      \
    }                                                                                             \
    shohin_status NAME##_run_sized(shohin_instance *instance, const void *const *inputs,          \
                                   const size_t *input_bytes, void *const *outputs,               \
                                   const size_t *output_bytes) {                                  \
        return NAME##_shohin_run_sized(instance, inputs, input_bytes, outputs, output_bytes);     \
    }                                                                                             \
    shohin_status NAME##_profile(shohin_instance *instance, const void *const *inputs,            \
                                 void *const *outputs, double *milliseconds_per_step) {           \
        return NAME##_shohin_profile(instance, inputs, outputs, milliseconds_per_step);           \
    }                                                                                             \
    const char *NAME##_step_label(int32_t step) {                                                 \
        return NAME##_shohin_step_label(&(MODEL), step);                                          \
    }                                                                                             \
    void NAME##_destroy(shohin_instance *instance) { NAME##_shohin_destroy(instance); }           \
    const char *NAME##_status_text(shohin_status status) {                                        \
        return NAME##_shohin_status_text(status);                                                 \
    }                                                                                             \
    const char *NAME##_last_error(void) { return NAME##_shohin_last_error(); }                    \
    typedef int NAME##_shohin_needs_a_semicolon

#endif
