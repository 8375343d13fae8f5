"""Integer layers with ternary weights: exact sums of codes of two bits."""

import random
from dataclasses import fields, replace

import avx_vnni
import numpy as np
import pytest
import torch
from convolutions import draw_geometry, padded
from fixed_points import apply_fixed, random_integers
from harness import KernelLibrary, to_blocked, to_plain
from ternary_units import BYTES
from test_fixed_conv2d import UNITS, conv
from torch.nn import functional

from shohin.backends.tvm.kernels.conv_tiles import ConvTile
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.fixed_ternary import TernaryWeights, most_chained, packed
from shohin.backends.tvm.kernels.fixed_ternary_conv2d import FixedTernaryConv2d, fits
from shohin.backends.tvm.kernels.fixed_ternary_linear import (
    DotTile,
    FixedTernaryLinear,
    chain_of,
)
from shohin.backends.tvm.target import CpuTarget

_RESCALE = Step("fixed-rescale", (9, -128, 127, 1))
_RELU = Step("fixed-relu")
_ADD = Step("fixed-add", (0, 3, 4, -128, 127, 0), "full", "int8")
_EACH = Step("fixed-rescale", (-128, 127, 0), "channel", "int32")
_REAL = Step("fixed-real", (9,))


def library_of(name, kernels):
    arch = BYTES[name][1]
    if problem := avx_vnni.why_not(arch):
        pytest.skip(problem)
    return KernelLibrary(kernels, CpuTarget(arch))


def ternary(shape, largest, seed, *, alike=False, lacking=True):
    """Integers of random codes, two different ones a row.

    Args:
        shape: `[O, ...]`.
        largest: absolute value that none exceeds.
        seed: of the random numbers.
        alike: whether rows are multiples of 1 and -1.
        lacking: whether some rows have no positive one, no negative one, or neither.
    """
    generator = np.random.default_rng(seed)
    codes = generator.integers(-1, 2, shape)
    each = (shape[0], *[1] * (len(shape) - 1))
    above, below = (generator.integers(1, largest + 1, each) for _ in range(2))
    below = above if alike else below
    above[0] = below[0] = largest
    found = np.where(codes > 0, above, np.where(codes < 0, -below, 0)).astype(np.int8)
    if lacking:
        found[1::5] = np.maximum(found[1::5], 0)
        found[2::5] = np.minimum(found[2::5], 0)
        found[3::5] = 0
    return found


def largest_of(kernel, registers):
    """The largest weight for which so many registers can be chained."""
    if kernel.scaled or registers == 1:
        return 127
    return (2**15 - 1) // (256 * registers)


def linear(unit, *, rows=1, depth=64, columns=32, steps=(_RESCALE,), **options):
    return FixedTernaryLinear(
        rows,
        depth,
        columns,
        unit,
        options.pop("signed", True),
        options.pop("result", "int8"),
        options.pop("tile", DotTile(min(rows, 2), 2)),
        steps=steps,
        **options,
    )


def linear_cases(unit):
    found = [
        linear(unit),
        linear(unit, depth=512, signed=False),
        linear(unit, depth=600, columns=40, scaled=True),
        linear(unit, depth=3, columns=5, tile=DotTile(1, 1)),
        linear(unit, rows=3, depth=4 * unit.width, columns=17, steps=(_RESCALE, _ADD, _RELU)),
        linear(unit, rows=5, depth=4 * unit.width + 1, columns=50, tile=DotTile(2, 4)),
        linear(unit, depth=8 * unit.width - 1, columns=40, steps=(_EACH,), tile=DotTile(1, 8, 2)),
        linear(unit, depth=100, columns=10, steps=(_REAL,), result="float32"),
        linear(unit, depth=5 * unit.width, columns=3, tile=DotTile(1, 16, 4)),
    ]
    if unit.chains:
        depth = 13 * unit.width + 7
        found += [linear(unit, depth=depth, signed=chain > 2, chain=chain) for chain in (2, 4)]
        found.append(linear(unit, depth=20 * unit.width, rows=2, chain=4, scaled=True))
    return found


def drawn_linear(unit, seed):
    choose = random.Random(seed)
    rows = choose.randint(1, 5)
    return linear(
        unit,
        rows=rows,
        depth=choose.randint(1, 900),
        columns=choose.randint(1, 70),
        signed=choose.random() < 0.5,
        tile=DotTile(choose.randint(1, rows), choose.choice([1, 2, 4]), choose.choice([1, 2])),
        steps=(_RESCALE, *choose.choice([(), (_RELU,), (_ADD,)])),
        scaled=choose.random() < 0.3,
        chain=choose.choice([1, 2, 4]) if unit.chains else 1,
    )


def held_for(kernel, weight):
    """Ternary integers, with factors only where the kernel has them."""
    found = TernaryWeights.of(weight)
    if kernel.scaled:
        return found
    factors = found.factors
    return replace(found, values=found.values * factors[:, None], factors=np.ones_like(factors))


