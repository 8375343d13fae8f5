/*
 * shohin_decode.c: makes the weights of a model from their coded form.
 *
 * The coded weights are jobs, each after its length, a varint. Jobs write to different places, so
 * threads share them; the longest come first. What a job looks like says
 * backends/tvm/weights/arrays.py; how symbols are coded, docs/format.md.
 *
 * Everything read is checked before it is used: damaged weights are refused, and no byte outside
 * of what is given is read or written.
 */
#if defined(__linux__)
#define _GNU_SOURCE
#else
#define _POSIX_C_SOURCE 200809L
#endif

#include "shohin_runtime.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#ifndef SHOHIN_NAME
#error "compile shohin_decode.c with -DSHOHIN_NAME=<name of the model>"
#endif

#define JOIN_(NAME, SUFFIX) NAME##_shohin_##SUFFIX
#define JOIN(NAME, SUFFIX) JOIN_(NAME, SUFFIX)
#define RUNTIME(SUFFIX) JOIN(SHOHIN_NAME, SUFFIX)

SHOHIN_DECLARE_RUNTIME(SHOHIN_NAME);

enum {
    MOST_SYMBOLS = 256,
    /* Symbols that are decoded at a time; a chunk of a Huffman stream. */
    BATCH = 2048,
    HUFFMAN_BITS = 12,
    HUFFMAN_WINDOWS = 1 << HUFFMAN_BITS,
    MOST_GROUP_LOG2 = 3, /* of the symbols that share a Huffman code */
    CODER_BITS = 2,
    ANS_BITS = 24,
    /* The highest bits of a number that say about which symbol it is. */
    ANS_GUESS_BITS = 10,
    ANS_LEVELS = 63,
    PAIR_LISTS = 3,
    MOST_TAPS = 1 << 16,
    MOST_PLACES_LOG2 = 34, /* of all lists of a layer: bounds the time that damaged ones take */
    /* Coded bytes below which threads are not worth starting. */
    FEW_BYTES = 1 << 16,
    STACK_BYTES = 1 << 20
};

typedef enum coder { PLAIN = 0, HUFFMAN = 1, ANS = 2 } coder;

typedef enum job_kind { RAW = 0, INDEXED = 1, SCATTERED = 2, LISTS = 3, WORDS = 4 } job_kind;

/* ---------------------------------------------------------------- reading */

/* What is left of some bytes. Once something is missing, `good` is false and all that follows 0. */
typedef struct reader {
    const unsigned char *at;
    const unsigned char *end;
    bool good;
} reader;

static size_t bytes_left(const reader *from) { return (size_t)(from->end - from->at); }

static const unsigned char *take(reader *from, uint64_t count) {
    if (!from->good || count > bytes_left(from)) {
        from->good = false;
        return NULL;
    }
    const unsigned char *found = from->at;
    from->at += count;
    return found;
}

static unsigned take_byte(reader *from) {
    const unsigned char *found = take(from, 1);
    return found == NULL ? 0 : *found;
}

static uint64_t take_varint(reader *from) {
    uint64_t number = 0;
    for (unsigned shift = 0; shift < 63; shift += 7) {
        const unsigned byte = take_byte(from);
        number |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            return number;
        }
    }
    from->good = false;
    return 0;
}

/* A number up to `most`. */
static uint64_t take_number(reader *from, uint64_t most) {
    const uint64_t number = take_varint(from);
    if (number > most) {
        from->good = false;
        return 0;
    }
    return number;
}

/* Numbers of a few bits, the lowest first; reads bytes that `bits * (index + 1)` bits reach. */
static unsigned packed_number(const unsigned char *packed, unsigned bits, uint64_t index) {
    const uint64_t place = index * bits;
    const unsigned char *first = packed + place / 8;
    unsigned window = first[0];
    if (place % 8 + bits > 8) {
        window |= (unsigned)first[1] << 8;
    }
    return window >> place % 8 & ((1u << bits) - 1);
}

static uint64_t packed_bytes(uint64_t count, unsigned bits) { return (count * bits + 7) / 8; }

/* ---------------------------------------------------------------- symbols */

