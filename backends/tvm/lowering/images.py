"""Selection of operators on images: convolution, pooling, slices, padding, concatenation."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from shohin.backends.tvm.lowering.operations import (
    Concatenation,
    Convolution,
    GlobalAveragePooling,
    Pooling,
    TernaryWeight,
    Value,
    View,
    WindowCopy,
)
from shohin.backends.tvm.lowering.select import Handler, Selector

aten = torch.ops.aten


def _is_image(value: Value | None) -> bool:
    return value is not None and len(value.shape) == 4 and value.dtype == torch.float32


def _is_map(value: Value | None) -> bool:
    """Whether a value is an image, of real numbers or of integers that stand for such."""
    return value is not None and len(value.shape) == 4 and (value.fixed or _is_image(value))


def _pair(item: Any) -> tuple[int, int]:
    if isinstance(item, int):
        return item, item
    first, second = (item * 2)[:2] if len(item) == 1 else item
    return int(first), int(second)


def _constant(value: Value | None) -> Tensor | None:
    return value.constant if value is not None else None


def _same_padding(size: int, stride: int, reach: int) -> tuple[int, int]:
    """Padding before and after that keeps ``ceil(size / stride)`` outputs."""
    if stride != 1:
        raise ValueError("padding='same' is defined for stride 1 only")
    return (reach - 1) // 2, (reach - 1) - (reach - 1) // 2


def _convolution_padding(
    padding: Any, size: tuple[int, ...], weight: Tensor, dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        return *_same_padding(size[2], 1, reach[0]), *_same_padding(size[3], 1, reach[1])
    rows, columns = _pair(padding)
    return rows, rows, columns, columns


def select_conv2d(selector: Selector, node: fx.Node) -> bool:
    """``aten.conv2d``; declined unless the weight is a constant."""
    x, weight = selector.tensor(node, "input"), _constant(selector.tensor(node, "weight"))
    bias = selector.tensor(node, "bias")
    if x is None or not _is_image(x) or weight is None or (bias and bias.constant is None):
        return False
    dilation = _pair(selector.argument(node, "dilation"))
    padding = _convolution_padding(selector.argument(node, "padding"), x.shape, weight, dilation)
    stride = _pair(selector.argument(node, "stride"))
    groups = int(selector.argument(node, "groups"))
    y = selector.result(node)
    label = selector.label(node, _convolution_text(x, weight, y, groups))
    selector.emit(
        Convolution(
            y,
            label,
            x,
            weight,
            _constant(bias),
            stride,
            padding,
            dilation,
            groups,
            selector.is_sparse(node, "weight"),
            selector.ternary(node, "weight"),
        )
    )
    return True


def _convolution_text(x: Value, weight: Tensor, y: Value, groups: int) -> str:
    kind = "conv" if groups == 1 else f"conv/{groups}"
    window = "x".join(str(int(size)) for size in weight.shape[2:])
    sizes = "x".join(str(size) for size in y.shape[2:])
    return f"{kind} {window} {x.shape[1]}->{y.shape[1]} {sizes}"


def _one_row_high(weight: TernaryWeight | None) -> TernaryWeight | None:
    return None if weight is None else replace(weight, codes=weight.codes.unsqueeze(2))


def select_conv1d(selector: Selector, node: fx.Node) -> bool:
    """``aten.conv1d`` as a convolution of images one row high."""
    x, weight = selector.tensor(node, "input"), _constant(selector.tensor(node, "weight"))
    bias = selector.tensor(node, "bias")
    padding = selector.argument(node, "padding")
    if x is None or len(x.shape) != 3 or x.dtype != torch.float32 or weight is None:
        return False
    if isinstance(padding, str) or (bias and bias.constant is None):
        return False
    y = selector.result(node)
    row = selector.temporary(node, "row", (x.shape[0], x.shape[1], 1, x.shape[2]))
    result = selector.temporary(node, "out", (y.shape[0], y.shape[1], 1, y.shape[2]))
    stride, dilation = (int(selector.argument(node, n)[0]) for n in ("stride", "dilation"))
    label = selector.label(node, f"conv1d {int(weight.shape[2])} {x.shape[1]}->{y.shape[1]}")
    selector.emit(View(row, label, x))
    selector.emit(
        Convolution(
            result,
            label,
            row,
            weight.unsqueeze(2),
            _constant(bias),
            (1, stride),
            (0, 0, int(padding[0]), int(padding[0])),
            (1, dilation),
            int(selector.argument(node, "groups")),
            ternary=_one_row_high(selector.ternary(node, "weight")),
        )
    )
    selector.emit(View(y, label, result))
    return True


def select_max_pool2d(selector: Selector, node: fx.Node) -> bool:
    """``aten.max_pool2d``."""
    x = selector.passable(selector.argument(node, "self"))
    if x is None or not _is_map(x):
        return False
    kernel = _pair(selector.argument(node, "kernel_size"))
    stride = selector.argument(node, "stride")
    selector.emit(
        Pooling(
            selector.passed(node, x),
            selector.label(node, f"max pool {kernel[0]}x{kernel[1]}"),
            x,
            "max",
            kernel,
            _pair(stride) if stride else kernel,
            _pair(selector.argument(node, "padding")),
            _pair(selector.argument(node, "dilation")),
        )
    )
    return True


def select_avg_pool2d(selector: Selector, node: fx.Node) -> bool:
    """``aten.avg_pool2d``; the whole image at once is a global average."""
    x = selector.tensor(node, "self")
    if x is None or not _is_image(x):
        return False
    kernel = _pair(selector.argument(node, "kernel_size"))
    stride = selector.argument(node, "stride")
    padding = _pair(selector.argument(node, "padding"))
    divisor = selector.argument(node, "divisor_override") or 0
    label = selector.label(node, f"average pool {kernel[0]}x{kernel[1]}")
    y = selector.result(node)
    if kernel == x.shape[2:] and padding == (0, 0) and not divisor:
        selector.emit(GlobalAveragePooling(y, label, x))
        return True
    selector.emit(
        Pooling(
            y,
            label,
            x,
            "average",
            kernel,
            _pair(stride) if stride else kernel,
            padding,
            count_padding=bool(selector.argument(node, "count_include_pad")),
            divisor=int(divisor),
        )
    )
    return True


def select_adaptive_avg_pool2d(selector: Selector, node: fx.Node) -> bool:
    """``aten.adaptive_avg_pool2d`` where every window has the same size."""
    x = selector.tensor(node, "self")
    if x is None or not _is_image(x):
        return False
    wanted = _pair(selector.argument(node, "output_size"))
    height, width = x.shape[2:]
    if height % wanted[0] or width % wanted[1]:
        return False
    label = selector.label(node, f"average pool to {wanted[0]}x{wanted[1]}")
    y = selector.result(node)
    kernel = (height // wanted[0], width // wanted[1])
    if kernel == (1, 1):
        selector.emit(View(y, label, x))
    elif wanted == (1, 1):
        selector.emit(GlobalAveragePooling(y, label, x))
    else:
        selector.emit(Pooling(y, label, x, "average", kernel, kernel, (0, 0)))
    return True


def select_mean(selector: Selector, node: fx.Node) -> bool:
    """``aten.mean`` over the pixels of an image; other means are declined."""
    x = selector.tensor(node, "self")
    axes = selector.argument(node, "dim")
    if x is None or not _is_image(x) or axes is None:
        return False
    if sorted(axis % 4 for axis in axes) != [2, 3] or selector.argument(node, "dtype"):
        return False
    y = selector.result(node)
    label = selector.label(node, "global average")
    pooled = selector.temporary(node, "pooled", (*x.shape[:2], 1, 1))
    selector.emit(GlobalAveragePooling(pooled, label, x))
    selector.emit(View(y, label, pooled))
    return True


def select_slice(selector: Selector, node: fx.Node) -> bool:
    """``aten.slice`` of an image's rows, columns or channels, or of leading elements (a view)."""
    x = selector.passable(selector.argument(node, "self"))
    if x is None:
        return False
    rank = len(x.shape)
    axis = int(selector.argument(node, "dim")) % rank
    size = x.shape[axis]
    start = selector.argument(node, "start") or 0
    start = min(max(start + size if start < 0 else start, 0), size)
    step = int(selector.argument(node, "step"))
    y = selector.passed(node, x)
    if y.shape == x.shape:
        selector.emit(View(y, selector.label(node, "slice"), x))
        return True
    if step == 1 and all(s == 1 for s in x.shape[:axis]):
        offset = start * _product(x.shape[axis + 1 :])
        selector.emit(View(y, selector.label(node, "slice"), x, offset))
        return True
    if not _is_map(x) or axis == 0 or (axis == 1 and step != 1):
        del (selector.fixed if x.fixed else selector.values)[node]
        return False
    starts = [0, 0, 0]
    steps = [1, 1, 1]
    starts[axis - 1], steps[axis - 1] = start, step
    label = selector.label(node, "slice")
    selector.emit(WindowCopy(y, label, x, (starts[0], starts[1], starts[2]), (steps[1], steps[2])))
    return True


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def select_pad(selector: Selector, node: fx.Node) -> bool:
    """``aten.pad`` and ``aten.constant_pad_nd`` of an image with a constant."""
    x = selector.passable(selector.argument(node, "self"))
    mode = selector.argument(node, "mode", "constant")
    if x is None or not _is_map(x) or mode != "constant":
        return False
    amounts = [int(amount) for amount in selector.argument(node, "pad")]
    amounts += [0] * (8 - len(amounts))
    if amounts[6] or amounts[7]:
        return False
    label = selector.label(node, "pad")
    start = (-amounts[4], -amounts[2], -amounts[0])
    value = float(selector.argument(node, "value") or 0.0)
    selector.emit(WindowCopy(selector.passed(node, x), label, x, start, (1, 1), value))
    return True