def ternary_places(kernel, held, width):
    """What codes stand for, and factors if any."""
    factors = [held.padded_factors(width)] if kernel.scaled else []
    return [held.pairs(width), *factors]


def operands_of(kernel, expected, width):
    """Second operands of steps as they are, and as a kernel takes them but for their layout."""
    generator, given, stored = np.random.default_rng(7), [], []
    for step in kernel.steps:
        if step.operand == "full":
            given.append(random_integers(generator, expected.shape, step.operand_type))
            stored.append(given[-1])
        elif step.operand == "channel":
            stored.append(generator.integers(-3, 12, width, dtype=np.int32))
            given.append(stored[-1][: expected.shape[1]])
    return given, stored


@pytest.mark.parametrize("name", BYTES)
def test_linear_sums_are_exact(name):
    unit = BYTES[name][0]
    kernels = [*linear_cases(unit), *(drawn_linear(unit, seed) for seed in range(8))]
    library = library_of(name, kernels)
    for kernel in dict.fromkeys(kernels):
        generator = np.random.default_rng(4)
        x = random_integers(generator, (kernel.rows, kernel.depth), "int8")
        x = x if kernel.signed else np.maximum(x, 0)
        largest = largest_of(kernel, kernel.chain)
        shape = (kernel.columns, kernel.depth)
        weight = ternary(shape, largest, 5, alike=kernel.scaled)
        held = held_for(kernel, weight)
        bias = generator.integers(-5000, 5000, kernel.columns)
        expected = x.astype(np.int64) @ weight.astype(np.int64).T + bias
        given, stored = operands_of(kernel, expected, kernel.padded_columns)
        arrays = [
            x,
            kernel.pack(held.codes),
            *ternary_places(kernel, held, kernel.padded_columns),
            kernel.biases(weight, bias),
            *stored,
        ]
        expected = apply_fixed(kernel.steps, expected, given)
        assert np.array_equal(library.run(kernel, arrays), expected), kernel


def ternary_conv(unit, *, scaled=False, chain=1, tile=None, **options):
    plain = conv(unit, **options)
    same = {one.name: getattr(plain, one.name) for one in fields(plain)}
    same |= {"chain": chain, "tile": tile or ConvTile(3, 1, 2)}
    return FixedTernaryConv2d(**same, scaled=scaled)


def conv_cases(unit):
    point = {"kernel": (1, 1), "padding": (0, 0, 0, 0), "channels": 176}
    found = [
        ternary_conv(unit),
        ternary_conv(unit, steps=(_RESCALE, _ADD, _RELU), batch=2, output_blocks=3),
        ternary_conv(unit, steps=(_EACH,), tile=ConvTile(2, 2, 5), scaled=True),
        ternary_conv(unit, steps=(_REAL,), result="float32", signed=False, **point),
        ternary_conv(unit, kernel=(2, 2), padding=(0, 1, 1, 0), channels=80),
        ternary_conv(unit, size=(2, 2), kernel=(5, 5), padding=(2, 2, 2, 2), filters=16),
        ternary_conv(unit, stride=(2, 2), padding=(0, 1, 0, 2), size=(7, 12)),
        ternary_conv(unit, dilation=(2, 1), padding=(2, 2, 1, 1), tile=ConvTile(2, 1, 3)),
        ternary_conv(unit, channels=64, filters=64, groups=2, batch=2),
    ]
    if unit.chains:
        found += [
            ternary_conv(unit, chain=4, scaled=True),
            ternary_conv(unit, chain=12, signed=False),
            ternary_conv(unit, chain=36),
            ternary_conv(unit, chain=36, **point),
            ternary_conv(unit, chain=20, kernel=(2, 2), channels=80, signed=False),
        ]
    return found


def drawn_conv(unit, seed):
    choose = random.Random(seed)
    blocks = choose.randint(1, 3)
    counts = [count for count in (1, 2, 3) if blocks % count == 0]
    plain = ternary_conv(
        unit,
        channels=LANES * choose.randint(1, 3),
        filters=LANES * blocks,
        signed=choose.random() < 0.5,
        batch=choose.randint(1, 2),
        scaled=choose.random() < 0.3,
        chain=choose.choice([1, 2, 4, 14, 50]) if unit.chains else 1,
        tile=ConvTile(choose.randint(1, 5), choose.choice(counts), choose.randint(1, 4)),
        steps=(_RESCALE, *choose.choice([(), (_RELU,), (_ADD,)])),
    )
    return replace(plain, geometry=draw_geometry(choose))


