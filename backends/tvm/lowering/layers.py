"""Selection of matrix products, attention, normalisations and views."""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from shohin.backends.tvm.lowering.operations import (
    BatchedMatMul,
    LayerNormalisation,
    Linear,
    SoftmaxRows,
    Value,
    View,
)
from shohin.backends.tvm.lowering.select import Handler, Selector

aten = torch.ops.aten


def _is_float(value: Value | None) -> bool:
    return value is not None and value.dtype == torch.float32 and value.constant is None


def select_linear(selector: Selector, node: fx.Node) -> bool:
    """``aten.linear`` with constant weights."""
    x, weight = selector.tensor(node, "input"), selector.tensor(node, "weight")
    bias = selector.tensor(node, "bias")
    if x is None or not _is_float(x) or weight is None or weight.constant is None:
        return False
    if bias is not None and bias.constant is None:
        return False
    label = selector.label(node, f"linear {weight.shape[1]}->{weight.shape[0]}")
    numbers = bias.constant if bias is not None else None
    sparse, values = selector.is_sparse(node, "weight"), selector.shared_values(node, "weight")
    ternary = selector.ternary(node, "weight")
    y = selector.result(node)
    selector.emit(Linear(y, label, x, weight.constant, numbers, sparse, values, ternary))
    return True


def select_addmm(selector: Selector, node: fx.Node) -> bool:
    """``aten.addmm`` with constant weights and bias and unit factors."""
    x, weight = selector.tensor(node, "mat1"), selector.tensor(node, "mat2")
    bias = selector.tensor(node, "self")
    if x is None or not _is_float(x) or weight is None or weight.constant is None:
        return False
    if bias is None or bias.constant is None or bias.shape != (weight.shape[1],):
        return False
    if selector.argument(node, "alpha") != 1 or selector.argument(node, "beta") != 1:
        return False
    label = selector.label(node, f"linear {weight.shape[0]}->{weight.shape[1]}")
    selector.emit(Linear(selector.result(node), label, x, weight.constant.t(), bias.constant))
    return True


def select_matmul(selector: Selector, node: fx.Node) -> bool:
    """``aten.matmul``, ``mm`` and ``bmm`` of arrays with equal leading axes."""
    left, right = node.args[0], node.args[1]
    a = selector.values.get(left) if isinstance(left, fx.Node) else None
    b = selector.values.get(right) if isinstance(right, fx.Node) else None
    if a is None or b is None or not _is_float(a) or b.dtype != torch.float32:
        return False
    if b.constant is not None and len(b.shape) == 2 and len(a.shape) >= 2:
        label = selector.label(node, f"linear {b.shape[0]}->{b.shape[1]}")
        selector.emit(Linear(selector.result(node), label, a, b.constant.t(), None))
        return True
    matrices = len(a.shape) >= 2 and len(b.shape) >= 2 and b.constant is None
    if not matrices or a.shape[:-2] != b.shape[:-2]:
        return False
    label = selector.label(node, f"matmul {a.shape[-2]}x{a.shape[-1]}x{b.shape[-1]}")
    selector.emit(BatchedMatMul(selector.result(node), label, a, b))
    return True


def select_attention(selector: Selector, node: fx.Node) -> bool:
    """Scaled dot-product attention without mask or dropout: two products around a softmax."""
    query, key, value = (selector.tensor(node, name) for name in ("query", "key", "value"))
    if query is None or key is None or value is None:
        return False
    plain = not selector.argument(node, "dropout_p") and not selector.argument(node, "is_causal")
    if not plain or selector.argument(node, "attn_mask") is not None:
        return False
    alike = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    if not alike or not all(_is_float(item) for item in (query, key, value)):
        return False
    given = selector.argument(node, "scale")
    scale = float(given) if given is not None else 1.0 / math.sqrt(query.shape[-1])
    shape = (*query.shape[:-1], key.shape[-2])
    scores = selector.temporary(node, "scores", shape)
    shares = selector.temporary(node, "shares", shape)
    selector.emit(
        BatchedMatMul(scores, selector.label(node, "attention scores"), query, key, True, scale)
    )
    selector.emit(SoftmaxRows(shares, selector.label(node, "attention softmax"), scores))
    selector.emit(
        BatchedMatMul(
            selector.result(node), selector.label(node, "attention values"), shares, value
        )
    )
    return True


def select_softmax(selector: Selector, node: fx.Node) -> bool:
    """``softmax`` and ``log_softmax`` over the last axis."""
    x = selector.tensor(node, "self")
    if x is None or not _is_float(x) or not x.shape or selector.argument(node, "dtype"):
        return False
    if int(selector.argument(node, "dim")) % len(x.shape) != len(x.shape) - 1:
        return False
    logarithm = node.target is aten.log_softmax.int
    selector.emit(SoftmaxRows(selector.result(node), selector.label(node, "softmax"), x, logarithm))
    return True


