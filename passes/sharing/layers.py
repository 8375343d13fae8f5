"""Weights that are going to share values, and what that would cost and spare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program, encoding_of, tensor_of
from shohin.passes.analyses.operators import WeightedOperation
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.sharing.clusters import Clusters, Initialisation, cluster, nearest
from shohin.passes.sharing.coding import entropy_coded, smallest

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Element types of weights that can share values; they are clustered in single precision."""


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight and those of its elements that are to be clustered.

    Attributes:
        candidate: the weight.
        stored: how it is stored now.
        values: float32 ``[n]``, the kept elements in row-major order; a view where that is
            possible, so they change with the weight.
        importance: positive ``[n]``, how much the square of an error matters; None for all alike.
    """

    candidate: Candidate
    stored: Encoding
    values: NDArray[np.float32]
    importance: NDArray[np.float32] | None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return self.candidate.name

    @property
    def held(self) -> Sparse | None:
        """How the weight is stored where only some elements are kept; None for all of them."""
        return self.stored if isinstance(self.stored, Sparse) else None

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the weight."""
        return self.candidate.weight.dtype

    @cached_property
    def energy(self) -> float:
        """Sum of the squares of the elements, each times its importance."""
        return _weighted(self.values, self.importance)

    @cached_property
    def coded_bytes(self) -> int:
        """Size of the weight as it is, entropy coded."""
        return self._coded.stored_bytes()

    @cached_property
    def gap_bytes(self) -> int:
        """Size of the gaps between kept elements, entropy coded."""
        coded = self._coded
        if not isinstance(coded, Sparse):
            return 0
        return coded.stored_bytes() - coded.values.stored_bytes()

    @cached_property
    def _coded(self) -> Encoding:
        return entropy_coded(self.stored)


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
        return _weighted(lack, self.layer.importance)

    @cached_property
    def smaller(self) -> bool:
        """Whether it takes fewer bytes than the weight does now, before entropy coding."""
        return self.encoding().stored_bytes() < self.layer.stored.stored_bytes()

    @cached_property
    def coded_bytes(self) -> int:
        """Size of the encoding, entropy coded, with centroids of the weight's own element type.

        Some can be stored narrower than that, but no more once they were trained.
        """
        _, indices = smallest(self.indices, self.centroids.size)
        return indices + self.layer.dtype.itemsize * self.centroids.size + self.layer.gap_bytes

    def encoding(self) -> Encoding:
        """The weight as it is stored."""
        held, centroids = self.layer.held, torch.from_numpy(self.centroids).to(self.layer.dtype)
        indices = torch.from_numpy(self.indices)
        if held is None:
            return Codebook(centroids, indices.reshape(self.layer.candidate.weight.shape))
        return Sparse(held.mask, Codebook(centroids, indices), held.gap_bits)


def layer_of(program: Program, candidate: Candidate, importance: Mapping[str, Tensor]) -> Layer:
    """The elements of a weight that are to be clustered: the kept ones of a sparse weight."""
    stored = encoding_of(program, candidate.name)
    held = stored if isinstance(stored, Sparse) else None
    given = importance.get(candidate.name)
    return Layer(
        candidate,
        stored,
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
    if layer.dtype in (torch.float16, torch.bfloat16):
        found = _rounded(layer, found)
    return Sharing(layer, bits, found.centroids, found.indices)


def write(sharing: Sharing) -> None:
    """Give a weight of a program the values that it is stored with."""
    with torch.no_grad():
        sharing.layer.candidate.weight.copy_(sharing.encoding().materialise())


def round_to(values: NDArray[np.float32], dtype: torch.dtype) -> NDArray[np.float32]:
    """The nearest numbers that an element type has."""
    return torch.from_numpy(values).to(dtype).float().numpy()


def _rounded(layer: Layer, found: Clusters) -> Clusters:
    """Centroids that the weight's element type has, different and none without elements."""
    centroids = np.unique(round_to(found.centroids, layer.dtype))
    used, indices = np.unique(nearest(layer.values, centroids), return_inverse=True)
    return Clusters(centroids[used], indices.reshape(-1).astype(np.uint8))


def _weighted(values: NDArray[np.float32], importance: NDArray[np.float32] | None) -> float:
    """Sum of squares, each times its importance."""
    squares = np.square(values, dtype=np.float64)
    return float(squares.sum() if importance is None else squares @ importance)


def _kept(tensor: Tensor, held: Sparse | None) -> NDArray[np.float32]:
    flat = tensor.detach().reshape(-1) if held is None else tensor.detach()[held.mask]
    return flat.float().numpy()


def _positive(importance: NDArray[np.float32]) -> NDArray[np.float32]:
    """Importances with a floor, so that every element belongs to a cluster with a mean."""
    floor = 1e-6 * float(importance.mean(dtype=np.float64))
    return np.maximum(importance, floor if floor > 0 else 1.0)
