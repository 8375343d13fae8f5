"""Which operators of a float graph have an integer form, and which."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import fx
from torch._ops import OpOverload

from shohin.passes.analyses.operators import WeightedOperation, weighted_operation
from shohin.passes.analyses.shapes import Shapes
from shohin.passes.patterns import NoMatch, argument, constant_weight
from shohin.passes.remarks import Reason

_aten = torch.ops.aten
_MOST_SHIFT = 15
_SUM_BITS = 31
_IMAGE_AXES = 4


@dataclass(frozen=True)
class Weighted:
    """A convolution or linear map.

    Attributes:
        operation: its parts.
        options: of ``shohin.fixed_conv2d`` after the bias: stride, padding, dilation and groups;
            empty for a linear map.
    """

    operation: WeightedOperation
    options: tuple[Any, ...]


@dataclass(frozen=True)
class Binary:
    """A sum or product of two feature maps of one shape.

    Attributes:
        product: whether they are multiplied.
    """

    product: bool


@dataclass(frozen=True)
class Average:
    """A mean over windows of equal size.

    Attributes:
        kernel: rows and columns of a window.
        stride: between windows.
        padding: (top, bottom, left, right), counted like pixels.
        divisor: what sums are divided by.
        flat: whether the result has no axes of its own for the pixels.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    divisor: int
    flat: bool

    def scale(self, bits: int) -> tuple[int, int]:
        """Multiplier and shift that stand for the division.

        A power of two is a shift alone. Otherwise the multiplier has as many bits as leave a sum of
        numbers of so many bits, times the multiplier, a 32-bit integer; 16-bit data has a 64-bit
        sum.
        """
        exponent = self.divisor.bit_length() - 1
        if self.divisor == 1 << exponent:
            return 1, exponent
        area = (self.kernel[0] * self.kernel[1]).bit_length()
        room = _SUM_BITS - (bits - 1) - area if bits <= 8 else _SUM_BITS
        shift = min(_MOST_SHIFT, room) + exponent
        return round(2**shift / self.divisor), shift


@dataclass(frozen=True)
class Carry:
    """An operator that gives some of the numbers that it is given, and perhaps zeros."""


@dataclass(frozen=True)
class Join:
    """A concatenation."""


Form: TypeAlias = Weighted | Binary | Average | Carry | Join

_CARRYING = frozenset(
    {
        _aten.relu.default,
        _aten.max_pool2d.default,
        _aten.view.default,
        _aten.reshape.default,
        _aten.flatten.using_ints,
        _aten.unflatten.int,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.unsqueeze.default,
        _aten.permute.default,
        _aten.transpose.int,
        _aten.t.default,
        _aten.slice.Tensor,
        _aten.select.int,
        _aten.contiguous.default,
        _aten.clone.default,
    }
)
RELU = _aten.relu.default


def form_of(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    """The integer form of an operator, or why it has none.

    Args:
        node: a call.
        shapes: of the program at some batch size.
    """
    if node.target in _CARRYING:
        return Carry()
    find = _FORMS.get(node.target) if isinstance(node.target, OpOverload) else None
    if find is None:
        detail = f"{node.target} has no integer form"
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, detail)
    return find(node, shapes)