def select_cat(selector: Selector, node: fx.Node) -> bool:
    """``aten.cat`` of arrays of one element type."""
    parts = [selector.passable(part) for part in node.args[0]]  # type: ignore[union-attr]
    if any(part is None or part.constant is not None for part in parts):
        return False
    found = [part for part in parts if part is not None]
    kinds = {(part.dtype, part.fixed) for part in found}
    if len(kinds) != 1 or any(not part.elements for part in found):
        return False
    axis = int(selector.argument(node, "dim")) % len(found[0].shape)
    label = selector.label(node, f"concat of {len(found)}")
    y = selector.passed(node, found[0])
    y.nonnegative = all(part.nonnegative for part in found)
    selector.emit(Concatenation(y, label, found, axis))
    return True


PASSING = frozenset(
    {
        aten.max_pool2d.default,
        aten.slice.Tensor,
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.cat.default,
    }
)
"""Operators that give numbers that they are given, and zeros."""

HANDLERS: dict[Any, Handler] = {
    aten.conv2d.default: select_conv2d,
    aten.conv2d.padding: select_conv2d,
    aten.conv1d.default: select_conv1d,
    aten.max_pool2d.default: select_max_pool2d,
    aten.avg_pool2d.default: select_avg_pool2d,
    aten.adaptive_avg_pool2d.default: select_adaptive_avg_pool2d,
    aten.mean.dim: select_mean,
    aten.slice.Tensor: select_slice,
    aten.pad.default: select_pad,
    aten.constant_pad_nd.default: select_pad,
    aten.cat.default: select_cat,
}
