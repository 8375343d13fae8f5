"""The layers of a network made chains, one after the other."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor, fx

from shohin.ir.program import Program
from shohin.passes.base import Batch, Context
from shohin.passes.factoring.factors import Ranks
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.regression import SAMPLES_PER_FEATURE
from shohin.passes.factoring.responses import (
    FirstImages,
    Observed,
    Sampling,
    bias_of,
    read_features,
)
from shohin.passes.factoring.rewrite import write_chain
from shohin.passes.factoring.solvers import Schedule
from shohin.passes.factoring.splitting import (
    Fitted,
    Solver,
    chain_of_weights,
    fit_chain,
    start_of,
)
from shohin.passes.patterns import argument
from shohin.passes.prefixes import Prefixes

MOST_ALTERNATING = 1024
"""Outputs up to which the ReLU is fitted: every iteration takes their third power of operations."""

_MEMORY = 1 << 30  # bytes of activations that are kept between layers


@dataclass(frozen=True, eq=False)
class Made:
    """What became of a layer.

    Attributes:
        nodes: what it is computed by now, in order.
        error: squared error of the responses over the squares of those wanted; None where no
            responses were looked at.
        rectified: whether that is after a ReLU.
    """

    nodes: tuple[fx.Node, ...]
    error: float | None
    rectified: bool


@dataclass(eq=False)
class Chains:
    """Splits layers in data-flow order.

    Attributes:
        program: changed in place.
        layers: of the program, in data-flow order.
        chosen: ranks by name.
        observed: responses of the original network by name, dropped once they are used; empty for
            the solver ``weights``.
        solver: how factors are found.
        schedule: of the alternating solver; None to reproduce responses as they are.
        batches: calibration batches.
        sampling: which responses are looked at.
        context: where notes go.
    """

    program: Program
    layers: Sequence[Layer]
    chosen: Mapping[str, Ranks]
    observed: dict[str, Observed]
    solver: Solver
    schedule: Schedule | None
    batches: FirstImages
    sampling: Sampling
    context: Context

    def make(self) -> dict[str, Made]:
        """Split every layer that is to be split."""
        inputs = None if self.solver == "weights" else self._inputs()
        split = [layer for layer in self.layers if self.chosen[layer.name].split]
        numbers = {name: number for number, name in enumerate(self.observed)}
        # Responses take much memory: what is not used is not kept.
        for name in self.observed.keys() - {layer.name for layer in split}:
            del self.observed[name]
        made = {}
        for done, layer in enumerate(split):
            self.context.progress(done, len(split), f"factors of {layer.name}")
            ranks = self.chosen[layer.name]
            if inputs is None:
                chain, error = chain_of_weights(layer, ranks), None
            else:
                fitted = self._fit(layer, ranks, inputs, numbers[layer.name])
                chain, error = fitted.chain, fitted.error
            nodes = write_chain(self.program, layer, chain, self.context.pass_name)
            made[layer.name] = Made(nodes, error, layer.rectified)
            if inputs is not None and inputs.program is self.program:
                inputs.prefixes.refresh()
        return made

    def _inputs(self) -> "_Inputs":
        """The network that layers get their inputs from: itself, as far as it is split by then."""
        network = self.program if self.solver == "asymmetric" else self.program.copy()
        return _Inputs(network, Prefixes(network.module, _MEMORY))

    def _fit(self, layer: Layer, ranks: Ranks, inputs: "_Inputs", number: int) -> Fitted:
        observed = self.observed.pop(layer.name)
        start = start_of(layer, ranks, observed)
        if start.first is None and self.solver != "asymmetric":
            features = observed.responses - bias_of(layer)
        else:
            values = inputs.reader(layer)
            features = read_features(
                layer, number, values, self.batches, self.sampling, start.features(layer)
            )
        alternates = layer.rectified and layer.shape.outputs <= MOST_ALTERNATING
        schedule = self.schedule if alternates else None
        fitted = fit_chain(layer, ranks, start, features, observed, schedule)
        if fitted.scarce:
            self._note_scarce(layer, len(features), features.shape[1])
        return fitted

    def _note_scarce(self, layer: Layer, features: int, samples: int) -> None:
        each = max(1, samples // max(1, self.batches.count()))
        needed = -(-features * SAMPLES_PER_FEATURE // each)
        self.context.noted(
            "few-samples",
            f"{layer.name}: {samples} samples for {features} features are few, so that the fit is"
            f" held to the original weights: {needed} examples would do, or more positions of each",
            samples=samples,
            features=features,
            needed=needed,
        )


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Where inputs of layers come from.

    Attributes:
        program: the network.
        prefixes: runs it.
    """

    program: Program
    prefixes: Prefixes

    def reader(self, layer: Layer) -> Callable[[int, Batch], Tensor]:
        """Gives the input of a layer for a batch, by its number."""
        for position, node in enumerate(self.program.graph.nodes):
            if node.name == layer.node.name:
                return partial(self._read, position, argument(node, "input"))
        raise AssertionError(f"{layer.node.name} is split once")

    def _read(self, position: int, data: fx.Node, index: int, batch: Batch) -> Tensor:
        found: Tensor = self.prefixes.arrive(index, batch, position).env[data]
        return found