/* A stream of symbols, decoded a batch at a time. */
typedef struct symbols {
    coder kind;
    unsigned alphabet;
    unsigned entries; /* of the table: symbols, or groups of them */
    unsigned group_log2;
    unsigned lone; /* the only symbol there is, or MOST_SYMBOLS */
    uint64_t left;
    uint64_t done;
    reader from;
    unsigned bits;              /* plain: of a symbol */
    const unsigned char *sizes; /* Huffman: of the next chunk, 2 bytes; NULL before the last */
    uint64_t chunks;
    uint64_t state; /* ANS */
    union {
        uint16_t huffman[HUFFMAN_WINDOWS]; /* length << 8 | symbol */
        struct {
            uint32_t first[MOST_SYMBOLS + 1];
            unsigned char symbol[MOST_SYMBOLS];
            unsigned char guess[1 << ANS_GUESS_BITS];
        } ans;
    } table;
} symbols;

static bool make_huffman_table(symbols *them, const unsigned char *packed) {
    unsigned filled = 0, used = 0;
    for (unsigned length = 1; length <= HUFFMAN_BITS; ++length) {
        for (unsigned symbol = 0; symbol < them->entries; ++symbol) {
            if (packed_number(packed, 4, symbol) != length) {
                continue;
            }
            const unsigned span = 1u << (HUFFMAN_BITS - length);
            if (span > HUFFMAN_WINDOWS - filled) {
                return false;
            }
            for (unsigned i = 0; i < span; ++i) {
                them->table.huffman[filled + i] = (uint16_t)(length << 8 | symbol);
            }
            filled += span;
            them->lone = used++ == 0 ? symbol : MOST_SYMBOLS;
        }
    }
    for (unsigned symbol = 0; symbol < them->entries; ++symbol) {
        if (packed_number(packed, 4, symbol) > HUFFMAN_BITS) {
            return false;
        }
    }
    /* A group alone would have no stream, from which its symbols could come. */
    return (used == 1 && them->group_log2 == 0) || filled == HUFFMAN_WINDOWS;
}

/* round(16 * 2^((level - 1) / 4)), in whole numbers: the same on every machine. */
static uint64_t level_weight(unsigned level) {
    static const uint32_t quarters[4] = {268435456u, 319225354u, 379625062u, 451452825u};
    const unsigned shift = 24 - (level - 1) / 4; /* of 2^28 times 2^(0..3 / 4) */
    return (quarters[(level - 1) % 4] + (1u << (shift - 1))) >> shift;
}

static bool make_ans_table(symbols *them, const unsigned char *packed) {
    uint64_t frequency[MOST_SYMBOLS], total = 0, given = 0;
    unsigned used = 0, largest = 0;
    for (unsigned symbol = 0; symbol < them->alphabet; ++symbol) {
        const unsigned level = packed_number(packed, 6, symbol);
        if (level != 0) {
            them->table.ans.symbol[used] = (unsigned char)symbol;
            frequency[used] = level_weight(level);
            total += frequency[used++];
        }
    }
    them->lone = used == 1 ? them->table.ans.symbol[0] : MOST_SYMBOLS;
    if (used < 2) {
        return used == 1;
    }
    for (unsigned i = 0; i < used; ++i) {
        frequency[i] = 1 + frequency[i] * ((1u << 16) - used) / total;
        given += frequency[i];
        largest = frequency[i] > frequency[largest] ? i : largest;
    }
    frequency[largest] += (1u << 16) - given;
    uint64_t before = 0;
    for (unsigned i = 0; i < used; ++i) {
        const uint64_t scaled = before * (((uint64_t)1 << ANS_BITS) - used) >> 16;
        them->table.ans.first[i] = (uint32_t)(scaled + i);
        before += frequency[i];
    }
    them->table.ans.first[used] = 1u << ANS_BITS;
    unsigned symbol = 0;
    for (unsigned i = 0; i < 1u << ANS_GUESS_BITS; ++i) {
        while (them->table.ans.first[symbol + 1] <= i << (ANS_BITS - ANS_GUESS_BITS)) {
            ++symbol;
        }
        them->table.ans.guess[i] = (unsigned char)symbol;
    }
    return true;
}

static uint32_t word_before(const unsigned char *end) {
    return (uint32_t)end[-4] | (uint32_t)end[-3] << 8 | (uint32_t)end[-2] << 16 |
           (uint32_t)end[-1] << 24;
}

