/*
 * shohin_device.cuh: what kernels call beyond CUDA's own functions. It comes before their code, and
 * needs no header of CUDA's.
 */
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#define uchar unsigned char
#define ushort unsigned short
#define uint unsigned int
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ll)
#define CUDART_NAN __longlong_as_double(0x7fffffffffffffffll)

#define SHOHIN_FUNCTION static __device__ __forceinline__
#define SHOHIN_ALL_LANES 0xffffffffu

/* Those that TVM writes, with the order of NaN that they have on processors: the second where either
   is NaN. CUDA's own ignore NaN. */
template <typename T> SHOHIN_FUNCTION T shohin_max(T one, T two) { return one > two ? one : two; }
template <typename T> SHOHIN_FUNCTION T shohin_min(T one, T two) { return one < two ? one : two; }
#define max shohin_max
#define min shohin_min

/* The larger of two; NaN is the largest of all. */
SHOHIN_FUNCTION float shohin_larger(float held, float value) {
    return value > held || value != value ? value : held;
}

/* Four bytes that lie side by side, at a multiple of four. */
SHOHIN_FUNCTION int shohin_word_at(const int8_t *first) { return *(const int *)first; }

/* Four floats that lie side by side, at a multiple of four. */
SHOHIN_FUNCTION int shohin_load_four(float *to, const float *first) {
    const float4 four = *(const float4 *)first;
    to[0] = four.x;
    to[1] = four.y;
    to[2] = four.z;
    to[3] = four.w;
    return 0;
}

/* Over the threads of a warp, for all of them; all have to call. */
SHOHIN_FUNCTION float shohin_warp_sum(float value) {
    for (int apart = 16; apart > 0; apart /= 2) {
        value += __shfl_xor_sync(SHOHIN_ALL_LANES, value, apart);
    }
    return value;
}

SHOHIN_FUNCTION int shohin_warp_total(int value) {
    for (int apart = 16; apart > 0; apart /= 2) {
        value += __shfl_xor_sync(SHOHIN_ALL_LANES, value, apart);
    }
    return value;
}

SHOHIN_FUNCTION float shohin_warp_largest(float value) {
    for (int apart = 16; apart > 0; apart /= 2) {
        value = shohin_larger(value, __shfl_xor_sync(SHOHIN_ALL_LANES, value, apart));
    }
    return value;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
/* sums[4] += a[16 x 32] * b[32 x 8] of bytes; fragments as PTX describes them for m16n8k32. */
SHOHIN_FUNCTION int shohin_mma_bytes(int *sums, int a0, int a1, int a2, int a3, int b0, int b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    return 0;
}

/* A float as TF32: 10 bits behind the point, to the nearest. */
SHOHIN_FUNCTION uint32_t shohin_tf32(float value) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

/* Not infinite, and a number. */
SHOHIN_FUNCTION bool shohin_is_finite(float value) { return value - value == 0.0f; }

/* The large part of a float; the largest ones are cut off, where rounding would make them infinite. */
SHOHIN_FUNCTION uint32_t shohin_large_part(float value) {
    const uint32_t bits = shohin_tf32(value);
    const bool overflows = shohin_is_finite(value) && !shohin_is_finite(__uint_as_float(bits));
    return overflows ? __float_as_uint(value) & 0xffffe000u : bits;
}

/* What is left of it; nothing where that is no number. */
SHOHIN_FUNCTION uint32_t shohin_small_part(float value, uint32_t large) {
    const float rest = value - __uint_as_float(large);
    return shohin_tf32(shohin_is_finite(rest) ? rest : 0.0f);
}

/* A large part to be multiplied by small ones, which may be zero: infinity times zero is no number. */
SHOHIN_FUNCTION uint32_t shohin_finite_part(uint32_t large) {
    return shohin_is_finite(__uint_as_float(large)) ? large : 0u;
}

SHOHIN_FUNCTION void shohin_mma_tf32(float *sums, const uint32_t *a, const uint32_t *b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* sums[4] += a[16 x 8] * b[8 x 8] of floats, each as the sum of two TF32: m16n8k8. */
SHOHIN_FUNCTION int shohin_mma_float(float *sums, float a0, float a1, float a2, float a3, float b0,
                                     float b1) {
    const float a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
    uint32_t large_a[4], small_a[4], finite_a[4], large_b[2], small_b[2], finite_b[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        large_a[i] = shohin_large_part(a[i]);
        small_a[i] = shohin_small_part(a[i], large_a[i]);
        finite_a[i] = shohin_finite_part(large_a[i]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        large_b[i] = shohin_large_part(b[i]);
        small_b[i] = shohin_small_part(b[i], large_b[i]);
        finite_b[i] = shohin_finite_part(large_b[i]);
    }
    /* Tensor cores cut off what does not fit when they add: the long sums are formed elsewhere. */
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    shohin_mma_tf32(part, small_a, finite_b);
    shohin_mma_tf32(part, finite_a, small_b);
    shohin_mma_tf32(part, large_a, large_b);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums[i] += part[i];
    }
    return 0;
}
#endif
