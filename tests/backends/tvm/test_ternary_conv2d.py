"""Convolutions with ternary weights: the packed kernel, and where it is used."""

import random
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import blocked_operand, draw_geometry, pack_filters
from emulated import EMULATED
from harness import ALL_STEPS, Array, KernelLibrary, random_array, to_blocked
from small_nets import RandomNet, compare, net
from ternary_nets import (
    SCALES,
    Scales,
    check_emulated,
    check_ternary,
    families,
    notes,
    ternary,
    ternary_weight,
)
from torch import Tensor, nn
from torch.nn import functional

import shohin
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.conv_tiles import ConvTile, choose_tile
from shohin.backends.tvm.kernels.emit import LANES, Kernel
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.packed_conv2d import PackedConv2d
from shohin.backends.tvm.kernels.sparse_conv2d import SparseConv2d
from shohin.backends.tvm.lowering.lower import lower
from shohin.backends.tvm.target import CpuTarget, host_runs
from shohin.backends.tvm.tuning.cache import TuningCache
from shohin.backends.tvm.tuning.tuner import Tuner
from shohin.ir.program import Program

_RESIDUAL = Step("add", operand="full")


def _conv(
    *,
    size: tuple[int, int] = (6, 20),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    batch: int = 1,
    channels: int = 16,
    filters: int = 32,
    tile: ConvTile | None = None,
    **more: Any,
) -> PackedConv2d:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    width, height = geometry.output_size[1], geometry.output_size[0]
    groups = more.pop("groups", 1)
    chosen = tile or replace(choose_tile(width, filters // LANES // groups, 7), input_blocks=1)
    return PackedConv2d(
        batch=batch,
        channels=channels,
        filters=filters,
        geometry=geometry,
        groups=groups,
        plain_input=channels <= 4,
        tile=chosen if tile else replace(chosen, rows=height),
        **more,
    )


def _draw(seed: int) -> PackedConv2d:
    choose = random.Random(seed)
    geometry = draw_geometry(choose)
    groups = choose.choice([1, 1, 2])
    channels = choose.choice([1, 3, 16, 48]) if groups == 1 else 32 * groups
    filters = 16 * groups * choose.randint(1, 3)
    kernel = PackedConv2d(
        batch=choose.randint(1, 3),
        channels=channels,
        filters=filters,
        geometry=geometry,
        groups=groups,
        plain_input=channels <= 4,
        tile=ConvTile(1, 1),
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
        items=choose.randint(1, 8),
    )
    return choose.choice([v for v in kernel.variants(7) if isinstance(v, PackedConv2d)])


_CASES = {
    "3x3": _conv(),
    "1x1": _conv(kernel=(1, 1), padding=(0, 0, 0, 0), channels=48),
    "7x7 stride 2, plain": _conv(
        kernel=(7, 7), padding=(3, 3, 3, 3), stride=(2, 2), channels=3, size=(18, 37)
    ),
    "one plain channel": _conv(channels=1),
    "even, ragged words": _conv(kernel=(5, 2), padding=(2, 2, 0, 1), channels=2),
    "all input blocks at once": _conv(channels=48, tile=ConvTile(5, 2, 6, 3)),
    "parts of input blocks, ragged rows": _conv(channels=80, tile=ConvTile(5, 1, 4, 2)),
    "a row at a time": _conv(channels=32, tile=ConvTile(5, 1, 1, 1)),
    "groups": _conv(channels=64, filters=64, groups=2, tile=ConvTile(5, 1, 6, 1)),
    "few channels of the last block": _conv(channels=48, last_channels=8, size=(5, 13)),
    "part of a concatenation, batch": _conv(output_blocks=5, batch=3),
    "residual": _conv(steps=(_RESIDUAL, Step("relu")), batch=2, stride=(2, 2), channels=32),
    "one number a channel": _conv(steps=(Step("multiply", operand="channel"), Step("silu"))),
    "padding beyond the kernel": _conv(padding=(4, 5, 5, 4), size=(3, 4)),
    "dilation 2": _conv(dilation=(2, 2), padding=(2, 2, 2, 2)),
    "one pixel": _conv(size=(1, 1)),
    **{f"random {seed}": _draw(seed) for seed in range(10)},
}


def _dense(kernel: PackedConv2d) -> Conv2d:
    """The dense kernel of the same tile, which does the same in the same order."""
    return Conv2d(**{field.name: getattr(kernel, field.name) for field in fields(Conv2d)})


@pytest.fixture(scope="module", params=["native", "x86-64-v2"])
def library(request: pytest.FixtureRequest) -> KernelLibrary:
    kernels = [one for kernel in _CASES.values() for one in (kernel, _dense(kernel))]
    return KernelLibrary(kernels, CpuTarget(request.param))


def _operands(kernel: Conv2d, generator: np.random.Generator) -> list[Array]:
    shapes = {
        "full": (kernel.batch, kernel.filters, *kernel.geometry.output_size),
        "channel": (kernel.filters,),
    }
    kinds = [step.operand for step in kernel.steps if step.operand != "none"]
    return [blocked_operand(random_array(generator, *shapes[kind])) for kind in kinds]


@pytest.mark.parametrize("name", _CASES)
def test_equal_to_the_dense_kernel(library: KernelLibrary, name: str) -> None:
    """Bit for bit: weights are the same once they are expanded."""
    kernel = _CASES[name]
    generator = np.random.default_rng(7)
    x = random_array(generator, kernel.batch, kernel.channels, *kernel.geometry.size)
    shape = (kernel.filters, kernel.channels // kernel.groups, *kernel.geometry.kernel)
    weight = ternary_weight(shape, "by row")
    if kernel.last_channels:
        weight.codes[:, kernel.channels - LANES + kernel.last_channels :] = 0
    image = x if kernel.plain_input else to_blocked(x)
    rest = [random_array(generator, kernel.filters), *_operands(kernel, generator)]
    values = (weight.pairs().numpy() * [1, -1]).T.astype(np.float32)
    dense = pack_filters(weight.materialise().numpy(), kernel)
    expected = library.run(_dense(kernel), [image, dense, *rest])
    words = kernel.pack(weight.codes.numpy())
    assert words.shape == kernel.parameters()[1].shape
    found = library.run(kernel, [image, words, values, *rest])
    np.testing.assert_array_equal(found, expected)


def test_scratch_and_work_items() -> None:
    kernel = _conv(size=(28, 28), channels=512, filters=64)
    for one in kernel.variants(30):
        assert isinstance(one, PackedConv2d)
        assert one.tile.rows == 28
        assert one.extent == one.filters // one.tile_filters
        assert 4 * one.tile.input_blocks * one.words * 16 * one.tile_filters <= 4 * 9216
    for one in replace(kernel, items=8).variants(30):
        assert one.extent >= 8
    assert not _conv(size=(200, 200), kernel=(150, 150)).variants(30)


# From here on: where the kernel is used.


def _check(module: nn.Module, *shape: int, batch: int, scales: Scales, threads: int = 2) -> None:
    program = ternary(module, shape, batch=batch, scales=scales)
    assert "conv2d" not in families(program, batch)
    check_ternary(program, shape, batch=batch, threads=threads)


def _strided() -> nn.Module:
    def function(s: nn.Module, x: Tensor) -> Tensor:
        return s.c(functional.relu(s.b(functional.relu(s.a(x)))))

    return net(
        function,
        a=nn.Conv2d(3, 20, 5, stride=2, padding=2),
        b=nn.Conv2d(20, 33, 3, padding=1, bias=False),
        c=nn.Conv2d(33, 7, 1),
    )


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scales", SCALES)
def test_networks(scales: Scales, batch: int) -> None:
    _check(_strided(), 3, 13, 11, batch=batch, scales=scales)


@pytest.mark.parametrize("seed", range(6))
def test_random_networks(seed: int) -> None:
    module = RandomNet(seed).eval()
    shape, batch = (module.channels, 12, 12), seed % 2 + 1
    program = ternary(module, shape, batch=batch, scales=SCALES[seed % 3])
    check_ternary(program, shape, batch=batch)


def test_residual_and_normalisation() -> None:
    """The steps behind a convolution, and its rows where a normalisation is folded into it."""
    module = net(
        lambda s, x: functional.relu(s.n(s.a(x)) + x),
        a=nn.Conv2d(20, 20, 3, padding=1, bias=False),
        n=nn.BatchNorm2d(20),
    )
    program = ternary(module, (20, 9, 9))
    folded = shohin.optimize(program, "fold-bn", drift=False).program
    for one in (program, folded):
        assert "packed_conv2d" in families(one)
        check_ternary(one, (20, 9, 9))
    assert families(folded) == ["to_blocked", "packed_conv2d", "to_plain"]


def test_groups_and_one_axis() -> None:
    module = net(
        lambda s, x: s.b(s.a(x).flatten(2)),
        a=nn.Conv2d(8, 64, 3, groups=2),
        b=nn.Conv1d(64, 18, 3, padding=1),
    )
    _check(module, 8, 5, 7, batch=2, scales="by row")


def test_depthwise_convolutions_stay_dense() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(20, 20, 3, groups=20))
    program = ternary(module, (20, 9, 9), scales="rows")
    assert notes(program) == ["dense: a depthwise convolution has no packed kernel"]
    check_ternary(program, (20, 9, 9))


def test_very_large_filters_stay_dense() -> None:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(5, 3, 150))
    program = ternary(module, (5, 151, 150), density=0.9)
    assert notes(program) == ["dense; no packed kernel for 150 x 150 filters"]


def test_pairs_are_taken_one_by_one() -> None:
    module = net(
        lambda s, x: s.b(s.a(x)), a=nn.Conv2d(16, 16, 3, padding=1), b=nn.Conv2d(16, 32, 1)
    )
    program = ternary(module, (16, 9, 9))
    assert families(program) == ["to_blocked", "packed_conv2d", "packed_conv2d", "to_plain"]


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_other_processors(arch: str) -> None:
    if host_runs(arch):
        pytest.skip(host_runs(arch))
    check_ternary(ternary(_strided(), (3, 13, 11), scales="rows"), (3, 13, 11), arch=arch)


@EMULATED
@pytest.mark.parametrize("target", ["arm", "armv7"])
def test_arm(target: str, tmp_path: Path) -> None:
    program = ternary(_strided(), (3, 13, 11), batch=2, scales="rows")
    check_emulated(program, target, tmp_path, (3, 13, 11), batch=2)


def _wide(density: float) -> Program:
    module = net(lambda s, x: s.a(x), a=nn.Conv2d(64, 96, 3, padding=1))
    return ternary(module, (64, 6, 6), density=density)


def test_weights_stay_packed() -> None:
    """The constants are codes, and two values and a bias for each filter."""
    binary = compile_program(_wide(0.5), CpuTarget(), 1)
    assert binary.constant_bytes < 64 * 96 * 9 / 4 + 3 * 4 * 96 + 256


def test_weights_that_are_coded_in_the_binary() -> None:
    program = _wide(0.1)
    plain = compile_program(program, CpuTarget(), 1)
    coded = compile_program(program, CpuTarget(), 1, weights="compressed")
    entropy = -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.05))
    assert coded.info.weight_bytes < 1.2 * entropy / 8 * 64 * 96 * 9 + 3 * 4 * 96
    x = torch.randn(1, 64, 6, 6, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(coded(x.numpy()), plain(x.numpy()))
    with torch.no_grad():
        compare(coded(x), program.module(x), 1e-5)


def test_few_weights_are_compared_as_lists_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = _wide(0.2)
    (note,) = notes(program)
    names = [part.split()[0] for part in note.removeprefix("estimated: ").split(", ")]
    assert names == ["dense", "sparse", "packed"]
    tuner = Tuner(CpuTarget(tune="quick"), TuningCache(tmp_path))

    def chosen(times: dict[type[Kernel], float]) -> set[str]:
        monkeypatch.setattr(
            "shohin.backends.tvm.tuning.tuner.measure_kernels",
            lambda kernels, target: [times.get(type(kernel), 0.1) for kernel in kernels],
        )
        for file in tmp_path.rglob("*.json"):
            file.unlink()
        plan = lower(program, tuner, 1, tmp_path / "constants", lambda done, total, text: None)
        return {call.kernel.family for call in plan.calls if "conv" in call.kernel.family}

    assert chosen({Conv2d: 1.0, SparseConv2d: 5.0, PackedConv2d: 1.04}) == {"packed_conv2d"}
    assert chosen({Conv2d: 1.0, SparseConv2d: 5.0, PackedConv2d: 1.1}) == {"conv2d"}
    assert chosen({Conv2d: 1.0, SparseConv2d: 0.2, PackedConv2d: 1.0}) == {"sparse_conv2d"}


@pytest.mark.usefixtures("always_sparse")
def test_sparse_networks() -> None:
    module = net(
        lambda s, x: functional.relu(s.b(functional.relu(s.a(x)))),
        a=nn.Conv2d(3, 20, 3, padding=1),
        b=nn.Conv2d(20, 24, 3, padding=1),
    )
    program = ternary(module, (3, 13, 11), scales="rows", density=0.1)
    assert "sparse_conv2d" in families(program)
    check_ternary(program, (3, 13, 11))
