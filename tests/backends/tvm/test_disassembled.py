"""The instructions in binaries: those of the target, and none of the machine that compiles."""

import struct

import capstone
import pytest
import torch
from capstone import arm64_const, x86_const
from small_nets import captured, net
from torch import nn

import shohin
from shohin.backends.registry import parse_target

_MACHINES = {"x86_64": 62, "aarch64": 183, "arm": 40}
"""``e_machine`` of the ELF specification."""

_EXECUTABLE = 4
_DECODERS = {
    "x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64),
    "aarch64": (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM),
}
_AVX = (
    x86_const.X86_GRP_AVX,
    x86_const.X86_GRP_AVX2,
    x86_const.X86_GRP_FMA,
    x86_const.X86_GRP_BMI,
    x86_const.X86_GRP_BMI2,
)


def small_program():
    """Float and integer layers, convolutions and products, with their activations."""
    torch.manual_seed(0)
    module = net(
        lambda s, x: s.d(s.c(torch.sigmoid(s.b(s.a(x).relu()))).flatten(1)).softmax(1),
        a=nn.Conv2d(3, 32, 3),
        b=nn.Conv2d(32, 32, 3, groups=32),
        c=nn.Conv2d(32, 20, 1),
        d=nn.Linear(20 * 36, 50),
    )
    program = captured(module, (3, 10, 10))
    data = [(torch.randn(4, 3, 10, 10),)]
    return program, shohin.optimize(program, "fixed-point", calibration=data, drift=False).program


PROGRAMS = small_program()


def executable_parts(path):
    """The machine of a 64-bit ELF file, and the bytes and address of each part that is code."""
    content = path.read_bytes()
    machine, table = struct.unpack_from("<18xH20xQ", content)
    size, count = struct.unpack_from("<58xHH", content)
    parts = []
    for number in range(count):
        header = struct.unpack_from("<IIQQQQ", content, table + number * size)
        if header[2] & _EXECUTABLE:
            address, start, length = header[3:]
            parts.append((content[start : start + length], address))
    return machine, parts


def instructions(target, folder):
    """Name, operands and groups of every instruction of libraries for a target."""
    options = parse_target(target).options
    found = []
    for program in PROGRAMS:
        binary = shohin.compile(program, target, weights="compressed")
        machine, parts = executable_parts(binary.save(folder / "net.so"))
        assert machine == _MACHINES[options.machine]
        decoder = capstone.Cs(*_DECODERS[options.machine])
        decoder.detail = True
        decoder.skipdata = True
        for code, address in parts:
            found += [
                (one.mnemonic, one.op_str, frozenset(one.groups if one.id else ()))
                for one in decoder.disasm(code, address)
            ]
    assert len(found) > 5000
    return found


@pytest.mark.parametrize(
    ("arch", "widest", "groups"),
    [
        ("x86-64-v2", "xmm", _AVX),
        ("x86-64-v3", "ymm", ()),
        ("x86-64-v4", "zmm", ()),
        ("x86-64-v4-vnni", "zmm", ()),
    ],
)
def test_x86_levels(arch, widest, groups, tmp_path):
    found = instructions(f"cpu{{arch={arch}}}", tmp_path)
    names = {name for name, _, _ in found}
    used = frozenset().union(*(one for _, _, one in found))
    registers = {
        kind for kind in ("xmm", "ymm", "zmm") if any(kind in text for _, text, _ in found)
    }
    wider = {"xmm": {"xmm"}, "ymm": {"xmm", "ymm"}, "zmm": {"xmm", "ymm", "zmm"}}
    assert registers == wider[widest]
    assert not used & set(groups)
    assert ("vpdpbusd" in names) == arch.endswith("-vnni")


@pytest.mark.parametrize(
    ("target", "dotprod"),
    [("arm", False), ("arm{cpu=cortex-a76}", True), ("arm{cpu=cortex-a76 dotprod=off}", False)],
)
def test_arm_cores(target, dotprod, tmp_path):
    found = instructions(target, tmp_path)
    names = {name for name, _, _ in found}
    used = frozenset().union(*(one for _, _, one in found))
    assert ("sdot" in names) == dotprod
    assert arm64_const.ARM64_GRP_NEON in used
    assert "smull" in names or dotprod
    assert not names & {"ptrue", "whilelo", "bfdot", "smmla", "fmlal"}


def test_other_machines_have_code_of_their_own(tmp_path):
    binary = shohin.compile(PROGRAMS[0], "armv7{cpu=cortex-a7}")
    content = binary.save(tmp_path / "net.so").read_bytes()
    assert content[4] == 1  # ELFCLASS32
    assert struct.unpack_from("<18xH", content)[0] == _MACHINES["arm"]
