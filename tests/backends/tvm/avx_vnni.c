// Carries out AVX-VNNI's vpdpbusd and vpdpwssd on processors that have AVX2 but not these.
//
// Such a processor raises SIGILL; the handler decodes the instruction, computes on the registers
// that the kernel saved, and goes on behind it. The rest of the code runs as it is, so a program
// for a newer processor is tested as it was compiled. Linux on x86-64 only.

#define _GNU_SOURCE
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

enum {
    LEGACY_XMM = 160,    // of the lower halves in the saved registers, Intel SDM 13.4.1
    HEADER = 512,        // of the bits that say which parts are not in their initial state
    UPPER_YMM = 576,     // of the upper halves, standard format
    AVX_STATE = 1 << 2,  // the bit of the upper halves
    BYTES = 0x50,        // opcode of vpdpbusd
    WORDS = 0x52,        // opcode of vpdpwssd
};

typedef union {
    int32_t sums[8];
    int16_t words[16];
    uint8_t raised[32];
    int8_t bytes[32];
} Vector;

typedef struct {
    int opcode, wide, target, first, length;
    Vector second;
} Instruction;

static volatile unsigned long carried_out;

static Vector read_register(const uint8_t *state, int number) {
    Vector value;
    memset(&value, 0, sizeof value);
    memcpy(&value, state + LEGACY_XMM + 16 * number, 16);
    if (state[HEADER] & AVX_STATE) memcpy(value.raised + 16, state + UPPER_YMM + 16 * number, 16);
    return value;
}

static void write_register(uint8_t *state, int number, Vector value) {
    if (!(state[HEADER] & AVX_STATE)) {
        memset(state + UPPER_YMM, 0, 256);
        state[HEADER] |= AVX_STATE;
    }
    memcpy(state + LEGACY_XMM + 16 * number, &value, 16);
    memcpy(state + UPPER_YMM + 16 * number, value.raised + 16, 16);
}

static uint64_t general(const mcontext_t *machine, int number) {
    static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                   REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                   REG_R12, REG_R13, REG_R14, REG_R15};
    return (uint64_t)machine->gregs[places[number]];
}

static int64_t displacement(const uint8_t *at, int size) {
    if (size == 1) return (int8_t)*at;
    int32_t value = 0;
    memcpy(&value, at, 4);
    return size ? value : 0;
}

// Length of the ModRM byte and what belongs to it; the address in *address.
static int decode_address(const mcontext_t *machine, const uint8_t *modrm, int index_high,
                          int base_high, const uint8_t **end, uint64_t *address) {
    int mode = *modrm >> 6, base = *modrm & 7, length = 1, none = 0;
    uint64_t found = 0;
    if (base == 4) {
        int sib = modrm[1], index = (sib >> 3 & 7) | index_high;
        base = sib & 7;
        length = 2;
        if (index != 4) found += general(machine, index) << (sib >> 6);
        none = base == 5 && mode == 0;
    } else if (base == 5 && mode == 0) {
        *end = modrm + 5;
        *address = (uint64_t)*end + (uint64_t)displacement(modrm + 1, 4);
        return 5;
    }
    int size = mode == 1 ? 1 : mode == 2 || none ? 4 : 0;
    if (!none) found += general(machine, base | base_high);
    *address = found + (uint64_t)displacement(modrm + length, size);
    *end = modrm + length + size;
    return length + size;
}

static int decode(const mcontext_t *machine, const uint8_t *state, Instruction *found) {
    const uint8_t *code = (const uint8_t *)machine->gregs[REG_RIP], *end;
    if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x83) != 1) return 0;
    found->opcode = code[3];
    if (found->opcode != BYTES && found->opcode != WORDS) return 0;
    const uint8_t *modrm = code + 4;
    int high = code[1] & 0x80 ? 0 : 8, index_high = code[1] & 0x40 ? 0 : 8;
    int base_high = code[1] & 0x20 ? 0 : 8;
    found->target = (*modrm >> 3 & 7) | high;
    found->first = ~(code[2] >> 3) & 15;
    found->wide = code[2] >> 2 & 1;
    if (*modrm >> 6 == 3) {
        found->second = read_register(state, (*modrm & 7) | base_high);
        found->length = 5;
        return 1;
    }
    uint64_t address;
    found->length = 4 + decode_address(machine, modrm, index_high, base_high, &end, &address);
    memset(&found->second, 0, sizeof found->second);
    memcpy(&found->second, (const void *)address, found->wide ? 32 : 16);
    return 1;
}

static void carry_out(int signal_number, siginfo_t *info, void *context) {
    (void)info;
    mcontext_t *machine = &((ucontext_t *)context)->uc_mcontext;
    uint8_t *state = (uint8_t *)machine->fpregs;
    Instruction found;
    if (!decode(machine, state, &found)) {
        signal(signal_number, SIG_DFL);
        return;
    }
    Vector target = read_register(state, found.target), first = read_register(state, found.first);
    int lanes = found.wide ? 8 : 4;
    for (int lane = 0; lane < lanes; lane++) {
        uint32_t sum = (uint32_t)target.sums[lane];
        for (int i = 4 * lane; found.opcode == BYTES && i < 4 * lane + 4; i++)
            sum += (uint32_t)(first.raised[i] * found.second.bytes[i]);
        for (int i = 2 * lane; found.opcode == WORDS && i < 2 * lane + 2; i++)
            sum += (uint32_t)(first.words[i] * found.second.words[i]);
        target.sums[lane] = (int32_t)sum;
    }
    for (int lane = lanes; lane < 8; lane++) target.sums[lane] = 0;
    write_register(state, found.target, target);
    machine->gregs[REG_RIP] += found.length;
    carried_out++;
}

// Instructions carried out so far, by all threads, about.
unsigned long avx_vnni_count(void) { return carried_out; }

// 0 where the handler is in place from now on.
int avx_vnni_install(void) {
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = carry_out;
    action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    return sigaction(SIGILL, &action, NULL);
}
