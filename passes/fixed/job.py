"""A fixed-point network made of a float network, with one choice of widths or another."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.fixed_ops import fixed_quantize
from shohin.ir.fixed_point import Rounding
from shohin.ir.program import Program, Stage, tensor_of
from shohin.passes.analysis import AnalysisCache
from shohin.passes.base import Batch, Context
from shohin.passes.fixed.calibration import Calibration, Chosen
from shohin.passes.fixed.common import common_data_fractions, common_weight_fractions
from shohin.passes.fixed.graph import FixedGraph, Site, rewrite
from shohin.passes.fixed.rounding import Rounder
from shohin.passes.fixed.sums import format_of
from shohin.passes.fixed.usable import Usable
from shohin.passes.fixed.widths import Candidate as Width
from shohin.passes.fixed.widths import Evaluations, Search
from shohin.passes.patterns import Rewriter, argument
from shohin.passes.pruning.candidates import Candidate, find_candidates


@dataclass(frozen=True, eq=False)
class Fixed:
    """A fixed-point network.

    Attributes:
        graph: its graph and sites.
        rounder: how its weights were rounded.
        chosen: the format of every feature map.
    """

    graph: FixedGraph
    rounder: Rounder
    chosen: Mapping[Site, Chosen]


@dataclass(frozen=True, eq=False)
class Job:
    """What a fixed-point network is made of, and how.

    Attributes:
        original: the float network; it stays as it is.
        candidates: its weights.
        batches: calibration batches.
        exclude: names or patterns of weights whose layers stay in floating point.
        weight_bits: width of the integers of a weight.
        map_bits: width of the integers of a feature map.
        rounding: of feature maps.
        static: whether one radix serves all weights, and one all feature maps.
        by_channel: whether each output of a weight has a radix of its own.
        by_ratio: whether the values of ternary weights become small integers times factors.
        correct_bias: whether biases make up for mean errors.
        squared: whether formats of feature maps are those of the least squared errors.
        context: of the pass.
    """

    original: Program
    candidates: Sequence[Candidate]
    batches: Sequence[Batch]
    exclude: tuple[str, ...]
    weight_bits: Callable[[Candidate], int]
    map_bits: Callable[[Site], int]
    rounding: Rounding
    static: bool
    by_channel: bool
    by_ratio: bool
    correct_bias: bool
    squared: bool
    context: Context

    def fix(self, widths: Mapping[str, int], context: Context) -> Fixed | None:
        """Make the fixed-point network.

        Args:
            widths: of weights by name, instead of `weight_bits`.
            context: where remarks go.

        Returns:
            None where nothing has an integer form.
        """
        program = self.original.copy()
        usable = Usable(program, find_candidates(program), self.exclude, context)
        graph = rewrite(program, usable, self.rounding, context)
        if not graph.sites:
            return None
        by_name = {name: one for one in self.candidates for name in one.names}

        def bits(name: str) -> int:
            found = by_name[name]
            return widths.get(found.name, self.weight_bits(found))

        common = common_weight_fractions(graph, bits) if self.static else {}
        rounder = Rounder(graph, bits, self.by_channel, common, self.by_ratio)
        calibration = Calibration(
            graph=graph,
            original=self.original,
            batches=self.batches,
            rounding=self.rounding,
            bits=self.map_bits,
            prepare=rounder.prepare,
            progress=context.progress,
            correct=rounder.correct,
            corrects=lambda site: self.correct_bias or rounder.has_ratio(site),
            squared=self.squared,
        )
        if self.static:
            calibration.common = common_data_fractions(calibration)
        return Fixed(graph, rounder, calibration.run())


def finished(fixed: Fixed) -> Program:
    """The program of a fixed-point network, without what rounds numbers a second time."""
    program = fixed.graph.program
    rewriter = Rewriter(program, "fixed-point")
    for node in [node for site in fixed.graph.sites for node in site.rounding_nodes]:
        data = argument(node, "input")
        if node.target is fixed_quantize and annotation(data, ActivationFormat) == format_of(node):
            rewriter.replace_uses(node, data)
            rewriter.erase(node)
    program.module.recompile()
    encodings = {**program.encodings, **fixed.rounder.encodings}
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def choose_widths_of(job: Job, most_drop: float, evaluations: Evaluations) -> dict[str, int]:
    """The fewest bits of every weight for which an evaluation falls by little enough.

    Raises:
        PassError: when it falls by more with the most bits.
    """
    evaluate = job.context.evaluate
    if evaluate is None:
        raise AssertionError("checked before the passes ran")
    quiet = replace(job.context, remarks=[], analyses=AnalysisCache())
    start = job.fix({}, quiet)
    if start is None:
        return {}

    def alone(name: str, bits: int) -> float:
        free, rounder = tensor_of(job.original.module, name).detach(), start.rounder
        held = rounder.formats[name].wanted
        rounder.round_again(name, bits, free)
        found = float(evaluate(start.graph.program.module))
        rounder.round_again(name, held, free)
        return found

    def together(widths: Mapping[str, int]) -> float:
        made = job.fix(widths, replace(quiet, remarks=[], analyses=AnalysisCache()))
        if made is None:
            raise AssertionError("there is something to fix")
        return float(evaluate(made.graph.program.module))

    layers = [
        Width(name, tensor_of(job.original.module, name).numel(), made.wanted)
        for name, made in start.rounder.formats.items()
    ]
    reference = float(evaluate(job.original.module))
    progress = job.context.progress
    search = Search(layers, reference, most_drop, alone, together, evaluations, progress)
    return search.run()
