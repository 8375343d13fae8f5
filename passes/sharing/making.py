"""Sharing of a whole program with given bits, to be kept or only to be looked at."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate
from shohin.passes.sharing.clusters import Initialisation
from shohin.passes.sharing.compensation import compensate
from shohin.passes.sharing.layers import Layer, Sharing, layer_of, share, write
from shohin.passes.training import restore, snapshot


@dataclass(frozen=True)
class Made:
    """What a sharing of a program came to.

    Attributes:
        sharings: weights and biases that share values from now on.
        refused: those that would take no fewer bytes, and stay as they are.
    """

    sharings: tuple[Sharing, ...]
    refused: tuple[Sharing, ...]

    @classmethod
    def of(cls, every: Sequence[Sharing]) -> "Made":
        """Those that get smaller, and the others."""
        smaller = tuple(one for one in every if one.smaller)
        return cls(smaller, tuple(one for one in every if not one.smaller))

    @property
    def coded_bytes(self) -> int:
        """Size of the entropy-coded encodings of all of them."""
        left = sum(one.layer.coded_bytes for one in self.refused)
        return sum(one.coded_bytes for one in self.sharings) + left


@dataclass(frozen=True, eq=False)
class Maker:
    """Shares the values of a program's weights, and of its biases.

    Attributes:
        program: its weights and biases are changed in place.
        layers: the weights.
        biases: to be shared as well.
        bias_bits: width of an index of a bias.
        start: where k-means starts.
        compensated: names of the weights whose elements make up for each other's errors.
        context: gives the seed, the calibration batches and the progress callback.
    """

    program: Program
    layers: Sequence[Layer]
    biases: Sequence[Candidate]
    bias_bits: int
    start: Initialisation
    compensated: frozenset[str]
    context: Context

    @property
    def names(self) -> set[str]:
        """All names of the weights and biases."""
        candidates = [*(layer.candidate for layer in self.layers), *self.biases]
        return {name for candidate in candidates for name in candidate.names}

    def cluster(self, layer: Layer, bits: int) -> Sharing:
        """One weight with so many bits."""
        return share(layer, bits, self.start, self.context.seed)

    def make(self, bits: Mapping[str, int]) -> Made:
        """Give all weights and biases the values that they will be stored with.

        Args:
            bits: of each layer, by the weight's name.
        """
        every = []
        for index, layer in enumerate(self.layers):
            self.context.progress(index, len(self.layers), f"clusters of {layer.name}")
            every.append(self.cluster(layer, bits[layer.name]))
        weights = Made.of(every)
        kept = list(weights.sharings)
        if any(one.layer.name in self.compensated for one in kept):
            kept = compensate(self.program, kept, self.compensated, self.context)
        # After the compensation, which changes biases.
        biases = self.share_biases()
        for one in (*kept, *biases.sharings):
            write(one)
        return Made((*kept, *biases.sharings), (*weights.refused, *biases.refused))

    def share_biases(self) -> Made:
        """The biases, as they are now; none is changed yet."""
        layers = [layer_of(self.program, one, {}) for one in self.biases]
        return Made.of([self.cluster(layer, self.bias_bits) for layer in layers])

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Bring weights and biases back afterwards."""
        before = snapshot(self.program)
        try:
            yield
        finally:
            restore(self.program, before)
