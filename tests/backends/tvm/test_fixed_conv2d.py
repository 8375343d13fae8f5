import random
from dataclasses import dataclass, replace

import avx_vnni
import numpy as np
import pytest
import torch
from convolutions import draw_geometry, padded
from fixed_points import apply_fixed, random_integers
from harness import KernelLibrary, to_blocked, to_plain
from torch.nn import functional
from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.conv_tiles import ConvTile, choose_tile
from shohin.backends.tvm.kernels.dots import DotUnit
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d, chain_length
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.target import CpuTarget

_RESCALE = Step("fixed-rescale", (9, -128, 127, 1))
_TRUNCATE = Step("fixed-rescale", (9, -128, 127, 0))
_RELU = Step("fixed-relu")
_ADD = Step("fixed-add", (2, 0, 2, -128, 127, 1), "full", "int8")
_EACH = Step("fixed-rescale", (-128, 127, 1), "channel", "int32")
_REAL = Step("fixed-real", (9,))


@dataclass(frozen=True)
class SoftVnni(DotUnit):
    """What ``vpdpbusd`` does, in other instructions: unsigned times signed bytes, four to a sum."""

    def _call(self, names, kind, *arguments):
        sums, factors, others = arguments
        for place in range(4):
            lanes = list(range(place, 4 * self.lanes, 4))
            unsigned = T.reinterpret(f"uint8x{self.lanes}", tirx.Shuffle([factors], lanes))
            products = T.cast(unsigned, kind) * T.cast(tirx.Shuffle([others], lanes), kind)
            sums = sums + products
        return sums


UNITS = {
    "avx2": (DotUnit("maddubs", 8), "x86-64-v3"),
    "sse": (DotUnit("maddubs", 4), "x86-64-v2"),
    "avx2 words": (DotUnit("maddwd", 8), "x86-64-v3"),
    "sse words": (DotUnit("maddwd", 4), "x86-64-v2"),
    "avx512 words": (DotUnit("maddwd", 16), "x86-64-v4"),
    "vnni": (DotUnit("vnni", 16), "x86-64-v4-vnni"),
    "avx vnni": (DotUnit("vnni", 8), "x86-64-v3-vnni"),
    "soft vnni": (SoftVnni("vnni", 16), "x86-64-v3"),
}


