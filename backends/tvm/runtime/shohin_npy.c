/*
 * shohin_npy.c: reads and writes NumPy's .npy files.
 *
 * A file is: 6 magic bytes, 2 version bytes, the header's length (2 bytes in version 1, else 4),
 * the header, and the elements. The header is a Python dictionary literal:
 * {'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }
 * Files are untrusted: every length is checked before use.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include "shohin_npy.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "elements are read and written as they lie in memory, which must be little endian"
#endif

enum { MAGIC_BYTES = 6, PREAMBLE_ALIGNMENT = 64, HEADER_CAPACITY = 2048 };
static const unsigned char magic[MAGIC_BYTES] = {0x93, 'N', 'U', 'M', 'P', 'Y'};

/* How a type is written in a header, without the byte order. */
typedef struct dtype_code {
    const char *code;
    const char *name;
    size_t bytes;
} dtype_code;

/* Indexed by shohin_dtype. */
static const dtype_code dtype_codes[] = {
    [SHOHIN_FLOAT32] = {"f4", "float32", 4}, [SHOHIN_FLOAT16] = {"f2", "float16", 2},
    [SHOHIN_INT64] = {"i8", "int64", 8},     [SHOHIN_INT32] = {"i4", "int32", 4},
    [SHOHIN_INT16] = {"i2", "int16", 2},     [SHOHIN_INT8] = {"i1", "int8", 1},
    [SHOHIN_UINT8] = {"u1", "uint8", 1},     [SHOHIN_BOOL] = {"b1", "bool", 1},
};

/* Types that are only named in messages. */
static const dtype_code other_codes[] = {
    {"f8", "float64", 8},   {"f16", "float128", 16}, {"u2", "uint16", 2},      {"u4", "uint32", 4},
    {"u8", "uint64", 8},    {"c8", "complex64", 8},  {"c16", "complex128", 16},
};

enum {
    DTYPE_COUNT = sizeof dtype_codes / sizeof dtype_codes[0],
    OTHER_COUNT = sizeof other_codes / sizeof other_codes[0]
};

size_t shohin_dtype_bytes(shohin_dtype dtype) { return dtype_codes[dtype].bytes; }

const char *shohin_dtype_name(shohin_dtype dtype) { return dtype_codes[dtype].name; }

/* ---------------------------------------------------------------- texts */

/* Appends to a text of limited size; what does not fit is cut. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void append(char *text, size_t capacity, const char *format, ...) {
    const size_t length = strlen(text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, capacity - length, format, arguments);
    va_end(arguments);
}

/* Stores "path: message". Always false, for `return fail(...)`. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static bool fail(shohin_npy_error *error, const char *path, const char *format, ...) {
    error->text[0] = '\0';
    append(error->text, sizeof error->text / 2, "%s", path);
    append(error->text, sizeof error->text, ": ");
    const size_t length = strlen(error->text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text + length, sizeof error->text - length, format, arguments);
    va_end(arguments);
    return false;
}

void shohin_npy_format_type(char text[SHOHIN_NPY_TYPE_BYTES], const char *dtype_name, int32_t rank,
                            const int64_t *shape) {
    text[0] = '\0';
    append(text, SHOHIN_NPY_TYPE_BYTES, "%s[", dtype_name);
    for (int32_t axis = 0; axis < rank; ++axis) {
        append(text, SHOHIN_NPY_TYPE_BYTES, "%s%" PRId64, axis > 0 ? "," : "", shape[axis]);
    }
    append(text, SHOHIN_NPY_TYPE_BYTES, "]");
}

/* ---------------------------------------------------------------- parsing the header */

typedef struct parser {
    const char *start;
    const char *next;
    const char *end;
    const char *expected; /* what was missing at `next`, after a failure */
} parser;

/* What the header says. */
typedef struct header {
    bool has_descr, has_order, has_shape;
    char descr[32];
    bool fortran_order;
    int32_t rank;
    int64_t shape[SHOHIN_NPY_MAX_RANK];
} header;