/* Takes a word from the end of the stream, if there is one. */
static void refill_state(symbols *them) {
    if (bytes_left(&them->from) >= 4) {
        them->state = them->state << 32 | word_before(them->from.end);
        them->from.end -= 4;
    }
}

static bool begin_stream(symbols *them) {
    switch (them->kind) {
    case PLAIN:
        return bytes_left(&them->from) == packed_bytes(them->left, them->bits);
    case HUFFMAN:
        them->chunks = (them->left + BATCH - 1) / BATCH;
        them->sizes = take(&them->from, 2 * (them->chunks - 1));
        return them->from.good;
    default:
        refill_state(them); /* of a short stream less than two words are left */
        refill_state(them);
        return bytes_left(&them->from) % 4 == 0;
    }
}

/* Reads what describes a stream, and takes its bytes. */
static bool open_symbols(symbols *them, reader *from) {
    const unsigned method = take_byte(from);
    them->kind = (coder)(method & ((1u << CODER_BITS) - 1));
    them->group_log2 = method >> CODER_BITS;
    them->alphabet = (unsigned)take_number(from, MOST_SYMBOLS);
    /* So many that their bits can be counted. */
    them->left = take_number(from, (uint64_t)1 << 48);
    them->done = 0;
    them->state = 0;
    them->lone = MOST_SYMBOLS;
    them->bits = 1;
    while (1u << them->bits < them->alphabet) {
        ++them->bits;
    }
    if (them->kind > ANS || them->group_log2 > (them->kind == HUFFMAN ? MOST_GROUP_LOG2 : 0u) ||
        (them->group_log2 > 0 && them->bits << them->group_log2 > 8)) {
        return false;
    }
    them->entries =
        them->group_log2 == 0 ? them->alphabet : 1u << (them->bits << them->group_log2);
    const unsigned width = them->kind == HUFFMAN ? 4 : 6;
    const unsigned char *table =
        them->kind == PLAIN ? NULL : take(from, packed_bytes(them->entries, width));
    const uint64_t size = take_varint(from);
    them->from.at = take(from, size);
    them->from.good = from->good;
    if (!from->good || them->alphabet == 0) {
        return false;
    }
    them->from.end = them->from.at + size;
    if (them->left == 0) {
        return size == 0;
    }
    if ((them->kind == HUFFMAN && !make_huffman_table(them, table)) ||
        (them->kind == ANS && !make_ans_table(them, table))) {
        return false;
    }
    return them->lone != MOST_SYMBOLS ? size == 0 : begin_stream(them);
}

static bool decode_plain(symbols *them, unsigned char *into, size_t count) {
    for (size_t i = 0; i < count; ++i) {
        const unsigned symbol = packed_number(them->from.at, them->bits, them->done + i);
        if (symbol >= them->alphabet) {
            return false;
        }
        into[i] = (unsigned char)symbol;
    }
    return true;
}

static uint64_t eight_bytes(const unsigned char *at) {
    uint64_t found = 0;
    for (unsigned i = 0; i < 8; ++i) {
        found = found << 8 | at[i];
    }
    return found;
}

/* Symbols of groups, each with its first symbol in the lowest bits. */
static bool split_groups(const symbols *them, const unsigned char *groups, unsigned char *into,
                         size_t count) {
    const unsigned most = (1u << them->bits) - 1, last = (1u << them->group_log2) - 1;
    for (size_t i = 0; i < count; ++i) {
        const unsigned group = groups[i >> them->group_log2];
        const unsigned symbol = group >> (i & last) * them->bits & most;
        if (symbol >= them->alphabet) {
            return false;
        }
        into[i] = (unsigned char)symbol;
    }
    return true;
}

