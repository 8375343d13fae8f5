"""A convolution and the 1 x 1 convolution that reads it as one kernel: numbers, pairs, choices."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import torch
from convolutions import blocked_operand, draw_geometry, pack_filters, padded, wide
from harness import (
    ALL_STEPS,
    Array,
    Bounded,
    KernelLibrary,
    apply_steps,
    random_array,
    sum_of_products,
    to_blocked,
    to_plain,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_nets import calls_text, captured, compare, net
from torch import Tensor, nn
from torch.nn import functional

import shohin
from shohin.backends.tvm import compile as compiling
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_pair import MOST_SCRATCH, MOST_WEIGHTS, ConvPair
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, choose_tile
from shohin.backends.tvm.kernels.emit import LANES, Kernel, blocks
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.lowering.calls import KernelCall, Plan
from shohin.backends.tvm.lowering.fuse import fuse
from shohin.backends.tvm.lowering.lower import HANDLERS, lower, select
from shohin.backends.tvm.lowering.operations import Convolution, ConvolutionPair, Operations
from shohin.backends.tvm.lowering.place_pairs import pair_convolutions
from shohin.backends.tvm.lowering.select import Selector
from shohin.backends.tvm.processor import Tune
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.backends.tvm.tuning import tuner as tuning
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner

_RELU = Step("relu")
_RESIDUAL = Step("add", operand="full")
_PROCESSORS = ["x86-64-v2", "x86-64-v3", "x86-64-v4"]

Function: TypeAlias = Callable[..., Any]
Milliseconds: TypeAlias = Callable[[Kernel], float]


def _pair(
    *,
    size: tuple[int, int] = (5, 9),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    channels: int = 16,
    middle: int = 16,
    filters: int = 16,
    tiles: tuple[ConvTile, ConvTile] | None = None,
    steps: tuple[Step, ...] = (),
    registers: int = 7,
    output_blocks: int = 0,
) -> ConvPair:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    width, middle_blocks = geometry.output_size[1], blocks(middle)
    plain = channels <= 4
    first = Conv2d(
        batch=batch,
        channels=channels if plain else blocks(channels) * LANES,
        filters=middle_blocks * LANES,
        geometry=geometry,
        groups=1,
        plain_input=plain,
        tile=tiles[0] if tiles else choose_tile(width, middle_blocks, registers),
        last_channels=0 if plain else channels % LANES,
    )
    second = Conv2d(
        batch=batch,
        channels=middle_blocks * LANES,
        filters=filters,
        geometry=Geometry(geometry.output_size, (1, 1)),
        groups=1,
        plain_input=False,
        tile=tiles[1] if tiles else choose_tile(width, filters // LANES, registers),
        steps=steps,
        output_blocks=output_blocks,
        last_channels=middle % LANES,
    )
    return ConvPair(first, second)


_CHOSEN = {
    "1x1": _pair(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "3x3": _pair(size=(6, 20), middle=32, filters=48),
    "3x1": _pair(kernel=(3, 1), padding=(1, 1, 0, 0)),
    "1x3": _pair(kernel=(1, 3), padding=(0, 0, 1, 1)),
    "5x5": _pair(kernel=(5, 5), padding=(2, 2, 2, 2)),
    "stride 2, plain": _pair(size=(9, 13), stride=(2, 2), channels=3),
    "stride 3x1, dilation 1x2": _pair(stride=(3, 1), dilation=(1, 2), size=(7, 11)),
    "plain 1, batch 3": _pair(channels=1, batch=3),
    "plain 4, residual": _pair(channels=4, steps=(_RESIDUAL,)),
    "asymmetric padding": _pair(padding=(2, 0, 0, 3), stride=(1, 2)),
    "rows of padding alone": _pair(kernel=(1, 1), padding=(2, 1, 3, 0), size=(2, 3)),
    "ragged channels": _pair(channels=21, middle=16),
    "ragged middle": _pair(middle=5),
    "both ragged, batch 3": _pair(channels=37, middle=41, filters=32, batch=3),
    "residual and relu, batch 3": _pair(steps=(_RESIDUAL, _RELU), batch=3, filters=32),
    "joined, batch 3": _pair(output_blocks=3, batch=3),
    "joined, residual": _pair(output_blocks=5, steps=(_RESIDUAL,), filters=32),
    "one pixel": _pair(size=(1, 1)),
    "different tiles": _pair(
        size=(3, 11), middle=48, filters=32, tiles=(ConvTile(2, 3), ConvTile(5, 1))
    ),
    "the largest scratch, often": _pair(
        size=(60, 64), kernel=(1, 1), padding=(0, 0, 0, 0), middle=256, batch=3
    ),
}


def _draw(seed: int) -> ConvPair:
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    filters = LANES * choose.randint(1, 3)
    return _pair(
        size=geometry.size,
        kernel=geometry.kernel,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        batch=choose.randint(1, 3),
        channels=choose.randint(1, 40),
        middle=choose.randint(1, 40),
        filters=filters,
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 3))),
        registers=choose.choice([30, 7, 3]),
        output_blocks=choose.choice([0, filters // LANES + 2]),
    )


_CASES = {**_CHOSEN, **{f"random {seed}": _draw(seed) for seed in range(10)}}


@dataclass(frozen=True)
class _Layer:
    """Weights of a convolution, and where its windows lie."""

    weight: Array
    bias: Array
    geometry: Geometry

    def sums(self, given: Bounded) -> Bounded:
        """What it gives in float32 for an image that is only known within bounds."""
        weight, bias = (torch.from_numpy(array).double() for array in (self.weight, self.bias))
        sizes = given.exact.abs() + given.bound
        rounded = sum_of_products(
            self._convolve(given.exact, weight, bias),
            self._convolve(sizes, weight.abs(), bias.abs()),
            terms=self.weight[0].size,
        )
        carried = self._convolve(given.bound, weight.abs(), torch.zeros_like(bias))
        return Bounded(rounded.exact, rounded.bound + carried)

    def _convolve(self, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        geometry = self.geometry
        image = padded(image, geometry.padding)
        return functional.conv2d(image, weight, bias, geometry.stride, dilation=geometry.dilation)


def _exactly(image: Array) -> Bounded:
    exact = torch.from_numpy(image).double()
    return Bounded(exact, torch.zeros_like(exact))


@dataclass(frozen=True)
class _Data:
    """Random numbers for a pair. What lies in lanes that are not in use must not matter."""

    x: Array
    first: _Layer
    second: _Layer
    operands: list[Array]

    def expected(self, steps: tuple[Step, ...]) -> Bounded:
        sums = self.second.sums(self.first.sums(_exactly(self.x)))
        return apply_steps(steps, sums, [wide(array) for array in self.operands])

    def inputs(self, pair: ConvPair) -> list[Array]:
        x, first, second = self.x, pair.first, pair.second
        if not first.plain_input:
            x = to_blocked(_filled(x, first.channels, 1, np.nan))
        return [
            x,
            *_packed(self.first, first),
            *_packed(self.second, second),
            *(blocked_operand(array) for array in self.operands),
        ]


def _data(pair: ConvPair) -> _Data:
    generator = np.random.default_rng(5)
    first, second = pair.first, pair.second
    channels, middle = _in_use(first), _in_use(second)
    full = (first.batch, second.filters, *second.geometry.output_size)

    def layer(filters: int, channels: int, geometry: Geometry) -> _Layer:
        weight = random_array(generator, filters, channels, *geometry.kernel)
        return _Layer(weight, random_array(generator, filters), geometry)

    return _Data(
        random_array(generator, first.batch, channels, *first.geometry.size),
        layer(middle, channels, first.geometry),
        layer(second.filters, middle, second.geometry),
        [
            random_array(generator, *(full if step.operand == "full" else full[1:2]))
            for step in second.steps
            if step.operand != "none"
        ],
    )


def _in_use(conv: Conv2d) -> int:
    return conv.channels - LANES + conv.last_channels if conv.last_channels else conv.channels


def _filled(array: Array, size: int, axis: int, value: float) -> Array:
    widths = [(0, size - array.shape[i] if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths, constant_values=value)


def _packed(layer: _Layer, conv: Conv2d) -> tuple[Array, Array]:
    weight = _filled(_filled(layer.weight, conv.channels, 1, 0.0), conv.filters, 0, 0.0)
    return pack_filters(weight, conv), _filled(layer.bias, conv.filters, 0, np.nan)


def _run(library: KernelLibrary, pair: ConvPair, data: _Data) -> Array:
    found = library.run(pair, data.inputs(pair))
    written = pair.second.filters // LANES
    assert np.isnan(found[:, written:]).all(), "wrote beside its part"
    return to_plain(found, pair.second.filters)


def _target(arch: str) -> CpuTarget:
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    return CpuTarget(arch)


@pytest.fixture(scope="module", params=_PROCESSORS)
def library(request: pytest.FixtureRequest) -> KernelLibrary:
    return KernelLibrary(_CASES.values(), _target(request.param))


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    pair = _CASES[name]
    data = _data(pair)
    data.expected(pair.second.steps).check(_run(library, pair, data))


@pytest.mark.parametrize("arch", _PROCESSORS)
def test_tiles_change_no_number(arch: str) -> None:
    target = _target(arch)
    pair = _pair(size=(3, 11), channels=21, middle=41, filters=32, steps=(_RESIDUAL, _RELU))
    variants = _variants(pair, target.registers(), 7)
    assert len(variants) > 3
    library = KernelLibrary([*variants, pair.first, pair.second], target)
    data = _data(pair)
    found = [_run(library, variant, data) for variant in variants]
    data.expected(pair.second.steps).check(found[0])
    # Every sum is added up in the same order, also by the two kernels that the pair is made of.
    for other in [*found[1:], _one_by_one(library, pair, data)]:
        np.testing.assert_array_equal(other, found[0])


def _variants(pair: ConvPair, *registers: int) -> list[ConvPair]:
    found = [variant for number in registers for variant in pair.variants(number)]
    return [variant for variant in dict.fromkeys(found) if isinstance(variant, ConvPair)]


def _one_by_one(library: KernelLibrary, pair: ConvPair, data: _Data) -> Array:
    x, weight, bias, last_weight, last_bias, *operands = data.inputs(pair)
    middle = library.run(pair.first, [x, weight, bias])
    found = library.run(pair.second, [middle, last_weight, last_bias, *operands])
    return to_plain(found, pair.second.filters)


@pytest.mark.parametrize("registers", [3, 7, 30])
def test_variants_differ_in_their_tiles_alone(registers: int) -> None:
    pair = _pair(size=(28, 28), middle=64, filters=128)
    variants = _variants(pair, registers)
    assert len({variant.tile_text() for variant in variants}) == len(variants) >= 1
    assert {variant.problem() for variant in variants} == {pair.problem()}
    assert {variant.extent for variant in variants} == {28}
    assert {variant.operations for variant in variants} == {pair.operations}


def test_other_steps_are_another_problem() -> None:
    assert _pair().problem() == _pair(tiles=(ConvTile(1, 1), ConvTile(2, 1))).problem()
    assert _pair().problem() != _pair(steps=(_RELU,)).problem()
    assert _pair().problem() != _pair(padding=(1, 1, 1, 0)).problem()


def test_sums_never_wait_in_the_output() -> None:
    pair = _pair(size=(14, 14), kernel=(5, 5), padding=(2, 2, 2, 2), channels=128, middle=64)
    assert pair.fits
    assert any("c" in variant.tile_text() for variant in pair.first.variants(30))
    for variant in _variants(pair, 30):
        assert not variant.first.tile.input_blocks


def _pointwise(width: int, channels: int, middle: int, filters: int) -> ConvPair:
    return _pair(
        size=(2, width),
        kernel=(1, 1),
        padding=(0, 0, 0, 0),
        channels=channels,
        middle=middle,
        filters=filters,
    )


def test_a_row_must_fit_the_scratch_memory() -> None:
    largest = _pointwise(64, channels=16, middle=256, filters=16)
    assert 4 * largest.scratch == MOST_SCRATCH
    assert largest.fits
    assert not _pointwise(65, channels=16, middle=256, filters=16).fits
    assert not _pointwise(64, channels=16, middle=257, filters=16).fits


def test_the_weights_of_both_must_be_few() -> None:
    largest = _pointwise(8, channels=256, middle=512, filters=256)
    assert 4 * 512 * (256 + 256) == MOST_WEIGHTS
    assert all(variant.fits for variant in [largest, *_variants(largest, 3, 30)])
    assert not _pointwise(8, channels=256, middle=512, filters=272).fits
    assert not _pointwise(8, channels=257, middle=512, filters=256).fits


def _layers(**others: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(16, 20, 3, padding=1), "b": nn.Conv2d(20, 16, 1), **others}


def _kinds(function: Function, **layers: nn.Module) -> list[str]:
    """Kinds of the operations, in order."""
    program = captured(net(function, **layers), (16, 8, 8), batch=1)
    return [type(op).__name__ for op in select(program, 1).operations]


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(16, 20, 3),
        nn.Conv2d(16, 20, 1),
        nn.Conv2d(16, 20, (3, 1), stride=2, padding=(2, 0), dilation=(2, 1), bias=False),
    ],
)
def test_a_pair(first: nn.Module) -> None:
    assert _kinds(lambda s, x: s.b(s.a(x)), **_layers(a=first)) == ["ConvolutionPair"]


def test_steps_of_the_second_are_those_of_the_pair() -> None:
    module = net(lambda s, x, y: (s.b(s.a(x)) + y).relu(), **_layers())
    (pair,) = select(captured(module, (16, 8, 8), (16, 8, 8)), 2).operations
    assert isinstance(pair, ConvolutionPair)
    assert [step.step.kind for step in pair.steps] == ["add", "relu"]
    assert [value.name for value in pair.reads] == ["inputs_0", "inputs_1"]


def test_a_pair_runs_where_the_second_did() -> None:
    def late(s: Any, x: Tensor) -> Any:
        middle = s.a(x)
        return s.b(middle) + functional.max_pool2d(x, 3, 1, 1)

    assert _kinds(late, **_layers()) == ["Pooling", "ConvolutionPair"]


def test_a_convolution_is_in_one_pair() -> None:
    layers = _layers(c=nn.Conv2d(16, 24, 1), d=nn.Conv2d(24, 16, 1))
    three = _kinds(lambda s, x: s.c(s.b(s.a(x))), **layers)
    assert three == ["ConvolutionPair", "Convolution"]
    four = _kinds(lambda s, x: s.d(s.c(s.b(s.a(x)))), **layers)
    assert four == ["ConvolutionPair", "ConvolutionPair"]


def _read_twice(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle), s.c(middle)


def _read_as_operand(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle) + middle


def _returned(s: Any, x: Tensor) -> Any:
    middle = s.a(x)
    return s.b(middle), middle


_APART: dict[str, tuple[Function, dict[str, nn.Module]]] = {
    "read twice": (_read_twice, {"c": nn.Conv2d(20, 16, 1)}),
    "read as an operand": (_read_as_operand, {"b": nn.Conv2d(20, 20, 1)}),
    "an output": (_returned, {}),
    "activation between": (lambda s, x: s.b(s.a(x).relu()), {}),
    "normalised between": (lambda s, x: s.b(s.n(s.a(x))), {"n": nn.BatchNorm2d(20)}),
    "cut between": (lambda s, x: s.b(s.a(x)[:, :, 1:]), {}),
    "pooled between": (lambda s, x: s.b(functional.max_pool2d(s.a(x), 2)), {}),
    **{
        f"second {name}": (lambda s, x: s.b(s.a(x)), {"b": second})
        for name, second in {
            "strided": nn.Conv2d(20, 16, 1, stride=(1, 2)),
            "padded": nn.Conv2d(20, 16, 1, padding=(0, 1)),
            "3x3": nn.Conv2d(20, 16, 3),
            "1x2": nn.Conv2d(20, 16, (1, 2)),
            "grouped": nn.Conv2d(20, 16, 1, groups=2),
            "depthwise": nn.Conv2d(20, 20, 1, groups=20),
        }.items()
    },
    "first grouped": (lambda s, x: s.b(s.a(x)), {"a": nn.Conv2d(16, 20, 3, groups=2)}),
    "first depthwise": (
        lambda s, x: s.b(s.a(x)),
        {"a": nn.Conv2d(16, 16, 3, groups=16), "b": nn.Conv2d(16, 16, 1)},
    ),
}


@pytest.mark.parametrize("name", _APART)
def test_what_is_no_pair(name: str) -> None:
    function, layers = _APART[name]
    kinds = _kinds(function, **_layers(**layers))
    assert "ConvolutionPair" not in kinds
    assert kinds.count("Convolution") >= 2


def _unpaired() -> Operations:
    program = captured(net(lambda s, x: s.b(s.a(x)), **_layers()), (16, 8, 8), batch=1)
    return fuse(Selector(program, 1, HANDLERS).select())


@pytest.mark.parametrize("sparse", [[0], [1], [0, 1]])
def test_sparse_convolutions_are_no_pair(sparse: list[int]) -> None:
    operations = _unpaired()
    assert len(pair_convolutions(operations).operations) == 1
    for index in sparse:
        convolution = operations.operations[index]
        assert isinstance(convolution, Convolution)
        convolution.sparse = True
    assert pair_convolutions(operations).operations == operations.operations


Pretend: TypeAlias = Callable[[Milliseconds], list[Kernel]]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Lets kernels take given times on a machine that runs all code; lists what was measured."""

    def start(milliseconds: Milliseconds) -> list[Kernel]:
        measured: list[Kernel] = []

        def measure(kernels: Sequence[Kernel], target: CpuTarget) -> list[float]:
            measured.extend(kernels)
            return [milliseconds(kernel) for kernel in kernels]

        monkeypatch.setattr(tuning, "measure_kernels", measure)
        monkeypatch.setattr(tuning, "host_runs", lambda processor: "")
        return measured

    return start


