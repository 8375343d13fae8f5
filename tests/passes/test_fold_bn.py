import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shohin.ir.capture import capture
from shohin.ir.encodings import Dense, Sparse
from shohin.ir.program import Fact, Stage, set_tensor, tensor_of
from shohin.ir.ternarising import Threshold, ternary_codes
from shohin.ir.ternary import Ternary
from shohin.passes.fold_bn import FoldBatchNorm
from shohin.passes.prune import Prune

aten = torch.ops.aten
NORMS = {aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default}
UNIT = 2.0**-24  # half an ulp of 1 in float32


def norms(program):
    return [node for node in program.graph.nodes if node.target in NORMS]


def double(program):
    return copy.deepcopy(program.module).double()


def rounding_bound(program, x):
    """What rounding the folded weights of the only operation can change its result by.

    Each weight is off by a relative 2**-24 at most, so the sum is off by 2**-24 * (|W| |x| + |b|).
    """
    module = double(program)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.abs_()
        return UNIT * module(x.abs())


AFTER = {
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d(6), (4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), (4, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 3, stride=2), nn.BatchNorm3d(4), (2, 5, 5, 5)),
    "same padding": (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6), (4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (4, 5, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8), (4, 5, 5)),
    "without affine": (nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False), (4, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (4, 5, 5)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
        nn.BatchNorm2d(6),
        (4, 5, 5),
    ),
    "linear": (nn.Linear(7, 6), nn.BatchNorm1d(6), (7,)),
    "linear without bias": (nn.Linear(7, 6, bias=False), nn.BatchNorm1d(6), (7,)),
}

BEFORE = {
    "conv2d": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "grouped": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 7, 7)),
    "valid padding": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid"), (4, 7, 7)),
    "same padding 1x1": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding="same"), (4, 7, 7)),
    "linear": (nn.BatchNorm1d(7), nn.Linear(7, 6, bias=False), (7,)),
}


@pytest.fixture(scope="module")
def captured(random_statistics):
    def make(module, *shape):
        module = random_statistics(copy.deepcopy(module), 0)
        return capture(module, (torch.ones(2, *shape),), name="net")

    return make


def test_golden(apply, golden, captured):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    program = captured(network, 3, 8, 8)
    golden("fold_bn", program, apply(FoldBatchNorm(), program).program)


@pytest.mark.parametrize(("operation", "norm", "shape"), AFTER.values(), ids=AFTER)
def test_after_an_operation(apply, captured, operation, norm, shape):
    program = captured(nn.Sequential(operation, norm), *shape)
    after = apply(FoldBatchNorm(), program)
    assert norms(after.program) == []
    assert after.reasons() == {"folded"}
    x = torch.randn(3, *shape, dtype=torch.float64)
    difference = (double(program)(x) - double(after.program)(x)).abs()
    # Both are computed in float64, whose own rounding is 2**29 times smaller.
    assert bool((difference <= 1.001 * rounding_bound(after.program, x)).all())


@pytest.mark.parametrize(("norm", "operation", "shape"), BEFORE.values(), ids=BEFORE)
def test_before_an_operation(apply, captured, norm, operation, shape):
    program = captured(nn.Sequential(norm, operation), *shape)
    after = apply(FoldBatchNorm(), program)
    assert norms(after.program) == []
    x = torch.randn(3, *shape, dtype=torch.float64)
    difference = (double(program)(x) - double(after.program)(x)).abs()
    assert bool((difference <= 1.001 * rounding_bound(after.program, x)).all())


@pytest.mark.parametrize(
    "operation", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, groups=2)]
)
def test_before_a_padded_operation_only_without_shift(apply, captured, operation):
    norm = nn.BatchNorm2d(4)
    shifted = captured(nn.Sequential(norm, operation), 4, 6, 6)
    assert apply(FoldBatchNorm(), shifted).reasons() == {"not-exact"}
    centred = shifted.copy()
    for name in ("0.running_mean", "0.bias"):
        set_tensor(centred.module, name, torch.zeros(4))
    after = apply(FoldBatchNorm(), centred)
    assert norms(after.program) == []
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    difference = (double(centred)(x) - double(after.program)(x)).abs()
    assert bool((difference <= 1.001 * rounding_bound(after.program, x)).all())


