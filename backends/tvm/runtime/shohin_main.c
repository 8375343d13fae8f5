/*
 * shohin_main.c: a command-line program around one model.
 *
 * Compiled with -DSHOHIN_NAME=<name of the model>. See print_usage() for what it does.
 */
#define _POSIX_C_SOURCE 200809L

#include "shohin_npy.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#ifndef SHOHIN_NAME
#error "compile shohin_main.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define MODEL(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)
#define QUOTE_(TEXT) #TEXT
#define QUOTE(TEXT) QUOTE_(TEXT)
#define PROGRAM QUOTE(SHOHIN_NAME)

SHOHIN_DECLARE_MODEL(SHOHIN_NAME);

enum { EXIT_GOOD = 0, EXIT_BAD_INPUT = 1, EXIT_USAGE = 2, EXIT_INTERNAL = 3, EXIT_UNSUITED = 4 };

enum {
    PRINTED_VALUES = 8,
    MAX_BENCHMARK_RUNS = 1000000,
    MAX_PROFILE_RUNS = 1000,
    DEFAULT_PROFILE_RUNS = 20,
    MAX_WARM_UP_RUNS = 10,
    DATA_ALIGNMENT = 64 /* what every kernel is content with */
};

typedef struct options {
    int32_t threads;
    int32_t benchmark; /* runs; 0: not wanted */
    bool profile;
    bool info;
    bool help;
    const char **outputs; /* values of --output */
    int32_t output_count;
    const char **inputs;
    int32_t input_count;
} options;

/* The tensors of one or several batches. */
typedef struct session {
    const shohin_info *info;
    int64_t batches; /* how often the model runs to cover the input */
    void **inputs;   /* all batches of each tensor, one after another */
    void **outputs;
    char **paths; /* where to write the outputs; NULL: print them */
    const void **batch_inputs;
    void **batch_outputs;
    shohin_instance *instance;
} session;

/* ---------------------------------------------------------------- messages */