def _pairs_take(milliseconds: float) -> Milliseconds:
    """Times by which every other kernel takes one millisecond."""
    return lambda kernel: milliseconds if isinstance(kernel, ConvPair) else 1.0


def _planned(
    module: nn.Module,
    shape: tuple[int, ...],
    folder: Path,
    *,
    batch: int = 1,
    tune: Tune = "quick",
) -> Plan:
    tuner = Tuner(CpuTarget("x86-64-v3", tune=tune), TuningCache(folder))
    program = captured(module, shape, batch=batch)
    return lower(program, tuner, batch, folder / "constants.bin", lambda done, total, text: None)


def _convolutions(plan: Plan) -> list[KernelCall]:
    return [call for call in plan.calls if isinstance(call.kernel, (Conv2d, ConvPair))]


def _one_pair(**others: nn.Module) -> nn.Module:
    return net(lambda s, x: s.b(s.a(x)), **_layers(**others))


def test_a_faster_pair_is_one_kernel(pretend: Pretend, tmp_path: Path) -> None:
    pretend(_pairs_take(1.5))
    (call,) = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert isinstance(call.kernel, ConvPair)
    assert call.note == "measured: one by one 2.000 ms, in one kernel 1.500 ms"
    assert call.label == "a: conv2d + conv2d"
    assert call.macs == 64 * (20 * 16 * 9 + 16 * 20)
    assert call.extent == 8