/* The codes of one chunk, whose bits are read highest first. */
static bool decode_codes(symbols *them, unsigned char *into, size_t count) {
    uint64_t size = bytes_left(&them->from);
    if (them->chunks > 1) {
        size = (uint64_t)them->sizes[0] | (uint64_t)them->sizes[1] << 8;
        them->sizes += 2;
        --them->chunks;
    }
    const unsigned char *at = take(&them->from, size);
    if (at == NULL) {
        return false;
    }
    const unsigned char *const end = at + size;
    uint64_t window = 0; /* the next bits, from the highest on */
    unsigned held = 0;   /* how many of them are real; beyond the end come zeros */
    for (size_t i = 0; i < count; ++i) {
        if (held < HUFFMAN_BITS && end - at >= 8) {
            window |= eight_bytes(at) >> held;
            at += (63 - held) >> 3;
            held |= 56;
        }
        while (held < HUFFMAN_BITS && at < end) {
            window |= (uint64_t)*at++ << (56 - held);
            held += 8;
        }
        const unsigned entry = them->table.huffman[window >> (64 - HUFFMAN_BITS)];
        const unsigned length = entry >> 8;
        if (length > held) {
            return false;
        }
        window <<= length;
        held -= length;
        into[i] = (unsigned char)entry;
    }
    return true;
}

/* One chunk. */
static bool decode_huffman(symbols *them, unsigned char *into, size_t count) {
    if (them->group_log2 == 0) {
        return decode_codes(them, into, count);
    }
    unsigned char groups[BATCH / 2];
    const size_t codes = (count + (1u << them->group_log2) - 1) >> them->group_log2;
    return decode_codes(them, groups, codes) && split_groups(them, groups, into, count);
}

static void decode_ans(symbols *them, unsigned char *into, size_t count) {
    const uint32_t *first = them->table.ans.first;
    for (size_t i = 0; i < count; ++i) {
        const uint32_t part = (uint32_t)them->state & ((1u << ANS_BITS) - 1);
        unsigned symbol = them->table.ans.guess[part >> (ANS_BITS - ANS_GUESS_BITS)];
        while (first[symbol + 1] <= part) {
            ++symbol;
        }
        const uint64_t width = first[symbol + 1] - first[symbol];
        them->state = (them->state >> ANS_BITS) * width + part - first[symbol];
        if (them->state >> 32 == 0) {
            refill_state(them);
        }
        into[i] = them->table.ans.symbol[symbol];
    }
}

/* Up to BATCH symbols; 0 when there are no more, or when the stream is damaged. */
static size_t next_symbols(symbols *them, unsigned char *into) {
    const size_t count = them->left < BATCH ? (size_t)them->left : BATCH;
    bool good = true;
    if (them->lone != MOST_SYMBOLS) {
        memset(into, (int)them->lone, count);
    } else if (count > 0 && them->kind == PLAIN) {
        good = decode_plain(them, into, count);
    } else if (count > 0 && them->kind == HUFFMAN) {
        good = decode_huffman(them, into, count);
    } else if (count > 0) {
        decode_ans(them, into, count);
    }
    if (!good) {
        them->from.good = false;
        return 0;
    }
    them->left -= count;
    them->done += count;
    /* The last symbol leaves nothing of a stream that is whole. */
    const bool coded = them->kind == ANS && them->lone == MOST_SYMBOLS;
    if (coded && them->left == 0 && (them->state != 0 || bytes_left(&them->from) > 0)) {
        them->from.good = false;
        return 0;
    }
    return count;
}

/* ---------------------------------------------------------------- elements */

/* The memory that weights go to. */
typedef struct target {
    char *memory;
    size_t bytes;
} target;

/* Where so many elements go; NULL if that is not inside of the memory. */
static char *place_of(const target *where, uint64_t place, uint64_t count, uint64_t width) {
    const bool fits = width > 0 && place <= where->bytes && count <= (where->bytes - place) / width;
    return fits && place % width == 0 ? where->memory + place : NULL;
}

static bool is_width(uint64_t width) {
    return width == 1 || width == 2 || width == 4 || width == 8;
}

/* The elements of a job: plain ones, or numbers of a table. */
typedef struct elements {
    bool numbered;
    unsigned width;
    const unsigned char *data; /* plain: what is left; numbered: the table */
    uint64_t left;             /* plain: elements */
    size_t held, used;         /* numbered: of the batch */
    symbols numbers;
    unsigned char batch[BATCH];
} elements;

static bool open_elements(elements *them, reader *from, unsigned width) {
    them->numbered = take_number(from, 1) == 1;
    them->width = width;
    them->held = them->used = 0;
    if (them->numbered) {
        if (!open_symbols(&them->numbers, from)) {
            return false;
        }
        them->data = take(from, (uint64_t)them->numbers.alphabet * width);
    } else {
        them->left = bytes_left(from) / width;
        them->data = take(from, them->left * width);
    }
    return from->good;
}