def select_layer_norm(selector: Selector, node: fx.Node) -> bool:
    """``aten.layer_norm`` with constant weight and bias, or neither."""
    x = selector.tensor(node, "input")
    weight, bias = selector.tensor(node, "weight"), selector.tensor(node, "bias")
    if x is None or not _is_float(x):
        return False
    if any(value is not None and value.constant is None for value in (weight, bias)):
        return False
    columns = math.prod(selector.argument(node, "normalized_shape"))
    numbers = [None if v is None or v.constant is None else v.constant for v in (weight, bias)]
    selector.emit(
        LayerNormalisation(
            selector.result(node),
            selector.label(node, f"layer norm {columns}"),
            x,
            columns,
            numbers[0],
            numbers[1],
            float(selector.argument(node, "eps")),
        )
    )
    return True


def select_view(selector: Selector, node: fx.Node) -> bool:
    """Reshapes of every kind: arrays are contiguous here, so none moves anything."""
    x = selector.passable(node.args[0])
    if x is None or x.constant is not None:
        return False
    selector.emit(View(selector.passed(node, x), selector.label(node, "view"), x))
    return True


def select_transpose(selector: Selector, node: fx.Node) -> bool:
    """Permutations that only move axes of size 1, which are reshapes; others are declined."""
    x = selector.passable(selector.argument(node, "self"))
    if x is None or x.constant is not None:
        return False
    rank = len(x.shape)
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [axis % rank for axis in selector.argument(node, "dims")]
    elif node.target is aten.t.default:
        order.reverse()
    else:
        first, second = (int(selector.argument(node, n)) % rank for n in ("dim0", "dim1"))
        order[first], order[second] = order[second], order[first]
    moved = [axis for axis in order if x.shape[axis] != 1]
    if moved != sorted(moved):
        return False
    selector.emit(View(selector.passed(node, x), selector.label(node, "view"), x))
    return True


def select_item(selector: Selector, node: fx.Node) -> bool:
    """One of the parts that ``unbind``, ``split`` or ``chunk`` give along a leading axis."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source not in selector.split_nodes:
        return False
    x = selector.tensor(source, "self")
    fake, parts = selector.fakes[node], selector.fakes[source]
    if x is None or not isinstance(fake, Tensor) or not isinstance(parts, (tuple, list)):
        return False
    index = int(str(node.args[1]))
    offset = sum(math.prod(part.shape) for part in parts[:index])
    selector.emit(View(selector.result(node), selector.label(node, "part"), x, offset))
    return True


def select_split(selector: Selector, node: fx.Node) -> bool:
    """A split whose every part is a view emits nothing itself; others are declined."""
    x = selector.tensor(node, "self")
    if x is None or x.constant is not None:
        return False
    axis = int(selector.argument(node, "dim")) % len(x.shape)
    items = all(user.target is operator.getitem for user in node.users)
    if not items or any(size != 1 for size in x.shape[:axis]):
        return False
    selector.split_nodes.add(node)
    return True


def select_select(selector: Selector, node: fx.Node) -> bool:
    """``aten.select`` along a leading axis, a view."""
    x = selector.passable(selector.argument(node, "self"))
    if x is None or x.constant is not None:
        return False
    axis = int(selector.argument(node, "dim")) % len(x.shape)
    if any(size != 1 for size in x.shape[:axis]):
        return False
    index = int(selector.argument(node, "index")) % x.shape[axis]
    offset = index * math.prod(x.shape[axis + 1 :])
    selector.emit(View(selector.passed(node, x), selector.label(node, "part"), x, offset))
    return True


_SPLITS = {
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
}
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)

PASSING = frozenset(
    {
        *_VIEWS,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.select.int,
    }
)
"""Operators that give the numbers that they are given."""

HANDLERS: dict[Any, Handler] = {
    aten.linear.default: select_linear,
    aten.addmm.default: select_addmm,
    aten.matmul.default: select_matmul,
    aten.mm.default: select_matmul,
    aten.bmm.default: select_matmul,
    aten.scaled_dot_product_attention.default: select_attention,
    aten.softmax.int: select_softmax,
    aten.log_softmax.int: select_softmax,
    aten.layer_norm.default: select_layer_norm,
    aten.transpose.int: select_transpose,
    aten.permute.default: select_transpose,
    aten.t.default: select_transpose,
    aten.select.int: select_select,
    operator.getitem: select_item,
    **dict.fromkeys(_SPLITS, select_split),
    **dict.fromkeys(_VIEWS, select_view),
}
