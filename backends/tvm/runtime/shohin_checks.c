/*
 * shohin_checks.c: whether the arrays that a run is given are those of the model.
 */
#include "shohin_runtime.h"

#ifndef SHOHIN_NAME
#error "compile shohin_checks.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

static shohin_status fail(const char *first, const char *second, const char *third) {
    const char *const parts[] = {first, second, third, NULL};
    return RUNTIME(fail)(SHOHIN_INVALID_ARGUMENT, parts);
}

/* Refuses an array of pointers that is NULL or has one that is; `kind` is "input" or "output". */
static shohin_status check_some_pointers(const char *kind, const void *const *pointers,
                                    const shohin_tensor_info *tensors, int32_t count) {
    if (count > 0 && pointers == NULL) {
        return fail("the array of ", kind, " pointers is NULL");
    }
    for (int32_t i = 0; i < count; ++i) {
        if (pointers[i] == NULL) {
            const char *const parts[] = {"the pointer of ", kind, " '", tensors[i].name,
                                         "' is NULL", NULL};
            return RUNTIME(fail)(SHOHIN_INVALID_ARGUMENT, parts);
        }
    }
    return SHOHIN_OK;
}

static shohin_status check_some_sizes(const char *kind, const size_t *bytes,
                                 const shohin_tensor_info *tensors, int32_t count) {
    if (count > 0 && bytes == NULL) {
        return fail("the ", kind, " sizes are NULL");
    }
    for (int32_t i = 0; i < count; ++i) {
        if (bytes[i] != tensors[i].bytes) {
            char wanted[SHOHIN_DIGITS], given[SHOHIN_DIGITS];
            const char *const parts[] = {kind, " '", tensors[i].name, "': expected ",
                                         RUNTIME(decimal)(wanted, tensors[i].bytes),
                                         " bytes, got ", RUNTIME(decimal)(given, bytes[i]), NULL};
            return RUNTIME(fail)(SHOHIN_WRONG_SIZE, parts);
        }
    }
    return SHOHIN_OK;
}

shohin_status RUNTIME(check_pointers)(const shohin_info *info, const void *const *inputs,
                                      void *const *outputs) {
    const shohin_status status =
        check_some_pointers("input", inputs, info->inputs, info->input_count);
    if (status != SHOHIN_OK) {
        return status;
    }
    return check_some_pointers("output", (const void *const *)outputs, info->outputs,
                               info->output_count);
}

shohin_status RUNTIME(check_sizes)(const shohin_info *info, const size_t *input_bytes,
                                   const size_t *output_bytes) {
    const shohin_status status =
        check_some_sizes("input", input_bytes, info->inputs, info->input_count);
    if (status != SHOHIN_OK) {
        return status;
    }
    return check_some_sizes("output", output_bytes, info->outputs, info->output_count);
}