@pytest.mark.parametrize("milliseconds", [2.0, 2.5])
def test_a_pair_that_is_not_faster_is_two(
    pretend: Pretend, tmp_path: Path, milliseconds: float
) -> None:
    pretend(_pairs_take(milliseconds))
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.label for call in calls] == ["a: conv2d", "b: conv2d"]
    text = f"measured: one by one 2.000 ms, in one kernel {milliseconds:.3f} ms"
    assert [call.note for call in calls] == [text, text]


def test_nothing_measured_is_two_without_a_note(pretend: Pretend, tmp_path: Path) -> None:
    measured = pretend(_pairs_take(0.1))
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path, tune="off"))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.note for call in calls] == ["", ""]
    assert not measured


def test_what_does_not_fit_is_not_measured(pretend: Pretend, tmp_path: Path) -> None:
    measured = pretend(_pairs_take(0.1))
    wide = _one_pair(a=nn.Conv2d(16, 257, 1), b=nn.Conv2d(257, 16, 1))
    calls = _convolutions(_planned(wide, (16, 1, 64), tmp_path))
    assert [call.kernel.family for call in calls] == ["conv2d", "conv2d"]
    assert [call.note for call in calls] == ["", ""]
    assert not any(isinstance(kernel, ConvPair) for kernel in measured)


