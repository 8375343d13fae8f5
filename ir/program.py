"""The program: a graph, what goes in, and how its weights are stored."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from shohin.ir.encodings import Dense, Encoding

BATCH = "N"
_SINGLE_BYTES = 4
Dimension: TypeAlias = int | str


class Stage(Enum):
    """How far a program has come; each stage has a verifier of its own."""

    CAPTURED = "captured"
    ANNOTATED = "annotated"
    LOWERED = "lowered"


class Fact(StrEnum):
    """A property that passes establish, require or preserve."""

    FUNCTIONAL = "functional"
    BN_FOLDED = "bn-folded"
    CONSTANTS_FOLDED = "constants-folded"
    DEAD_REMOVED = "dead-removed"
    PRUNED = "pruned"
    SHARED = "shared"
    ENTROPY_CODED = "entropy-coded"
    FIXED_POINT = "fixed-point"
    TERNARY = "ternary"
    LOW_RANK = "low-rank"


@dataclass(frozen=True)
class InputSpec:
    """One input of a program.

    Attributes:
        name: the placeholder's name.
        shape: sizes; the symbolic batch size is the text ``"N"``.
        dtype: element type.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: torch.dtype

    def concrete(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)

    def describe(self) -> str:
        """``float32[N,3,32,32]``."""
        sizes = ",".join(str(size) for size in self.shape)
        return f"{str(self.dtype).removeprefix('torch.')}[{sizes}]"


@dataclass(frozen=True)
class Program:
    """A model in the form that passes rewrite and backends compile.

    The module is mutable (passes edit its graph; the manager gives each pass a copy), everything
    beside it is not.

    Attributes:
        module: ATen graph with the model's own parameter names; runnable and trainable in PyTorch.
            Takes the inputs as positional tensors, returns one tensor or a flat tuple of tensors.
        inputs: one specification per placeholder, in order.
        stage: how far the program has come.
        encodings: how weights are stored, by parameter name. A weight without an entry is dense.
        facts: properties that hold.
        history: canonical text of each pass that ran, in order.
        name: what the model is called in reports and generated files.
        outputs: names of the outputs, where the model gives them any; otherwise an output is
            called after the node that computes it.
        captured_bytes: what the weights of the captured model take in single precision, those that
            passes removed since then included; 0 where nobody knows.
    """

    module: fx.GraphModule
    inputs: tuple[InputSpec, ...]
    stage: Stage = Stage.CAPTURED
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    facts: frozenset[Fact] = frozenset()
    history: tuple[str, ...] = ()
    name: str = "model"
    outputs: tuple[str, ...] = ()
    captured_bytes: int = 0

    @property
    def graph(self) -> fx.Graph:
        """The module's graph."""
        return self.module.graph

    @property
    def symbolic_batch(self) -> bool:
        """Whether any input has a symbolic batch size."""
        return any(BATCH in spec.shape for spec in self.inputs)

    def copy(self) -> "Program":
        """An independent copy: editing its module leaves this program as it is."""
        return replace(self, module=copy_module(self.module), encodings=dict(self.encodings))


def output_names(program: Program, nodes: Sequence[str]) -> tuple[str, ...]:
    """What a program's outputs are called.

    Args:
        program: the program.
        nodes: names of the nodes that compute them, for a program without names of its own.
    """
    return program.outputs if len(program.outputs) == len(nodes) else tuple(nodes)


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """Deep copy of a graph module that keeps the nodes' metadata and shared parameters."""
    metadata = [node.meta for node in module.graph.nodes]
    duplicate = copy.deepcopy(module)
    for node, meta in zip(duplicate.graph.nodes, metadata, strict=True):
        node.meta = dict(meta)
    return duplicate


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer with a dotted name.

    Raises:
        AttributeError: when there is none.
    """
    path, _, leaf = name.rpartition(".")
    found = getattr(module.get_submodule(path), leaf)
    if not isinstance(found, Tensor):
        raise AttributeError(f"'{name}' is a {type(found).__name__}, not a tensor")
    return found


def is_tensor_name(module: nn.Module, name: str) -> bool:
    """Whether the module has a parameter or buffer of that dotted name."""
    try:
        tensor_of(module, name)
    except AttributeError:
        return False
    return True


def make_owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a dotted name, made where it is missing, and the last part."""
    path, _, leaf = name.rpartition(".")
    owner = module
    for part in path.split(".") if path else []:
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner, leaf


def set_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the module's parameter (float) or buffer (otherwise) of a dotted name.

    Submodules on the way are made where they are missing. What had the name before is replaced.
    """
    owner, leaf = make_owner(module, name)
    was_buffer = leaf in owner._buffers
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    if value.is_floating_point() and not was_buffer:
        owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=True))
    else:
        owner.register_buffer(leaf, value.detach())


def weight_names(program: Program) -> list[str]:
    """Names of the tensors that the graph reads, each once, in order of first use."""
    targets = [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]
    return [name for name in dict.fromkeys(targets) if is_tensor_name(program.module, name)]


def tied_names(program: Program) -> list[list[str]]:
    """The names of each tensor that the graph reads, in order of first use."""
    names: dict[int, list[str]] = {}
    for name in weight_names(program):
        names.setdefault(id(tensor_of(program.module, name)), []).append(name)
    return [*names.values()]


def encoding_of(program: Program, name: str) -> Encoding:
    """How a weight is stored; `Dense` where nothing else was chosen."""
    chosen = program.encodings.get(name)
    return chosen if chosen is not None else Dense(tensor_of(program.module, name).detach())


def remove_unused_tensors(module: fx.GraphModule) -> list[str]:
    """Drop the parameters and buffers that the graph does not read, and emptied submodules.

    Returns:
        The names of the tensors that were dropped.
    """
    used = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    dropped = [name for name, _ in named if name not in used]
    for name in dropped:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    module.delete_all_unused_submodules()
    return dropped


def single_bytes(dtype: torch.dtype, elements: int) -> int:
    """Bytes of elements, floating-point ones in single precision."""
    return elements * (_SINGLE_BYTES if dtype.is_floating_point else dtype.itemsize)


def readers(program: Program, name: str) -> Iterator[fx.Node]:
    """The nodes that read a weight, in graph order."""
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            yield from node.users