def _convolution(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    operation = weighted_operation(node)
    problem = _weights_problem(operation)
    if operation is None or problem is not None:
        return problem or NoMatch(Reason.NOT_APPLICABLE)
    weight = constant_weight(operation.weight)
    dilation = _pair(argument(node, "dilation"))
    padding = argument(node, "padding")
    if weight is None or len(shapes.of(operation.data).shape) != _IMAGE_AXES:
        return NoMatch(Reason.NOT_APPLICABLE, "its input is no batch of images")
    if padding == "same":
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        rows, columns = reach
        sides = (rows // 2, rows - rows // 2, columns // 2, columns - columns // 2)
    else:
        rows, columns = (0, 0) if padding == "valid" else _pair(padding)
        sides = (rows, rows, columns, columns)
    stride = _pair(argument(node, "stride"))
    return Weighted(operation, ([*stride], [*sides], [*dilation], operation.groups))


def _linear(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    operation = weighted_operation(node)
    problem = _weights_problem(operation)
    if operation is None or problem is not None:
        return problem or NoMatch(Reason.NOT_APPLICABLE)
    return Weighted(operation, ())


def _weights_problem(operation: WeightedOperation | None) -> NoMatch | None:
    if operation is None:
        return NoMatch(Reason.NOT_APPLICABLE, "its weight is computed")
    weight = constant_weight(operation.weight)
    if weight is None:
        return NoMatch(Reason.NOT_CONSTANT, "its weight is computed")
    if operation.bias is not None and constant_weight(operation.bias) is None:
        return NoMatch(Reason.NOT_CONSTANT, "its bias is computed")
    if weight.dtype != torch.float32:
        return NoMatch(Reason.NOT_APPLICABLE, f"its weight has elements of type {weight.dtype}")
    return None


def _sum(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    if argument(node, "alpha", 1) != 1:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its second operand has a factor")
    return _binary(node, shapes, product=False)


def _product(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    return _binary(node, shapes, product=True)


def _binary(node: fx.Node, shapes: Shapes, *, product: bool) -> Form | NoMatch:
    operands = [argument(node, name) for name in ("self", "other")]
    if not all(isinstance(one, fx.Node) for one in operands):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "one operand is a number")
    sizes = [shapes.of(one).shape for one in operands]
    if sizes[0] != sizes[1]:
        first, second = (_sizes_text(size, shapes.batch) for size in sizes)
        detail = f"its operands have shapes {first} and {second}"
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, detail)
    return Binary(product)


def _sizes_text(size: Sequence[int], batch: int) -> str:
    named = ["N" if length == batch else str(length) for length in size[:1]]
    return f"[{', '.join([*named, *map(str, size[1:])])}]"


def _windows(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    size = shapes.of(argument(node, "self")).shape
    if len(size) != _IMAGE_AXES:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its input is no batch of images")
    kernel = _pair(argument(node, "kernel_size"))
    stride = _pair(argument(node, "stride") or kernel)
    padding = _pair(argument(node, "padding"))
    if any(padding) and not argument(node, "count_include_pad"):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "windows at the border have other sizes")
    whole = [
        (length + 2 * beside - width) // step + 1
        for length, beside, width, step in zip(size[2:], padding, kernel, stride, strict=True)
    ]
    if whole != [*shapes.of(node).shape[2:]]:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "windows at the border have other sizes")
    divisor = argument(node, "divisor_override") or kernel[0] * kernel[1]
    if divisor < 1:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, f"it divides by {divisor}")
    sides = (padding[0], padding[0], padding[1], padding[1])
    return Average(kernel, stride, sides, int(divisor), flat=False)


def _adaptive(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    whole = shapes.of(argument(node, "self")).shape
    if len(whole) != _IMAGE_AXES:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its input is no batch of images")
    size, wanted = whole[-2:], shapes.of(node).shape[-2:]
    if any(length % count for length, count in zip(size, wanted, strict=True)):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "its windows have different sizes")
    kernel = (size[0] // wanted[0], size[1] // wanted[1])
    return Average(kernel, kernel, (0, 0, 0, 0), math.prod(kernel), flat=False)


def _mean(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    size, axes = shapes.of(argument(node, "self")).shape, argument(node, "dim")
    pixels = len(size) == _IMAGE_AXES and axes is not None and sorted(a % 4 for a in axes) == [2, 3]
    if not pixels or argument(node, "dtype") is not None:
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it is no mean over the pixels of images")
    kernel = (size[2], size[3])
    flat = not argument(node, "keepdim")
    return Average(kernel, kernel, (0, 0, 0, 0), math.prod(kernel), flat)


def _joined(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    return Join()


def _dropout(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    if argument(node, "train"):
        return NoMatch(Reason.TRAINING_MODE, "it drops elements")
    return Carry()


def _padded(node: fx.Node, shapes: Shapes) -> Form | NoMatch:
    if argument(node, "mode", "constant") != "constant" or argument(node, "value"):
        return NoMatch(Reason.UNSUPPORTED_OPERATOR, "it pads with something else than zeros")
    return Carry()


def _pair(item: Any) -> tuple[int, int]:
    if isinstance(item, int):
        return item, item
    first, second = (list(item) * 2)[:2]
    return int(first), int(second)


_FORMS: Mapping[OpOverload, Callable[[fx.Node, Shapes], Form | NoMatch]] = {
    _aten.conv2d.default: _convolution,
    _aten.conv2d.padding: _convolution,
    _aten.linear.default: _linear,
    _aten.add.Tensor: _sum,
    _aten.mul.Tensor: _product,
    _aten.avg_pool2d.default: _windows,
    _aten.adaptive_avg_pool2d.default: _adaptive,
    _aten.mean.dim: _mean,
    _aten.cat.default: _joined,
    _aten.dropout.default: _dropout,
    _aten.constant_pad_nd.default: _padded,
    _aten.pad.default: _padded,
}