static bool expected(parser *in, const char *what) {
    in->expected = what;
    return false;
}

static void skip_space(parser *in) {
    while (in->next < in->end && (*in->next == ' ' || *in->next == '\n' || *in->next == '\t')) {
        ++in->next;
    }
}

/* Takes a character if it comes next. */
static bool accept(parser *in, char character) {
    skip_space(in);
    if (in->next < in->end && *in->next == character) {
        ++in->next;
        return true;
    }
    return false;
}

/* Takes a word if it comes next. */
static bool accept_word(parser *in, const char *word) {
    const size_t length = strlen(word);
    skip_space(in);
    if ((size_t)(in->end - in->next) >= length && memcmp(in->next, word, length) == 0) {
        in->next += length;
        return true;
    }
    return false;
}

/* A quoted string of printable characters without escapes. */
static bool parse_string(parser *in, char *text, size_t capacity, const char *what) {
    skip_space(in);
    const char quote = in->next < in->end ? *in->next : '\0';
    if (quote != '\'' && quote != '"') {
        return expected(in, what);
    }
    size_t length = 0;
    for (++in->next; in->next < in->end && *in->next != quote; ++in->next) {
        if (*in->next < ' ' || *in->next > '~' || *in->next == '\\' || length + 1 >= capacity) {
            return expected(in, what);
        }
        text[length++] = *in->next;
    }
    text[length] = '\0';
    return accept(in, quote) || expected(in, "a closing quote");
}

static bool parse_integer(parser *in, int64_t *value) {
    skip_space(in);
    const char *first = in->next;
    int64_t sum = 0;
    for (; in->next < in->end && *in->next >= '0' && *in->next <= '9'; ++in->next) {
        const int64_t digit = *in->next - '0';
        if (sum > (INT64_MAX - digit) / 10) {
            return expected(in, "a dimension below 2^63");
        }
        sum = sum * 10 + digit;
    }
    if (in->next == first) {
        return expected(in, "a dimension");
    }
    accept(in, 'L'); /* written by Python 2 */
    *value = sum;
    return true;
}

/* (), (3,) or (3, 4) */
static bool parse_shape(parser *in, header *out) {
    if (!accept(in, '(')) {
        return expected(in, "'('");
    }
    out->rank = 0;
    while (!accept(in, ')')) {
        if (out->rank == SHOHIN_NPY_MAX_RANK) {
            return expected(in, "at most 64 dimensions");
        }
        if (!parse_integer(in, &out->shape[out->rank])) {
            return false;
        }
        ++out->rank;
        if (!accept(in, ',')) {
            return accept(in, ')') || expected(in, "',' or ')'");
        }
    }
    return true;
}

static bool parse_bool(parser *in, bool *value) {
    *value = accept_word(in, "True");
    return *value || accept_word(in, "False") || expected(in, "True or False");
}

/* Each key may occur once. */
static bool claim(parser *in, bool *claimed) {
    if (*claimed) {
        return expected(in, "each key once");
    }
    *claimed = true;
    return true;
}

static bool parse_entry(parser *in, header *out) {
    char key[32];
    if (!parse_string(in, key, sizeof key, "a quoted key")) {
        return false;
    }
    if (!accept(in, ':')) {
        return expected(in, "':'");
    }
    if (strcmp(key, "descr") == 0) {
        return claim(in, &out->has_descr) &&
               parse_string(in, out->descr, sizeof out->descr, "a simple type such as '<f4'");
    }
    if (strcmp(key, "fortran_order") == 0) {
        return claim(in, &out->has_order) && parse_bool(in, &out->fortran_order);
    }
    if (strcmp(key, "shape") == 0) {
        return claim(in, &out->has_shape) && parse_shape(in, out);
    }
    return expected(in, "the keys descr, fortran_order and shape only");
}