/* Prints "program: message" and returns the exit code, for `return complain(...)`. */
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static int complain(int code, const char *format, ...) {
    va_list arguments;
    fflush(stdout);
    fputs(PROGRAM ": ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    return code;
}

static int out_of_memory(void) { return complain(EXIT_INTERNAL, "out of memory"); }

static int report_status(const char *action, shohin_status status) {
    const int code =
        status == SHOHIN_UNSUPPORTED_PROCESSOR || status == SHOHIN_NO_DEVICE ? EXIT_UNSUITED
                                                                            : EXIT_INTERNAL;
    return complain(code, "%s: %s", action, MODEL(last_error)());
}

static void print_usage(void) {
    fputs("usage: " PROGRAM " [--threads N] [--benchmark N] [--profile] [--info]\n"
          "       [--output PREFIX | --output FILE.npy ...] INPUT.npy ...\n"
          "\n"
          "Runs the model on one .npy file per input. Without --output it prints the shape and\n"
          "the first values of each output.\n"
          "\n"
          "  --threads N     use N threads; 0, the default, means one per processor\n"
          "  --output VALUE  write the outputs: a VALUE that ends in .npy names the file of one\n"
          "                  output (repeat the option for each output, in order); any other\n"
          "                  VALUE is a prefix: PREFIX_<output>.npy, or PREFIX<output>.npy if it\n"
          "                  ends in /\n"
          "  --benchmark N   print the median, minimum and mean time of N runs, after a warm-up,\n"
          "                  and the most memory that was resident\n"
          "  --profile       print the median time of each step (of N runs with --benchmark N)\n"
          "  --info          print inputs, outputs and memory use\n"
          "  --help          print this text\n"
          "\n"
          "--benchmark and --profile measure one batch; without any INPUT they use zeros.\n"
          "An input may hold several batches along its first axis if the model has a batch axis.\n"
          "Exit code: 0 success, 1 bad input or unwritable output, 2 wrong usage,\n"
          "3 internal error, 4 a processor that lacks instructions.\n",
          stdout);
}

/* ---------------------------------------------------------------- options */

/* Parses a whole number; false if the text is not one in the range. */
static bool parse_number(const char *text, long low, long high, int32_t *out) {
    char *end = NULL;
    errno = 0;
    const long value = strtol(text, &end, 10);
    if (end == text || *end != '\0' || errno != 0 || value < low || value > high) {
        return false;
    }
    *out = (int32_t)value;
    return true;
}

/*
 * If the current argument is the option, with its value behind "=" or as the next argument, stores
 * the value (NULL if there is none) and returns true.
 */
static bool match_option(const char *option, int count, char **arguments, int *index,
                         const char **value) {
    const size_t length = strlen(option);
    const char *argument = arguments[*index];
    if (strncmp(argument, option, length) != 0) {
        return false;
    }
    if (argument[length] == '=') {
        *value = argument + length + 1;
        return true;
    }
    if (argument[length] != '\0') {
        return false;
    }
    *value = *index + 1 < count ? arguments[++*index] : NULL;
    return true;
}

static int number_option(const char *option, const char *value, long low, long high,
                         int32_t *out) {
    if (value == NULL) {
        return complain(EXIT_USAGE, "%s needs a value", option);
    }
    if (!parse_number(value, low, high, out)) {
        return complain(EXIT_USAGE, "%s: expected a number from %ld to %ld, got '%s'", option, low,
                        high, value);
    }
    return EXIT_GOOD;
}

/* The option without a value that the argument is; NULL: none. */
static bool *find_flag(options *out, const char *argument) {
    if (strcmp(argument, "--profile") == 0) {
        return &out->profile;
    }
    if (strcmp(argument, "--info") == 0) {
        return &out->info;
    }
    if (strcmp(argument, "--help") == 0 || strcmp(argument, "-h") == 0) {
        return &out->help;
    }
    return NULL;
}

static int parse_option(options *out, int count, char **arguments, int *index) {
    const char *argument = arguments[*index];
    const char *value = NULL;
    if (match_option("--threads", count, arguments, index, &value)) {
        return number_option("--threads", value, 0, SHOHIN_MAX_THREADS, &out->threads);
    }
    if (match_option("--benchmark", count, arguments, index, &value)) {
        return number_option("--benchmark", value, 1, MAX_BENCHMARK_RUNS, &out->benchmark);
    }
    if (match_option("--output", count, arguments, index, &value)) {
        if (value == NULL) {
            return complain(EXIT_USAGE, "--output needs a value");
        }
        out->outputs[out->output_count++] = value;
        return EXIT_GOOD;
    }
    bool *flag = find_flag(out, argument);
    if (flag == NULL) {
        return complain(EXIT_USAGE, "unknown option '%s'; see " PROGRAM " --help", argument);
    }
    *flag = true;
    return EXIT_GOOD;
}

static int parse_arguments(options *out, int count, char **arguments) {
    bool only_inputs = false;
    for (int index = 1; index < count; ++index) {
        const char *argument = arguments[index];
        if (only_inputs || argument[0] != '-') {
            out->inputs[out->input_count++] = argument;
        } else if (strcmp(argument, "--") == 0) {
            only_inputs = true;
        } else {
            const int code = parse_option(out, count, arguments, &index);
            if (code != EXIT_GOOD) {
                return code;
            }
        }
    }
    return EXIT_GOOD;
}

/* ---------------------------------------------------------------- --info */

static void format_tensor(char text[SHOHIN_NPY_TYPE_BYTES], const shohin_tensor_info *tensor) {
    shohin_npy_format_type(text, shohin_dtype_name(tensor->dtype), tensor->rank, tensor->shape);
}

static void print_tensors(const char *kind, const shohin_tensor_info *tensors, int32_t count) {
    char type[SHOHIN_NPY_TYPE_BYTES];
    for (int32_t i = 0; i < count; ++i) {
        format_tensor(type, &tensors[i]);
        printf("%-9s %s %s\n", kind, tensors[i].name, type);
    }
}

static void print_info(const shohin_info *info) {
    printf("model     %s\n", info->name);
    printf("target    %s\n", info->target);
    print_tensors("input", info->inputs, info->input_count);
    print_tensors("output", info->outputs, info->output_count);
    if (info->batch > 0) {
        printf("batch     %" PRId32 "\n", info->batch);
    }
    printf("steps     %" PRId32 "\n", info->step_count);
    printf("arena     %zu bytes\n", info->arena_bytes);
    printf("constants %zu bytes\n", info->constant_bytes);
    printf("content   %s\n", info->content_hash);
    printf("version   shohin %s\n", info->version);
}

/* ---------------------------------------------------------------- inputs */

/* Uninitialised memory for all batches of a tensor; NULL if there is none. */
static void *allocate_tensor(const shohin_tensor_info *tensor, int64_t batches) {
    void *data = NULL;
    if (tensor->bytes > 0 && (uint64_t)batches > SIZE_MAX / 2 / tensor->bytes) {
        return NULL;
    }
    const size_t bytes = tensor->bytes * (size_t)batches;
    return posix_memalign(&data, DATA_ALIGNMENT, bytes > 0 ? bytes : 1) == 0 ? data : NULL;
}

/* How many batches a file of the right type holds; 0: the shape does not fit. */
static int64_t count_batches(const shohin_npy *file, const shohin_tensor_info *tensor,
                             int32_t batch) {
    if (file->rank != tensor->rank) {
        return 0;
    }
    const int32_t fixed = batch > 0 && tensor->rank > 0 ? 1 : 0; /* the first axis to be equal */
    for (int32_t axis = fixed; axis < tensor->rank; ++axis) {
        if (file->shape[axis] != tensor->shape[axis]) {
            return 0;
        }
    }
    if (fixed == 0) {
        return 1;
    }
    return file->shape[0] % batch == 0 ? file->shape[0] / batch : 0;
}

/* Says what the file should be, what it is, and how to convert it if that is possible. */
static int reject_type(const shohin_npy *file, const shohin_tensor_info *tensor, int32_t batch,
                       bool shape_fits) {
    char wanted[SHOHIN_NPY_TYPE_BYTES];
    char found[SHOHIN_NPY_TYPE_BYTES];
    char multiple[64] = "";
    format_tensor(wanted, tensor);
    shohin_npy_format_type(found, file->dtype_name, file->rank, file->shape);
    if (batch > 0) {
        snprintf(multiple, sizeof multiple, " (or a multiple of %" PRId32 " along axis 0)", batch);
    }
    if (!shape_fits) {
        return complain(EXIT_BAD_INPUT, "%s: expected %s%s, got %s", file->path, wanted, multiple,
                        found);
    }
    return complain(EXIT_BAD_INPUT,
                    "%s: expected %s%s, got %s; convert it with "
                    "numpy.save(\"%s\", numpy.load(\"%s\").astype(\"%s\"))",
                    file->path, wanted, multiple, found, file->path, file->path,
                    shohin_dtype_name(tensor->dtype));
}

/* Checks type and shape, and that all inputs have the same number of batches. */
static int check_input(session *run, const shohin_npy *file, int32_t index) {
    const shohin_tensor_info *tensor = &run->info->inputs[index];
    const int64_t batches = count_batches(file, tensor, run->info->batch);
    if (batches == 0 || !file->supported || file->dtype != tensor->dtype) {
        return reject_type(file, tensor, run->info->batch, batches > 0);
    }
    if (index > 0 && batches != run->batches) {
        return complain(EXIT_BAD_INPUT,
                        "%s: expected %" PRId64 " along axis 0 as in the first input, got %" PRId64,
                        file->path, run->batches * run->info->batch, file->shape[0]);
    }
    run->batches = batches;
    return EXIT_GOOD;
}

static int read_open_input(session *run, shohin_npy *file, int32_t index) {
    shohin_npy_error error;
    const int code = check_input(run, file, index);
    if (code != EXIT_GOOD) {
        return code;
    }
    run->inputs[index] = allocate_tensor(&run->info->inputs[index], run->batches);
    if (run->inputs[index] == NULL) {
        return out_of_memory();
    }
    if (!shohin_npy_read(file, run->inputs[index], &error)) {
        return complain(EXIT_BAD_INPUT, "%s", error.text);
    }
    return EXIT_GOOD;
}

static int read_input(session *run, const char *path, int32_t index) {
    shohin_npy file;
    shohin_npy_error error;
    if (!shohin_npy_open(path, &file, &error)) {
        return complain(EXIT_BAD_INPUT, "%s", error.text);
    }
    const int code = read_open_input(run, &file, index);
    shohin_npy_close(&file);
    return code;
}

static int make_zero_input(session *run, int32_t index) {
    run->batches = 1;
    run->inputs[index] = allocate_tensor(&run->info->inputs[index], 1);
    if (run->inputs[index] == NULL) {
        return out_of_memory();
    }
    memset(run->inputs[index], 0, run->info->inputs[index].bytes);
    return EXIT_GOOD;
}

static int load_inputs(session *run, const options *from) {
    const bool zeros = from->input_count == 0;
    int code = EXIT_GOOD;
    run->batches = 1;
    for (int32_t i = 0; code == EXIT_GOOD && i < run->info->input_count; ++i) {
        code = zeros ? make_zero_input(run, i) : read_input(run, from->inputs[i], i);
    }
    return code;
}

/* ---------------------------------------------------------------- outputs */

/* The whole output's shape: axis 0 covers all batches. */
static void output_shape(const session *run, int32_t index, int64_t shape[SHOHIN_NPY_MAX_RANK]) {
    const shohin_tensor_info *tensor = &run->info->outputs[index];
    if (tensor->rank > 0) {
        memcpy(shape, tensor->shape, (size_t)tensor->rank * sizeof *shape);
        shape[0] *= run->batches;
    }
}

static float half_to_float(uint16_t half) {
    const int exponent = half >> 10 & 31;
    const int fraction = half & 1023;
    const float sign = half >> 15 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return fraction ? NAN : sign * INFINITY;
    }
    float value = (float)(exponent ? fraction + 1024 : fraction);
    for (int power = exponent ? exponent - 25 : -24; power != 0; power += power < 0 ? 1 : -1) {
        value = power < 0 ? value * 0.5f : value * 2.0f; /* exact, and needs no libm */
    }
    return sign * value;
}

