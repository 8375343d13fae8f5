import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shohin.ir.capture import capture
from shohin.passes.analyses.liveness import liveness


class Shortcut(nn.Module):
    """A chain with a shortcut over it."""

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(x)
        z = torch.exp(y)
        w = torch.tanh(z)
        return w + y


def test_ranges_and_peak():
    found = liveness(capture(Shortcut(), (torch.ones(2, 8),)))
    assert found.schedule == ("x", "relu", "exp", "tanh", "add", "output")
    spans = {live.members[0]: (live.first, live.last, live.bytes) for live in found.ranges}
    assert spans == {
        "x": (0, 1, 32),
        "relu": (1, 4, 32),
        "exp": (2, 3, 32),
        "tanh": (3, 4, 32),
        "add": (4, 5, 32),
    }
    assert found.bytes_at == (32, 64, 64, 96, 96, 32)
    assert (found.peak_bytes, found.peak_node) == (96, "tanh")


def test_views_live_in_their_base():
    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = functional.relu(x)
            flat = y.flatten(1).view(-1, 2, 4)
            z = torch.exp(x)
            return z.sum() + flat[:, 1]

    found = liveness(capture(Views(), (torch.ones(2, 8),)))
    base = found.range_of("relu")
    assert base is found.range_of("view")
    assert base is found.range_of("select")
    assert base.bytes == 32
    assert found.schedule[base.last] == "add"


def test_a_copy_has_memory_of_its_own():
    class Copied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return functional.relu(x.transpose(1, 2).reshape(-1, 12))

    found = liveness(capture(Copied(), (torch.ones(2, 3, 4),)))
    assert found.range_of("reshape") is not found.range_of("x")
    assert found.range_of("transpose") is found.range_of("x")


def test_several_results_and_several_outputs():
    class Parts(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            value, index = x.max(1)
            return value, index

    found = liveness(capture(Parts(), (torch.ones(2, 6),)))
    last = len(found.schedule) - 1
    sizes = sorted(live.bytes for live in found.ranges)
    assert sizes == [4, 8, 24]
    assert found.bytes_at[last] == 12


def test_weights_are_left_out():
    found = liveness(capture(nn.Linear(100, 100), (torch.ones(2, 100),)))
    assert found.peak_bytes == 800
    with pytest.raises(KeyError, match="no intermediate tensor"):
        found.range_of("weight")


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_use_lies_in_the_range(random_network, seed):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    found = liveness(program)
    steps = {name: step for step, name in enumerate(found.schedule)}
    nodes = {node.name: node for node in program.graph.nodes}
    for live in found.ranges:
        uses = [steps[user.name] for name in live.members for user in nodes[name].users]
        assert live.first <= min([*uses, live.last])
        assert live.last >= max([*uses, live.first])
    for step, total in enumerate(found.bytes_at):
        assert total == sum(live.bytes for live in found.ranges if live.first <= step <= live.last)
