/*
 * Runs a model of many small steps on several threads and on one, with pauses after which workers
 * are asleep, and compares every number. Every step reads neighbours that other threads wrote.
 */
#include "shohin_runtime.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { COUNT = 61, STRIDE = 64, STEPS = 12 };

static void mix(const float *in, float *out, float shift, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) {
        out[i] = in[i] + in[(i + 7) % COUNT] * 0.5f + shift;
    }
}

#define ARENA(FRAME, INDEX) ((float *)(void *)(FRAME)->arena + (INDEX) * STRIDE)
#define STEP(INDEX)                                                                               \
    static void step_##INDEX(const shohin_frame *frame, int32_t begin, int32_t end) {             \
        mix(ARENA(frame, (INDEX) - 1), ARENA(frame, INDEX), INDEX, begin, end);                   \
    }

static void step_0(const shohin_frame *frame, int32_t begin, int32_t end) {
    mix(frame->inputs[0], ARENA(frame, 0), 0, begin, end);
}
STEP(1)
STEP(2)
STEP(3)
STEP(4)
STEP(5)
STEP(6)
STEP(7)
STEP(8)
STEP(9)
STEP(10)
static void step_11(const shohin_frame *frame, int32_t begin, int32_t end) {
    mix(ARENA(frame, 10), frame->outputs[0], 11, begin, end);
}

static const shohin_step steps[STEPS] = {
    {step_0, COUNT, COUNT, "0"}, {step_1, COUNT, 1, "1"},     {step_2, COUNT, COUNT, "2"},
    {step_3, COUNT, 3, "3"},     {step_4, COUNT, COUNT, "4"}, {step_5, COUNT, 2, "5"},
    {step_6, COUNT, COUNT, "6"}, {step_7, COUNT, COUNT, "7"}, {step_8, COUNT, 1, "8"},
    {step_9, COUNT, COUNT, "9"}, {step_10, COUNT, 5, "10"},   {step_11, COUNT, COUNT, "11"},
};
static const int64_t shape[1] = {COUNT};
static const shohin_tensor_info tensor = {"x", SHOHIN_FLOAT32, 1, shape, COUNT * sizeof(float)};
static const size_t alignment[1] = {64};
static const shohin_model model = {
    .info = {.abi_version = SHOHIN_ABI_VERSION,
             .name = "stress",
             .metadata = "{}",
             .input_count = 1,
             .output_count = 1,
             .inputs = &tensor,
             .outputs = &tensor,
             .arena_bytes = STRIDE * (STEPS - 1) * sizeof(float),
             .step_count = STEPS,
             .batch = 1},
    .steps = steps,
    .constants = "",
    .input_alignment = alignment,
    .output_alignment = alignment,
};
SHOHIN_DEFINE_MODEL(stress, model);

int main(int count, char **arguments) {
    shohin_instance *several, *one;
    if (count != 3 || stress_create(atoi(arguments[1]), &several) || stress_create(1, &one)) {
        return 2;
    }
    static _Alignas(64) float x[STRIDE], found[STRIDE], expected[STRIDE];
    const void *in[1] = {x};
    void *out[1] = {found}, *check[1] = {expected};
    unsigned random = 1;
    for (long run = atol(arguments[2]); run > 0; --run) {
        for (int i = 0; i < COUNT; ++i) {
            random = random * 1664525u + 1013904223u;
            x[i] = (float)(random >> 20);
        }
        if (stress_run(several, in, out) || stress_run(one, in, check)) {
            return 2;
        }
        for (int i = 0; i < COUNT; ++i) {
            if (found[i] != expected[i]) {
                printf("%ld runs before the end, number %d is wrong\n", run, i);
                return 1;
            }
        }
        if (run % 37 == 0) {
            usleep((random >> 25) * 2);
        }
    }
    stress_destroy(several);
    stress_destroy(one);
    return 0;
}