static bool parse_header(parser *in, header *out) {
    if (!accept(in, '{')) {
        return expected(in, "'{'");
    }
    while (!accept(in, '}')) {
        if (!parse_entry(in, out)) {
            return false;
        }
        if (!accept(in, ',')) {
            if (accept(in, '}')) {
                break;
            }
            return expected(in, "',' or '}'");
        }
    }
    skip_space(in);
    if (in->next != in->end) {
        return expected(in, "nothing after '}'");
    }
    return (out->has_descr && out->has_order && out->has_shape) ||
           expected(in, "the keys descr, fortran_order and shape");
}

/* ---------------------------------------------------------------- meaning of the header */

static const dtype_code *find_code(const dtype_code *codes, int count, const char *code) {
    for (int i = 0; i < count; ++i) {
        if (strcmp(codes[i].code, code) == 0) {
            return &codes[i];
        }
    }
    return NULL;
}

/* Fills in the type. Unsupported types get a name for messages. */
static void interpret_descr(shohin_npy *file, const char *descr) {
    const bool has_order = descr[0] != '\0' && strchr("<>=|", descr[0]) != NULL;
    const char *code = descr + has_order;
    const dtype_code *known = find_code(dtype_codes, DTYPE_COUNT, code);
    const dtype_code *named = known ? known : find_code(other_codes, OTHER_COUNT, code);
    const bool swapped = descr[0] == '>' && (named == NULL || named->bytes > 1);
    file->supported = known != NULL && !swapped;
    if (file->supported) {
        file->dtype = (shohin_dtype)(known - dtype_codes);
    }
    if (named != NULL) {
        snprintf(file->dtype_name, sizeof file->dtype_name, "%s%s",
                 swapped ? "big-endian " : "", named->name);
    } else {
        snprintf(file->dtype_name, sizeof file->dtype_name, "'%s'", descr);
    }
}

/* False: the size does not fit. */
static bool size_in_bytes(const shohin_npy *file, size_t *bytes) {
    size_t product = shohin_dtype_bytes(file->dtype);
    for (int32_t axis = 0; axis < file->rank; ++axis) {
        const uint64_t dimension = (uint64_t)file->shape[axis];
        if (dimension != 0 && product > SIZE_MAX / 2 / dimension) {
            return false;
        }
        product *= (size_t)dimension;
    }
    *bytes = product;
    return true;
}

/* Compares the announced size with the rest of a regular file (of a pipe it is unknown). */
static bool check_file_size(const shohin_npy *file, shohin_npy_error *error) {
    struct stat status;
    const off_t position = ftello(file->stream);
    if (fstat(fileno(file->stream), &status) != 0 || !S_ISREG(status.st_mode) || position < 0) {
        return true;
    }
    const int64_t rest = (int64_t)status.st_size - (int64_t)position;
    if (rest == (int64_t)file->bytes) {
        return true;
    }
    char type[SHOHIN_NPY_TYPE_BYTES];
    shohin_npy_format_type(type, file->dtype_name, file->rank, file->shape);
    return fail(error, file->path, "expected %zu bytes of data for %s, got %" PRId64, file->bytes,
                type, rest);
}

static bool interpret_header(shohin_npy *file, const header *from, shohin_npy_error *error) {
    interpret_descr(file, from->descr);
    file->rank = from->rank;
    memcpy(file->shape, from->shape, sizeof file->shape);
    if (from->fortran_order && from->rank > 1) {
        return fail(error, file->path,
                    "expected C order, got Fortran order; convert it with "
                    "numpy.save(\"%s\", numpy.ascontiguousarray(numpy.load(\"%s\")))",
                    file->path, file->path);
    }
    if (!file->supported) {
        return true;
    }
    if (!size_in_bytes(file, &file->bytes)) {
        return fail(error, file->path, "expected an array that fits in memory, got a larger shape");
    }
    return check_file_size(file, error);
}

/* ---------------------------------------------------------------- reading */

/* Reads exactly so many bytes. */
static bool read_exactly(shohin_npy *file, void *data, size_t bytes, const char *what,
                         shohin_npy_error *error) {
    const size_t got = fread(data, 1, bytes, file->stream);
    if (got == bytes) {
        return true;
    }
    if (ferror(file->stream)) {
        return fail(error, file->path, "cannot read the %s: %s", what, strerror(errno));
    }
    return fail(error, file->path, "truncated %s: expected %zu bytes, got %zu", what, bytes, got);
}

