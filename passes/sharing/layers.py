"""Weights that are going to share values, and what that would cost and spare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.ir.codebook import Codebook
from shohin.ir.coding import entropy_bits
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.gaps import codes_of, gaps_of
from shohin.ir.program import Program, tensor_of
from shohin.passes.analyses.operators import WeightedOperation
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.sharing.clusters import Initialisation, cluster

_CENTROID_BITS = 32


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and those of its elements that are to be clustered.

    Attributes:
        candidate: the weight.
        held: how the weight is stored where only some elements are kept; None for all of them.
        values: float32 ``[n]``, the kept elements in row-major order.
        importance: positive ``[n]``, how much the square of an error matters; None for all alike.
    """

    candidate: Candidate
    held: Sparse | None
    values: NDArray[np.float32]
    importance: NDArray[np.float32] | None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.candidate.name

    @cached_property
    def gap_bits(self) -> float:
        """Entropy of the gaps between kept elements, in the width where it is least."""
        if self.held is None:
            return 0.0
        gaps = gaps_of(self.held.mask)
        return min(entropy_bits(np.bincount(codes_of(gaps, width))) for width in range(1, 9))


@dataclass(frozen=True, eq=False)
class Sharing:
    """A weight with shared values.

    Attributes:
        layer: what was clustered.
        bits: width of an index that was asked for.
        centroids: the values, ascending.
        indices: uint8 ``[n]``.
    """

    layer: Layer
    bits: int
    centroids: NDArray[np.float32]
    indices: NDArray[np.uint8]

    @property
    def error(self) -> float:
        """Sum of the squared errors, each times its importance."""
        lack = self.layer.values - self.centroids[self.indices]
        square = np.square(lack, dtype=np.float64)
        importance = self.layer.importance
        return float(square.sum() if importance is None else square @ importance)

    @property
    def coded_bits(self) -> float:
        """Entropies of indices and gaps, and the table of centroids."""
        indices = entropy_bits(np.bincount(self.indices))
        return indices + _CENTROID_BITS * self.centroids.size + self.layer.gap_bits

    def encoding(self) -> Encoding:
        """The weight as it is stored."""
        held, centroids = self.layer.held, torch.from_numpy(self.centroids)
        indices = torch.from_numpy(self.indices)
        if held is None:
            return Codebook(centroids, indices.reshape(self.layer.candidate.weight.shape))
        return Sparse(held.mask, Codebook(centroids, indices), held.gap_bits)


def layer_of(program: Program, candidate: Candidate, importance: Mapping[str, Tensor]) -> Layer:
    """The elements of a weight that are to be clustered: the kept ones of a sparse weight."""
    encoding = program.encodings.get(candidate.name)
    held = encoding if isinstance(encoding, Sparse) else None
    given = importance.get(candidate.name)
    return Layer(
        candidate,
        held,
        _kept(candidate.weight, held),
        None if given is None else _positive(_kept(given, held)),
    )


def find_biases(program: Program, candidates: Sequence[Candidate]) -> list[Candidate]:
    """The biases of convolutions and linear maps, in order of first use, tied ones once."""
    readers: dict[int, list[WeightedOperation]] = {}
    names: dict[int, dict[str, None]] = {}
    for operation in (one for candidate in candidates for one in candidate.operations):
        if operation.bias is not None and operation.bias.op == "get_attr":
            name = str(operation.bias.target)
            key = id(tensor_of(program.module, name))
            readers.setdefault(key, []).append(operation)
            names.setdefault(key, {})[name] = None
    found = []
    for key, operations in readers.items():
        first, *aliases = names[key]
        bias = tensor_of(program.module, first)
        node = operations[0].node
        found.append(Candidate(first, tuple(aliases), node, tuple(operations), bias))
    return found


def share(layer: Layer, bits: int, start: Initialisation, seed: int) -> Sharing:
    """Cluster the elements of a weight into at most ``2**bits`` values."""
    found = cluster(layer.values, 1 << bits, start=start, importance=layer.importance, seed=seed)
    return Sharing(layer, bits, found.centroids, found.indices)


def _kept(tensor: Tensor, held: Sparse | None) -> NDArray[np.float32]:
    flat = tensor.detach().reshape(-1) if held is None else tensor.detach()[held.mask]
    return flat.float().numpy()


def _positive(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importances with a floor, so that every element belongs to a cluster with a mean."""
    floor = 1e-6 * float(importance.mean(dtype=np.float64))
    return np.maximum(importance, floor if floor > 0 else 1.0)
