"""Shapes and element types of every node, found without computing anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shohin.errors import VerifyError
from shohin.ir.program import BATCH, Dimension, InputSpec, Program

_PROBES = (3, 5)


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a tensor.

    Attributes:
        shape: sizes; in symbolic shapes a size that depends on the batch is a text (``4N``).
        dtype: element type.
    """

    shape: tuple[Dimension, ...]
    dtype: torch.dtype

    def sizes(self) -> tuple[int, ...]:
        """The shape of a tensor whose every size is a number.

        Raises:
            ValueError: when a size is symbolic.
        """
        return tuple(int(size) for size in self.shape)

    def describe(self) -> str:
        """``float32[N,3,32,32]``."""
        sizes = ",".join(str(size) for size in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


NodeType: TypeAlias = TensorType | int | float | bool | str | tuple["NodeType", ...] | None


def infer_shapes(program: Program, batch: int) -> dict[str, NodeType]:
    """The type of every node's value at a batch size, by node name.

    Runs the graph on fake tensors: no arithmetic, no memory.

    Args:
        program: the program; its inputs give the shapes to start from.
        batch: size of the symbolic batch.

    Returns:
        `TensorType` for a tensor, a number for the size of an axis, a tuple for several values.

    Raises:
        VerifyError: naming the node whose operator refuses its arguments.
    """
    values = fake_values(program.module, program.inputs, batch)
    return {node.name: _type_of(value) for node, value in values.items()}


def symbolic_shapes(program: Program) -> dict[str, NodeType]:
    """The type of every node's value with the batch size as ``N``, by node name.

    Found by inference at two batch sizes: a size that grows with the batch is shown as ``N``,
    ``4N`` or ``N+1``; one that grows in another way as ``?``.

    Raises:
        VerifyError: naming the node whose operator refuses its arguments.
    """
    small = infer_shapes(program, _PROBES[0])
    if not program.symbolic_batch:
        return small
    large = infer_shapes(program, _PROBES[1])
    return {name: _generalise(small[name], large[name]) for name in small}


def fake_values(
    module: fx.GraphModule, inputs: Sequence[InputSpec], batch: int
) -> dict[fx.Node, object]:
    """The fake value of every node at a batch size.

    Fake tensors that alias each other in PyTorch share their storage here too.

    Raises:
        VerifyError: naming the node whose operator refuses its arguments.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode, torch.no_grad():
        feeds = [torch.empty(spec.concrete(batch), dtype=spec.dtype) for spec in inputs]
        interpreter = _Recorder(module, mode)
        interpreter.run(*feeds)
    return interpreter.values


class _Recorder(fx.Interpreter):
    """Runs a graph on fake tensors and keeps every value."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.extra_traceback = False
        self.values: dict[fx.Node, object] = {}
        self._mode = mode
        self._weights: dict[int, FakeTensor] = {}

    def run_node(self, n: fx.Node) -> object:
        try:
            value = super().run_node(n)
        except Exception as error:  # an operator may raise anything
            raise VerifyError(
                f"node '{n.name}'",
                f"{n.target} refuses its arguments: {first_line(error)}",
                "compare the shapes and types of its arguments with what the operator takes",
            ) from error
        found = self._imitate(value) if n.op == "get_attr" else value
        # An operator may change the shape of its argument in place: keep what it was before.
        self.values[n] = found.detach() if isinstance(found, Tensor) else found
        return found

    def _imitate(self, value: object) -> object:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in self._weights:
            self._weights[id(value)] = self._mode.from_tensor(value, static_shapes=True)
        return self._weights[id(value)]


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says anything, or its class name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _type_of(value: object) -> NodeType:
    if isinstance(value, Tensor):
        return TensorType(tuple(int(size) for size in value.shape), value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(_type_of(item) for item in value)
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return type(value).__name__


def _generalise(small: NodeType, large: NodeType) -> NodeType:
    if isinstance(small, TensorType) and isinstance(large, TensorType):
        if len(small.shape) != len(large.shape):
            return TensorType(("?",), small.dtype)
        sizes = zip(small.shape, large.shape, strict=True)
        return TensorType(tuple(_size(int(one), int(two)) for one, two in sizes), small.dtype)
    if isinstance(small, tuple) and isinstance(large, tuple) and len(small) == len(large):
        return tuple(_generalise(one, two) for one, two in zip(small, large, strict=True))
    if type(small) is int and type(large) is int:
        return _size(small, large)
    return small if small == large else "?"


def _size(small: int, large: int) -> Dimension:
    """The size as a linear function of the batch, from its values at the two probes."""
    factor, rest = divmod(large - small, _PROBES[1] - _PROBES[0])
    offset = small - factor * _PROBES[0]
    if rest or factor < 0:
        return "?"
    if factor == 0:
        return small
    text = BATCH if factor == 1 else f"{factor}{BATCH}"
    return f"{text}{offset:+d}" if offset else text


def tensor_types(types: Mapping[str, NodeType]) -> dict[str, TensorType]:
    """Only the nodes whose value is one tensor."""
    return {name: kind for name, kind in types.items() if isinstance(kind, TensorType)}
