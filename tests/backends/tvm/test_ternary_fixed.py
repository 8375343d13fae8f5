"""Integer layers with ternary weights: exact sums of codes of two bits, and where they are used."""

import random
import shutil
import subprocess
from dataclasses import dataclass, fields, replace

import avx_vnni
import numpy as np
import pytest
import torch
from convolutions import draw_geometry, padded
from fixed_points import apply_fixed, random_integers
from harness import KernelLibrary, to_blocked, to_plain
from small_nets import captured, net
from test_fixed_conv2d import UNITS, SoftVnni, conv
from torch import nn
from torch.nn import functional
from tvm import tirx

import shohin
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.conv_tiles import ConvTile
from shohin.backends.tvm.kernels.dots import DotUnit
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d
from shohin.backends.tvm.kernels.fixed_linear import FixedLinear
from shohin.backends.tvm.kernels.fixed_ternary import TernaryWeights, most_chained, packed
from shohin.backends.tvm.kernels.fixed_ternary_conv2d import FixedTernaryConv2d, fits
from shohin.backends.tvm.kernels.fixed_ternary_linear import (
    DotTile,
    FixedTernaryLinear,
    chain_of,
)
from shohin.backends.tvm.lowering import lower, place_fixed_ternary
from shohin.backends.tvm.lowering.memory import ConstantFile
from shohin.backends.tvm.lowering.plan import Planner
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.ir.encodings import Dense
from shohin.ir.program import Stage
from shohin.ir.ternary import Ternary

_AVX2 = CpuTarget("x86-64-v3", tune="off")
_RESCALE = Step("fixed-rescale", (9, -128, 127, 1))
_RELU = Step("fixed-relu")
_ADD = Step("fixed-add", (0, 3, 4, -128, 127, 0), "full", "int8")
_EACH = Step("fixed-rescale", (-128, 127, 0), "channel", "int32")
_REAL = Step("fixed-real", (9,))


@dataclass(frozen=True)
class SoftTables(SoftVnni):
    """Registers of 64 bytes, with tables in those of 32."""

    def look_up(self, table, index):
        halves = [list(range(32 * i, 32 * i + 32)) for i in range(2)]
        narrow = DotUnit("maddubs", 8)
        parts = [
            narrow.look_up(tirx.Shuffle([table], half), tirx.Shuffle([index], half))
            for half in halves
        ]
        return tirx.Shuffle(parts, list(range(64)))


BYTES = {name: UNITS[name] for name in ("avx2", "sse", "vnni", "avx vnni")}
BYTES["soft vnni"] = (SoftTables("vnni", 16), "x86-64-v3")


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


def ternary_program(module, shape, *, pairs=None, by_row=True):
    """A network whose layers but the first convolution are ternary, with rows as after folding."""
    program = captured(module, shape)
    encodings, generator = {}, torch.Generator().manual_seed(6)
    for name, tensor in program.module.named_parameters():
        if not name.endswith("weight") or name.startswith("stem"):
            continue
        codes = torch.randint(-1, 2, tensor.shape, generator=generator).to(torch.int8)
        rows = torch.rand(len(tensor), generator=generator) * 0.5 - 0.1 if by_row else None
        scales = Dense(torch.tensor([0.11, 0.07] if pairs is None else pairs))
        encodings[name] = Ternary(codes, scales, rows)
        with torch.no_grad():
            tensor.copy_(encodings[name].materialise())
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def forward(self, x):
    x = torch.relu(self.stem(x))
    y = torch.relu(self.left(x) + x)
    y = torch.relu(self.right(self.point(y)))  # The second reads numbers with a sign.
    return self.head(torch.relu(self.body(y.flatten(1))))


def small_net():
    return net(
        forward,
        stem=nn.Conv2d(3, 32, 3, padding=1),
        left=nn.Conv2d(32, 32, 3, padding=1),
        point=nn.Conv2d(32, 48, 1),
        right=nn.Conv2d(48, 20, 3, stride=2, padding=1, groups=1),
        body=nn.Linear(20 * 25, 70),
        head=nn.Linear(70, 10),
    )


