from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from shohin.errors import CaptureError
from shohin.ir import capture, format_program, is_in_place, make_functional, verify


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def write_to_a_slice(x: Tensor) -> Any:
    y = x * 2
    y[:, 1:3] = 0
    return y


def write_to_a_reshaped_row(x: Tensor) -> Any:
    y = x * 1
    flat = y.view(y.shape[0], -1)
    flat[:, 0] = 7.0
    return y, flat


def write_to_half_and_read_the_other_views(x: Tensor) -> Any:
    y = x * 2
    one, two = y.chunk(2, 1)
    two.mul_(one)
    turned = y.transpose(1, 2)
    turned[:, 1].relu_()
    return y, one, two, turned


def write_after_dropout(x: Tensor) -> Any:
    y = torch.dropout(x, 0.5, False)
    y += 1
    return x * y


def change_shape_in_place(x: Tensor) -> Any:
    y = x + 0
    y.unsqueeze_(1).add_(1)
    return y.squeeze_(1)


def write_to_a_copy(x: Tensor) -> Any:
    y = x.permute(0, 2, 1, 3).contiguous()
    rows = y.reshape(-1, 4)
    rows.clamp_(0.5)
    return y + 1, rows


def write_to_a_permutation(x: Tensor) -> Any:
    y = x.clone()
    y.permute(0, 3, 1, 2)[:, 1:].exp_()
    return y


def write_integers(x: Tensor) -> Any:
    y = (x * 3).int()
    y.mul_(2)
    y[:, 0] = x[:, 0]
    y[:, torch.tensor([0, 1])] = 5
    y.masked_fill_(y > 3, 9)
    return y


def write_to_a_diagonal(x: Tensor) -> Any:
    y = x.clone()
    diagonal = torch.diagonal(y, 0, 2, 3)
    diagonal.zero_()
    y[0:1].fill_(3)
    y.select(1, 0).copy_(torch.ones(4))
    return y.detach_(), diagonal


def keep_the_narrower_type(x: Tensor) -> Any:
    y = x.half()
    y.add_(x)
    first, *_ = y.unbind(1)
    first.exp_()
    return nn.functional.relu(y, inplace=True) + first.unsqueeze(1)


def write_to_few_of_a_batch(x: Tensor) -> Any:
    y = x.clone()
    head = y[:1]
    head.add_(1)
    return y, head


FUNCTIONS = [
    write_to_a_slice,
    write_to_a_reshaped_row,
    write_to_half_and_read_the_other_views,
    write_after_dropout,
    change_shape_in_place,
    write_to_a_copy,
    write_to_a_permutation,
    write_integers,
    write_to_a_diagonal,
    keep_the_narrower_type,
    write_to_few_of_a_batch,
]


def _leaves(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _check(model: nn.Module, program: Any, x: Tensor) -> None:
    expected, found = _leaves(model(x.clone())), _leaves(program.module(x.clone()))
    for one, two in zip(expected, found, strict=True):
        assert one.dtype == two.dtype
        torch.testing.assert_close(two, one, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functional_graph_computes_the_same(function):
    model = Call(function)
    program = capture(model, torch.randn(2, 4, 4, 4))
    assert not any(is_in_place(node) for node in program.graph.nodes)
    for batch in (1, 4, 7):
        _check(model, program, torch.randn(batch, 4, 4, 4))


def test_golden_slice_assignment(golden):
    golden(format_program(capture(Call(write_to_a_slice), torch.ones(2, 4, 4))))


def test_golden_views_of_views(golden):
    function = write_to_half_and_read_the_other_views
    golden(format_program(capture(Call(function), torch.ones(2, 4, 4))))


def test_a_functional_graph_is_left_alone(program):
    text = format_program(program)
    assert make_functional(program.module, program.inputs) == []
    assert format_program(program) == text


@torch.library.custom_op("shohin_test::fill_with_one_", mutates_args={"x"})
def fill_with_one_(x: Tensor) -> None:
    x.fill_(1)


def _in_place_graph(target: Any, *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.ones(2, 3)
    written = graph.call_function(target, (x, *args))
    graph.output(written)
    return fx.GraphModule(nn.Module(), graph)


def test_new_nodes_are_returned_and_shapes_come_from_metadata():
    module = _in_place_graph(torch.ops.aten.add_.Tensor, 1)
    assert [node.name for node in make_functional(module)] == ["add"]
    assert torch.equal(module(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_an_operator_without_a_functional_form_is_named():
    module = _in_place_graph(torch.ops.shohin_test.fill_with_one_.default)
    with pytest.raises(CaptureError, match=r"node 'fill_with_one_.*has no functional form; write"):
        make_functional(module)


def test_a_write_through_an_overlapping_view_is_named():
    def function(x: Tensor) -> Any:
        y = x.clone()
        y.as_strided((2, 2), (4, 1)).add_(1)
        return y

    with pytest.raises(CaptureError, match=r"node 'as_strided'.*cannot write through a view"):
        capture(Call(function), torch.ones(2, 4), dynamic_batch=False)


def _views(v: Tensor) -> list[Callable[[], Tensor]]:
    deep, wide = v.dim() >= 3, v.dim() >= 2 and v.shape[1] > 1
    found: list[Callable[[], Tensor]] = [lambda: v.reshape(v.shape[0], -1), lambda: v.unsqueeze(1)]
    found += [lambda: v[:, 1:], lambda: v[:, ::2], lambda: v.chunk(2, 1)[1]] if wide else []
    return found + ([lambda: v.transpose(1, 2), lambda: v.select(1, 0)] if deep else [])


def _writes(v: Tensor, other: Tensor) -> list[Callable[[], Any]]:
    found = [
        lambda: v.add_(1.5),
        lambda: v.relu_(),
        lambda: v.mul_(other.amax()),
        lambda: v[:1].zero_(),
    ]
    if v.shape == other.shape:
        found.append(lambda: v.copy_(other))
    return found


class RandomWrites(nn.Module):
    """Steps that each view, write to, or copy one of the values so far."""

    def __init__(self, steps: list[tuple[int, int, int, int]]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x * 2]
        for kind, which, choice, other in self.steps:
            value = values[which % len(values)]
            if kind == 0:
                values.append(value * 0.5)
            elif kind <= 2:
                options = _views(value)
                values.append(options[choice % len(options)]())
            else:
                writes = _writes(value, values[other % len(values)])
                writes[choice % len(writes)]()
        return tuple(values)


STEP = st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(STEP, min_size=2, max_size=10))
def test_random_writes_and_views(steps):
    model = RandomWrites(steps)
    program = capture(model, torch.ones(3, 4, 6, dtype=torch.float64))
    verify(program)
    generator = torch.Generator().manual_seed(len(steps))
    _check(model, program, torch.randn(2, 4, 6, dtype=torch.float64, generator=generator))
