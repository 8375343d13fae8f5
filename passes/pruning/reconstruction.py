"""Layers of a program, one after the other, posed as least-squares problems and solved."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from shohin.errors import InputError, SpecError, UnsupportedError, near_name_hint
from shohin.ir.encodings import Sparse
from shohin.ir.program import Program, readers, tensor_of
from shohin.passes.analyses.operators import weighted_operation
from shohin.passes.base import Batch
from shohin.passes.patterns import weight_name
from shohin.passes.prefixes import Prefixes
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.pruning.divergence import costs_of, divergence
from shohin.passes.pruning.moments import Moments, Sampling
from shohin.passes.pruning.surgeon import LARGEST_INPUTS, Problem, eliminate, reconstruct
from shohin.passes.pruning.unfolding import Unfolding, can_unfold, unfolding_of
from shohin.passes.remarks import Reason

_RELU = frozenset({torch.ops.aten.relu.default, torch.ops.aten.relu_.default})
_PROBES = 50  # examples on which outputs are compared
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
        rectified: whether nothing but a ReLU reads the responses.
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    reads: tuple[tuple[int, Unfolding], ...]
    held: Tensor | None
    rectified: bool = False

    @property
    def groups(self) -> int:
        """Number of groups of the operations."""
        return self.reads[0][1].groups

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return self.weight.numel()

    @property
    def left(self) -> int:
        """Number of those that do not have to stay zero."""
        return self.size if self.held is None else int(self.held.sum())

    @property
    def rows(self) -> Tensor:
        """The weight as a matrix, the bias its last column, float64 `[outputs, inputs]`."""
        rows = self.weight.detach().flatten(1).double()
        if self.bias is None:
            return rows
        return torch.cat([rows, self.bias.detach().double().unsqueeze(1)], 1)


def unsupported(program: Program, candidate: Candidate) -> tuple[Reason, str] | None:
    """Why a weight is no layer for `find_layers`, with a sentence about it; None when it is one.

    Args:
        program: the program.
        candidate: one of its weights.
    """
    name = candidate.name
    for operation in candidate.operations:
        if not can_unfold(operation):
            detail = f"{name} is read by {operation.node.target}, expected conv2d or linear"
            return Reason.UNSUPPORTED_OPERATOR, detail
    inputs = tensor_of(program.module, name)[0].numel()
    if inputs >= LARGEST_INPUTS:
        detail = f"{name} has {inputs} inputs per output, expected fewer than {LARGEST_INPUTS}"
        return Reason.NOT_APPLICABLE, detail
    return None


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
    nodes = list(program.graph.nodes)
    return Layer(
        name,
        weight,
        tensor_of(program.module, bias) if bias is not None else None,
        reads,
        held.mask if isinstance(held, Sparse) else None,
        all(_is_rectified(nodes[position]) for position, _ in reads),
    )


def _is_rectified(node: fx.Node) -> bool:
    return all(user.target in _RELU for user in node.users)


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
        sampling: which output positions of images are looked at, and how much they count.
        memory: most bytes of activations to hold.
        refits: how often to fit what a ReLU lets through, after the responses themselves.
    """

    def __init__(
        self,
        program: Program,
        batches: Iterable[Batch],
        damping: float,
        sampling: Sampling,
        memory: int,
        refits: int = 0,
    ) -> None:
        self._batches = batches
        self._damping = max(damping, _LEAST_DAMPING)
        self._sampling = sampling
        self._refits = refits
        self._copy = program.copy()
        self._sketch = Prefixes(self._copy.module, memory)
        self._original = Prefixes(self._copy.module, memory // 2)
        self._pruned = Prefixes(program.module, memory // 2)
        self._outputs: list[Tensor] = []
        self._probed = 0

    def costs(self, name: str, shares: Sequence[float]) -> Tensor:
        """What dropping elements of one layer alone costs the network.

        Layers must be asked for in data-flow order, before the first is pruned.

        Args:
            name: the layer's weight.
            shares: rising densities below 1, of the elements that are left of it, at which the
                divergence of the outputs is measured.

        Returns:
            float64 `[elements left]`, ascending; see `divergence.costs_of`.
        """
        layer = find_layers(self._copy, [name])[0]
        left, zeros = layer.left, layer.size - layer.left
        if left == 0:
            return torch.zeros(0, dtype=torch.float64)
        self._outputs = self._outputs or self._probe()
        # Fitted to other examples than those it is measured on, where there are others.
        moments = self._moments(layer, self._sketch, self._sketch, skip=self._probed)
        problem = self._pose(layer, moments)
        elimination, present = eliminate(problem), layer.rows
        measured = {}
        for dropped in sorted({max(1, left - round(share * left)) for share in shares}):
            # Those that have to stay zero are dropped before all others.
            self.write(layer, reconstruct(problem, elimination.mask(zeros + dropped)))
            measured[dropped] = divergence(self._outputs, self._probe())
        self.write(layer, present)
        return costs_of(elimination.errors()[zeros:], list(measured.items()))

    def _probe(self) -> list[Tensor]:
        """Outputs of the original network, as its copy is now, on the first batches."""
        outputs: list[Tensor] = []
        examples = 0
        for index, batch in enumerate(self._batches):
            outputs.extend(self._sketch.outputs(index, batch))
            examples += batch[0].shape[0] if batch[0].dim() else 1
            self._probed = index + 1
            if examples >= _PROBES:
                break
        return outputs

    def prune(self, layer: Layer, kept: int) -> Tensor:
        """Prune a layer in place.

        Layers must be given in data-flow order.

        Args:
            layer: a layer of the program.
            kept: number of elements to keep.

        Returns:
            bool of the weight's shape, true where an element is kept.
        """
        kept = min(kept, layer.left)
        if kept == layer.size:
            return torch.ones_like(layer.weight, dtype=torch.bool)
        problem = self.problem(layer)
        mask, original = eliminate(problem).mask(layer.size - kept), layer.rows
        self.write(layer, reconstruct(problem, mask))
        for _ in range(self._refits if layer.rectified else 0):
            self._refit(layer, problem, original, mask)
        return mask.view(layer.weight.shape)

    def problem(self, layer: Layer) -> Problem:
        """The least-squares problem of a layer, for the inputs that those before it leave.

        Layers must be given in data-flow order.
        """
        return self._pose(layer, self._moments(layer, self._original, self._pruned))

    @staticmethod
    def write(layer: Layer, rows: Tensor) -> None:
        """Replace the weight of a layer, and its bias if it has one to correct.

        Args:
            layer: a layer of the program.
            rows: float64 `[outputs, inputs]`, the bias its last column.
        """
        inputs = layer.weight[0].numel()
        with torch.no_grad():
            layer.weight.copy_(rows[:, :inputs].reshape(layer.weight.shape))
            if layer.bias is not None:
                layer.bias.copy_(rows[:, inputs])

    def _moments(
        self,
        layer: Layer,
        original: Prefixes,
        pruned: Prefixes,
        *,
        rectified: bool = False,
        skip: int = 0,
    ) -> Moments:
        """Moments over all batches but the first `skip`, or over all where there are no more."""
        with_ones, sampling = layer.bias is not None, self._sampling
        moments = Moments(layer.weight, layer.groups, with_ones, sampling, not rectified)
        for index, batch in enumerate(self._batches):
            for position, unfolding in layer.reads:
                # Later readers see what this layer's weight does: nothing after it may be held.
                hold = position == layer.reads[0][0]
                data, wanted = original.evaluate(index, batch, position, hold=hold)
                found = wanted
                if pruned is not original:
                    data, found = pruned.evaluate(index, batch, position, hold=hold)
                if index >= skip:
                    moments.add(unfolding, data, _lack(wanted, found, rectified))
        if moments.count == 0 and skip > 0:
            return self._moments(layer, original, pruned, rectified=rectified)
        if moments.count == 0:
            raise InputError("calibration", "expected at least one batch, got none")
        moments.check(layer.name)
        return moments

    def _pose(self, layer: Layer, moments: Moments) -> Problem:
        """The least-squares problem of a layer, `damping` pulling to its present weights."""
        diagonals = moments.second.diagonal(dim1=1, dim2=2)
        dead, pull = diagonals == 0, self._pull(diagonals, with_ones=layer.bias is not None)
        hessian = moments.second + torch.diag_embed(pull)
        present = _by_group(layer.rows, layer.groups)
        target = present @ hessian + moments.cross
        start = torch.cholesky_solve(target.mT, torch.linalg.cholesky(hessian)).mT
        priority = -dead.repeat_interleave(present.shape[1], 0).double()
        priority = priority[:, : layer.weight[0].numel()].clone()
        if layer.held is not None:
            priority[~layer.held.flatten(1)] = -2.0
        return Problem(hessian, pull, target.flatten(0, 1), start.flatten(0, 1), priority)

    def _refit(self, layer: Layer, problem: Problem, original: Tensor, mask: Tensor) -> None:
        """Fit what a ReLU lets through a little better, or as well, in place.

        Where the wanted response `y` is positive the error of a response `u` is ``(y - u)^2``,
        elsewhere ``max(0, u)^2``. Nowhere does that bend more than a square, so that the least
        squares to the targets ``y`` and ``min(0, u)`` never make it larger. (What positions have in
        common is fitted to the same targets.)

        Args:
            layer: the layer, pruned.
            problem: the problem of its responses.
            original: its rows before.
            mask: what is kept.
        """
        lacks = self._moments(layer, self._original, self._pruned, rectified=True)
        pruned, pulled = (_by_group(rows, layer.groups) for rows in (layer.rows, original))
        target = pruned @ problem.hessian + lacks.cross
        target += (pulled - pruned) * problem.pull.unsqueeze(1)
        self.write(layer, reconstruct(replace(problem, target=target.flatten(0, 1)), mask))

    def _pull(self, diagonals: Tensor, with_ones: bool) -> Tensor:
        """What to add to the diagonals `[groups, inputs]` of the Hessians."""
        inputs = diagonals[:, :-1] if with_ones else diagonals
        pull = inputs.mean(1, keepdim=True).expand_as(diagonals).clone()
        if with_ones:
            pull[:, -1] = diagonals[:, -1]
        # Inputs that are all zero say nothing: any pull keeps the weights as they are.
        return self._damping * torch.where(pull > 0, pull, 1.0)


def _lack(wanted: Tensor, found: Tensor, rectified: bool) -> Tensor:
    """What responses lack to those wanted, or to the nearest that a ReLU makes the same of."""
    if not rectified:
        return wanted - found
    return torch.where(wanted > 0, wanted - found, -found.clamp_min(0.0))


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Rows `[groups * n, inputs]` as `[groups, n, inputs]`."""
    return rows.view(groups, -1, rows.shape[1])
