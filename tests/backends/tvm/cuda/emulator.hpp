// What CUDA source needs to be compiled for a processor: kernels run one thread after another,
// which change at barriers. See emulator.c.
#pragma once
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(threads)
#define alignas(bytes) __attribute__((aligned(bytes))) // which may follow `static`

struct emulated_index {
    int x, y, z;
};

struct float4 {
    float x, y, z, w;
};

extern "C" {
extern emulated_index emulated_thread, emulated_block;
void emulated_block_barrier(void);
unsigned emulated_shuffle_xor(unsigned value, int apart);
const unsigned *emulated_share(const unsigned *words, int count);
float nearbyintf(float), floorf(float), ceilf(float), sqrtf(float), logf(float), expf(float);
float powf(float, float), fabsf(float), tanhf(float), erff(float), roundf(float), truncf(float);
float tanf(float), atanf(float), sinhf(float), coshf(float), exp2f(float);
float log2f(float), log10f(float), asinf(float), acosf(float), atan2f(float, float);
float sinf(float), cosf(float), fmodf(float, float), log1pf(float), expm1f(float), rintf(float);
double nearbyint(double), floor(double), sqrt(double), log(double), exp(double), fabs(double);
double pow(double, double);
}

#define threadIdx emulated_thread
#define blockIdx emulated_block
#define __syncthreads emulated_block_barrier
#define __logf logf
#define __expf expf

template <typename To, typename From> static inline To emulated_bits(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "same size");
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}
static inline float __int_as_float(int x) { return emulated_bits<float>(x); }
#define rsqrtf(x) (1.0f / sqrtf(x))
static inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
static inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }

static inline float __shfl_xor_sync(unsigned, float value, int apart) {
    return emulated_bits<float>(emulated_shuffle_xor(emulated_bits<unsigned>(value), apart));
}
static inline int __shfl_xor_sync(unsigned, int value, int apart) {
    return (int)emulated_shuffle_xor((unsigned)value, apart);
}

static inline int __dp4a(int a, int b, int total) {
    for (int i = 0; i < 4; ++i) {
        total += (int)(signed char)(a >> (8 * i)) * (int)(signed char)(b >> (8 * i));
    }
    return total;
}

static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)b << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned chosen = selector >> (4 * i) & 15;
        unsigned byte = (unsigned)(bytes >> (8 * (chosen & 7))) & 255;
        byte = chosen & 8 ? (byte & 128 ? 255 : 0) : byte;
        result |= byte << (8 * i);
    }
    return result;
}

// Fragments of mma.m16n8k8 and m16n8k32 by the PTX ISA: thread 4 * g + m has rows g and g + 8 of
// words m and m + 4 of the left operand, column g of the right one, and of the result columns
// 2 * m and 2 * m + 1 of both rows.
struct emulated_fragments {
    unsigned a[4], b[2];
};

template <typename Sum, typename Product>
static inline void emulated_mma(Sum *sums, emulated_fragments own, Product product) {
    const unsigned *all = emulated_share((const unsigned *)&own, 6);
    const int lane = emulated_thread.x % 32, group = lane / 4, member = lane % 4;
    Sum results[4];
    for (int part = 0; part < 4; ++part) {
        const int upper = part / 2, column = 2 * member + part % 2;
        Sum total = sums[part];
        for (int word = 0; word < 8; ++word) {
            const unsigned *left = all + 6 * (4 * group + word % 4);
            const unsigned *right = all + 6 * (4 * column + word % 4);
            total += product(left[upper + 2 * (word / 4)], right[4 + word / 4]);
        }
        results[part] = total;
    }
    emulated_share(nullptr, 0); // nobody writes before all have read
    for (int part = 0; part < 4; ++part) {
        sums[part] = results[part];
    }
}

static inline int shohin_mma_bytes(int *sums, int a0, int a1, int a2, int a3, int b0, int b1) {
    emulated_fragments own = {{(unsigned)a0, (unsigned)a1, (unsigned)a2, (unsigned)a3},
                              {(unsigned)b0, (unsigned)b1}};
    emulated_mma(sums, own, [](unsigned a, unsigned b) { return __dp4a((int)a, (int)b, 0); });
    return 0;
}

// To the nearest of 10 bits behind the point, ties away from zero, as cvt.rna.tf32 does.
static inline float emulated_tf32(float value) {
    const unsigned bits = emulated_bits<unsigned>(value);
    return (bits & 0x7f800000) == 0x7f800000 ? value
                                             : emulated_bits<float>((bits + 0x1000) & 0xffffe000);
}

static inline bool emulated_finite(float value) { return value - value == 0.0f; }

static inline float emulated_large(float value) {
    const float large = emulated_tf32(value);
    return emulated_finite(value) && !emulated_finite(large)
               ? emulated_bits<float>(emulated_bits<unsigned>(value) & 0xffffe000)
               : large;
}

static inline float emulated_rest(float value) {
    const float rest = value - emulated_large(value);
    return emulated_tf32(emulated_finite(rest) ? rest : 0.0f);
}

static inline float emulated_finite_part(float value) {
    return emulated_finite(emulated_large(value)) ? emulated_large(value) : 0.0f;
}

static inline int shohin_mma_float(float *sums, float a0, float a1, float a2, float a3, float b0,
                                   float b1) {
    const float values[6] = {a0, a1, a2, a3, b0, b1};
    emulated_fragments own;
    __builtin_memcpy(&own, values, sizeof own);
    float part[4] = {0, 0, 0, 0};
    emulated_mma(part, own, [](unsigned left, unsigned right) {
        const float a = emulated_bits<float>(left), b = emulated_bits<float>(right);
        return emulated_rest(a) * emulated_finite_part(b) +
               emulated_finite_part(a) * emulated_rest(b) + emulated_large(a) * emulated_large(b);
    });
    for (int i = 0; i < 4; ++i) {
        sums[i] += part[i];
    }
    return 0;
}
