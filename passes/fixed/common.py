"""One radix for all: static fixed point."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from shohin.ir.program import tensor_of
from shohin.passes.fixed.calibration import Calibration, measure_spreads
from shohin.passes.fixed.forms import Weighted
from shohin.passes.fixed.fractions import candidates, common_weight_fraction, data_errors
from shohin.passes.fixed.graph import FixedGraph, Site
from shohin.passes.patterns import argument, weight_name


def common_weight_fractions(graph: FixedGraph, bits: Callable[[str], int]) -> dict[int, int]:
    """The fractional length of all weights of each width.

    Args:
        graph: its weights not rounded yet.
        bits: width of the integers of a weight, by its name.
    """
    names = {
        str(weight_name(argument(site.node, "weight")))
        for site in graph.sites
        if isinstance(site.form, Weighted)
    }
    by_width: dict[int, list[Tensor]] = {}
    for name in sorted(names):
        by_width.setdefault(bits(name), []).append(tensor_of(graph.program.module, name))
    return {
        width: common_weight_fraction(weights, [width] * len(weights))
        for width, weights in by_width.items()
    }


def common_data_fractions(calibration: Calibration) -> dict[int, int]:
    """The fractional length of all feature maps of each width.

    The one of the least relative error, summed over the maps of the float network.
    """
    sites = [one for one in calibration.graph.sites if calibration.graph.feeds_integers(one)]
    spreads = measure_spreads(calibration.original, sites, calibration.batches)
    found = {}
    for width in sorted({calibration.bits(site) for site in sites}):
        alike = [site for site in sites if calibration.bits(site) == width]
        tried = sorted({f for s in alike for f in candidates(spreads[s.source].largest, width)})
        recorder = _Errors(calibration, alike, width, tried)
        for batch in calibration.batches:
            with torch.inference_mode():
                recorder.run(*batch)
        sizes = {site.source: spreads[site.source].size for site in alike}
        total = sum(recorder.errors[name] / size for name, size in sizes.items() if size)
        found[width] = tried[int(torch.as_tensor(total).argmin())] if torch.is_tensor(total) else 0
    return found


class _Errors(fx.Interpreter):
    """Runs the float network and sums the errors of its maps for several fractional lengths."""

    def __init__(
        self, calibration: Calibration, sites: list[Site], bits: int, tried: list[int]
    ) -> None:
        super().__init__(calibration.original.module)
        self._rectified = {site.source: site.rectifier is not None for site in sites}
        self._rounding, self._bits, self._tried = calibration.rounding, bits, tried
        self.errors = {site.source: torch.zeros(len(tried), dtype=torch.float64) for site in sites}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.errors and isinstance(value, Tensor):
            seen = value.relu() if self._rectified[n.name] else value
            found = data_errors(seen, seen, self._bits, self._tried, self._rounding)
            self.errors[n.name] += found[0]
        return value