#define ELEMENT(TYPE, DATA, INDEX) (((const TYPE *)(DATA))[INDEX])

static void print_value(const void *data, size_t index, shohin_dtype dtype) {
    switch (dtype) {
    case SHOHIN_FLOAT32:
        printf(" %.9g", (double)ELEMENT(float, data, index));
        break;
    case SHOHIN_FLOAT16:
        printf(" %.9g", (double)half_to_float(ELEMENT(uint16_t, data, index)));
        break;
    case SHOHIN_INT64:
        printf(" %" PRId64, ELEMENT(int64_t, data, index));
        break;
    case SHOHIN_INT32:
        printf(" %" PRId32, ELEMENT(int32_t, data, index));
        break;
    case SHOHIN_INT16:
        printf(" %d", (int)ELEMENT(int16_t, data, index));
        break;
    case SHOHIN_INT8:
        printf(" %d", (int)ELEMENT(int8_t, data, index));
        break;
    case SHOHIN_UINT8:
    case SHOHIN_BOOL:
        printf(" %d", (int)ELEMENT(uint8_t, data, index));
        break;
    }
}

static void print_output(const session *run, int32_t index) {
    const shohin_tensor_info *tensor = &run->info->outputs[index];
    const size_t count =
        tensor->bytes / shohin_dtype_bytes(tensor->dtype) * (size_t)run->batches;
    int64_t shape[SHOHIN_NPY_MAX_RANK];
    char type[SHOHIN_NPY_TYPE_BYTES];
    output_shape(run, index, shape);
    shohin_npy_format_type(type, shohin_dtype_name(tensor->dtype), tensor->rank, shape);
    printf("%s %s:", tensor->name, type);
    for (size_t i = 0; i < count && i < PRINTED_VALUES; ++i) {
        print_value(run->outputs[index], i, tensor->dtype);
    }
    puts(count > PRINTED_VALUES ? " ..." : "");
}