def images(seed, batch=1):
    return torch.randn(batch, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def fixed_program(options="", **how):
    program = ternary_program(small_net(), (3, 10, 10), **how)
    text = f"fixed-point{{{options}}}" if options else "fixed-point"
    return shohin.optimize(program, text, calibration=[(images(1, 8),)], drift=False).program


def plan_calls(program, target, path=None):
    operations = lower.select(program, 1)
    tuner = Tuner(target, TuningCache.default())
    planner = Planner(tuner, ConstantFile(path), lower.PLACERS)
    return planner.plan(operations), planner.constants


@pytest.fixture
def all_packed(monkeypatch):
    """Use codes where nothing is measured, however few weights there are."""
    monkeypatch.setattr(place_fixed_ternary, "_CACHED", 0)


OPTIONS = ["", "weights=4", "weights=2 by_channel=true", "by_channel=true", "data=16", "weights=12"]


@pytest.mark.usefixtures("all_packed")
@pytest.mark.parametrize("options", OPTIONS)
def test_every_bit_is_that_of_the_reference(options):
    check(fixed_program(options), CpuTarget(tune="off"))


def check(program, target, **how):
    binary = compile_program(program, target, 1, **how)
    for seed in range(3):
        x = images(10 + seed) * (1 + 2 * seed)
        with torch.no_grad():
            wanted = program.module(x).numpy()
        assert np.array_equal(binary.run([x.numpy()])[0], wanted)


@pytest.mark.usefixtures("all_packed")
@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni"])
@pytest.mark.parametrize("weights", ["plain", "compressed"])
def test_every_bit_on_other_processors(arch, weights, monkeypatch):
    if problem := avx_vnni.allow(monkeypatch, arch):
        pytest.skip(problem)
    check(fixed_program(), CpuTarget(arch, threads=2, tune="off"), weights=weights)


@pytest.mark.usefixtures("all_packed")
@pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64")
@pytest.mark.parametrize("target", ["arm", "arm{cpu=neoverse-n1}"])
def test_every_bit_on_emulated_arm(target, tmp_path):
    program = fixed_program()
    executable = shohin.compile(program, target).save(tmp_path / "net")
    np.save(tmp_path / "x.npy", images(20).numpy())
    command = ["qemu-aarch64", "-cpu", "max", executable, tmp_path / "x.npy", "--output"]
    subprocess.run([*command, tmp_path / "y.npy"], check=True, capture_output=True)
    with torch.no_grad():
        wanted = program.module(images(20)).numpy()
    assert np.array_equal(np.load(tmp_path / "y.npy"), wanted)


@pytest.mark.usefixtures("all_packed")
def test_weights_are_packed_in_memory(tmp_path):
    """Two bits of each weight are among the constants, and no byte of it."""
    calls, constants = plan_calls(fixed_program(), _AVX2, tmp_path / "constants")
    kernels = [call.kernel for call in calls]
    layers = [one for one in kernels if isinstance(one, (FixedTernaryConv2d, FixedTernaryLinear))]
    assert len(layers) == 5
    sizes = {parameter.bytes for one in layers for parameter in one.parameters()[1:2]}
    marked = {one.buffer.bytes for one in constants.arrays if one.index_bits}
    # Behind the last code of a linear map, a register can be read.
    lines = {500 * 70 // 4 + 6, 10 * 18 + 16}
    assert sizes == marked == {32 * 32 * 9 // 4, 32 * 48 // 4, 32 * 48 * 9 // 4, *lines}
    plain = [one for one in kernels if type(one) is FixedConv2d]
    assert [one.channels for one in plain] == [LANES]


def test_few_weights_stay_bytes_unmeasured():
    calls, _ = plan_calls(fixed_program(), _AVX2)
    kinds = {type(call.kernel) for call in calls}
    assert FixedConv2d in kinds
    assert FixedTernaryConv2d not in kinds
    assert FixedTernaryLinear in kinds
    notes = [call.note for call in calls if isinstance(call.kernel, FixedConv2d)]
    assert notes.count("estimated: ternary, as bytes") == 3


def test_wide_data_has_integers_and_says_so():
    calls, _ = plan_calls(fixed_program("data=16"), _AVX2)
    notes = [call.note for call in calls if isinstance(call.kernel, (FixedConv2d, FixedLinear))]
    assert sum("there is no such kernel" in note for note in notes) == 5


def test_long_chains_are_used_where_weights_are_small():
    """Of one bit beside the sign after its factor is taken out."""
    program = fixed_program("by_channel=true", pairs=[0.1, 0.1])
    calls, _ = plan_calls(program, _AVX2)
    found = [c.kernel for c in calls if isinstance(c.kernel, FixedTernaryLinear)]
    assert [(one.chain, one.scaled) for one in found] == [(4, True)] * 2


@pytest.mark.parametrize(("bytes_first", "expected"), [(True, FixedLinear), (False, None)])
def test_the_faster_one_is_chosen(bytes_first, expected, monkeypatch):
    """Of measured times; the note has both."""

    def milliseconds(self, kernel):
        packed_codes = isinstance(kernel, FixedTernaryLinear)
        return 2.0 if packed_codes == bytes_first else 1.0

    monkeypatch.setattr(Tuner, "milliseconds", milliseconds)
    calls, _ = plan_calls(fixed_program(), _AVX2)
    wanted = expected or FixedTernaryLinear
    found = [call for call in calls if isinstance(call.kernel, wanted)]
    assert len(found) == 2
    times = "bytes 1.000 ms, two bits 2.000 ms" if bytes_first else "bytes 2.000 ms, two bits 1.000"
    assert all(times in call.note for call in found)