static bool read_magic(shohin_npy *file, shohin_npy_error *error) {
    unsigned char found[MAGIC_BYTES];
    const size_t count = fread(found, 1, sizeof found, file->stream);
    if (ferror(file->stream)) {
        return fail(error, file->path, "cannot read: %s", strerror(errno));
    }
    if (count == sizeof found && memcmp(found, magic, sizeof magic) == 0) {
        return true;
    }
    char text[64] = "";
    for (size_t i = 0; i < count; ++i) {
        append(text, sizeof text, " %02x", found[i]);
    }
    return fail(error, file->path, "expected a .npy file (first bytes 93 4e 55 4d 50 59), got%s",
                count > 0 ? text : " an empty file");
}

/* Reads the version and the header's length. */
static bool read_preamble(shohin_npy *file, size_t *header_bytes, shohin_npy_error *error) {
    unsigned char version[2];
    unsigned char length[4] = {0};
    if (!read_exactly(file, version, sizeof version, "version", error)) {
        return false;
    }
    if (version[0] < 1 || version[0] > 3 || version[1] != 0) {
        return fail(error, file->path, "expected .npy version 1.0, 2.0 or 3.0, got %d.%d",
                    version[0], version[1]);
    }
    if (!read_exactly(file, length, version[0] == 1 ? 2 : 4, "header length", error)) {
        return false;
    }
    *header_bytes = (size_t)length[0] | (size_t)length[1] << 8 | (size_t)length[2] << 16 |
                    (size_t)length[3] << 24;
    if (*header_bytes > SHOHIN_NPY_MAX_HEADER) {
        return fail(error, file->path, "expected a header of at most %d bytes, got %zu",
                    (int)SHOHIN_NPY_MAX_HEADER, *header_bytes);
    }
    return true;
}

static bool parse_text(shohin_npy *file, const char *text, size_t bytes, shohin_npy_error *error) {
    header parsed = {0};
    parser in = {.start = text, .next = text, .end = text + bytes, .expected = NULL};
    if (!parse_header(&in, &parsed)) {
        return fail(error, file->path, "malformed header: expected %s at byte %td", in.expected,
                    in.next - in.start);
    }
    return interpret_header(file, &parsed, error);
}

static bool read_header(shohin_npy *file, shohin_npy_error *error) {
    size_t bytes = 0;
    if (!read_magic(file, error) || !read_preamble(file, &bytes, error)) {
        return false;
    }
    char *text = malloc(bytes + 1);
    if (text == NULL) {
        return fail(error, file->path, "out of memory");
    }
    const bool good =
        read_exactly(file, text, bytes, "header", error) && parse_text(file, text, bytes, error);
    free(text);
    return good;
}

bool shohin_npy_open(const char *path, shohin_npy *file, shohin_npy_error *error) {
    memset(file, 0, sizeof *file);
    file->path = path;
    file->stream = fopen(path, "rb");
    if (file->stream == NULL) {
        return fail(error, path, "cannot open: %s", strerror(errno));
    }
    if (!read_header(file, error)) {
        shohin_npy_close(file);
        return false;
    }
    return true;
}

bool shohin_npy_read(shohin_npy *file, void *data, shohin_npy_error *error) {
    return read_exactly(file, data, file->bytes, "data", error);
}

void shohin_npy_close(shohin_npy *file) {
    if (file->stream != NULL) {
        fclose(file->stream);
        file->stream = NULL;
    }
}

/* ---------------------------------------------------------------- writing */