static int emit_output(const session *run, int32_t index) {
    const shohin_tensor_info *tensor = &run->info->outputs[index];
    int64_t shape[SHOHIN_NPY_MAX_RANK];
    shohin_npy_error error;
    if (run->paths == NULL) {
        print_output(run, index);
        return EXIT_GOOD;
    }
    output_shape(run, index, shape);
    if (!shohin_npy_write(run->paths[index], tensor->dtype, tensor->rank, shape,
                          run->outputs[index], &error)) {
        return complain(EXIT_BAD_INPUT, "%s", error.text);
    }
    return EXIT_GOOD;
}

static bool names_a_file(const char *value) {
    const size_t length = strlen(value);
    return length >= 4 && strcmp(value + length - 4, ".npy") == 0;
}

/* "prefix_name.npy"; characters of the name that do not suit a file name become "_". */
static char *join_path(const char *prefix, const char *name) {
    const size_t length = strlen(prefix);
    const char *separator = length > 0 && prefix[length - 1] != '/' ? "_" : "";
    const size_t capacity = length + strlen(name) + 8;
    char *path = malloc(capacity);
    if (path == NULL) {
        return NULL;
    }
    snprintf(path, capacity, "%s%s%s.npy", prefix, separator, name);
    for (char *letter = path + length; *letter != '\0'; ++letter) {
        if (*letter == '/' || *letter == '\\' || *letter == ':' || (*letter > 0 && *letter < '!')) {
            *letter = '_';
        }
    }
    return path;
}

