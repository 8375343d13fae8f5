/*
 * shohin_texts.c: what a status means, and what the last failure of a thread was.
 */
#include "shohin_runtime.h"

#ifndef SHOHIN_NAME
#error "compile shohin_texts.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

enum { ERROR_BYTES = 512 };

/* A thread's own: what fails in one does not change what another is about to read. */
static _Thread_local char last_error[ERROR_BYTES];

/* Stores the parts, up to the first NULL, one after another; what does not fit is left out. */
shohin_status RUNTIME(fail)(shohin_status status, const char *const *parts) {
    size_t length = 0;
    for (; *parts != NULL; ++parts) {
        for (const char *letter = *parts; *letter != '\0' && length + 1 < ERROR_BYTES; ++letter) {
            last_error[length++] = *letter;
        }
    }
    last_error[length] = '\0';
    return status;
}

const char *RUNTIME(last_error)(void) { return last_error; }

const char *RUNTIME(decimal)(char digits[SHOHIN_DIGITS], uint64_t value) {
    char *first = digits + SHOHIN_DIGITS - 1;
    *first = '\0';
    do {
        *--first = (char)('0' + value % 10);
        value /= 10;
    } while (value > 0);
    return first;
}

const char *RUNTIME(status_text)(shohin_status status) {
    switch (status) {
    case SHOHIN_OK:
        return "ok";
    case SHOHIN_INVALID_ARGUMENT:
        return "invalid argument: a required pointer is NULL";
    case SHOHIN_OUT_OF_MEMORY:
        return "out of memory";
    case SHOHIN_THREAD_FAILURE:
        return "a thread could not be started";
    case SHOHIN_BUSY:
        return "the instance is in use by another thread";
    case SHOHIN_DAMAGED_WEIGHTS:
        return "the coded weights are damaged: copy the binary again, or compile it again";
    case SHOHIN_WRONG_SIZE:
        return "an array is not as large as the model's";
    case SHOHIN_UNSUPPORTED_PROCESSOR:
        return "this processor lacks instructions that the model was compiled with";
    case SHOHIN_NO_DEVICE:
        return "there is no CUDA driver, or no GPU";
    case SHOHIN_DEVICE_FAILURE:
        return "the GPU's driver reported a failure";
    }
    return "unknown status";
}