/* The next element; NULL when there is none. */
static inline const unsigned char *next_element(elements *them) {
    if (!them->numbered) {
        const unsigned char *found = them->data;
        if (them->left == 0) {
            return NULL;
        }
        --them->left;
        them->data += them->width;
        return found;
    }
    if (them->used == them->held) {
        them->used = 0;
        them->held = next_symbols(&them->numbers, them->batch);
        if (them->held == 0) {
            return NULL;
        }
    }
    return them->data + (size_t)them->batch[them->used++] * them->width;
}

static bool is_used_up(elements *them) { return next_element(them) == NULL; }

/* Copies with a size that the compiler knows. */
static inline void copy_element(char *into, const unsigned char *from, unsigned width) {
    switch (width) {
    case 1:
        *into = (char)*from;
        break;
    case 2:
        memcpy(into, from, 2);
        break;
    case 4:
        memcpy(into, from, 4);
        break;
    default:
        memcpy(into, from, 8);
    }
}

/* ---------------------------------------------------------------- positions */

/* Ascending positions, from the gaps between them. */
typedef struct positions {
    unsigned span; /* the code for so many zeros and no position after them */
    uint64_t next; /* the least that the next position can be */
    size_t held, used;
    symbols codes;
    unsigned char batch[BATCH];
} positions;

static bool open_positions(positions *them, reader *from) {
    const unsigned bits = (unsigned)take_number(from, 8);
    them->span = (1u << bits) - 1;
    them->next = 0;
    them->held = them->used = 0;
    return bits > 0 && open_symbols(&them->codes, from) && them->codes.alphabet == 1u << bits;
}

/* The next position, below `limit`; `limit` when there is none. */
static inline uint64_t next_position(positions *them, uint64_t limit) {
    for (;;) {
        if (them->used == them->held) {
            them->used = 0;
            them->held = next_symbols(&them->codes, them->batch);
            if (them->held == 0) {
                return limit;
            }
        }
        const unsigned code = them->batch[them->used++];
        const uint64_t found = them->next + code;
        if (found >= limit) {
            them->codes.from.good = false;
            return limit;
        }
        them->next = found + (code != them->span);
        if (code != them->span) {
            return found;
        }
    }
}

/* ---------------------------------------------------------------- jobs */

static bool do_raw(reader *from, const target *where) {
    const uint64_t place = take_varint(from), bytes = take_varint(from);
    char *into = place_of(where, place, bytes, 1);
    const unsigned char *data = take(from, bytes);
    if (into == NULL || data == NULL) {
        return false;
    }
    memcpy(into, data, bytes);
    return true;
}

static bool do_indexed(reader *from, const target *where) {
    elements values;
    const uint64_t place = take_varint(from), width = take_varint(from);
    if (!is_width(width) || !open_elements(&values, from, (unsigned)width) || !values.numbered) {
        return false;
    }
    const uint64_t count = values.numbers.left;
    char *into = place_of(where, place, count, width);
    if (into == NULL) {
        return false;
    }
    for (uint64_t done = 0; done < count;) {
        const size_t some = next_symbols(&values.numbers, values.batch);
        if (some == 0) {
            return false;
        }
        for (size_t i = 0; i < some; ++i, into += width) {
            copy_element(into, values.data + values.batch[i] * width, (unsigned)width);
        }
        done += some;
    }
    return true;
}

static bool do_scattered(reader *from, const target *where) {
    positions kept;
    elements values;
    const uint64_t place = take_varint(from), width = take_varint(from);
    const uint64_t count = take_varint(from);
    char *into = is_width(width) ? place_of(where, place, count, width) : NULL;
    if (into == NULL || !open_positions(&kept, from) ||
        !open_elements(&values, from, (unsigned)width)) {
        return false;
    }
    uint64_t position;
    while ((position = next_position(&kept, count)) < count) {
        const unsigned char *value = next_element(&values);
        if (value == NULL) {
            return false;
        }
        copy_element(into + position * width, value, (unsigned)width);
    }
    return kept.codes.from.good && is_used_up(&values);
}