static bool is_prefix_form(const options *from) {
    return from->output_count == 1 && !names_a_file(from->outputs[0]);
}

static int check_output_options(const shohin_info *info, const options *from) {
    if (from->output_count == 0 || is_prefix_form(from)) {
        return EXIT_GOOD;
    }
    for (int32_t i = 0; i < from->output_count; ++i) {
        if (!names_a_file(from->outputs[i])) {
            return complain(EXIT_USAGE,
                            "--output: expected one prefix or only .npy files, got '%s'",
                            from->outputs[i]);
        }
    }
    if (from->output_count != info->output_count) {
        return complain(EXIT_USAGE,
                        "expected --output %" PRId32 " times, once per output, got %" PRId32,
                        info->output_count, from->output_count);
    }
    return EXIT_GOOD;
}

/* Outputs must not overwrite each other. */
static int check_distinct_paths(const session *run) {
    for (int32_t i = 1; i < run->info->output_count; ++i) {
        for (int32_t j = 0; j < i; ++j) {
            if (strcmp(run->paths[i], run->paths[j]) == 0) {
                return complain(EXIT_USAGE, "--output: two outputs would be written to '%s'",
                                run->paths[i]);
            }
        }
    }
    return EXIT_GOOD;
}

static void *allocate_table(int32_t count, size_t element_bytes) {
    return calloc(count > 0 ? (size_t)count : 1, element_bytes);
}

static int choose_paths(session *run, const options *from) {
    if (from->output_count == 0) {
        return EXIT_GOOD;
    }
    run->paths = allocate_table(run->info->output_count, sizeof *run->paths);
    if (run->paths == NULL) {
        return out_of_memory();
    }
    for (int32_t i = 0; i < run->info->output_count; ++i) {
        run->paths[i] = is_prefix_form(from)
                            ? join_path(from->outputs[0], run->info->outputs[i].name)
                            : strdup(from->outputs[i]);
        if (run->paths[i] == NULL) {
            return out_of_memory();
        }
    }
    return check_distinct_paths(run);
}

/* ---------------------------------------------------------------- running */

/* Points the batch pointers at the given batch. */
static void select_batch(session *run, int64_t batch) {
    for (int32_t i = 0; i < run->info->input_count; ++i) {
        run->batch_inputs[i] =
            (const char *)run->inputs[i] + run->info->inputs[i].bytes * (size_t)batch;
    }
    for (int32_t i = 0; i < run->info->output_count; ++i) {
        run->batch_outputs[i] =
            (char *)run->outputs[i] + run->info->outputs[i].bytes * (size_t)batch;
    }
}

static shohin_status run_once(session *run) {
    return MODEL(run)(run->instance, run->batch_inputs, run->batch_outputs);
}

static int compute(session *run) {
    for (int64_t batch = 0; batch < run->batches; ++batch) {
        select_batch(run, batch);
        const shohin_status status = run_once(run);
        if (status != SHOHIN_OK) {
            return report_status("run", status);
        }
    }
    for (int32_t i = 0; i < run->info->output_count; ++i) {
        const int code = emit_output(run, i);
        if (code != EXIT_GOOD) {
            return code;
        }
    }
    return EXIT_GOOD;
}

static double now_milliseconds(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e3 + (double)time.tv_nsec * 1e-6;
}

static int compare_doubles(const void *left, const void *right) {
    const double a = *(const double *)left;
    const double b = *(const double *)right;
    return (a > b) - (a < b);
}

/* Sorts the samples. */
static double median(double *samples, int32_t count) {
    qsort(samples, (size_t)count, sizeof *samples, compare_doubles);
    return (samples[(count - 1) / 2] + samples[count / 2]) * 0.5;
}

/* Runs a few times so that memory, caches and threads are warm. */
static shohin_status warm_up(session *run, int32_t runs) {
    shohin_status status = SHOHIN_OK;
    select_batch(run, 0);
    for (int32_t i = 0; status == SHOHIN_OK && i < runs && i < MAX_WARM_UP_RUNS; ++i) {
        status = run_once(run);
    }
    return status;
}

