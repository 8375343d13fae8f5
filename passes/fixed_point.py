"""Fixed point: a network that computes with integers and shifts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import fx

from shohin.errors import SpecError
from shohin.ir.annotations import ActivationFormat, Origin, annotation
from shohin.ir.fixed_ops import fixed_quantize
from shohin.ir.fixed_point import LEAST_BITS, MOST_BITS, Rounding
from shohin.ir.program import Fact, Program, Stage, encoding_of, readers, tensor_of
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.analyses.shapes import Shapes, shapes
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.fixed.calibration import Calibration, Chosen
from shohin.passes.fixed.common import common_data_fractions, common_weight_fractions
from shohin.passes.fixed.forms import Weighted, form_of
from shohin.passes.fixed.graph import FixedGraph, Site, rewrite
from shohin.passes.fixed.rounding import Rounder, WeightFormat
from shohin.passes.fixed.stored import can_encode
from shohin.passes.fixed.sums import SUM_BITS, format_of, weighted_sums
from shohin.passes.patterns import NoMatch, Rewriter, argument, weight_name
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    count_non_finite,
    find_candidates,
    matches,
    value_for_names,
)
from shohin.passes.remarks import Reason

_BITS = 8


@dataclass(frozen=True, kw_only=True)
class ToFixedPoint(Pass):
    """Compute with integers: numbers of few bits, one radix for each layer and each feature map.

    Every convolution, linear map, sum, product, average and concatenation is computed in integers,
    and rescaled by shifts alone (Qiu et al., "Going Deeper with Embedded FPGA Platform for
    Convolutional Neural Network", FPGA 2016). Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
        %relu = aten.relu(%linear)
        weights
          @fc.weight: float32[10,64] dense (2560 bytes)

    After, numbers are rounded to integers times powers of two where they come in and after every
    layer::

        %fixed_quantize = shohin.fixed_quantize(%x, bits=8, fraction=4, rounding='nearest-even')
        %fixed_linear = shohin.fixed_linear(%fixed_quantize, @fc.weight, @fc.bias, [9], 4, bits=8,
            fraction=3, rounding='nearest-even')
        %relu = aten.relu(%fixed_linear)
        weights
          @fc.weight: float32[10,64] 8-bit fixed point /9 (640 bytes)

    The fractional length of a weight is the one of least error, ``argmin sum |W - W(bits, f)|``.
    Those of feature maps are found layer by layer in data-flow order, on calibration batches: the
    one for which the fixed-point network, all of whose earlier layers are fixed, is nearest to the
    float network, ``argmin sum |x - x(bits, f)|``. Biases have the radix of the sums that they are
    added to. Sums are exact: a layer whose sums could exceed 32 bits is computed with wider ones,
    and a note says so. Results that only float operators read, as those of a classifier, are not
    rounded to `data` bits.

    Operators without an integer form stay as they are, between conversions, and remarks say why.
    Put fold-bn before, so that no normalisation is among them. In PyTorch the program computes
    exactly what compiled integers compute.

    Attributes:
        weights: width of the integers of weights, 2 to 16.
        data: width of those of feature maps, 2 to 16.
        fc_weights: width for the weights of linear maps alone.
        layers: widths by weight name or shell pattern, which win over the two above.
        maps: widths of feature maps by name or shell pattern of the module that computes them; they
            win over `data`.
        exclude: names or shell patterns of weights whose layers stay in floating point.
        strategy: ``dynamic`` gives every layer and every feature map a radix of its own,
            ``static`` gives one to all weights and one to all feature maps of a width.
        rounding: of feature maps: ``nearest-even``, or ``truncate`` as plain shifts do.
        by_channel: give every output channel of a weight a radix of its own.
    """

    name: ClassVar[str] = "fixed-point"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FIXED_POINT})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    weights: int = _BITS
    data: int = _BITS
    fc_weights: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    maps: dict[str, int] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    strategy: Literal["dynamic", "static"] = "dynamic"
    rounding: Rounding = "nearest-even"
    by_channel: bool = False

    def validate(self) -> None:
        """Check the ranges of the options, and that they go together."""
        given = {"weights": self.weights, "data": self.data, "fc_weights": self.fc_weights}
        given |= {f"layers '{pattern}'": bits for pattern, bits in self.layers.items()}
        given |= {f"maps '{pattern}'": bits for pattern, bits in self.maps.items()}
        for option, bits in given.items():
            if bits is not None and not LEAST_BITS <= bits <= MOST_BITS:
                expected = f"expected {LEAST_BITS} to {MOST_BITS} bits, got {bits}"
                raise SpecError(f"fixed-point {option}", expected)
        if self.by_channel and self.strategy == "static":
            problem = "does not go together with 'strategy=static'"
            raise SpecError("fixed-point by_channel", problem, "leave out one of the two")

    def check_context(self, context: Context) -> None:
        """Check that calibration batches are there."""
        if next(iter(context.calibration), None) is None:
            hint = "give calibration=[(inputs,), ...], or --data on the command line"
            problem = "ranges of feature maps are found on calibration batches, got none"
            raise SpecError("fixed-point", problem, hint)

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose formats, and rewrite the graph.

        Raises:
            SpecError: when a pattern matches nothing, or there are no calibration batches.
            PassError: when a feature map has numbers that are not finite.
        """
        self.check_context(context)
        candidates = find_candidates(program)
        names = all_names(candidates)
        check_patterns("fixed-point layers", self.layers, names)
        check_patterns("fixed-point exclude", self.exclude, names)
        before = context.analyses.get(cost, program)
        original = program.copy()
        usable = _Usable(program, candidates, self.exclude, context)
        graph = rewrite(program, usable, self.rounding, context)
        if not graph.sites:
            return PassResult(program, modified=False, failed=self.establishes)
        self._check_maps(graph)
        return self._calibrate(graph, original, candidates, before, context)

    def _calibrate(
        self,
        graph: FixedGraph,
        original: Program,
        candidates: list[Candidate],
        before: Cost,
        context: Context,
    ) -> PassResult:
        by_name = {name: one for one in candidates for name in one.names}
        batches = list(context.calibration)
        static = self.strategy == "static"

        def weight_bits(name: str) -> int:
            return self._weight_bits(by_name[name])

        common = common_weight_fractions(graph, weight_bits) if static else {}
        rounder = Rounder(graph, weight_bits, self.by_channel, common, context.pass_name)
        calibration = Calibration(
            graph,
            original,
            batches,
            self.rounding,
            self._map_bits,
            rounder.prepare,
            context.progress,
        )
        if static:
            calibration.common = common_data_fractions(calibration)
        chosen = calibration.run()
        _drop_idle_rounding(graph)
        encodings = {**graph.program.encodings, **rounder.encodings}
        after = replace(graph.program, encodings=encodings, stage=Stage.ANNOTATED)
        after.module.recompile()
        _remark(graph, chosen, rounder.formats, before, after, context)
        return PassResult(after, modified=True)

    def _weight_bits(self, candidate: Candidate) -> int:
        found = value_for_names(candidate.spellings, self.layers)
        kind = self.fc_weights if candidate.linear else None
        return found or kind or self.weights

    def _map_bits(self, site: Site) -> int:
        return value_for_names(_map_names(site), self.maps) or self.data

    def _check_maps(self, graph: FixedGraph) -> None:
        known = [name for site in graph.sites for name in _map_names(site)]
        for pattern in self.maps:
            if not any(matches(name, [pattern]) for name in known):
                problem = "expected a module or node that computes a feature map, got no match"
                raise SpecError(f"fixed-point maps '{pattern}'", problem)


class _Usable:
    """Says which convolutions and linear maps can compute in integers."""

    def __init__(
        self,
        program: Program,
        candidates: list[Candidate],
        exclude: tuple[str, ...],
        context: Context,
    ) -> None:
        layouts = context.analyses.get(shapes, program)
        self._context = context
        self._problems: dict[str, NoMatch | None] = {}
        for one in candidates:
            excluded = next((name for name in one.spellings if matches(name, exclude)), None)
            if excluded is not None:
                detail = f"{excluded} matches the option 'exclude'"
                found: NoMatch | None = NoMatch(Reason.EXCLUDED_BY_OPTION, detail)
            else:
                found = _obstacle(program, one, layouts)
            self._problems |= dict.fromkeys(one.names, found)

    def __call__(self, node: fx.Node, form: Weighted) -> NoMatch | None:
        name = weight_name(form.operation.weight)
        if name is None or name not in self._problems:
            return NoMatch(Reason.NOT_CONSTANT, "its weight is computed")
        if not self._context.allows(node.name):
            return NoMatch(Reason.EXCLUDED_BY_OPTION, f"{name} may not be changed")
        return self._problems[name]


def _obstacle(program: Program, candidate: Candidate, layouts: Shapes) -> NoMatch | None:
    """Why the layers of a weight cannot compute in integers; None when they can."""
    name = candidate.name
    own = {operation.node for operation in candidate.operations}
    reading = (node for alias in candidate.names for node in readers(program, alias))
    others = [node.name for node in reading if node not in own]
    others += [node.name for node in own if not isinstance(form_of(node, layouts), Weighted)]
    if others and (len(own) > 1 or others[0] not in {node.name for node in own}):
        return NoMatch(Reason.OTHER_USERS, f"{name} is also read by {', '.join(others)}")
    stored = encoding_of(program, name)
    if not can_encode(stored):
        return NoMatch(Reason.ALREADY_ENCODED, f"{name} is stored as {stored.describe()}")
    biases = [one.bias for one in candidate.operations if one.bias is not None]
    named = {name, *(str(one.target) for one in biases if one.op == "get_attr")}
    for tensor in sorted(named):
        bad = count_non_finite(tensor_of(program.module, tensor))
        if bad:
            detail = f"{tensor} has {bad} elements that are NaN or infinite"
            return NoMatch(Reason.NOT_FINITE, detail)
    return None


def _map_names(site: Site) -> list[str]:
    """What the option `maps` may call a feature map: its module, or its node."""
    origin = annotation(site.node, Origin)
    module = [origin.module] if origin is not None and origin.module else []
    return [*module, site.source]


def _drop_idle_rounding(graph: FixedGraph) -> None:
    """Take out what rounds numbers to the format that they have already."""
    rewriter = Rewriter(graph.program, "fixed-point")
    for site in graph.sites:
        for node in site.rounding_nodes:
            data = argument(node, "input")
            if node.target is fixed_quantize and annotation(data, ActivationFormat) == format_of(
                node
            ):
                rewriter.replace_uses(node, data)
                rewriter.erase(node)


def _remark(
    graph: FixedGraph,
    chosen: Mapping[Site, Chosen],
    weights: Mapping[str, WeightFormat],
    before: Cost,
    after: Program,
    context: Context,
) -> None:
    for site, found in chosen.items():
        _remark_map(site, found, context)
        if isinstance(site.form, Weighted):
            _remark_layer(site, weights, before, after, context)


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
    weights: Mapping[str, WeightFormat],
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
    if largest >= 2 ** (SUM_BITS - 1):
        bits = int(largest).bit_length() + 1
        context.noted("wide-sums", f"{site.source}: sums need {bits} bits, so they have 64")