/* Lists of a sparse kernel; see ListLayout in backends/tvm/kernels/list_layout.py. */
typedef struct lists {
    char *distances;
    char *starts; /* NULL: another job makes them */
    unsigned width;
    uint64_t entries, count, channels, stride, step, taps;
    bool paired;
    const uint32_t *tap;
    uint64_t list;    /* the one being filled */
    uint64_t written; /* entries so far, of all lists */
    uint64_t begun;   /* entries before this list */
} lists;

static bool add_entry(lists *them, uint32_t distance) {
    if (them->written == them->entries) {
        return false;
    }
    char *into = them->distances + them->written++ * them->width;
    if (them->width == 2) {
        const uint16_t narrow = (uint16_t)distance;
        memcpy(into, &narrow, 2);
    } else {
        memcpy(into, &distance, 4);
    }
    return true;
}

/* Fills the list up and goes on to a later one. */
static bool go_on_to(lists *them, uint64_t list) {
    while (them->list < list) {
        while ((them->written - them->begun) % them->step != 0) {
            if (!add_entry(them, 0)) {
                return false;
            }
        }
        them->begun = them->written;
        ++them->list;
        if (them->starts != NULL) {
            const uint32_t start = (uint32_t)them->written;
            memcpy(them->starts + 4 * them->list, &start, 4);
        }
    }
    return true;
}

static bool fill_lists(lists *them, positions *kept) {
    const uint64_t places = them->channels * them->taps, limit = them->count * places;
    uint64_t list_end = places, tap = 0, row_end = them->taps, row = 0, position;
    while ((position = next_position(kept, limit)) < limit) {
        if (position >= list_end) {
            const uint64_t list = position / places;
            if (!go_on_to(them, list)) {
                return false;
            }
            list_end = (list + 1) * places;
            row_end = list * places + them->taps;
            row = 0;
        }
        if (position >= row_end) {
            const uint64_t rows = (position - row_end) / them->taps + 1;
            row += rows;
            row_end += rows * them->taps;
        }
        tap = position + them->taps - row_end;
        const uint32_t distance = (uint32_t)(row * them->stride) + them->tap[tap];
        const bool twice = them->paired && them->list % PAIR_LISTS == 0;
        if (!add_entry(them, distance) || (twice && !add_entry(them, distance))) {
            return false;
        }
    }
    return kept->codes.from.good && go_on_to(them, them->count);
}

static uint32_t *take_taps(reader *from, uint64_t count) {
    uint32_t *taps = malloc((size_t)count * sizeof *taps);
    for (uint64_t i = 0; taps != NULL && i < count; ++i) {
        taps[i] = (uint32_t)take_number(from, UINT32_MAX);
    }
    return taps;
}

static bool do_lists(reader *from, const target *where) {
    positions kept;
    lists made = {0};
    const uint64_t most = (uint64_t)1 << 31;
    const uint64_t place = take_varint(from);
    made.width = (unsigned)take_number(from, 4);
    made.entries = take_number(from, most);
    const bool has_starts = take_number(from, 1) == 1;
    const uint64_t starts = has_starts ? take_varint(from) : 0;
    made.count = take_number(from, most);
    made.channels = take_number(from, 1 << 24);
    made.stride = take_number(from, most);
    made.step = take_number(from, 1 << 10);
    made.paired = take_number(from, 1) == 1;
    made.taps = take_number(from, MOST_TAPS);
    const bool shaped = made.channels > 0 && made.step > 0 && made.taps > 0 &&
                        (made.width == 2 || made.width == 4) &&
                        made.count <= ((uint64_t)1 << MOST_PLACES_LOG2) / made.channels / made.taps;
    made.distances = shaped ? place_of(where, place, made.entries, made.width) : NULL;
    made.starts = shaped && has_starts ? place_of(where, starts, made.count + 1, 4) : NULL;
    if (!from->good || made.distances == NULL || (has_starts && made.starts == NULL)) {
        return false;
    }
    uint32_t *taps = take_taps(from, made.taps);
    made.tap = taps;
    const bool good = taps != NULL && open_positions(&kept, from) && fill_lists(&made, &kept);
    free(taps);
    return good;
}