@pytest.mark.parametrize("name", BYTES)
def test_convolutions_are_exact(name):
    unit = BYTES[name][0]
    kernels = [*conv_cases(unit), *(drawn_conv(unit, seed) for seed in range(3))]
    library = library_of(name, kernels)
    for kernel in dict.fromkeys(kernels):
        generator = np.random.default_rng(3)
        geometry = kernel.geometry
        x = random_integers(generator, (kernel.batch, kernel.channels, *geometry.size), "int8")
        x = x if kernel.signed else np.maximum(x, 0)
        shape = (kernel.filters, kernel.channels // kernel.groups, *geometry.kernel)
        weight = ternary(shape, largest_of(kernel, kernel.chain), 5, alike=kernel.scaled)
        held = held_for(kernel, weight)
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
        given, stored = operands_of(kernel, expected, kernel.filters)
        given = [one.reshape(1, -1, 1, 1) if one.ndim == 1 else one for one in given]
        stored = [to_blocked(one) if one.ndim == 4 else one for one in stored]
        arrays = [
            to_blocked(x),
            kernel.pack(held.codes),
            *ternary_places(kernel, held, kernel.filters),
            kernel.biases(weight, bias),
            *stored,
        ]
        found = library.run(kernel, arrays)
        expected = apply_fixed(kernel.steps, expected, given)
        assert np.array_equal(to_plain(found, kernel.filters), expected), kernel


def test_chains_are_at_their_limits():
    """Sums of 16 bits that are as large as they get, so that one more product would show."""
    unit = BYTES["avx2"][0]
    kernels = [linear(unit, depth=4096, columns=16, chain=chain) for chain in (2, 4)]
    library = library_of("avx2", kernels)
    for kernel in kernels:
        largest = largest_of(kernel, kernel.chain)
        assert chain_of(most_chained(unit, largest)) == kernel.chain
        assert chain_of(most_chained(unit, 2 * largest + 2)) < kernel.chain
        for sign in (1, -1):
            x = np.full((1, kernel.depth), -128, np.int8)
            weight = np.full((16, kernel.depth), sign * largest, np.int8)
            held = TernaryWeights(
                np.full(weight.shape, 1 if sign > 0 else 2, np.uint8),
                np.tile([largest, -largest], (16, 1)),
                np.ones(16, np.int64),
            )
            arrays = [x, kernel.pack(held.codes), held.pairs(16), np.zeros(16, np.int32)]
            sums = x.astype(np.int64) @ weight.astype(np.int64).T
            assert np.array_equal(library.run(kernel, arrays), apply_fixed([_RESCALE], sums, []))


def test_what_is_ternary():
    assert TernaryWeights.of(np.array([[1, 2, 0]], np.int8)) is None
    assert TernaryWeights.of(np.array([[-1, 0], [-1, -2]], np.int8)) is None
    found = TernaryWeights.of(np.array([[3, 0, -2], [0, 6, 0], [-4, 0, -4], [0, 0, 0]], np.int8))
    assert found.codes.tolist() == [[1, 0, 2], [0, 1, 0], [2, 0, 2], [0, 0, 0]]
    assert found.values.tolist() == [[3, -2]] * 4
    assert found.factors.tolist() == [1, 2, 2, 1]
    assert found.scaled
    apart = TernaryWeights.of(np.array([[3, 0, -2], [5, 0, -2]], np.int8))
    assert apart.values.tolist() == [[3, -2], [5, -2]]
    assert not apart.scaled
    alike = TernaryWeights.of(np.array([[100, -100], [87, 0]], np.int8))
    assert alike.values.tolist() == [[1, -1]] * 2
    assert alike.factors.tolist() == [100, 87]
    for one in (found, apart, alike):
        again = one.unscaled() * one.factors.reshape(-1, 1)
        assert np.array_equal(TernaryWeights.of(again.astype(np.int8)).codes, one.codes)


def test_rows_of_either_sign_have_the_same_two_integers():
    """What is above zero in one row is a multiple of what is below in the other."""
    weight = np.array([[6, 0, -4], [-9, 0, 6], [0, 1400, -2100], [-3, 0, 0], [0, 0, 2]], np.int16)
    found = TernaryWeights.of(weight)
    assert found.values.tolist() == [[3, -2]] * 5
    assert found.factors.tolist() == [2, -3, -700, -1, -1]
    assert found.largest == 3
    assert np.array_equal(found.unscaled().astype(np.int64) * found.factors[:, None], weight)
    assert TernaryWeights.of(np.array([[6, -4], [-9, 7]], np.int16)).largest == 9


def test_four_codes_share_a_byte():
    codes = np.array([[1, 0], [2, 0], [0, 1], [2, 2]], np.uint8)
    assert packed(codes, 0).tolist() == [0b10_00_10_01, 0b10_01_00_00]
    kernel = linear(BYTES["avx2"][0], depth=128, columns=2)
    weight = np.zeros((2, 128), np.uint8)
    weight[1, [0, 32, 64, 96]] = [1, 2, 0, 2]
    found = kernel.pack(weight)
    assert found.size == 2 * 128 // 4
    assert found[32] == 0b10_00_10_01
    assert np.count_nonzero(found) == 1


def test_words_have_no_such_kernel():
    assert not fits(conv(UNITS["avx2 words"][0]))
    assert not fits(conv(BYTES["avx2"][0], channels=16, last_channels=3))
    assert not fits(conv(BYTES["avx2"][0], size=(4, 400)))
    assert fits(conv(BYTES["avx2"][0], channels=32, last_channels=3))
