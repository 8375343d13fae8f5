/*
 * shohin_npy.h: reads and writes NumPy's .npy files.
 *
 * Read: format versions 1.0, 2.0 and 3.0, C order, little endian. Written: version 1.0.
 * Functions that can fail return true on success; otherwise they describe the problem in `error`,
 * beginning with the file's name.
 */
#ifndef SHOHIN_NPY_H
#define SHOHIN_NPY_H

#include "shohin.h"

#include <stdbool.h>
#include <stdio.h>

enum {
    SHOHIN_NPY_MAX_RANK = 64,         /* as in NumPy */
    SHOHIN_NPY_MAX_HEADER = 64 << 10, /* bytes; what a version 1.0 file can have */
    SHOHIN_NPY_NAME_BYTES = 48,
    SHOHIN_NPY_TYPE_BYTES = 512 /* longer type texts are cut */
};

typedef struct shohin_npy_error {
    char text[2048];
} shohin_npy_error;

/* A file that is open for reading. */
typedef struct shohin_npy {
    const char *path;
    FILE *stream;
    bool supported; /* whether `dtype` and `bytes` are meaningful */
    shohin_dtype dtype;
    char dtype_name[SHOHIN_NPY_NAME_BYTES]; /* also of unsupported types: "float64" */
    int32_t rank;
    int64_t shape[SHOHIN_NPY_MAX_RANK];
    size_t bytes; /* of all elements */
} shohin_npy;

/* Opens a file and reads its header. Close it only after success. */
bool shohin_npy_open(const char *path, shohin_npy *file, shohin_npy_error *error);

/* Reads the elements, file->bytes bytes, of a supported type. */
bool shohin_npy_read(shohin_npy *file, void *data, shohin_npy_error *error);

void shohin_npy_close(shohin_npy *file);

/* Writes a temporary file next to `path` and renames it, so that `path` is never incomplete. */
bool shohin_npy_write(const char *path, shohin_dtype dtype, int32_t rank, const int64_t *shape,
                      const void *data, shohin_npy_error *error);

size_t shohin_dtype_bytes(shohin_dtype dtype);
const char *shohin_dtype_name(shohin_dtype dtype);

/* Writes a type like "float32[1,3,32,32]". */
void shohin_npy_format_type(char text[SHOHIN_NPY_TYPE_BYTES], const char *dtype_name, int32_t rank,
                            const int64_t *shape);

#endif