static shohin_status time_runs(session *run, double *samples, int32_t runs) {
    shohin_status status = warm_up(run, runs);
    for (int32_t i = 0; status == SHOHIN_OK && i < runs; ++i) {
        const double start = now_milliseconds();
        status = run_once(run);
        samples[i] = now_milliseconds() - start;
    }
    return status;
}

static void print_times(double *samples, int32_t runs) {
    double sum = 0;
    for (int32_t i = 0; i < runs; ++i) {
        sum += samples[i];
    }
    const double middle = median(samples, runs);
    printf("runs      %" PRId32 "\n", runs);
    printf("median    %.6f ms\n", middle);
    printf("minimum   %.6f ms\n", samples[0]);
    printf("mean      %.6f ms\n", sum / runs);
}

/* The most memory that was resident at once, in KiB; 0 where the system does not say. */
static long peak_memory(void) {
    char line[128];
    long kilobytes = 0;
    FILE *file = fopen("/proc/self/status", "r");
    if (file == NULL) {
        return 0;
    }
    while (kilobytes == 0 && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, "VmHWM:", 6) == 0) {
            kilobytes = strtol(line + 6, NULL, 10);
        }
    }
    fclose(file);
    return kilobytes;
}

static int benchmark(session *run, int32_t runs) {
    double *samples = allocate_table(runs, sizeof *samples);
    if (samples == NULL) {
        return out_of_memory();
    }
    const shohin_status status = time_runs(run, samples, runs);
    if (status == SHOHIN_OK) {
        print_times(samples, runs);
        const long memory = peak_memory();
        if (memory > 0) {
            printf("memory    %ld KiB at most\n", memory);
        }
    }
    free(samples);
    return status == SHOHIN_OK ? EXIT_GOOD : report_status("benchmark", status);
}

/* Stores the samples of a step next to each other; `row` has room for one run. */
static shohin_status time_steps(session *run, double *samples, double *row, int32_t runs) {
    const int32_t steps = run->info->step_count;
    shohin_status status = warm_up(run, runs);
    for (int32_t i = 0; status == SHOHIN_OK && i < runs; ++i) {
        status = MODEL(profile)(run->instance, run->batch_inputs, run->batch_outputs, row);
        for (int32_t step = 0; step < steps; ++step) {
            samples[(size_t)step * (size_t)runs + (size_t)i] = row[step];
        }
    }
    return status;
}

static void print_profile(double *samples, double *medians, int32_t steps, int32_t runs) {
    double total = 0;
    for (int32_t step = 0; step < steps; ++step) {
        medians[step] = median(samples + (size_t)step * (size_t)runs, runs);
        total += medians[step];
    }
    printf("%5s  %12s  %6s  %s\n", "step", "ms", "share", "label");
    for (int32_t step = 0; step < steps; ++step) {
        const double share = total > 0 ? 100 * medians[step] / total : 0;
        printf("%5" PRId32 "  %12.6f  %5.1f%%  %s\n", step, medians[step], share,
               MODEL(step_label)(step));
    }
    printf("%5s  %12.6f  %5.1f%%  %" PRId32 " steps, median of %" PRId32 " runs\n", "total", total,
           100.0, steps, runs);
}

static int profile(session *run, int32_t wanted_runs) {
    const int32_t limited = wanted_runs < MAX_PROFILE_RUNS ? wanted_runs : MAX_PROFILE_RUNS;
    const int32_t runs = wanted_runs > 0 ? limited : DEFAULT_PROFILE_RUNS;
    const int32_t steps = run->info->step_count;
    double *row = allocate_table(steps, sizeof *row);
    double *samples = allocate_table(steps, (size_t)runs * sizeof *samples);
    int code = EXIT_GOOD;
    if (row == NULL || samples == NULL) {
        code = out_of_memory();
    } else {
        const shohin_status status = time_steps(run, samples, row, runs);
        if (status == SHOHIN_OK) {
            print_profile(samples, row, steps, runs);
        } else {
            code = report_status("profile", status);
        }
    }
    free(row);
    free(samples);
    return code;
}

/* ---------------------------------------------------------------- putting it together */

