from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from small_nets import check, fused, net
from torch import nn
from torch.nn import functional


def _conv() -> nn.Conv2d:
    return nn.Conv2d(16, 16, 3, padding=1)


def _steps(function: Callable[..., Any], **layers: nn.Module) -> str:
    """The fused operations without their options, checked against PyTorch on the way."""
    module = net(function, **layers)
    check(module, (16, 4, 4))
    lines = fused(module, (16, 4, 4)).splitlines()
    options = (" stride=", " padding=", " dilation=", " groups=")
    return "\n".join(
        " ".join(word for word in line.split(" ") if not f" {word}".startswith(options))
        for line in lines
    )


def _is(found: str, expected: str) -> None:
    assert found == dedent(expected).strip()


def test_a_chain_moves_into_its_producer() -> None:
    _is(
        _steps(lambda s, x: (s.c(x).relu() * 2 + 1).tanh(), c=_conv()),
        """
        tanh = Convolution(inputs_0) + relu + multiply-scalar(2) + add-scalar(1) + tanh
        return tanh
        """,
    )


def test_residual() -> None:
    def block(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x).relu()
        return (s.d(y) + y).relu()

    _is(
        _steps(block, c=_conv(), d=_conv()),
        """
        relu = Convolution(inputs_0) + relu
        relu_1 = Convolution(relu) + add(relu) + relu
        return relu_1
        """,
    )


def test_residual_the_other_way_round() -> None:
    def block(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x).relu()
        return y + s.d(y)

    _is(
        _steps(block, c=_conv(), d=_conv()),
        """
        relu = Convolution(inputs_0) + relu
        add = Convolution(relu) + add(relu)
        return add
        """,
    )


def test_the_later_of_two_producers_takes_the_sum() -> None:
    _is(
        _steps(lambda s, x: s.c(x) + s.d(x), c=_conv(), d=_conv()),
        """
        conv2d = Convolution(inputs_0)
        add = Convolution(inputs_0) + add(conv2d)
        return add
        """,
    )


def test_operands_of_a_difference_keep_their_order() -> None:
    def both(s: Any, x: torch.Tensor) -> Any:
        y = x.tanh()
        return s.c(x) - y, y - s.d(x)

    _is(
        _steps(both, c=_conv(), d=_conv()),
        """
        tanh = Elementwise(inputs_0) + tanh
        sub = Convolution(inputs_0) + subtract(tanh)
        sub_1 = Convolution(inputs_0) + subtract-from(tanh)
        return sub, sub_1
        """,
    )


def test_swapped_operands() -> None:
    kinds = (torch.maximum, torch.minimum, torch.mul, torch.add, torch.sub)
    text = _steps(lambda s, x: tuple(kind(x.tanh(), s.c(x)) for kind in kinds), c=_conv())
    assert text.count("Convolution(inputs_0) + ") == len(kinds)


def test_a_square_is_not_fused() -> None:
    def square(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)
        return y * y

    _is(
        _steps(square, c=_conv()),
        """
        conv2d = Convolution(inputs_0)
        mul = Elementwise(conv2d) + multiply(conv2d)
        return mul
        """,
    )


def test_a_value_with_two_readers_is_kept() -> None:
    def twice(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)
        return s.d(y.relu()) + y.tanh()

    text = _steps(twice, c=_conv(), d=_conv())
    assert text.splitlines()[0] == "conv2d = Convolution(inputs_0)"


def test_an_output_that_is_also_read_is_kept() -> None:
    def both(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)
        return y, y.relu()

    _is(
        _steps(both, c=_conv()),
        """
        conv2d = Convolution(inputs_0)
        relu = Elementwise(conv2d) + relu
        return conv2d, relu
        """,
    )


def test_operand_computed_after_the_producer() -> None:
    def late(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)
        z = s.d(x).tanh()
        return (y + z.flatten(1).softmax(1).view_as(z)).relu()

    text = _steps(late, c=_conv(), d=_conv())
    lines = text.splitlines()
    assert lines[-2].startswith("relu = Convolution(inputs_0) + add(")


def test_element_wise_steps_do_not_pass_other_shapes() -> None:
    text = _steps(lambda s, x: s.c(x).flatten(1).relu(), c=_conv())
    assert text.splitlines()[0] == "conv2d = Convolution(inputs_0)"


def test_linear_takes_per_column_steps() -> None:
    module = net(
        lambda s, x: s.b(s.l(x)).relu() + s.m(x), l=nn.Linear(9, 20), b=nn.BatchNorm1d(20),
        m=nn.Linear(9, 20),
    )  # fmt: skip
    check(module, (9,))
    assert fused(module, (9,)).splitlines() == [
        "relu = Linear(inputs_0) + multiply(batch_norm_multiply) + add(batch_norm_add) + relu",
        "add = Linear(inputs_0) + add(relu)",
        "return add",
    ]


def test_linear_on_images_leaves_per_channel_steps() -> None:
    module = net(lambda s, x: s.b(s.l(x)), l=nn.Linear(6, 5), b=nn.BatchNorm2d(3))
    check(module, (3, 4, 6))
    assert fused(module, (3, 4, 6)).splitlines()[0] == "linear = Linear(inputs_0)"


def _windows(function: Callable[..., Any]) -> list[str]:
    module = net(function, c=nn.Conv2d(16, 16, 1))
    check(module, (16, 8, 9))
    lines = fused(module, (16, 8, 9)).splitlines()
    return [line.partition(") ")[2] for line in lines if "WindowCopy" in line]


def test_slices_and_padding_become_one_copy() -> None:
    assert _windows(lambda s, x: functional.pad(s.c(x)[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))) == [
        "start=(-8,0,0) step=(2,2)"
    ]


def test_slices_of_slices() -> None:
    def cut(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)
        for axis, start, end, step in [(1, 3, 99, 1), (2, 1, 7, 2), (1, 2, 9, 1), (2, 1, 9, 1)]:
            y = torch.ops.aten.slice.Tensor(y, axis, start, end, step)
        return y

    assert _windows(cut) == ["start=(5,3,0) step=(2,1)"]


def test_padding_on_padding_of_another_axis() -> None:
    assert _windows(lambda s, x: functional.pad(functional.pad(s.c(x), (1, 2)), (0, 0, 3, 1))) == [
        "start=(0,-3,-1) step=(1,1)"
    ]


@pytest.mark.parametrize(
    "function",
    [
        # The second padding would have to keep out what the first slice cut off.
        lambda s, x: functional.pad(s.c(x)[:, :, 2:-2], (0, 0, 1, 1)),
        # Two values to pad with.
        lambda s, x: functional.pad(functional.pad(s.c(x), (1, 1), value=1.0), (0, 0, 1, 1)),
        lambda s, x: functional.pad(s.c(x)[:, :, :, ::2], (1, 1)),
    ],
)
def test_windows_that_say_something_else_together(function: Callable[..., Any]) -> None:
    assert len(_windows(function)) == 2


def test_a_window_with_two_readers_is_kept() -> None:
    def twice(s: Any, x: torch.Tensor) -> Any:
        y = s.c(x)[:, :, 1:]
        return y[:, :, 1:], y.relu()

    assert len(_windows(twice)) == 2