@pytest.mark.parametrize("pair", [0.1, 5.0])
def test_kernels_are_those_whose_times_were_compared(
    pretend: Pretend, tmp_path: Path, pair: float
) -> None:
    favourites = _planned(_one_pair(), (16, 8, 8), tmp_path, tune="off")
    tiles = {call.kernel.tile_text() for call in _convolutions(favourites)}
    both = "+".join(call.kernel.tile_text() for call in _convolutions(favourites))

    def milliseconds(kernel: Kernel) -> float:
        slow = 1.0 if kernel.tile_text() in {*tiles, both} else 0.25
        return slow * (pair if isinstance(kernel, ConvPair) else 1.0)

    pretend(milliseconds)
    calls = _convolutions(_planned(_one_pair(), (16, 8, 8), tmp_path))
    assert len(calls) == (1 if pair < 1 else 2)
    assert not {*tiles, both} & {call.kernel.tile_text() for call in calls}
    text = f"measured: one by one 0.500 ms, in one kernel {pair / 4:.3f} ms"
    assert {call.note for call in calls} == {text}


def _joined() -> nn.Module:
    return net(
        lambda s, x: torch.cat([s.b(s.a(x)), s.d(s.c(x)).relu()], 1),
        a=nn.Conv2d(16, 20, 3, padding=1),
        b=nn.Conv2d(20, 32, 1),
        c=nn.Conv2d(16, 8, 1),
        d=nn.Conv2d(8, 20, 1),
    )