def test_form_with_several_results(apply, captured):
    class Legit(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.norm
            results = aten._native_batch_norm_legit_no_training.default(
                self.conv(x), norm.weight, norm.bias, norm.running_mean, norm.running_var, 0.1, 1e-5
            )
            return functional.relu(results[0])

    program = captured(Legit(), 3, 4, 4)
    after = apply(FoldBatchNorm(), program)
    assert norms(program)
    assert norms(after.program) == []
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    difference = (double(program)(x) - double(after.program)(x)).abs()
    assert bool((difference <= 1.001 * rounding_bound(after.program, x)).all())


class Custom(nn.Module):
    """A convolution and a normalisation, put together by a function."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def in_training(self, x):
    norm = self.norm
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    return functional.batch_norm(self.conv(x), mean, variance, training=True)


def with_computed_statistics(self, x):
    y = self.conv(x)
    return functional.batch_norm(y, y.mean((0, 2, 3)), y.var((0, 2, 3)))


def with_computed_weight(self, x):
    return self.norm(functional.conv2d(x, self.conv.weight.exp()))


def with_other_users(self, x):
    y = self.conv(x)
    return self.norm(y) + y


NEAR_MISSES = {
    "training": (in_training, "training-mode"),
    "computed statistics": (with_computed_statistics, "not-constant"),
    "computed weight": (with_computed_weight, "not-constant"),
    "other users": (with_other_users, "other-users"),
    "a ReLU between": (lambda self, x: self.norm(functional.relu(self.conv(x))), "not-applicable"),
    "used twice": (lambda self, x: self.conv(y := self.norm(x)) + y, "other-users"),
}


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(apply, captured, function, reason):
    program = captured(Custom(function), 4, 5, 5)
    after = apply(FoldBatchNorm(), program)
    assert not after.modified
    assert after.reason("batch_norm") == reason
    assert len(norms(after.program)) == 1


def test_linear_on_the_last_of_three_axes_stays(apply, captured):
    program = captured(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7)), 7, 5)
    assert apply(FoldBatchNorm(), program).reasons() == {"not-exact"}


def test_statistics_that_are_not_finite_stay(apply, captured):
    program = captured(Custom(lambda self, x: self.norm(self.conv(x))), 4, 5, 5)
    set_tensor(program.module, "norm.running_var", torch.full((4,), -1.0))
    assert apply(FoldBatchNorm(), program).reasons() == {"not-finite"}


def test_shared_weights_get_copies(apply, captured):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.second(self.conv(self.first(self.conv(x)))))

    program = captured(Shared(), 4, 5, 5)
    after = apply(FoldBatchNorm(), program)
    assert norms(after.program) == []
    assert torch.equal(
        tensor_of(program.module, "conv.weight"), tensor_of(after.program.module, "conv.weight")
    )
    assert sum("own copy" in remark.detail for remark in after.remarks) == 2
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = double(program)(x)
    # Three layers of four channels, each weight off by 2**-24.
    assert torch.allclose(expected, double(after.program)(x), rtol=0, atol=64 * UNIT * 100)


def test_sparse_weight_keeps_its_mask(apply, captured):
    program = captured(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), 4, 5, 5)
    sparse = apply(Prune(density=0.25), program).program
    after = apply(FoldBatchNorm(), sparse)
    before, folded = sparse.encodings["0.weight"], after.program.encodings["0.weight"]
    weight = tensor_of(after.program.module, "0.weight")
    assert isinstance(folded, Sparse)
    assert torch.equal(folded.mask, before.mask)
    assert torch.equal(folded.materialise().view(torch.int32), weight.view(torch.int32))
    assert after.program.stage is Stage.ANNOTATED
    (remark,) = after.remarks
    assert (remark.before.parameters, remark.after.parameters) == (54 + 6 + 12, 54 + 6)


def test_other_encodings_stay(apply, captured):
    program = captured(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 4)
    weight = torch.full((6, 4), 2.0)
    set_tensor(program.module, "0.weight", weight)
    every = torch.ones(24, dtype=torch.bool)
    values = Sparse(every, Dense(weight.flatten()))
    held = Sparse(every.view(6, 4), values)
    encoded = replace(program, encodings={"0.weight": held}, stage=Stage.ANNOTATED)
    assert apply(FoldBatchNorm(), encoded).reasons() == {"already-encoded"}


def test_chain_folds_whole(apply, captured):
    network = nn.Sequential(
        nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    )
    after = apply(FoldBatchNorm(), captured(network, 4, 5, 5))
    assert norms(after.program) == []
    assert len(after.remarks) == 3


def test_remark_states_the_cost(apply, captured):
    program = captured(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), 4, 5, 5)
    (remark,) = apply(FoldBatchNorm(), program).remarks
    assert (remark.before.parameters, remark.after.parameters) == (216 + 12, 216 + 6)
    assert remark.before.macs == remark.after.macs == 6 * 9 * 36
    assert remark.after.stored_bytes == 4 * 222


def test_sites_that_are_not_allowed_stay(apply, captured):
    program = captured(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 4)
    after = apply(FoldBatchNorm(), program, allows=lambda site: site != "batch_norm")
    assert after.reason("batch_norm") == "excluded-by-option"


def test_twice_is_once(apply, captured):
    once = apply(FoldBatchNorm(), captured(nn.Sequential(*AFTER["conv2d"][:2]), 4, 7, 7)).program
    assert not apply(FoldBatchNorm(), once).modified


def test_facts():
    assert FoldBatchNorm.establishes == {Fact.BN_FOLDED}
    assert FoldBatchNorm.option_names() == ()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_networks_give_the_same(apply, random_network, seed):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    after = apply(FoldBatchNorm(), program).program
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        expected, found = double(program)(x), double(after)(x)
    # At most 10 layers whose weights are off by 2**-24 each; the longest sum has 144 terms.
    scale = float(expected.abs().max()) + 1.0
    assert float((expected - found).abs().max()) <= 10 * 144 * UNIT * scale


def as_ternary(program, name="0.weight", **parts):
    """A program one of whose weights is ternary."""
    weight = tensor_of(program.module, name).detach()
    held = Ternary(ternary_codes(weight, Threshold(0.3)), Dense(torch.tensor([0.3, 0.7])))
    held = replace(held, **parts)
    set_tensor(program.module, name, held.materialise())
    return replace(program, encodings={name: held}, stage=Stage.ANNOTATED)


ROWS_FIRST = {name: case for name, case in AFTER.items() if not name.startswith("transposed")}


@pytest.mark.parametrize(("operation", "norm", "shape"), ROWS_FIRST.values(), ids=ROWS_FIRST)
def test_scales_become_those_of_the_rows_of_a_ternary_weight(
    apply, captured, operation, norm, shape
):
    program = as_ternary(captured(nn.Sequential(operation, norm), *shape))
    after = apply(FoldBatchNorm(), program)
    before, folded = program.encodings["0.weight"], after.program.encodings["0.weight"]
    assert norms(after.program) == []
    assert isinstance(folded, Ternary)
    assert torch.equal(folded.codes, before.codes)
    assert folded.scales is before.scales
    assert folded.rows.shape == (before.codes.shape[0],)
    x = torch.randn(3, *shape, dtype=torch.float64)
    difference = (double(program)(x) - double(after.program)(x)).abs()
    # Factors are rounded, and so are their products with the scales.
    assert bool((difference <= 2.001 * rounding_bound(after.program, x)).all())
    (remark,) = after.remarks
    assert remark.after.stored_bytes == sum(
        after.program.encodings[name].stored_bytes()
        if name in after.program.encodings
        else tensor_of(after.program.module, name).nbytes
        for name in ("0.weight", "0.bias")
    )


def test_rows_of_a_ternary_weight_may_be_folded_again(apply, captured):
    layers = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    program = captured(layers, 5)
    rows = torch.linspace(-1, 2, 6)
    by_row = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    for parts in ({"rows": rows}, {"scales": Dense(by_row)}):
        encoded = as_ternary(program.copy(), **parts)
        after = apply(FoldBatchNorm(), encoded).program
        folded = after.encodings["0.weight"]
        assert (folded.rows is None) == ("rows" not in parts)
        assert torch.equal(folded.codes, encoded.encodings["0.weight"].codes)
        x = torch.randn(3, 5, dtype=torch.float64)
        difference = (double(encoded)(x) - double(after)(x)).abs()
        assert bool((difference <= 3.001 * rounding_bound(after, x)).all())


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6)), (4, 5, 5)),
        (nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 6)), (7,)),
    ],
)
def test_a_ternary_weight_whose_rows_are_no_outputs_stays(apply, captured, network, shape):
    program = captured(network, *shape)
    name = next(name for name in ("0.weight", "1.weight") if is_matrix(program, name))
    encoded = as_ternary(program, name)
    after = apply(FoldBatchNorm(), encoded)
    (remark,) = after.remarks
    stored = encoded.encodings[name].describe()
    assert (remark.reason, remark.detail) == ("already-encoded", f"{name} is stored as {stored}")
    assert after.program.encodings[name] is encoded.encodings[name]


def is_matrix(program, name):
    return tensor_of(program.module, name).dim() > 1


def test_kept_elements_that_are_ternary_stay(apply, captured):
    program = captured(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 4)
    mask = tensor_of(program.module, "0.weight").detach() > 0
    values = Ternary.of(torch.ones(int(mask.sum())).to(torch.int8), 0.5, 0.5, torch.float32)
    held = Sparse(mask, values)
    set_tensor(program.module, "0.weight", held.materialise())
    encoded = replace(program, encodings={"0.weight": held}, stage=Stage.ANNOTATED)
    after = apply(FoldBatchNorm(), encoded)
    assert after.reasons() == {"already-encoded"}
    assert after.program.encodings["0.weight"] is held


def test_a_ternary_bias_stays(apply, captured):
    program = captured(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), 4)
    encoded = as_ternary(program, "0.bias")
    after = apply(FoldBatchNorm(), encoded)
    assert after.reasons() == {"already-encoded"}
    assert after.program.encodings["0.bias"] is encoded.encodings["0.bias"]


def test_a_shared_ternary_weight_gets_a_copy(apply, captured):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(functional.relu(self.norm(self.conv(x))))

    program = as_ternary(captured(Shared(), 4, 5, 5), "conv.weight")
    after = apply(FoldBatchNorm(), program)
    (remark,) = after.remarks
    assert remark.detail.endswith("with its own copy of a shared weight")
    kept = after.program.encodings
    assert kept["conv.weight"] is program.encodings["conv.weight"]
    (copied,) = (name for name in kept if name != "conv.weight")
    assert kept[copied].rows is not None
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = double(program)(x)
    assert torch.allclose(expected, double(after.program)(x), rtol=0, atol=64 * UNIT * 100)
