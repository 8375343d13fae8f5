"""Integer networks with ternary weights: every bit of the reference, and where codes are used."""

from dataclasses import replace

import avx_vnni
import numpy as np
import pytest
import torch
from emulated import EMULATED, run_emulated
from small_nets import captured, net
from ternary_units import AVX2
from torch import nn

import shohin
from shohin.backends.registry import parse_target
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.fixed_conv2d import FixedConv2d
from shohin.backends.tvm.kernels.fixed_linear import FixedLinear
from shohin.backends.tvm.kernels.fixed_ternary_conv2d import FixedTernaryConv2d
from shohin.backends.tvm.kernels.fixed_ternary_linear import (
    FixedTernaryLinear,
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
    monkeypatch.setattr(place_fixed_ternary, "_STREAMED", 0)


OPTIONS = [
    "",
    "weights=4",
    "weights=2 by_channel=true",
    "by_channel=true",
    "data=16",
    "weights=12",
    "ternary=ratio",
    "ternary=ratio by_channel=true",
    "ternary=ratio data=16",
]


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
    program = fixed_program("ternary=ratio" if weights == "compressed" else "")
    check(program, CpuTarget(arch, threads=2, tune="off"), weights=weights)


@pytest.mark.usefixtures("all_packed")
@EMULATED
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("arm", ""),
        ("arm", "ternary=ratio"),
        ("arm{cpu=neoverse-n1}", "ternary=ratio"),
        ("armv7", ""),
        ("armv7", "ternary=ratio"),
    ],
)
def test_every_bit_on_emulated_arm(target, options, tmp_path):
    program, x = fixed_program(options), images(20)
    with torch.no_grad():
        assert torch.equal(run_emulated(program, target, [x], tmp_path), program.module(x))


def test_small_integers_are_used_where_weights_are_multiples():
    """Of twelve bits, and yet products are those of bytes, many of them added in 16 bits."""
    calls, _ = plan_calls(fixed_program("ternary=ratio"), AVX2)
    kernels = [call.kernel for call in calls]
    layers = [one for one in kernels if isinstance(one, (FixedTernaryConv2d, FixedTernaryLinear))]
    assert len(layers) == 5
    for layer in layers:
        assert layer.unit.name == "maddubs"
        assert layer.scaled
        # 8 : 5 is nearest to 0.11 : 0.07; of these, 15 products of two fit.
        assert layer.chain == (15 if isinstance(layer, FixedTernaryConv2d) else 4)
    assert {call.note for call in calls if call.kernel in layers} == {
        "estimated: weights of two bits"
    }
    words, _ = plan_calls(fixed_program("ternary=ratio data=16"), AVX2)
    assert not [one for one in words if isinstance(one.kernel, FixedTernaryConv2d)]
    notes = {call.note for call in words if call.note}
    assert notes == {"ternary, but there is no such kernel: integers as they are"}


@pytest.mark.usefixtures("all_packed")
def test_weights_are_packed_in_memory(tmp_path):
    """Two bits of each weight are among the constants, and no byte of it."""
    calls, constants = plan_calls(fixed_program(), AVX2, tmp_path / "constants")
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
    calls, _ = plan_calls(fixed_program(), AVX2)
    kinds = {type(call.kernel) for call in calls}
    assert FixedConv2d in kinds
    assert FixedTernaryConv2d not in kinds
    assert FixedTernaryLinear in kinds
    notes = [call.note for call in calls if isinstance(call.kernel, FixedConv2d)]
    assert notes.count("estimated: ternary, as bytes") == 3


@pytest.mark.parametrize(
    ("target", "packed"),
    [("arm", 0), ("arm{dotprod=off}", 0), ("armv7", 0), ("arm{dotprod=on}", 2)],
)
def test_codes_are_not_worth_it_where_products_come_in_pairs(target, packed):
    """Taking codes apart costs more there than reading the bytes of a small layer."""
    calls, _ = plan_calls(fixed_program(), parse_target(target).options)
    codes = [call for call in calls if isinstance(call.kernel, FixedTernaryLinear)]
    assert len(codes) == packed
    assert {call.note for call in codes} <= {"estimated: weights of two bits"}
    assert [call.note for call in calls].count("estimated: ternary, as bytes") == 5 - packed


def test_wide_data_has_integers_and_says_so():
    calls, _ = plan_calls(fixed_program("data=16"), AVX2)
    notes = [call.note for call in calls if isinstance(call.kernel, (FixedConv2d, FixedLinear))]
    assert sum("there is no such kernel" in note for note in notes) == 5


def test_long_chains_are_used_where_weights_are_small():
    """Of one bit beside the sign after its factor is taken out."""
    program = fixed_program("by_channel=true", pairs=[0.1, 0.1])
    calls, _ = plan_calls(program, AVX2)
    found = [c.kernel for c in calls if isinstance(c.kernel, FixedTernaryLinear)]
    assert [(one.chain, one.scaled) for one in found] == [(4, True)] * 2


@pytest.mark.parametrize(("bytes_first", "expected"), [(True, FixedLinear), (False, None)])
def test_the_faster_one_is_chosen(bytes_first, expected, monkeypatch):
    """Of measured times; the note has both."""

    def milliseconds(self, kernel):
        packed_codes = isinstance(kernel, FixedTernaryLinear)
        return 2.0 if packed_codes == bytes_first else 1.0

    monkeypatch.setattr(Tuner, "milliseconds", milliseconds)
    calls, _ = plan_calls(fixed_program(), AVX2)
    wanted = expected or FixedTernaryLinear
    found = [call for call in calls if isinstance(call.kernel, wanted)]
    assert len(found) == 2
    times = "bytes 1.000 ms, two bits 2.000 ms" if bytes_first else "bytes 2.000 ms, two bits 1.000"
    assert all(times in call.note for call in found)
