/*
 * deploy_soak.c: runs the model "net" a million times on four instances at once, then creates and
 * destroys instances ten thousand times. Prints how many outputs differed from the first one, and
 * the resident memory before and after: "what,times,wrong,KB before,KB after", before being when a
 * tenth is done.
 */
#include "net.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INSTANCES = 4, RUNS = 1000000, CREATIONS = 10000 };

typedef struct worker {
    pthread_t thread;
    long runs, wrong;
} worker;

static float *input, *expected;

/* Without pages of the program's file, which come as code is run for the first time. */
static long resident_kilobytes(void) {
    char line[256];
    long found = -1;
    FILE *file = fopen("/proc/self/status", "r");
    while (file != NULL && found < 0 && fgets(line, sizeof line, file) != NULL) {
        (void)sscanf(line, "RssAnon: %ld kB", &found);
    }
    if (file == NULL || found < 0) {
        exit(1);
    }
    fclose(file);
    return found;
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

/* Between the parts of the runs, where nothing is allocated or freed. */
static pthread_barrier_t pause_;

static void run_many(worker *self, shohin_instance *instance, float *output, long runs) {
    const size_t bytes = net_info()->outputs[0].bytes;
    for (long i = 0; i < runs; ++i) {
        memset(output, 0xff, bytes);
        run(instance, output);
        self->wrong += memcmp(output, expected, bytes) != 0;
    }
}

static void *work(void *argument) {
    worker *self = argument;
    float *output = allocate(net_info()->outputs[0].bytes);
    shohin_instance *instance;
    check(net_create(1, &instance));
    run_many(self, instance, output, self->runs / 10);
    pthread_barrier_wait(&pause_);
    pthread_barrier_wait(&pause_);
    run_many(self, instance, output, self->runs - self->runs / 10);
    pthread_barrier_wait(&pause_);
    pthread_barrier_wait(&pause_);
    net_destroy(instance);
    free(output);
    return NULL;
}

/* Resident memory at a moment when all workers wait. */
static long resident_in_pause(void) {
    pthread_barrier_wait(&pause_);
    const long found = resident_kilobytes();
    pthread_barrier_wait(&pause_);
    return found;
}

static void run_all(long runs) {
    worker workers[INSTANCES] = {0};
    long wrong = 0;
    if (pthread_barrier_init(&pause_, NULL, INSTANCES + 1) != 0) {
        exit(1);
    }
    for (int i = 0; i < INSTANCES; ++i) {
        workers[i].runs = runs / INSTANCES;
        if (pthread_create(&workers[i].thread, NULL, work, &workers[i]) != 0) {
            exit(1);
        }
    }
    const long before = resident_in_pause(), after = resident_in_pause();
    for (int i = 0; i < INSTANCES; ++i) {
        pthread_join(workers[i].thread, NULL);
        wrong += workers[i].wrong;
    }
    printf("runs,%ld,%ld,%ld,%ld\n", runs, wrong, before, after);
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

static void create_and_report(long times) {
    create_all(times / 10); /* What is allocated once is there then. */
    const long before = resident_kilobytes();
    const long wrong = create_all(times);
    printf("instances,%ld,%ld,%ld,%ld\n", times, wrong, before, resident_kilobytes());
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
    run_all(RUNS);
    create_and_report(CREATIONS);
    return 0;
}