/* Words that hold as many indices as fit, the first in the lowest bits. */
static bool do_words(reader *from, const target *where) {
    symbols indices;
    unsigned char batch[BATCH];
    const uint64_t place = take_varint(from);
    const unsigned bits = (unsigned)take_number(from, 8);
    const uint64_t words = take_varint(from);
    char *into = bits > 0 ? place_of(where, place, words, 4) : NULL;
    if (into == NULL || !open_symbols(&indices, from) || indices.alphabet != 1u << bits ||
        indices.left != words * (32 / bits)) {
        return false;
    }
    const unsigned end = 32 / bits * bits;
    uint32_t word = 0;
    unsigned filled = 0;
    for (size_t count; (count = next_symbols(&indices, batch)) > 0;) {
        for (size_t i = 0; i < count; ++i) {
            word |= (uint32_t)batch[i] << filled;
            filled += bits;
            if (filled == end) {
                memcpy(into, &word, 4);
                into += 4;
                word = filled = 0;
            }
        }
    }
    return indices.left == 0 && indices.from.good;
}

static bool do_job(reader from, const target *where) {
    switch (take_number(&from, WORDS)) {
    case RAW:
        return from.good && do_raw(&from, where);
    case INDEXED:
        return do_indexed(&from, where);
    case SCATTERED:
        return do_scattered(&from, where);
    case LISTS:
        return do_lists(&from, where);
    default:
        return do_words(&from, where);
    }
}

/* ---------------------------------------------------------------- threads */

/* What the threads share. */
typedef struct work {
    const reader *jobs;
    size_t count;
    target where;
    atomic_size_t next;
    atomic_bool good;
} work;

static void *work_off(void *argument) {
    work *all = argument;
    size_t index;
    while ((index = atomic_fetch_add(&all->next, 1)) < all->count && atomic_load(&all->good)) {
        if (!do_job(all->jobs[index], &all->where)) {
            atomic_store(&all->good, false);
        }
    }
    return NULL;
}

/* Works with so many threads, the caller's among them; with fewer where they cannot be started. */
static void work_together(work *all, int32_t threads) {
    pthread_t others[SHOHIN_MAX_THREADS];
    int32_t started = 0;
    pthread_attr_t how;
    if (threads > 1 && pthread_attr_init(&how) == 0) {
        (void)pthread_attr_setstacksize(&how, STACK_BYTES);
        while (started < threads - 1 && started < SHOHIN_MAX_THREADS &&
               pthread_create(&others[started], &how, work_off, all) == 0) {
            ++started;
        }
        pthread_attr_destroy(&how);
    }
    (void)work_off(all);
    for (int32_t i = 0; i < started; ++i) {
        pthread_join(others[i], NULL);
    }
}

/* The next job. */
static reader take_job(reader *from) {
    const uint64_t size = take_varint(from);
    const unsigned char *at = take(from, size);
    const reader job = {at, at == NULL ? NULL : at + size, from->good};
    return job;
}

static size_t count_jobs(reader from) {
    size_t count = 0;
    while (from.good && from.at < from.end) {
        (void)take_job(&from);
        ++count;
    }
    return count;
}

/* The jobs; one that is cut off is not good. NULL: out of memory. */
static reader *take_jobs(reader from, size_t count) {
    reader *jobs = malloc((count + 1) * sizeof *jobs);
    for (size_t i = 0; jobs != NULL && i < count; ++i) {
        jobs[i] = take_job(&from);
    }
    return jobs;
}

shohin_status RUNTIME(decode)(const unsigned char *coded, size_t coded_bytes, char *weights,
                              size_t weight_bytes, int32_t threads) {
    const reader from = {coded, coded + coded_bytes, true};
    work all = {.count = count_jobs(from), .where = {weights, weight_bytes}};
    reader *jobs = take_jobs(from, all.count);
    if (jobs == NULL) {
        return SHOHIN_OUT_OF_MEMORY;
    }
    all.jobs = jobs;
    atomic_init(&all.next, 0);
    atomic_init(&all.good, true);
    const int32_t useful = all.count < (size_t)threads ? (int32_t)all.count : threads;
    work_together(&all, coded_bytes < FEW_BYTES ? 1 : useful);
    free(jobs);
    return atomic_load(&all.good) ? SHOHIN_OK : SHOHIN_DAMAGED_WEIGHTS;
}
