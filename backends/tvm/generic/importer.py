"""From ATen nodes to a legalised Relax module.

The nodes are traced down to core ATen under fake tensors, imported by TVM's importer (with
converters of our own where it has none or is wrong) and legalised to one PrimFunc per operator.
"""

import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import tvm
from torch import fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from tvm import ir
from tvm.relax import transform
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from shohin.backends.tvm.generic.converters import CONVERTERS
from shohin.backends.tvm.generic.expressions import RefusedError
from shohin.backends.tvm.generic.operands import operator_name, prepare_operands
from shohin.backends.tvm.generic.quiet import quiet
from shohin.backends.tvm.generic.relax_values import Value, value_shape

_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.upsample_nearest2d.default,
    _ATEN.upsample_nearest2d.vec,
    _ATEN.upsample_bilinear2d.default,
    _ATEN.upsample_bilinear2d.vec,
}
"""Operators whose decomposition is worse than what converters make of them."""

_SPLIT = [
    _ATEN.native_group_norm,
    _ATEN.native_batch_norm,
    _ATEN.upsample_bicubic2d,
    _ATEN.upsample_linear1d,
    _ATEN.upsample_nearest1d,
    _ATEN.upsample_trilinear3d,
    _ATEN.celu,
    _ATEN.elu,
    _ATEN.selu,
    _ATEN.unfold,
]
"""Operators to decompose although they are core ATen."""

_FLOAT_ONLY = (
    "mm", "bmm", "matmul", "addmm", "baddbmm", "linear", "einsum", "convolution", "conv1d",
    "conv2d", "conv3d", "_convolution",
)  # fmt: skip
"""Operators that TVM's importer computes in float32 whatever their inputs are."""

_WRONG = ("grid_sampler_2d", "affine_grid_generator")
_WITH_INDICES = ("max_pool2d_with_indices", "max_pool3d_with_indices")
_TYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.float32, torch.float64,
)  # fmt: skip

Inputs = Sequence[tuple[tuple[int, ...], torch.dtype]]


def trace(module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """The module in core ATen nodes with shapes in their metadata.

    Args:
        module: ATen nodes.
        inputs: shape and type of each placeholder.
    """
    arguments = [torch.empty(shape, dtype=dtype) for shape, dtype in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = _trace_once(module, arguments)
        if any(_mutates(node) for node in traced.graph.nodes):
            traced = _trace_once(functionalize(traced, remove="mutations"), arguments)
    _drop_assertions(traced)
    return traced


@lru_cache(maxsize=1)
def _decompositions() -> Mapping[Any, Any]:
    """How to take operators apart; costs a fifth of a second to collect."""
    rules: dict[Any, Any] = dict(core_aten_decompositions()) | get_decompositions(_SPLIT)
    rules |= {_ATEN.add.Tensor: _scaled_add, _ATEN.sub.Tensor: _scaled_subtract}
    return {op: rule for op, rule in rules.items() if op not in _KEPT}


def _scaled_add(x: Any, y: Any, *, alpha: float = 1) -> Any:
    """TVM's importer leaves out the factor of the second operand."""
    return NotImplemented if alpha == 1 else x + y * alpha


def _scaled_subtract(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return NotImplemented if alpha == 1 else x - y * alpha


def _trace_once(function: Callable[..., Any], arguments: Sequence[torch.Tensor]) -> fx.GraphModule:
    tracer = make_fx(
        function,
        decomposition_table=dict(_decompositions()),
        tracing_mode="fake",
        _allow_non_fake_inputs=True,
    )
    return tracer(*arguments)


def _mutates(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _CheckedValues(dict[Any, Any]):
    """Relax values by ATen node, each that is used of the type that torch gives the node."""

    def __setitem__(self, node: Any, value: Value) -> None:
        if isinstance(node, fx.Node) and node.op == "call_function" and node.users:
            _check_type(node, value)
        super().__setitem__(node, value)


def _check_type(node: fx.Node, value: Value) -> None:
    """Refuse a value whose shape or type is not what torch says."""
    expected = node.meta.get("val")
    if not isinstance(expected, torch.Tensor) or not isinstance(value, ir.Expr):
        return
    wanted = f"{str(expected.dtype).removeprefix('torch.')}{list(expected.shape)}"
    try:
        found = f"{value.ty.dtype}{list(value_shape(value))}"
    except (AttributeError, ValueError) as error:
        raise RefusedError(f"TVM does not know the shape of {node.target}") from error
    if found != wanted:
        raise RefusedError(f"TVM computes {node.target} as {found}, torch as {wanted}")


def import_region(module: fx.GraphModule, inputs: Inputs) -> Any:
    """The region as a Relax module of TIR calls.

    Args:
        module: ATen nodes.
        inputs: shape and type of each placeholder.

    Raises:
        RefusedError: an operator would be computed wrongly.
    """
    traced = trace(module, inputs)
    _refuse_wrong_results(traced)
    prepare_operands(traced)
    arguments = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(traced, arguments)
        with quiet():
            return _legalised(program)


def _legalised(program: torch.export.ExportedProgram) -> Any:
    importer = ExportedProgramImporter()
    importer.env = _CheckedValues()
    try:
        relax_module = importer.from_exported_program(program, False, False, False, CONVERTERS)
    except Exception as error:
        # An unfinished builder complains when it goes, so let it go while nothing is printed.
        traceback.clear_frames(error.__traceback__)
        importer.env.clear()
        importer.block_builder = None
        raise
    passes = [transform.LegalizeOps(), transform.DeadCodeElimination(), transform.ToNonDataflow()]
    with tvm.target.Target({"kind": "llvm"}):
        return tvm.transform.Sequential(passes)(relax_module)


def _drop_assertions(traced: fx.GraphModule) -> None:
    """Shapes and types are fixed here, so what asserts them has nothing to say."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and "assert" in node.name and not node.users:
            traced.graph.erase_node(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _refuse_wrong_results(traced: fx.GraphModule) -> None:
    """Refuse what TVM would import without complaint and compute wrongly."""
    for node in traced.graph.nodes:
        if node.op not in ("call_function", "placeholder"):
            continue
        for value in tree_leaves(node.meta.get("val")):
            if isinstance(value, torch.Tensor) and value.dtype not in _TYPES:
                what = node.target if node.op == "call_function" else "the operator before it"
                raise RefusedError(f"{what} gives {value.dtype}, which has no kernels")
        if node.op == "call_function":
            _refuse_operator(node, operator_name(node))


def _refuse_operator(node: fx.Node, name: str) -> None:
    if name in _WRONG:
        raise RefusedError(f"TVM's {node.target} differs from torch's")
    value = node.meta.get("val")
    if name in _FLOAT_ONLY and isinstance(value, torch.Tensor) and value.dtype != torch.float32:
        raise RefusedError(f"{node.target} of {value.dtype} would be computed in float32")
    if name in _WITH_INDICES and any(user.args[1] == 1 and user.users for user in node.users):
        raise RefusedError(f"{node.target}: TVM does not give the indices")
