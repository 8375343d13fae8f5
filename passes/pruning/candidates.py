"""Which weights can be pruned, and how they are seen as matrices."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, fx

from shohin.errors import SpecError, near_name_hint
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.program import Program, readers, tensor_of, tied_names
from shohin.passes.analyses.operators import WeightedOperation, weighted_operation
from shohin.passes.base import Context
from shohin.passes.remarks import Reason

PIECE = 1 << 22
"""Elements that are looked at together, so that no copy of a whole weight is made."""

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A weight that is read by convolutions or linear maps.

    Attributes:
        name: its name; the first one where it has several.
        aliases: its other names.
        node: the first convolution or linear map that reads it.
        operations: all of them, in graph order.
        weight: the tensor, as it lies in the module.
    """

    name: str
    aliases: tuple[str, ...]
    node: fx.Node
    operations: tuple[WeightedOperation, ...]
    weight: Tensor

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
        """All its names."""
        return (self.name, *self.aliases)

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
    for tied in tied_names(program):
        operations = tuple(_operations(program, tied))
        if operations:
            first, *aliases = tied
            weight = tensor_of(program.module, first)
            node = operations[0].node
            found.append(Candidate(first, tuple(aliases), node, operations, weight))
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
    """Whether the option `exclude` names a weight; a remark says so."""
    excluded = matches(candidate.name, patterns)
    if excluded:
        detail = f"{candidate.name} matches the option 'exclude'"
        context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
    return excluded


def value_for(name: str, by_pattern: Mapping[str, Value]) -> Value | None:
    """The value of the name itself, or else of the first pattern that matches; None without."""
    if name in by_pattern:
        return by_pattern[name]
    return next((value for key, value in by_pattern.items() if fnmatchcase(name, key)), None)


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


def _operations(program: Program, names: Sequence[str]) -> Iterator[WeightedOperation]:
    for name in names:
        for node in readers(program, name):
            operation = weighted_operation(node)
            if operation is not None and operation.weight.target == name:
                yield operation
