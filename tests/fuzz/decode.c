/*
 * decode.c: the decoder of coded weights on its own, whole and damaged.
 *
 * As a library, `decode` is the decoder. As a program, given a number of tries, a seed, the size of
 * the weights and a file of coded weights, it decodes damaged copies of the file: each in memory of
 * just its size, so that a sanitizer sees every byte that is read or written beyond it. Prints how
 * many of them were refused.
 */
#include "shohin_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

SHOHIN_DECLARE_RUNTIME(fuzz);

__attribute__((visibility("default"))) int decode(const unsigned char *coded, size_t coded_bytes,
                                                  char *weights, size_t weight_bytes,
                                                  int32_t threads) {
    return (int)fuzz_shohin_decode(coded, coded_bytes, weights, weight_bytes, threads);
}

static uint64_t state;

/* xorshift64* */
static uint64_t draw(uint64_t limit) {
    state ^= state >> 12;
    state ^= state << 25;
    state ^= state >> 27;
    return (state * 0x2545F4914F6CDD1Du >> 11) % limit;
}

static void damage(unsigned char *bytes, size_t size) {
    static const unsigned char telling[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    for (uint64_t left = 1 + draw(4); left > 0; --left) {
        unsigned char *at = bytes + draw(size);
        switch (draw(4)) {
        case 0:
            *at ^= (unsigned char)(1u << draw(8));
            break;
        case 1:
            *at = (unsigned char)draw(256);
            break;
        case 2:
            *at = telling[draw(sizeof telling)];
            break;
        default:
            /* What stood elsewhere, as long as both ends allow. */
            {
                const unsigned char *from = bytes + draw(size);
                const size_t room = (size_t)(bytes + size - (at > from ? at : from));
                memmove(at, from, draw(room < 16 ? room + 1 : 16));
            }
        }
    }
}

static unsigned char *read_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    unsigned char *bytes = NULL;
    if (file != NULL && fseek(file, 0, SEEK_END) == 0) {
        *size = (size_t)ftell(file);
        rewind(file);
        bytes = malloc(*size + 1);
        if (bytes != NULL && fread(bytes, 1, *size, file) != *size) {
            free(bytes);
            bytes = NULL;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return bytes;
}

int main(int count, char **arguments) {
    size_t size = 0;
    unsigned char *whole = count == 5 ? read_file(arguments[4], &size) : NULL;
    if (whole == NULL || size == 0) {
        fprintf(stderr, "usage: %s TRIES SEED WEIGHT_BYTES FILE\n", arguments[0]);
        return 2;
    }
    const size_t weight_bytes = strtoull(arguments[3], NULL, 10);
    state = strtoull(arguments[2], NULL, 10) * 2 + 1;
    long refused = 0;
    const long tries = strtol(arguments[1], NULL, 10);
    for (long i = 0; i < tries; ++i) {
        const size_t kept = draw(8) == 0 ? 1 + draw(size) : size;
        unsigned char *coded = malloc(kept);
        char *weights = calloc(1, weight_bytes);
        memcpy(coded, whole, kept);
        damage(coded, kept);
        refused += decode(coded, kept, weights, weight_bytes, 1) != SHOHIN_OK;
        free(weights);
        free(coded);
    }
    free(whole);
    printf("%ld %ld\n", tries, refused);
    return 0;
}
