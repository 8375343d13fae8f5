"""Which weights can be pruned, and how they are seen as matrices."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, fx

from shohin.errors import SpecError, near_name_hint
from shohin.ir.annotations import Origin, annotation
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.program import Program, readers, tensor_of, tied_names, weight_names
from shohin.passes.analyses.operators import WeightedOperation, weighted_operation
from shohin.passes.base import Context
from shohin.passes.remarks import Reason

PIECE = 1 << 22
"""Elements that are looked at together, so that no copy of a whole weight is made."""

Value = TypeVar("Value")

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    {
        *(_aten.matmul.default, _aten.mm.default, _aten.bmm.default, _aten.mv.default),
        *(_aten.addmm.default, _aten.baddbmm.default, _aten.einsum.default),
    }
)


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight that is read by convolutions or linear maps.

    Attributes:
        name: its name; the first one where it has several.
        aliases: its other names.
        node: the first convolution or linear map that reads it.
        operations: all of them, in graph order.
        weight: the tensor, as it lies in the module.
        former: names that it had in other modules before it was captured.
    """

    name: str
    aliases: tuple[str, ...]
    node: fx.Node
    operations: tuple[WeightedOperation, ...]
    weight: Tensor
    former: tuple[str, ...] = ()

    @property
    def grouped(self) -> bool:
        """Whether any of its operations is a grouped or depthwise convolution."""
        return any(operation.groups > 1 for operation in self.operations)

    @property
    def transposed(self) -> bool:
        """Whether its output channels lie on axis 1."""
        return self.operations[0].transposed

    @property
    def linear(self) -> bool:
        """Whether every one of its operations is a linear map."""
        return all(operation.linear for operation in self.operations)

    @property
    def names(self) -> tuple[str, ...]:
        """All its names in the program."""
        return (self.name, *self.aliases)

    @property
    def spellings(self) -> tuple[str, ...]:
        """All names that options may call it by."""
        return (*self.names, *self.former)

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape as `[output channels, everything else]`.

        A view where that is possible. Makes sense for weights that are not grouped.
        """
        rows_first = tensor.transpose(0, 1) if self.transposed else tensor
        return rows_first.reshape(rows_first.shape[0], -1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A contiguous tensor of the weight's shape; the inverse of `as_matrix`."""
        shape = self.weight.shape
        if not self.transposed:
            return matrix.reshape(shape).contiguous()
        rows_first = matrix.reshape(shape[1], shape[0], *shape[2:])
        return rows_first.transpose(0, 1).contiguous()


def find_candidates(program: Program) -> list[Candidate]:
    """The weights of convolutions and linear maps, in order of first use, tied ones once."""
    found = []
    known = set(weight_names(program))
    for tied in tied_names(program):
        operations = tuple(_operations(program, tied))
        if operations:
            first, *aliases = tied
            weight = tensor_of(program.module, first)
            former = tuple(name for name in _former_names(first, operations) if name not in known)
            node = operations[0].node
            found.append(Candidate(first, tuple(aliases), node, operations, weight, former))
    return found


def obstacle(program: Program, candidate: Candidate) -> tuple[Reason, str] | None:
    """Why a weight cannot be pruned, with a sentence about it; None when it can."""
    name, weight = candidate.name, candidate.weight
    own = {operation.node for operation in candidate.operations}
    reading = (node for alias in candidate.names for node in readers(program, alias))
    others = [node.name for node in reading if node not in own]
    if others:
        return Reason.OTHER_USERS, f"{name} is also read by {', '.join(others)}"
    encoding = program.encodings.get(name)
    if encoding is not None and not is_plain(encoding):
        return Reason.ALREADY_ENCODED, f"{name} is stored as {encoding.describe()}"
    if not weight.is_floating_point():
        return Reason.NOT_APPLICABLE, f"{name} has elements of type {weight.dtype}"
    bad = count_non_finite(weight)
    if bad:
        return Reason.NOT_FINITE, f"{name} has {bad} elements that are NaN or infinite"
    return None


def gives_outputs(program: Program, candidate: Candidate) -> bool:
    """Whether the output channels of a weight are those of an output of the program.

    They are when no convolution without groups, linear map or product with a weight lies between.
    """
    constants = _constant_sources(program.graph)
    waiting = [operation.node for operation in candidate.operations]
    seen = set(waiting)
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user not in seen and not _ends_channels(user, constants):
                seen.add(user)
                waiting.append(user)
    return False


def reads_inputs(program: Program, candidate: Candidate) -> bool:
    """Whether an operation of a weight reads an input of the program.

    One does when no convolution without groups, linear map or product with a weight lies between.
    """
    own = {operation.node for operation in candidate.operations}
    constants = _constant_sources(program.graph)
    waiting = [node for node in program.graph.nodes if node.op == "placeholder"]
    seen = set(waiting)
    while waiting:
        for user in waiting.pop().users:
            if user in own:
                return True
            if user not in seen and not _ends_channels(user, constants):
                seen.add(user)
                waiting.append(user)
    return False


