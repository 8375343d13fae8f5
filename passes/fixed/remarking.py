"""What the fixed-point pass says of its decisions."""

from dataclasses import replace

from shohin.ir.annotations import Origin, annotation
from shohin.ir.program import Program, encoding_of
from shohin.passes.analyses.cost import Cost
from shohin.passes.base import Context
from shohin.passes.fixed.calibration import Chosen
from shohin.passes.fixed.forms import Average, Weighted
from shohin.passes.fixed.graph import Site
from shohin.passes.fixed.job import Fixed
from shohin.passes.fixed.stored import lost_values
from shohin.passes.fixed.sums import SUM_BITS, largest_window, weighted_sums
from shohin.passes.patterns import argument, weight_name


def map_names(site: Site) -> list[str]:
    """What the option `maps` may call a feature map: its module, or its node."""
    origin = annotation(site.node, Origin)
    module = [origin.module] if origin is not None and origin.module else []
    return [*module, site.source]


def remark(fixed: Fixed, before: Cost, after: Program, context: Context) -> None:
    """Say which format every feature map has, and what became of every layer."""
    for site, found in fixed.chosen.items():
        _remark_map(site, found, context)
        if isinstance(site.form, Weighted):
            _remark_layer(site, before, after, context)
            _remark_lost(site, fixed, context)
            _remark_ratio(site, fixed, context)
        if isinstance(site.form, Average):
            _remark_sums(site, largest_window(site), context)


def _remark_map(site: Site, found: Chosen, context: Context) -> None:
    bits, fraction = found.format.bits, found.format.fraction
    figures = {"bits": bits, "fraction": fraction, "largest": found.largest, "error": found.error}
    text = f"{site.source}: {bits} bits, fraction {fraction}, values to {found.largest:.4g}"
    if found.error:
        text += f", mean error {100 * found.error:.2f} %"
    if found.largest == 0:
        text += "; it is zero on all calibration data"
    context.noted("map", text, **figures)


def _remark_layer(
    site: Site,
    before: Cost,
    after: Program,
    context: Context,
) -> None:
    name = str(weight_name(argument(site.node, "weight")))
    fractions = argument(site.node, "weight_fractions")
    spent = before.nodes[site.source]
    held = before.weights.get(name)
    stored = encoding_of(after, name).stored_bytes()
    spared = stored - (held.stored_bytes if held is not None else stored)
    sums = weighted_sums(site.node)
    largest = float(sums.max()) if sums.numel() else 0.0
    width = (
        f"fractions {min(fractions)} to {max(fractions)}"
        if len(fractions) > 1
        else f"fraction {fractions[0]}"
    )
    context.changed(
        site.node,
        "fixed-point",
        f"{name}: {encoding_of(after, name).describe()}, {width}",
        before=spent.for_remark(),
        after=replace(spent.for_remark(), stored_bytes=spent.stored_bytes + spared),
        figures={"weight_fractions": [*fractions], "largest_sum": largest},
    )
    _remark_sums(site, largest, context)


def _remark_ratio(site: Site, fixed: Fixed, context: Context) -> None:
    """Say by which small integers the values of a ternary weight are replaced."""
    name = str(weight_name(argument(site.node, "weight")))
    ratio = fixed.rounder.ratios.get(name)
    if ratio is not None:
        pair = f"{ratio.positive} : {ratio.negative}"
        text = f"{name}: values whose ratio is {ratio.wanted:.4g} are {pair}, times factors"
        context.noted("ratio", text, positive=ratio.positive, negative=ratio.negative)


def _remark_lost(site: Site, fixed: Fixed, context: Context) -> None:
    """Say which values of a ternary weight are zero now: a coarse grid takes all of their codes."""
    name = str(weight_name(argument(site.node, "weight")))
    stored, found = encoding_of(fixed.graph.program, name), fixed.rounder.encodings[name]
    lost = lost_values(stored, found)
    if lost:
        text = f"{name}: {lost} of the values of its rows are rounded to 0"
        context.noted("rounded-to-zero", text, values=lost)


def _remark_sums(site: Site, largest: float, context: Context) -> None:
    if largest >= 2 ** (SUM_BITS - 1):
        bits = int(largest).bit_length() + 1
        context.noted("wide-sums", f"{site.source}: sums need {bits} bits, so they have 64")
