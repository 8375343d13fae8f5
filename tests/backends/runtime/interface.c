/*
 * Calls every function of the interface of the stub model in stub_models.py, well and badly, from
 * several threads at once. Built with sanitizers, which look for leaks, races with freed memory and
 * undefined behaviour. Exit code 0: all was as it should be.
 */
#include "shohin.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

SHOHIN_DECLARE_MODEL(net);

enum { ROWS = 4, COLUMNS = 67, THREADS = 4, ROUNDS = 50, CREATIONS = 10000 };

#define CHECK(CONDITION)                                                   \
    do {                                                                   \
        if (!(CONDITION)) {                                                \
            fprintf(stderr, "line %d: %s\n", __LINE__, #CONDITION);        \
            return 1;                                                      \
        }                                                                  \
    } while (0)

typedef struct buffers {
    float x[ROWS * COLUMNS], y[ROWS * COLUMNS], z[ROWS * COLUMNS], sum[ROWS];
    char misaligned[sizeof(float) * ROWS * COLUMNS + 1];
} buffers;

static const size_t input_bytes[] = {sizeof(float) * ROWS * COLUMNS};
static const size_t output_bytes[] = {sizeof(float) * ROWS * COLUMNS,
                                      sizeof(float) * ROWS * COLUMNS, sizeof(float) * ROWS};

static int is_right(const buffers *data) {
    for (int row = 0; row < ROWS; ++row) {
        float sum = 0;
        for (int i = 0; i < COLUMNS; ++i) {
            const float expected = 2.0f * data->x[row * COLUMNS + i] + 1.0f;
            CHECK(data->y[row * COLUMNS + i] == expected);
            sum += expected;
        }
        CHECK(data->sum[row] == sum);
    }
    return 0;
}

static int use_well(shohin_instance *instance, buffers *data) {
    const void *inputs[] = {data->x};
    void *outputs[] = {data->y, data->z, data->sum};
    double milliseconds[16];
    CHECK(net_run(instance, inputs, outputs) == SHOHIN_OK);
    CHECK(is_right(data) == 0);
    memset(data->y, 0, sizeof data->y);
    CHECK(net_run_sized(instance, inputs, input_bytes, outputs, output_bytes) == SHOHIN_OK);
    CHECK(is_right(data) == 0);
    CHECK(net_info()->step_count <= 16);
    CHECK(net_profile(instance, inputs, outputs, milliseconds) == SHOHIN_OK);
    memcpy(data->misaligned + 1, data->x, sizeof data->x);
    inputs[0] = data->misaligned + 1;
    memset(data->y, 0, sizeof data->y);
    CHECK(net_run(instance, inputs, outputs) == SHOHIN_OK);
    return is_right(data);
}

static int use_badly(shohin_instance *instance, buffers *data) {
    const void *inputs[] = {data->x};
    void *outputs[] = {data->y, NULL, data->sum};
    const size_t short_bytes[] = {input_bytes[0] - 1};
    CHECK(net_create(1, NULL) == SHOHIN_INVALID_ARGUMENT);
    CHECK(net_run(NULL, inputs, outputs) == SHOHIN_INVALID_ARGUMENT);
    CHECK(net_run(instance, NULL, outputs) == SHOHIN_INVALID_ARGUMENT);
    CHECK(net_run(instance, inputs, outputs) == SHOHIN_INVALID_ARGUMENT);
    CHECK(strcmp(net_last_error(), "the pointer of output 'z' is NULL") == 0);
    outputs[1] = data->z;
    CHECK(net_profile(instance, inputs, outputs, NULL) == SHOHIN_INVALID_ARGUMENT);
    CHECK(net_run_sized(instance, inputs, short_bytes, outputs, output_bytes) == SHOHIN_WRONG_SIZE);
    CHECK(strcmp(net_last_error(), "input 'x': expected 1072 bytes, got 1071") == 0);
    CHECK(net_step_label(-1) == NULL && net_step_label(1000) == NULL);
    for (int status = 0; status < 20; ++status) {
        CHECK(net_status_text((shohin_status)status)[0] != '\0');
    }
    return 0;
}

static int use(void) {
    static _Thread_local buffers data;
    for (int i = 0; i < ROWS * COLUMNS; ++i) {
        data.x[i] = (float)(i % 19 - 9);
    }
    for (int round = 0; round < ROUNDS; ++round) {
        shohin_instance *instance = NULL;
        CHECK(net_create(1 + round % 3, &instance) == SHOHIN_OK);
        CHECK(use_well(instance, &data) == 0);
        CHECK(use_badly(instance, &data) == 0);
        CHECK(use_well(instance, &data) == 0);
        net_destroy(instance);
    }
    net_destroy(NULL);
    return 0;
}

static void *use_in_thread(void *failed) {
    *(int *)failed = use();
    return NULL;
}

/* What every creation lost a little of would be found by the leak checker at the end. */
static int create_often(void) {
    static buffers data;
    const void *inputs[] = {data.x};
    void *outputs[] = {data.y, data.z, data.sum};
    for (int i = 0; i < CREATIONS; ++i) {
        shohin_instance *instance = NULL;
        CHECK(net_create(1 + (i % 100 == 0), &instance) == SHOHIN_OK);
        if (i % 10 == 0) {
            CHECK(net_run(instance, inputs, outputs) == SHOHIN_OK);
        }
        net_destroy(instance);
    }
    return 0;
}

int main(void) {
    pthread_t threads[THREADS];
    int failed[THREADS] = {0};
    CHECK(net_info()->abi_version == SHOHIN_ABI_VERSION);
    CHECK(strcmp(net_info()->content_hash, "c0ffee") == 0);
    for (int i = 0; i < THREADS; ++i) {
        CHECK(pthread_create(&threads[i], NULL, use_in_thread, &failed[i]) == 0);
    }
    for (int i = 0; i < THREADS; ++i) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(failed[i] == 0);
    }
    return create_often();
}