def is_plain(encoding: Encoding) -> bool:
    """Whether the elements are stored as they are, all of them or those under a mask."""
    return isinstance(encoding.values if isinstance(encoding, Sparse) else encoding, Dense)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in row-major order, a few million at a time, as views where possible."""
    return iter(torch.split(tensor.detach().reshape(-1), PIECE))


def count_non_finite(tensor: Tensor) -> int:
    """Number of elements that are NaN or infinite."""
    finite = (torch.isfinite(piece) for piece in pieces(tensor))
    return sum(int(torch.count_nonzero(~one)) for one in finite if not one.all())


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a weight's name is one of the names, or matches one of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_excluded(candidate: Candidate, patterns: Iterable[str], context: Context) -> bool:
    """Whether the option `exclude` names a weight, by any of its names; a remark says so."""
    patterns = list(patterns)
    excluded = next((name for name in candidate.spellings if matches(name, patterns)), None)
    if excluded is not None:
        detail = f"{excluded} matches the option 'exclude'"
        context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
    return excluded is not None


def value_for(name: str, by_pattern: Mapping[str, Value]) -> Value | None:
    """The value of the name itself, or else of the first pattern that matches; None without."""
    return value_for_names((name,), by_pattern)


def value_for_names(names: Sequence[str], by_pattern: Mapping[str, Value]) -> Value | None:
    """The value of the first name that has one, or else of the first pattern that matches any."""
    exact = next((by_pattern[name] for name in names if name in by_pattern), None)
    if exact is not None:
        return exact
    return next((value for key, value in by_pattern.items() if _any_matches(names, key)), None)


def check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a name or pattern that matches no weight.

    Args:
        option: what the patterns are an option of, for the error, e.g. ``prune exclude``.
        patterns: names or shell patterns.
        names: the weights there are.

    Raises:
        SpecError: naming the pattern, with the nearest names.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise SpecError(
                f"{option} '{pattern}'",
                "expected a convolution or linear weight, got no match",
                near_name_hint(pattern, list(names)),
            )


def all_names(candidates: Iterable[Candidate]) -> list[str]:
    """Every name that options may call some weights by."""
    return [name for candidate in candidates for name in candidate.spellings]


def other_products(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """The nodes that multiply by parameters in a form that is no candidate, and what each reads.

    These are products of matrices, as decomposed exports have them, and convolutions and linear
    maps whose weight is computed, as of a normalised one.
    """
    parameters = dict(program.module.named_parameters(remove_duplicate=False))
    sources = _constant_sources(program.graph)
    for node in program.graph.nodes:
        operation = weighted_operation(node)
        if operation is not None and operation.weight.op != "get_attr":
            operands = [operation.weight]
        else:
            operands = node.all_input_nodes if node.target in _PRODUCTS else []
        read = {name for one in operands for name in sources.get(one, ())}
        names = sorted(name for name in read if name in parameters and parameters[name].dim() > 1)
        if names and operation is not None:
            yield node, f"its weight is computed from {', '.join(names)}"
        elif names:
            yield node, f"{node.target} multiplies by {', '.join(names)}, not conv or linear"


def _constant_sources(graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """By node that depends on no input of the program, the tensors that it is computed from."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({str(node.target)})
        elif node.op == "call_function" and all(one in found for one in node.all_input_nodes):
            found[node] = frozenset().union(*(found[one] for one in node.all_input_nodes))
    return found


def _ends_channels(node: fx.Node, constants: Collection[fx.Node]) -> bool:
    """Whether a node gives new channels, or only the size of what it is given."""
    operation = weighted_operation(node)
    if operation is not None:
        return operation.groups == 1
    product = node.target in _PRODUCTS and any(one in constants for one in node.all_input_nodes)
    return product or node.target is _aten.sym_size.int


def _any_matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _former_names(name: str, operations: Iterable[WeightedOperation]) -> Iterator[str]:
    """What a weight was called in the modules that read it: a capture keeps one name of each."""
    leaf = name.rpartition(".")[2]
    origins = (annotation(operation.node, Origin) for operation in operations)
    modules = dict.fromkeys(origin.module for origin in origins if origin is not None)
    return (f"{module}.{leaf}" for module in modules if module)


def _operations(program: Program, names: Sequence[str]) -> Iterator[WeightedOperation]:
    for name in names:
        for node in readers(program, name):
            operation = weighted_operation(node)
            if operation is not None and operation.weight.target == name:
                yield operation
