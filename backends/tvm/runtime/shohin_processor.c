/*
 * shohin_processor.c: whether this processor has the instructions that a model was compiled with.
 *
 * Instruction sets have the names that Linux gives them in /proc/cpuinfo. On x86 those that widen
 * registers count only where the system saves them when it switches threads.
 */
#include "shohin_runtime.h"

#include <stdbool.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif

#ifndef SHOHIN_NAME
#error "compile shohin_processor.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

#if defined(__x86_64__)

enum { EAX, EBX, ECX, EDX, REGISTERS };

/* Bits of the extended control register 0: which registers the system saves. */
enum { NOTHING = 0, YMM = 0x06, ZMM = 0xe6 };

typedef struct feature {
    const char *name;
    unsigned leaf, subleaf;
    int where, bit; /* in which register of the answer */
    unsigned saved; /* registers that it needs */
} feature;

static const feature features[] = {
    {"ssse3", 1, 0, ECX, 9, NOTHING},       {"sse4_1", 1, 0, ECX, 19, NOTHING},
    {"sse4_2", 1, 0, ECX, 20, NOTHING},     {"movbe", 1, 0, ECX, 22, NOTHING},
    {"fma", 1, 0, ECX, 12, YMM},            {"avx2", 7, 0, EBX, 5, YMM},
    {"bmi2", 7, 0, EBX, 8, NOTHING},        {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512dq", 7, 0, EBX, 17, ZMM},       {"avx512cd", 7, 0, EBX, 28, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},       {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512_vnni", 7, 0, ECX, 11, ZMM},    {"avx_vnni", 7, 1, EAX, 4, YMM},
};

static unsigned saved_registers(void) {
    unsigned answer[REGISTERS];
    const unsigned has_xgetbv = 1u << 27;
    if (!__get_cpuid(1, &answer[EAX], &answer[EBX], &answer[ECX], &answer[EDX]) ||
        (answer[ECX] & has_xgetbv) == 0) {
        return NOTHING;
    }
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static bool has_feature(const feature *one) {
    unsigned answer[REGISTERS];
    return __get_cpuid_count(one->leaf, one->subleaf, &answer[EAX], &answer[EBX], &answer[ECX],
                             &answer[EDX]) &&
           (answer[one->where] >> one->bit & 1) != 0 &&
           (saved_registers() & one->saved) == one->saved;
}

#else

typedef struct feature {
    const char *name;
    int bit; /* of what the system tells programs when they start */
} feature;

static const feature features[] = {
#if defined(__aarch64__)
    {"asimd", 1}, {"asimdhp", 10}, {"asimdrdm", 12}, {"asimddp", 20},
#elif defined(__arm__)
    {"neon", 12}, {"vfpv4", 16}, {"idiva", 17},
#elif defined(__riscv)
    {"d", 'd' - 'a'},
#endif
    {"", 0},
};

static bool has_feature(const feature *one) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> one->bit & 1) != 0;
#else
    (void)one;
    return true; /* unknown: let it try */
#endif
}

#endif

/* Whether this processor has the instruction set of that name; unknown ones it lacks. */
static bool has(const char *name, size_t length) {
    for (size_t i = 0; i < sizeof features / sizeof features[0]; ++i) {
        const char *known = features[i].name;
        if (strlen(known) == length && memcmp(known, name, length) == 0) {
            return has_feature(&features[i]);
        }
    }
    return false;
}

static void append(char *text, size_t room, size_t *length, const char *part, size_t bytes) {
    for (size_t i = 0; i < bytes && *length + 1 < room; ++i) {
        text[(*length)++] = part[i];
    }
    text[*length] = '\0';
}

/* Writes the names that this processor lacks, with commas between; returns how many these are. */
size_t RUNTIME(missing)(const char *needs, char *text, size_t room) {
    size_t count = 0, length = 0;
    while (needs != NULL && *needs != '\0') {
        const size_t bytes = strcspn(needs, " ");
        if (!has(needs, bytes)) {
            append(text, room, &length, ", ", count > 0 ? 2 : 0);
            append(text, room, &length, needs, bytes);
            ++count;
        }
        needs += bytes + (needs[bytes] == ' ');
    }
    return count;
}
