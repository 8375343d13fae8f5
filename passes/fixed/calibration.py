"""Formats of feature maps, chosen layer by layer on calibration batches (Qiu et al., section 5).

Layers are taken in data-flow order. The weights of a layer are rounded first; then the fixed-point
network, all of whose earlier layers are fixed, is compared with the float network:
``fraction = argmin sum |x - x(bits, fraction)|`` over all calibration batches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from shohin.errors import InputError, PassError
from shohin.ir.annotations import ActivationFormat, annotate
from shohin.ir.fixed_ops import unrounded
from shohin.ir.fixed_point import Rounding
from shohin.ir.program import Program
from shohin.passes.base import Batch
from shohin.passes.fixed.forms import Join, Weighted
from shohin.passes.fixed.fractions import candidates, data_errors
from shohin.passes.fixed.graph import FixedGraph, Site
from shohin.passes.fixed.sums import check_summands, natural_fraction, room
from shohin.passes.patterns import argument
from shohin.passes.prefixes import Prefixes

_MEMORY = 1 << 31
"""Bytes of feature maps that are held between layers, over all batches and both networks."""

_IMAGE_AXES = 4

WIDE = 32
"""Bits of results that only float operators read: sums are not rounded any more than need be."""


@dataclass(frozen=True)
class Spread:
    """What the float network says of a feature map.

    Attributes:
        largest: the largest absolute value; after a ReLU, where one alone reads the map.
        size: the sum of all absolute values.
    """

    largest: float
    size: float


@dataclass(frozen=True)
class Chosen:
    """The format of a feature map, and what it costs.

    Attributes:
        format: bits and fraction.
        error: mean absolute error over mean absolute value; 0 where nothing was compared.
        largest: the largest absolute value in the float network.
    """

    format: ActivationFormat
    error: float
    largest: float


def settle(graph: FixedGraph, site: Site, chosen: ActivationFormat) -> None:
    """Write the format of a site into the graph."""
    for node in site.rounding_nodes:
        node.update_kwarg("bits", chosen.bits)
        node.update_kwarg("fraction", chosen.fraction)
        annotate(node, chosen)
    for node in graph.carriers(site):
        annotate(node, chosen)


def measure_spreads(
    program: Program, sites: Sequence[Site], batches: Sequence[Batch]
) -> dict[str, Spread]:
    """What the float network computes at each site, by the name of its node.

    Raises:
        InputError: when there are no calibration batches.
        PassError: naming a feature map with numbers that are not finite.
    """
    recorder = _Recorder(
        program.module, {site.source: site.rectifier is not None for site in sites}
    )
    for batch in batches:
        with torch.inference_mode():
            recorder.run(*batch)
    missing = [site.source for site in sites if site.source not in recorder.spreads]
    if missing:
        raise InputError("calibration", "expected at least one example, got none")
    return recorder.spreads


class _Recorder(fx.Interpreter):
    """Runs a module and looks at the numbers of some nodes.

    Args:
        module: the module.
        wanted: by name of node, whether only positive numbers count.
    """

    def __init__(self, module: fx.GraphModule, wanted: Mapping[str, bool]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.spreads: dict[str, Spread] = {}
        self._wanted = wanted

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._wanted:
            self._record(n, value)
        return value

    def _record(self, node: fx.Node, value: Tensor) -> None:
        if not value.numel():
            return
        bad = int(torch.count_nonzero(~torch.isfinite(value)))
        if bad:
            problem = (
                f"{bad} of {value.numel()} numbers are NaN or infinite on the calibration data"
            )
            hint = "look at the calibration batches; or exclude the layers that give them"
            raise PassError(f"fixed-point, node '{node.name}'", problem, hint)
        counted = value.relu() if self._wanted[node.name] else value
        before = self.spreads.get(node.name, Spread(0.0, 0.0))
        largest = float(counted.abs().max())
        size = before.size + float(counted.abs().sum(dtype=torch.float64))
        self.spreads[node.name] = Spread(max(before.largest, largest), size)


@dataclass(eq=False)
class Calibration:
    """Chooses formats one site after the other.

    Attributes:
        graph: the fixed-point network, its formats undecided.
        original: the float network.
        batches: calibration batches, in memory or readable any number of times.
        rounding: of data.
        bits: the width of a site's integers.
        prepare: rounds the weights of a site's layer; called before its results are looked at.
        correct: is told what the results of a site's layer lack on the mean, `[outputs]`, before
            their format is chosen.
        corrects: whether it wants to know that of a site.
        squared: whether formats are those of the least squared errors, not of absolute ones.
        common: one fractional length for all maps of so many bits, by width; empty for one each.
    """

    graph: FixedGraph
    original: Program
    batches: Sequence[Batch]
    rounding: Rounding
    bits: Callable[[Site], int]
    prepare: Callable[[Site], None]
    progress: Callable[[int, int, str], None]
    correct: Callable[[Site, Tensor], None]
    corrects: Callable[[Site], bool]
    squared: bool = False
    common: Mapping[int, int] = field(default_factory=dict)
    spreads: Mapping[str, Spread] = field(default_factory=dict)

    def run(self) -> dict[Site, Chosen]:
        """Choose the format of every site, and write it into the graph.

        Raises:
            InputError: when there are no calibration batches.
            PassError: naming a feature map that is not finite, or a sum that would not be exact.
        """
        self.spreads = measure_spreads(self.original, self.graph.sites, self.batches)
        fixed = Prefixes(self.graph.program.module, _MEMORY // 2)
        original = Prefixes(self.original.module, _MEMORY // 2)
        found = {}
        for done, site in enumerate(self.graph.sites):
            self.progress(done, len(self.graph.sites), f"format of {site.source}")
            check_summands(site)
            self.prepare(site)
            if isinstance(site.form, Weighted) and self.corrects(site):
                self.correct(site, self._mean_lack(site, fixed, original))
            found[site] = self._choose(site, fixed, original)
            settle(self.graph, site, found[site].format)
        self.graph.program.module.recompile()
        return found

    def _choose(self, site: Site, fixed: Prefixes, original: Prefixes) -> Chosen:
        largest, bits = self.spreads[site.source].largest, self.bits(site)
        natural = natural_fraction(site)
        if not self.graph.feeds_integers(site):
            wide = ActivationFormat(WIDE, min(natural, room(site, WIDE)))
            return Chosen(wide, 0.0, largest)
        tried = [self.common[bits]] if self.common else candidates(largest, bits, natural)
        errors = torch.zeros(2, len(tried), dtype=torch.float64)
        for index, batch in enumerate(self.batches):
            wanted, raw = self._compare(site, index, batch, fixed, original)
            errors += data_errors(wanted, raw, bits, tried, self.rounding)
        best = int(errors[int(self.squared)].argmin())
        size = self.spreads[site.source].size
        share = float(errors[0, best]) / size if size else 0.0
        return Chosen(ActivationFormat(bits, tried[best]), share, largest)

    def _compare(
        self, site: Site, index: int, batch: Batch, fixed: Prefixes, original: Prefixes
    ) -> tuple[Tensor, Tensor]:
        """A feature map of the float network, and the same before it is rounded."""
        wanted, raw = self._results(site, index, batch, fixed, original)
        if site.rectifier is not None:
            wanted, raw = wanted.relu(), raw.relu()
        return wanted.reshape(-1), raw.reshape(-1)

    def _results(
        self, site: Site, index: int, batch: Batch, fixed: Prefixes, original: Prefixes
    ) -> tuple[Tensor, Tensor]:
        """What both networks compute at a site, as it comes out of the operator."""
        with torch.inference_mode():
            source = self._node(self.original, site.source)
            run = original.arrive(index, batch, self._position(self.original, source))
            wanted = run.env[source] if source.op == "placeholder" else run.run_node(source)
            return wanted, self._raw(site, index, batch, fixed)

    def _mean_lack(self, site: Site, fixed: Prefixes, original: Prefixes) -> Tensor:
        """What each output of a layer lacks on the mean of all examples and positions.

        Where a ReLU alone reads the results, those that are negative in both networks do not count:
        making up for what nobody sees would spoil what remains.
        """
        total = count = torch.zeros(1, dtype=torch.float64)
        for index, batch in enumerate(self.batches):
            wanted, raw = map(_rows, self._results(site, index, batch, fixed, original))
            seen = torch.ones_like(wanted, dtype=torch.bool)
            if site.rectifier is not None:
                seen = (wanted > 0) | (raw > 0)
            total = total + ((wanted - raw) * seen).sum(0)
            count = count + seen.sum(0)
        return total / count.clamp(min=1)

    def _raw(self, site: Site, index: int, batch: Batch, fixed: Prefixes) -> Tensor:
        program = self.graph.program
        first = site.rounding_nodes[0]
        run = fixed.arrive(index, batch, self._position(program, first))
        if isinstance(site.form, Join):
            parts = [run.env[argument(one, "input")] for one in site.rounding_nodes]
            return torch.cat(parts, argument(site.node, "dim"))
        operands, _ = run.fetch_args_kwargs_from_env(first)
        return unrounded(first.target, operands)

    @staticmethod
    def _position(program: Program, node: fx.Node) -> int:
        return next(index for index, one in enumerate(program.graph.nodes) if one is node)

    @staticmethod
    def _node(program: Program, name: str) -> fx.Node:
        found: fx.Node = next(node for node in program.graph.nodes if node.name == name)
        return found


def _rows(results: Tensor) -> Tensor:
    """Results with a row for each example and position, and a column for each output, float64."""
    moved = results.flatten(2).transpose(1, 2) if results.dim() == _IMAGE_AXES else results
    return moved.reshape(-1, moved.shape[-1]).double()
