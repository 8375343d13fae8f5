/*
 * deploy_soak.c: runs the model "net" a million times on four instances at once, then creates and
 * destroys instances ten thousand times. Prints how many outputs differed from the first one, and
 * the resident memory before and after: "what,times,wrong,KB before,KB after".
 */
#include "net.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { INSTANCES = 4, RUNS = 1000000, CREATIONS = 10000 };

typedef struct worker {
    pthread_t thread;
    long runs, wrong;
} worker;

static float *input, *expected;

static long resident_kilobytes(void) {
    long pages = 0, resident = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (file == NULL || fscanf(file, "%ld %ld", &pages, &resident) != 2) {
        exit(1);
    }
    fclose(file);
    return resident * (sysconf(_SC_PAGESIZE) / 1024);
}

static void check(shohin_status status) {
    if (status != SHOHIN_OK) {
        fprintf(stderr, "soak: %s\n", net_last_error());
        exit(1);
    }
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes);
    return memory != NULL ? memory : (exit(1), NULL);
}

static void run(shohin_instance *instance, float *output) {
    const void *inputs[] = {input};
    void *outputs[] = {output};
    check(net_run(instance, inputs, outputs));
}

static void *work(void *argument) {
    worker *self = argument;
    const size_t bytes = net_info()->outputs[0].bytes;
    float *output = allocate(bytes);
    shohin_instance *instance;
    check(net_create(1, &instance));
    for (long i = 0; i < self->runs; ++i) {
        memset(output, 0xff, bytes);
        run(instance, output);
        self->wrong += memcmp(output, expected, bytes) != 0;
    }
    net_destroy(instance);
    free(output);
    return NULL;
}

static long run_all(long runs) {
    worker workers[INSTANCES] = {0};
    long wrong = 0;
    for (int i = 0; i < INSTANCES; ++i) {
        workers[i].runs = runs / INSTANCES;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) {
            exit(1);
        }
    }
    for (int i = 0; i < INSTANCES; ++i) {
        pthread_join(workers[i].thread, NULL);
        wrong += workers[i].wrong;
    }
    return wrong;
}

static long create_all(long times) {
    const size_t bytes = net_info()->outputs[0].bytes;
    float *output = allocate(bytes);
    long wrong = 0;
    for (long i = 0; i < times; ++i) {
        shohin_instance *instance;
        check(net_create((int32_t)(1 + i % 3), &instance));
        run(instance, output);
        wrong += memcmp(output, expected, bytes) != 0;
        net_destroy(instance);
    }
    free(output);
    return wrong;
}

static void report(const char *what, long (*function)(long), long times) {
    function(times / 10); /* What is allocated once is there then. */
    const long before = resident_kilobytes();
    const long wrong = function(times);
    printf("%s,%ld,%ld,%ld,%ld\n", what, times, wrong, before, resident_kilobytes());
}

int main(void) {
    const shohin_info *info = net_info();
    input = allocate(info->inputs[0].bytes);
    expected = allocate(info->outputs[0].bytes);
    for (size_t i = 0; i < info->inputs[0].bytes / sizeof *input; ++i) {
        input[i] = (float)(i % 13) - 6.0f;
    }
    shohin_instance *instance;
    check(net_create(1, &instance));
    run(instance, expected);
    net_destroy(instance);
    report("runs", run_all, RUNS);
    report("instances", create_all, CREATIONS);
    return 0;
}