def conv(unit, *, channels=32, filters=32, tile=None, steps=(_RESCALE,), signed=True, **options):
    geometry = Geometry(
        options.pop("size", (5, 11)),
        options.pop("kernel", (3, 3)),
        options.pop("stride", (1, 1)),
        options.pop("padding", (1, 1, 1, 1)),
        options.pop("dilation", (1, 1)),
    )
    groups = options.pop("groups", 1)
    width = geometry.output_size[1]
    return FixedConv2d(
        batch=options.pop("batch", 1),
        channels=channels,
        filters=filters,
        geometry=geometry,
        groups=groups,
        unit=unit,
        signed=signed,
        result=options.pop("result", "int8"),
        tile=tile or choose_tile(width, filters // LANES // groups, 7),
        steps=steps,
        source=options.pop("source", unit.input_type),
        weight_type=options.pop("weight_type", unit.input_type),
        **options,
    )


def cases(unit):
    """Kernels of every kind for a unit."""
    words = unit.input_type == "int16"
    found = {
        "plain": conv(unit),
        "not signed": conv(unit, signed=False),
        "truncated": conv(unit, steps=(_TRUNCATE,)),
        "relu": conv(unit, steps=(_RESCALE, _RELU)),
        "residual": conv(unit, steps=(_RESCALE, _ADD, _RELU), batch=2),
        "a shift a channel": conv(unit, steps=(_EACH,), result="int8"),
        "real": conv(unit, steps=(_REAL,), result="float32"),
        "few channels": conv(unit, channels=16, last_channels=3),
        "few channels of the last block": conv(unit, channels=48, last_channels=5),
        "few channels, all groups": conv(unit, channels=32, last_channels=14),
        "1x1": conv(unit, kernel=(1, 1), padding=(0, 0, 0, 0)),
        "no interior": conv(unit, size=(2, 2), kernel=(5, 5), padding=(2, 2, 2, 2)),
        "strided, uneven padding": conv(unit, stride=(2, 2), padding=(0, 1, 0, 2), size=(7, 12)),
        "dilated": conv(unit, dilation=(2, 1), padding=(2, 2, 1, 1)),
        "groups": conv(unit, channels=64, filters=64, groups=2, batch=2),
        "part of a concatenation": conv(unit, output_blocks=3, batch=2),
        "wide tile": conv(unit, tile=ConvTile(4, 2)),
    }
    if words:
        found["wide sums"] = conv(
            unit,
            wide=True,
            steps=(replace(_RESCALE, constants=(20, -32768, 32767, 1)),),
            result="int16",
        )
        found["bytes of weights"] = conv(unit, weight_type="int8")
        found["bytes of inputs"] = conv(unit, source="int8", signed=False)
    if unit.chains:
        found["chain of 2"] = conv(unit, signed=False, chain=2)
        found["chain of 4"] = conv(unit, signed=False, chain=4)
        found["signed chain of 4"] = conv(unit, chain=4)
    return found


def drawn(unit, seed):
    """A kernel of random sizes."""
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    blocks = choose.randint(1, 3)
    return FixedConv2d(
        batch=choose.randint(1, 2),
        channels=LANES * choose.randint(1, 3),
        filters=LANES * blocks,
        geometry=geometry,
        groups=1,
        unit=unit,
        signed=choose.random() < 0.5,
        result="int8",
        tile=ConvTile(
            choose.randint(1, 5), choose.choice([c for c in (1, 2, 3) if blocks % c == 0])
        ),
        source=unit.input_type,
        weight_type=unit.input_type,
        steps=(_RESCALE, *choose.choice([(), (_RELU,), (_ADD,), (_ADD, _RELU)])),
    )


def check(library, kernel):
    generator = np.random.default_rng(3)
    geometry, unit = kernel.geometry, kernel.unit
    x = random_integers(generator, (kernel.batch, kernel.channels, *geometry.size), kernel.source)
    if not kernel.signed:
        x = np.maximum(x, 0)
    weight = random_integers(
        generator,
        (kernel.filters, kernel.channels // kernel.groups, *geometry.kernel),
        kernel.weight_type,
        symmetric=True,
    )
    if unit.input_type == "int16" and not kernel.wide:
        weight = weight >> (8 if kernel.weight_type == "int16" else 0)
        x = x >> (6 if kernel.source == "int16" else 0)
    if kernel.chain > 1:
        # Small enough for sums of so many groups in 16 bits.
        weight = weight // 16
    if kernel.last_channels:
        weight[:, kernel.channels - LANES + kernel.last_channels :] = 0
    bias = generator.integers(-5000, 5000, kernel.filters)
    sums = functional.conv2d(
        padded(torch.from_numpy(x).double(), geometry.padding),
        torch.from_numpy(weight.astype(np.float64)),
        torch.from_numpy(bias).double(),
        geometry.stride,
        dilation=geometry.dilation,
        groups=kernel.groups,
    )
    expected = sums.numpy().astype(np.int64)
    operands, stored = [], []
    for step in kernel.steps:
        if step.operand == "full":
            operands.append(random_integers(generator, expected.shape, step.operand_type))
            stored.append(to_blocked(operands[-1]))
        elif step.operand == "channel":
            stored.append(generator.integers(-3, 12, kernel.filters, dtype=np.int32))
            operands.append(stored[-1].reshape(1, -1, 1, 1))
    expected = apply_fixed(kernel.steps, expected, operands)
    arrays = [to_blocked(x), kernel.pack(weight), kernel.biases(weight, bias), *stored]
    found = library.run(kernel, arrays)
    assert np.array_equal(to_plain(found, kernel.filters), expected)


@pytest.mark.parametrize("name", UNITS)
def test_sums_are_exact(name):
    unit, arch = UNITS[name]
    if problem := avx_vnni.why_not(arch):
        pytest.skip(problem)
    kernels = [*cases(unit).values(), *(drawn(unit, seed) for seed in range(12))]
    library = KernelLibrary(kernels, CpuTarget(arch))
    for kernel in kernels:
        check(library, kernel)


def test_chains_are_as_long_as_16_bits_allow():
    block = np.zeros((1, LANES), int)
    assert chain_length(block, 4, signed=True) == 4
    block[0, :2] = 127  # 254 of the 258 that inputs up to 127 allow.
    assert chain_length(block, 4, signed=False) == 4
    block[0, 4] = 4
    assert chain_length(block, 4, signed=False) == 4
    block[0, 4] = 5
    assert chain_length(block, 4, signed=False) == 1
    block[0, 8], block[0, 4] = 5, 0
    assert chain_length(block, 4, signed=False) == 2
    block[0, 8] = -5
    assert chain_length(block, 4, signed=False) == 4
    assert chain_length(block, 4, signed=True) == 2
