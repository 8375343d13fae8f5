/*
 * Runs a compiled model on one input and prints the index of its largest output.
 *
 *     main INPUT.f32 [THREADS]
 *
 * INPUT.f32 holds the input as raw little-endian float32 values in row-major order; numpy's
 * array.tofile() writes it. The model has one float32 input and one float32 output.
 */
#include "net.h"

#include <stdio.h>
#include <stdlib.h>

static int complain(const char *where, const char *problem) {
    fprintf(stderr, "main: %s: %s\n", where, problem);
    return 1;
}

/* Fills a buffer from a file that must have exactly its size. */
static int read_exactly(const char *path, void *data, size_t bytes) {
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return complain(path, "cannot be opened");
    }
    const size_t read = fread(data, 1, bytes, file);
    const int more = fgetc(file) != EOF;
    fclose(file);
    return read == bytes && !more ? 0 : complain(path, "has not the size of the model's input");
}

static size_t largest(const float *values, size_t count) {
    size_t best = 0;
    for (size_t i = 1; i < count; ++i) {
        best = values[i] > values[best] ? i : best;
    }
    return best;
}

static int run(const char *path, int32_t threads, float *input, float *output) {
    const shohin_info *info = net_info();
    if (read_exactly(path, input, info->inputs[0].bytes) != 0) {
        return 1;
    }
    shohin_instance *instance = NULL;
    shohin_status status = net_create(threads, &instance);
    if (status == SHOHIN_OK) {
        const void *inputs[] = {input};
        void *outputs[] = {output};
        status = net_run(instance, inputs, outputs);
        net_destroy(instance);
    }
    if (status != SHOHIN_OK) {
        return complain(info->name, net_last_error());
    }
    const size_t best = largest(output, info->outputs[0].bytes / sizeof *output);
    printf("%zu %.9g\n", best, (double)output[best]);
    return 0;
}

int main(int count, char **arguments) {
    const shohin_info *info = net_info();
    if (count < 2 || count > 3) {
        return complain("usage", "main INPUT.f32 [THREADS]");
    }
    if (info->abi_version != SHOHIN_ABI_VERSION) {
        return complain(info->name, "was built with another version of net.h");
    }
    float *input = malloc(info->inputs[0].bytes);
    float *output = malloc(info->outputs[0].bytes);
    int code = 1;
    if (input == NULL || output == NULL) {
        complain("memory", "there is not enough");
    } else {
        code = run(arguments[1], count > 2 ? atoi(arguments[2]) : 1, input, output);
    }
    free(input);
    free(output);
    return code;
}
