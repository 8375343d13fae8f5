"""Fixed point: a network that computes with integers and shifts."""

import warnings
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from shohin.errors import DivergedError, ShohinWarning, SpecError
from shohin.ir.fixed_point import LEAST_BITS, MOST_BITS, Rounding
from shohin.ir.program import Fact, Program, encoding_of, tensor_of
from shohin.ir.serialise import content_hash
from shohin.passes.analyses.cost import cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.fixed.equalise import equalise, kept_by_encodings
from shohin.passes.fixed.graph import FixedGraph, Site
from shohin.passes.fixed.job import Fixed, Job, choose_widths_of, finished
from shohin.passes.fixed.remarking import map_names, remark
from shohin.passes.fixed.training import train_rounded
from shohin.passes.fixed.widths import Evaluations
from shohin.passes.pipeline import format_pass
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    find_candidates,
    matches,
    value_for_names,
)
from shohin.passes.training import restore, snapshot

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

    Ternary weights stay ternary: their two values, or those of each row, are rounded, and no code
    changes. By ``ternary=ratio`` the two values of a layer become integers of at most 10, times a
    whole number for each output: a ratio up to 5 changes by 7 % at most, in return for kernels that
    add products in 16 bits. Biases make up for what that changes on the mean of the calibration
    data; layers without one keep their values. The integers of such weights are up to four bits
    wider.

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
        ternary: how the two values of a ternary weight are rounded, as ``values`` of their own, or
            by their ``ratio`` where no row has values of another one.
        equalise: first make the ranges of channels alike across layers, by powers of two that
            cancel out (Nagel et al. 2019, section 4.1).
        correct_bias: let biases make up for what the results of a layer lack on the mean of the
            calibration data (section 4.2).
        error: what is least for the format of a feature map, the sum of ``absolute`` errors, as
            published, or of ``squared`` ones, which saturates fewer of the large numbers. Of
            ``static`` formats always the former.
        retrain: train the rounded network through the training function, with straight-through
            estimators and the formats fixed: ``auto`` where there is one, ``all`` insists on it.
        bits: ``auto`` gives the weights of every layer as few bits, up to those of the options
            above, as `max_drop` allows (in the manner of Ristretto, arXiv 1605.06402). Needs an
            evaluate function; evaluations are kept in the work folder, and resumed.
        max_drop: by how much the evaluation may fall with ``bits=auto``, from that of the program
            before, rounding of feature maps included.
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
    ternary: Literal["values", "ratio"] = "values"
    equalise: bool = False
    correct_bias: bool = False
    error: Literal["absolute", "squared"] = "absolute"
    retrain: Literal["none", "auto", "all"] = "none"
    bits: Literal["given", "auto"] = "given"
    max_drop: float = 0.5

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
        if self.ternary == "ratio" and self.strategy == "static":
            problem = "'ratio' does not go together with 'strategy=static'"
            raise SpecError("fixed-point ternary", problem, "leave out one of the two")
        if not 0 <= self.max_drop < float("inf"):
            raise self.invalid_option("max_drop", "0 or more")

    def check_context(self, context: Context) -> None:
        """Check that calibration batches are there, and training where it is needed."""
        if next(iter(context.calibration), None) is None:
            hint = "give calibration=[(inputs,), ...], or --data on the command line"
            problem = "ranges of feature maps are found on calibration batches, got none"
            raise SpecError("fixed-point", problem, hint)
        if self.retrain == "all" and context.train is None:
            problem = "'all' needs a train function, got none"
            hint = "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"
            raise SpecError("fixed-point retrain", problem, hint)
        if self.bits == "auto" and context.evaluate is None:
            hint = "give evaluate=..., or --evaluate on the command line"
            raise SpecError("fixed-point bits", "'auto' needs an evaluate function", hint)

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose formats, and rewrite the graph.

        Raises:
            SpecError: when a pattern matches nothing, or there are no calibration batches.
            PassError: when a feature map has numbers that are not finite, or the evaluation falls
                by more than `max_drop` with the most bits.
        """
        self.check_context(context)
        candidates = find_candidates(program)
        names = all_names(candidates)
        check_patterns("fixed-point layers", self.layers, names)
        check_patterns("fixed-point exclude", self.exclude, names)
        before = context.analyses.get(cost, program)
        for pair in equalise(program) if self.equalise else ():
            detail = f"{pair.first.node.name} and {pair.second.node.name} have ranges alike"
            context.noted("equalised", detail)
        for name in kept_by_encodings(program) if self.equalise else ():
            held = encoding_of(program, name).describe()
            context.noted("not-equalised", f"{name} is stored as {held}: its range stays")
        job = self._job(program, candidates, context)
        fixed = job.fix(self._choose_widths(job) if self.bits == "auto" else {}, context)
        if fixed is None:
            return PassResult(program, modified=False, failed=self.establishes)
        self._check_maps(fixed.graph)
        if self.retrain != "none" and context.train is not None:
            _train(fixed, program, context)
        after = finished(fixed)
        remark(fixed, before, after, context)
        return PassResult(after, modified=True)

    def _job(self, program: Program, candidates: list[Candidate], context: Context) -> Job:
        return Job(
            original=program,
            candidates=candidates,
            batches=list(context.calibration),
            exclude=self.exclude,
            weight_bits=self._weight_bits,
            map_bits=self._map_bits,
            rounding=self.rounding,
            static=self.strategy == "static",
            by_channel=self.by_channel,
            by_ratio=self.ternary == "ratio",
            correct_bias=self.correct_bias,
            squared=self.error == "squared",
            context=context,
        )

    def _choose_widths(self, job: Job) -> dict[str, int]:
        """The fewest bits that are within the budget, and a note of what they come to."""
        context = job.context
        identity = [content_hash(job.original), format_pass(self), str(context.seed)]
        evaluations = Evaluations.of(context.workdir, identity, context.resume)
        found = choose_widths_of(job, self.max_drop, evaluations)
        for name, bits in found.items():
            context.noted("width", f"{name}: {bits} bits", bits=bits)
        return found

    def _weight_bits(self, candidate: Candidate) -> int:
        found = value_for_names(candidate.spellings, self.layers)
        kind = self.fc_weights if candidate.linear else None
        return found or kind or self.weights

    def _map_bits(self, site: Site) -> int:
        return value_for_names(map_names(site), self.maps) or self.data

    def _check_maps(self, graph: FixedGraph) -> None:
        known = [name for site in graph.sites for name in map_names(site)]
        for pattern in self.maps:
            if not any(matches(name, [pattern]) for name in known):
                problem = "expected a module or node that computes a feature map, got no match"
                raise SpecError(f"fixed-point maps '{pattern}'", problem)


def _train(fixed: Fixed, original: Program, context: Context) -> None:
    """Train the rounded network; when that diverges, it is what it was before."""
    program, rounder = fixed.graph.program, fixed.rounder
    before, encodings = snapshot(program), dict(rounder.encodings)
    free = {name: tensor_of(original.module, name).detach() for name in rounder.formats}
    try:
        train_rounded(fixed.graph, rounder, {**free, **rounder.biases}, context)
    except DivergedError as error:
        restore(program, before)
        rounder.encodings.update(encodings)
        text = f"{error}; the weights are those before the training"
        context.noted("diverged", text)
        warnings.warn(f"fixed-point, {text}", ShohinWarning, stacklevel=2)