@pytest.mark.parametrize("milliseconds", [0.1, 5.0])
@pytest.mark.parametrize("batch", [1, 3])
def test_pairs_write_into_a_concatenation(
    pretend: Pretend, tmp_path: Path, batch: int, milliseconds: float
) -> None:
    pretend(_pairs_take(milliseconds))
    plan = _planned(_joined(), (16, 4, 4), tmp_path, batch=batch)
    assert "concat" not in calls_text(plan)
    pairs = [call.kernel for call in plan.calls if isinstance(call.kernel, ConvPair)]
    assert len(pairs) == (2 if milliseconds < 1 else 0)
    joined = 4 if batch > 1 else None
    assert all(pair.second.output_blocks == joined for pair in pairs if joined)


@pytest.fixture
def always_pairs(
    pretend: Pretend, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Measurements by which pairs win, away from the user's own."""
    cache = TuningCache(tmp_path_factory.mktemp("tuning"))
    monkeypatch.setattr(compiling, "Tuner", lambda target: Tuner(target, cache))
    monkeypatch.setenv("SHOHIN_TUNE", "quick")
    pretend(_pairs_take(0.1))


def _compiled(
    module: nn.Module, inputs: Sequence[Tensor], target: str = "cpu{threads=2}"
) -> tuple[Any, int]:
    """What a compiled network gives, and how many pairs it is made of."""
    batch, *_ = inputs[0].shape
    program = captured(module, *(tuple(x.shape[1:]) for x in inputs), batch=batch)
    binary = shohin.compile(program, target, batch=batch)
    pairs = [step for step in binary.info.steps if step.kernel.startswith("conv_pair ")]
    return binary(*inputs), len(pairs)


def _inputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _chain(s: Any, x: Tensor) -> Tensor:
    first = s.b(s.a(x)).relu()
    middle = s.c(first)
    second = (s.d(middle) + functional.max_pool2d(first, 3, 1, 1)).relu()
    return torch.cat([s.f(s.e(second)), s.h(s.g(second)).sigmoid()], 1)


def _network() -> nn.Module:
    """Pairs that read an input, each other and what is computed in between, and are joined."""
    return net(
        _chain,
        a=nn.Conv2d(3, 5, 3, padding=1, stride=2),
        b=nn.Conv2d(5, 20, 1),
        c=nn.Conv2d(20, 33, (3, 1), padding=(1, 0)),
        d=nn.Conv2d(33, 20, 1, bias=False),
        e=nn.Conv2d(20, 7, (1, 3), padding=(0, 1)),
        f=nn.Conv2d(7, 32, 1),
        g=nn.Conv2d(20, 18, 1),
        h=nn.Conv2d(18, 9, 1),
    )


@pytest.mark.usefixtures("always_pairs")
@pytest.mark.parametrize("batch", [1, 3])
def test_a_network_of_pairs(batch: int) -> None:
    module, inputs = _network(), _inputs((batch, 3, 11, 14))
    found, pairs = _compiled(module, inputs)
    assert pairs == 4
    with torch.no_grad():
        compare(found, module(*inputs), tolerance=1e-5)