/* Everything before the elements, padded so that they begin at a multiple of 64. */
static size_t format_header(char *out, size_t capacity, const dtype_code *code, int32_t rank,
                            const int64_t *shape) {
    const size_t preamble = MAGIC_BYTES + 4;
    char *text = out + preamble;
    const size_t room = capacity - preamble;
    text[0] = '\0';
    append(text, room, "{'descr': '%s%s', 'fortran_order': False, 'shape': (",
           code->bytes > 1 ? "<" : "|", code->code);
    for (int32_t axis = 0; axis < rank; ++axis) {
        append(text, room, "%s%" PRId64, axis > 0 ? ", " : "", shape[axis]);
    }
    append(text, room, rank == 1 ? ",), }" : "), }");
    size_t total = preamble + strlen(text) + 1;
    total += (PREAMBLE_ALIGNMENT - total % PREAMBLE_ALIGNMENT) % PREAMBLE_ALIGNMENT;
    memset(text + strlen(text), ' ', total - 1 - preamble - strlen(text));
    out[total - 1] = '\n';
    memcpy(out, magic, sizeof magic);
    out[MAGIC_BYTES] = 1;
    out[MAGIC_BYTES + 1] = 0;
    out[MAGIC_BYTES + 2] = (char)((total - preamble) & 0xff);
    out[MAGIC_BYTES + 3] = (char)((total - preamble) >> 8);
    return total;
}

/* Creates a new file next to `path`; `name` receives its name. */
static FILE *create_temporary(const char *path, char *name, size_t capacity) {
    snprintf(name, capacity, "%s.%ld.tmp", path, (long)getpid());
    const int descriptor = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor < 0) {
        return NULL;
    }
    FILE *stream = fdopen(descriptor, "wb");
    if (stream == NULL) {
        const int reason = errno;
        close(descriptor);
        unlink(name);
        errno = reason;
    }
    return stream;
}

/* Writes both pieces and closes the stream; false with errno set. */
static bool write_and_close(FILE *stream, const void *head, size_t head_bytes, const void *data,
                            size_t data_bytes) {
    const bool written = fwrite(head, 1, head_bytes, stream) == head_bytes &&
                         fwrite(data, 1, data_bytes, stream) == data_bytes;
    const int reason = errno;
    if (fclose(stream) != 0) {
        return false;
    }
    errno = reason;
    return written;
}

/* Replacing a device or a directory by renaming would be a surprise. */
static bool may_replace(const char *path) {
    struct stat status;
    return stat(path, &status) != 0 || S_ISREG(status.st_mode);
}

static bool write_file(const char *path, const void *head, size_t head_bytes, const void *data,
                       size_t data_bytes, char *temporary, size_t capacity,
                       shohin_npy_error *error) {
    if (!may_replace(path)) {
        return fail(error, path, "cannot write: not a regular file");
    }
    FILE *stream = create_temporary(path, temporary, capacity);
    if (stream == NULL) {
        return fail(error, path, "cannot write: %s", strerror(errno));
    }
    if (!write_and_close(stream, head, head_bytes, data, data_bytes) ||
        rename(temporary, path) != 0) {
        const int reason = errno;
        unlink(temporary);
        return fail(error, path, "cannot write: %s", strerror(reason));
    }
    return true;
}

bool shohin_npy_write(const char *path, shohin_dtype dtype, int32_t rank, const int64_t *shape,
                      const void *data, shohin_npy_error *error) {
    if (rank < 0 || rank > SHOHIN_NPY_MAX_RANK) {
        return fail(error, path, "expected a rank of at most %d, got %d",
                    (int)SHOHIN_NPY_MAX_RANK, (int)rank);
    }
    char head[HEADER_CAPACITY]; /* 64 dimensions of 21 characters fit */
    const dtype_code *code = &dtype_codes[dtype];
    const size_t head_bytes = format_header(head, sizeof head, code, rank, shape);
    size_t bytes = code->bytes;
    for (int32_t axis = 0; axis < rank; ++axis) {
        bytes *= (size_t)shape[axis];
    }
    const size_t capacity = strlen(path) + 32;
    char *temporary = malloc(capacity);
    if (temporary == NULL) {
        return fail(error, path, "out of memory");
    }
    const bool good =
        write_file(path, head, head_bytes, data, bytes, temporary, capacity, error);
    free(temporary);
    return good;
}
