"""Layers of a program, one after the other, posed as least-squares problems and solved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shohin.errors import InputError, SpecError, UnsupportedError, near_name_hint
from shohin.ir.encodings import Sparse
from shohin.ir.program import Program, readers, tensor_of
from shohin.passes.analyses.operators import weighted_operation
from shohin.passes.base import Batch
from shohin.passes.patterns import weight_name
from shohin.passes.pruning.moments import Moments, Sampling
from shohin.passes.pruning.prefixes import Prefixes
from shohin.passes.pruning.surgeon import LARGEST_INPUTS, Problem, eliminate, reconstruct
from shohin.passes.pruning.unfolding import Unfolding, unfolding_of

_LEAST_DAMPING = 1e-5  # above the rounding of products in float32, which may be indefinite


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight that convolutions or linear maps read.

    Attributes:
        name: the weight's name.
        weight: its values in the program, `[outputs, inputs / groups, ...]`; changed in place.
        bias: the bias to correct, `[outputs]`, or None.
        reads: position in the graph, and way of unfolding, of each operation that reads it.
        held: bool of the weight's shape, false where it has to stay zero; None for nowhere.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    reads: tuple[tuple[int, Unfolding], ...]
    held: Tensor | None

    @property
    def groups(self) -> int:
        """Number of groups of the operations."""
        return self.reads[0][1].groups

    @property
    def rows(self) -> Tensor:
        """The weight as a matrix, the bias its last column, float64 `[outputs, inputs]`."""
        rows = self.weight.detach().flatten(1).double()
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias.detach().double().unsqueeze(1)], 1)


def find_layers(program: Program, names: Sequence[str]) -> list[Layer]:
    """The layers of some weights, in data-flow order.

    Raises:
        SpecError: when a name is none of a weight that convolutions or linear maps read.
        UnsupportedError: naming a layer of another kind, or with too many inputs.
    """
    reads: dict[str, list[tuple[int, Unfolding]]] = {}
    biases: dict[str, set[str | None]] = {}
    known: list[str] = []
    for position, node in enumerate(program.graph.nodes):
        operation = weighted_operation(node)
        name = weight_name(operation.weight) if operation else None
        if operation is None or name is None:
            continue
        known.append(name)
        if name in names:
            unfolding = unfolding_of(operation, tensor_of(program.module, name))
            reads.setdefault(name, []).append((position, unfolding))
            biases.setdefault(name, set()).add(weight_name(operation.bias))
    for name in names:
        if name not in reads:
            problem = "no convolution or linear map reads a weight of that name"
            raise SpecError(f"weight '{name}'", problem, near_name_hint(name, known))
    return [_make_layer(program, name, tuple(reads[name]), biases[name]) for name in reads]


def _make_layer(
    program: Program,
    name: str,
    reads: tuple[tuple[int, Unfolding], ...],
    biases: set[str | None],
) -> Layer:
    weight, held = tensor_of(program.module, name), program.encodings.get(name)
    if weight[0].numel() >= LARGEST_INPUTS:
        problem = f"expected fewer than {LARGEST_INPUTS} inputs, got {weight[0].numel()}"
        raise UnsupportedError(f"weight '{name}'", problem, "exclude it or rank it by magnitude")
    bias = _own_bias(program, reads, biases)
    return Layer(
        name,
        weight,
        tensor_of(program.module, bias) if bias is not None else None,
        reads,
        held.mask if isinstance(held, Sparse) else None,
    )


def _own_bias(
    program: Program, reads: tuple[tuple[int, Unfolding], ...], biases: set[str | None]
) -> str | None:
    """The bias of all operations that read a weight, when nothing else reads it."""
    (name, *others) = biases
    if name is None or others or name in program.encodings:
        return None
    return name if len(list(readers(program, name))) == len(reads) else None


class Surgeon:
    """Prunes the layers of a program, each for the inputs that those before it leave.

    Args:
        program: changed in place.
        batches: calibration batches, in memory or readable any number of times.
        damping: pull to the original weights, over the mean diagonal of the second moments.
        sampling: which output positions of images are looked at.
        memory: most bytes of activations to hold.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Batch],
        damping: float,
        sampling: Sampling,
        memory: int,
    ) -> None:
        self._batches = batches
        self._damping = max(damping, _LEAST_DAMPING)
        self._sampling = sampling
        original = program.copy().module
        self._sketch = Prefixes(original, memory)
        self._original = Prefixes(original, memory // 2)
        self._pruned = Prefixes(program.module, memory // 2)

    def dense_costs(self, layer: Layer) -> Tensor:
        """What dropping elements costs on the original inputs, relative to the responses' variance.

        Layers must be asked for in data-flow order, before the first is pruned.

        Returns:
            float64 `[elements]`, ascending: the rise of the layer's squared error at each step,
            or the greatest so far; below zero for elements that are to be dropped anyway.
        """
        moments = self._moments(layer, self._sketch, self._sketch)
        costs = eliminate(self._pose(layer, moments)).thresholds().flatten().sort().values
        return costs / max(moments.energy(), torch.finfo(torch.float64).tiny)

    def prune(self, layer: Layer, kept: int) -> Tensor:
        """Prune a layer in place.

        Layers must be given in data-flow order.

        Args:
            layer: a layer of the program.
            kept: number of elements to keep.

        Returns:
            bool of the weight's shape, true where an element is kept.
        """
        total = layer.weight.numel()
        held = total if layer.held is None else int(layer.held.sum())
        if min(kept, held) == total:
            return torch.ones_like(layer.weight, dtype=torch.bool)
        problem = self._pose(layer, self._moments(layer, self._original, self._pruned))
        mask = eliminate(problem).mask(total - min(kept, held))
        _write(layer, reconstruct(problem, mask))
        return mask.view(layer.weight.shape)

    def _moments(self, layer: Layer, original: Prefixes, pruned: Prefixes) -> Moments:
        moments = Moments(layer.weight, layer.groups, layer.bias is not None, self._sampling)
        for index, batch in enumerate(self._batches):
            for position, unfolding in layer.reads:
                # Later readers see what this layer's weight does: nothing after it may be held.
                hold = position == layer.reads[0][0]
                data, wanted = original.evaluate(index, batch, position, hold=hold)
                found = wanted
                if pruned is not original:
                    data, found = pruned.evaluate(index, batch, position, hold=hold)
                moments.add(unfolding, data, wanted, found)
        if moments.count == 0:
            raise InputError("calibration", "expected at least one batch, got none")
        moments.check(layer.name)
        return moments

    def _pose(self, layer: Layer, moments: Moments) -> Problem:
        """The least-squares problem of a layer, `damping` pulling to its present weights."""
        rows, groups = layer.rows, layer.groups
        hessian = moments.second.clone()
        diagonals = hessian.diagonal(dim1=1, dim2=2)
        dead = diagonals == 0
        diagonals += self._pull(diagonals, with_ones=layer.bias is not None)
        present = rows.view(groups, -1, rows.shape[1])
        target = present @ hessian + moments.cross
        start = torch.cholesky_solve(target.mT, torch.linalg.cholesky(hessian)).mT
        priority = -dead.repeat_interleave(present.shape[1], 0).double()
        priority = priority[:, : layer.weight[0].numel()].clone()
        if layer.held is not None:
            priority[~layer.held.flatten(1)] = -2.0
        return Problem(hessian, target.flatten(0, 1), start.flatten(0, 1), priority)

    def _pull(self, diagonals: Tensor, with_ones: bool) -> Tensor:
        """What to add to the diagonals `[groups, inputs]` of the Hessians."""
        inputs = diagonals[:, :-1] if with_ones else diagonals
        pull = inputs.mean(1, keepdim=True).expand_as(diagonals).clone()
        if with_ones:
            pull[:, -1] = diagonals[:, -1]
        # Inputs that are all zero say nothing: any pull keeps the weights as they are.
        return self._damping * torch.where(pull > 0, pull, 1.0)


def _write(layer: Layer, rows: Tensor) -> None:
    inputs = layer.weight[0].numel()
    with torch.no_grad():
        layer.weight.copy_(rows[:, :inputs].reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(rows[:, inputs])
