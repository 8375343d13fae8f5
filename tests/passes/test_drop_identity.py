import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shohin.ir.capture import capture
from shohin.passes.drop_identity import DropIdentity

aten = torch.ops.aten


class Call(nn.Module):
    """A module that calls a function between two ReLUs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.function(functional.relu(x)))


def program_of(function, *shape, dtype=torch.float32):
    example = torch.ones(shape or (2, 3, 4, 4), dtype=dtype)
    return capture(Call(function), (example,), name="call")


def program_with(target, *arguments):
    """A program of two ReLUs with an operator put between them by hand."""
    program = program_of(lambda x: x)
    first = next(node for node in program.graph.nodes if node.op == "call_function")
    with program.graph.inserting_after(first):
        made = program.graph.call_function(target, (first, *arguments))
    first.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    program.module.recompile()
    return program


def inner(program):
    """Operators between the two ReLUs."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    first, last = (i for i, target in enumerate(targets) if target == aten.relu.default)
    return targets[first + 1 : last]


IDENTITIES = {
    "dropout": lambda x: functional.dropout(x, 0.5, training=False),
    "dropout of nothing": lambda x: functional.dropout(x, 0.0, training=True),
    "dropout2d": lambda x: functional.dropout2d(x, training=False),
    "alpha dropout": lambda x: functional.alpha_dropout(x, training=False),
    "alias": aten.alias,
    "detach": aten.detach,
    "lift": aten.lift_fresh_copy,
    "clone": lambda x: x.clone(),
    "to type": lambda x: x.to(torch.float32, copy=True),
    "_to_copy": lambda x: aten._to_copy(x, dtype=torch.float32),
    "type_as": lambda x: x.type_as(x),
    "view": lambda x: x.view(x.shape),
    "reshape": lambda x: x.reshape(-1, 3, 4, 4),
    "flatten": lambda x: aten.flatten.using_ints(x, 1, 1),
    "expand": lambda x: x.expand(-1, -1, 4, -1),
    "permute": lambda x: aten.permute(x, [0, 1, -2, -1]),
    "transpose": lambda x: aten.transpose(x, 1, -3),
    "slice": lambda x: aten.slice(x, 1, 0, 99),
    "slice of the batch": lambda x: aten.slice(x, 0, 0, 2**63 - 1),
    "pad": lambda x: aten.pad(x, [0, 0, 0, 0]),
    "max pool": lambda x: functional.max_pool2d(x, 1),
    "average pool": lambda x: functional.avg_pool2d(x, 1, 1),
    "adaptive pool": lambda x: functional.adaptive_avg_pool2d(x, 4),
    "plus negative zero": lambda x: aten.add.Tensor(x, -0.0),
    "minus zero": lambda x: aten.sub.Tensor(x, 0),
    "times one": lambda x: aten.mul.Tensor(x, 1),
    "by one": lambda x: aten.div.Tensor(x, 1.0),
}

NEAR_MISSES = {
    "dropout in training": (lambda x: functional.dropout(x, training=True), "training-mode"),
    "another type": (lambda x: x.to(torch.float64), "not-exact"),
    "plus zero": (lambda x: aten.add.Tensor(x, 0.0), "not-exact"),
    "plus integer zero": (lambda x: aten.add.Tensor(x, 0), "not-exact"),
    "minus negative zero": (lambda x: aten.sub.Tensor(x, -0.0), "not-exact"),
    "plus one": (lambda x: aten.add.Tensor(x, 1), "not-applicable"),
    "times two": (lambda x: aten.mul.Tensor(x, 2), "not-applicable"),
    "another layout": (
        lambda x: x.contiguous(memory_format=torch.channels_last),
        "not-exact",
    ),
    "square transpose": (lambda x: aten.permute(x, [0, 1, 3, 2]), "not-exact"),
    "shifting pad": (lambda x: aten.pad(x, [1, -1]), "not-applicable"),
    "wide pool": (lambda x: functional.max_pool2d(x, 3, 1, 1), "not-applicable"),
    "another shape": (lambda x: x.reshape(-1, 3, 2, 8), "not-applicable"),
    "reverse order": (lambda x: aten.slice(x, 2, 0, 99, 4), "not-applicable"),
}


def test_golden(apply, golden):
    def network(x: Tensor) -> Tensor:
        return functional.dropout(x.clone(), training=False).flatten(1)

    program = program_of(network)
    golden("drop_identity", program, apply(DropIdentity(), program).program)


@pytest.mark.parametrize("function", IDENTITIES.values(), ids=IDENTITIES)
def test_identities_are_dropped(apply, function):
    program = program_of(function)
    after = apply(DropIdentity(), program)
    x = torch.randn(3, 3, 4, 4)
    assert after.modified
    assert inner(after.program) == []
    assert torch.equal(program.module(x), after.program.module(x))


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(apply, function, reason):
    program = program_of(function)
    after = apply(DropIdentity(), program)
    assert not after.modified
    assert after.reasons() == {reason}
    assert inner(after.program) == inner(program)


def test_contiguous_of_what_is_contiguous_is_dropped(apply):
    after = apply(DropIdentity(), program_with(aten.contiguous.default))
    assert inner(after.program) == []


def test_slice_that_a_larger_batch_would_feel_stays(apply):
    after = apply(DropIdentity(), program_with(aten.slice.Tensor, 0, 0, 1000))
    assert after.reason("slice_tensor") == "not-applicable"


def test_neutral_constants_keep_negative_zero_and_non_finite_values():
    x = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), 1e-45])
    for kept in (x + -0.0, x - 0.0, x * 1, x / 1):
        assert torch.equal(kept.view(torch.int32), x.view(torch.int32))
    assert not torch.equal((x + 0.0).view(torch.int32), x.view(torch.int32))


def test_integers_plus_zero_are_dropped_but_not_promoted(apply):
    same = program_of(lambda x: aten.add.Tensor(x, 0), 2, 3, dtype=torch.int64)
    promoted = program_of(lambda x: aten.mul.Tensor(x, 1.0), 2, 3, dtype=torch.int64)
    assert apply(DropIdentity(), same).modified
    assert apply(DropIdentity(), promoted).reasons() == {"not-exact"}


def test_broadcast_along_the_batch_stays(apply):
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.token.expand(x.shape[0], -1), x], 1)

    after = apply(DropIdentity(), capture(Token(), (torch.ones(2, 3),)))
    assert not after.modified


def test_contiguous_before_a_view_stays(apply):
    program = program_of(lambda x: x.permute(0, 2, 3, 1).contiguous().view(-1, 16, 3), 2, 3, 4, 4)
    after = apply(DropIdentity(), program)
    assert aten.contiguous.default in inner(after.program)
    after.program.module(torch.ones(2, 3, 4, 4))


def test_sites_that_are_not_allowed_stay(apply):
    program = program_of(lambda x: x.clone())
    after = apply(DropIdentity(), program, allows=lambda site: site != "clone")
    assert not after.modified
    assert after.reason("clone") == "excluded-by-option"


def test_twice_is_once(apply):
    once = apply(DropIdentity(), program_of(IDENTITIES["dropout"])).program
    assert not apply(DropIdentity(), once).modified


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_random_networks_stay_bit_equal(apply, random_network, seed):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    after = apply(DropIdentity(), program).program
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(program.module(x), after.module(x))