static int allocate_session(session *run) {
    const int32_t inputs = run->info->input_count;
    const int32_t outputs = run->info->output_count;
    run->inputs = allocate_table(inputs, sizeof *run->inputs);
    run->outputs = allocate_table(outputs, sizeof *run->outputs);
    run->batch_inputs = allocate_table(inputs, sizeof *run->batch_inputs);
    run->batch_outputs = allocate_table(outputs, sizeof *run->batch_outputs);
    return run->inputs != NULL && run->outputs != NULL && run->batch_inputs != NULL &&
                   run->batch_outputs != NULL
               ? EXIT_GOOD
               : out_of_memory();
}

static void free_table(void **table, int32_t count) {
    for (int32_t i = 0; table != NULL && i < count; ++i) {
        free(table[i]);
    }
    free(table);
}

static void free_session(session *run) {
    MODEL(destroy)(run->instance);
    free_table(run->inputs, run->info->input_count);
    free_table(run->outputs, run->info->output_count);
    free_table((void **)run->paths, run->info->output_count);
    free((void *)run->batch_inputs);
    free(run->batch_outputs);
}

static int allocate_outputs(session *run) {
    for (int32_t i = 0; i < run->info->output_count; ++i) {
        run->outputs[i] = allocate_tensor(&run->info->outputs[i], run->batches);
        if (run->outputs[i] == NULL) {
            return out_of_memory();
        }
    }
    return EXIT_GOOD;
}

static int prepare(session *run, const options *from) {
    int code = allocate_session(run);
    code = code == EXIT_GOOD ? choose_paths(run, from) : code;
    code = code == EXIT_GOOD ? load_inputs(run, from) : code;
    code = code == EXIT_GOOD ? allocate_outputs(run) : code;
    if (code != EXIT_GOOD) {
        return code;
    }
    const shohin_status status = MODEL(create)(from->threads, &run->instance);
    return status == SHOHIN_OK ? EXIT_GOOD : report_status("create", status);
}

static int execute(session *run, const options *from) {
    const bool measure = from->benchmark > 0 || from->profile;
    int code = prepare(run, from);
    if (code == EXIT_GOOD && (!measure || from->output_count > 0)) {
        code = compute(run);
    }
    if (code == EXIT_GOOD && from->benchmark > 0) {
        code = benchmark(run, from->benchmark);
    }
    if (code == EXIT_GOOD && from->profile) {
        code = profile(run, from->benchmark);
    }
    return code;
}

/* Zeros will do for measuring; otherwise there must be one file per input. */
static int check_input_count(const shohin_info *info, const options *from) {
    const bool measure_only =
        (from->benchmark > 0 || from->profile) && from->output_count == 0;
    if (from->input_count == info->input_count || (from->input_count == 0 && measure_only)) {
        return EXIT_GOOD;
    }
    return complain(EXIT_USAGE,
                    "expected %" PRId32 " input file%s, got %" PRId32 "; see " PROGRAM " --help",
                    info->input_count, info->input_count == 1 ? "" : "s", from->input_count);
}

static int run_command(const options *from) {
    const shohin_info *info = MODEL(info)();
    if (from->help) {
        print_usage();
        return EXIT_GOOD;
    }
    if (from->info) {
        print_info(info);
        if (from->input_count == 0 && from->benchmark == 0 && !from->profile) {
            return EXIT_GOOD; /* --info alone; otherwise it adds to the rest */
        }
    }
    int code = check_input_count(info, from);
    code = code == EXIT_GOOD ? check_output_options(info, from) : code;
    if (code != EXIT_GOOD) {
        return code;
    }
    session run = {.info = info};
    code = execute(&run, from);
    free_session(&run);
    return code;
}

/* Output that got lost, on a full disk for example, must not look like success. */
static int finish_output(int code) {
    const bool good = fflush(stdout) == 0 && ferror(stdout) == 0;
    return good || code != EXIT_GOOD ? code
                                     : complain(EXIT_BAD_INPUT, "cannot write the output: %s",
                                                strerror(errno));
}

int main(int count, char **arguments) {
    options parsed = {0};
    int code = EXIT_INTERNAL;
    parsed.outputs = allocate_table(count, sizeof *parsed.outputs);
    parsed.inputs = allocate_table(count, sizeof *parsed.inputs);
    if (parsed.outputs == NULL || parsed.inputs == NULL) {
        code = out_of_memory();
    } else {
        code = parse_arguments(&parsed, count, arguments);
        code = code == EXIT_GOOD ? run_command(&parsed) : code;
    }
    free((void *)parsed.outputs);
    free((void *)parsed.inputs);
    return finish_output(code);
}
