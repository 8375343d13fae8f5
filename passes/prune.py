"""Pruning, with retraining in rounds or without."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from shohin.errors import SpecError
from shohin.ir.program import Fact, Program
from shohin.passes.analyses.cost import cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pipeline import format_pass
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    find_candidates,
    other_products,
    value_for_names,
)
from shohin.passes.pruning.checks import (
    check_apart,
    check_calibration,
    check_choice,
    check_density,
    check_positive,
    check_train,
)
from shohin.passes.pruning.pools import Pool, deviation
from shohin.passes.pruning.ranking import held_masks, ranking_of
from shohin.passes.pruning.result import encoded, remark_layers
from shohin.passes.pruning.rounds import Job, run_rounds
from shohin.passes.pruning.targets import Figure, Target, allocate
from shohin.passes.pruning.units import Units, parse_block, units_of
from shohin.passes.pruning.usable import Limits, find_usable
from shohin.passes.remarks import Reason

_DENSITY = 0.1
_BLOCK = "16x1"
_TARGETS: tuple[Figure, ...] = ("parameters", "macs", "ms")


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Keep the weights of convolutions and linear maps that matter most and drop the others.

    Weights are ranked by magnitude (Han et al., arXiv 1506.02626), or by what calibration batches
    say of them. Of `n` weights ``round(density * n)`` are kept, at least one; of equal ones the
    first are. A weight that several operators share is pruned once, and goes by any of its names;
    one that is sparse already only becomes sparser. Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] dense (2560 bytes)

    After, the weight is zero outside the mask of its encoding::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] sparse 10.0% (320 bytes)

    Where a training function is given, what is left is retrained from its values, the dropped
    weights held at zero. In several rounds the densities go down geometrically, to exactly the
    wanted ones in the last. Batch normalisation and dropout train as in the model that was
    captured, as long as they are in the graph: put drop-identity, which takes dropout out, and
    fold-bn after this pass. When the training diverges, a warning says so and the weights are those
    after the last round that went well. Rounds are resumed after an interruption, like passes.

    Attributes:
        density: share of the weights to keep, above 0 and at most 1.
        densities: density by weight name or shell pattern; the name itself or else the first
            pattern that matches wins over `first`, `last` and `density`.
        exclude: weight names or shell patterns to leave as they are.
        scope: ``layer`` keeps `density` of every weight tensor, ``global`` keeps `density` of all
            of them together, so that layers of small weights lose more, down to the largest unit
            of each, and ``sensitivity`` chooses a density for every layer from curves, measured
            by the chosen `granularity`, so that a target is met. Weights with a density of their
            own are pruned by themselves in all three.
        method: ``magnitude``; ``obd``, the rise of the loss by the diagonal of its Hessian (LeCun
            et al. 1989); or ``obs``, layer after layer with the kept weights corrected for the
            dropped ones (Frantar and Alistarh 2022), for those who cannot retrain. The last two
            need calibration batches. Weights that they cannot rank stay as they are: for ``obs``
            all but those of conv2d and linear, for ``obd`` those before an operator whose second
            derivatives it does not know.
        quality: instead of a density, keep what is at least this many standard deviations of the
            layer's weights from zero; with several rounds it rises in equal steps.
        granularity: what is kept or dropped as one: single elements, blocks, or whole output
            channels; of `n` blocks or channels ``round(density * n)`` are kept, at least one,
            those of the largest mean magnitudes. Grouped convolutions are pruned by element only.
            Channels that are outputs of the program, as a classifier's, stay, unless `densities`
            has the very name of the weight.
        block: rows by columns of a block of the matrix ``[outputs, inputs * height * width]``.
        first: density of the first convolution or linear map; none to treat it like the others.
        last: density of the last one; none to treat it like the others.
        rounds: how often to prune and retrain.
        retrain: ``auto`` retrains all layers together where there is a training function;
            ``all`` insists on it; ``fc-conv`` first trains linear maps alone and then
            convolutions, ``conv-fc`` the other way round; ``none`` never trains.
        dropout: while retraining, let dropout shrink with the layer that it feeds, by the square
            root of the share of its connections that is left. The program's own ratios stay.
            Does nothing to a program whose dropout drop-identity has taken out.
        damping: of ``obs``, how much the inputs' second moments are damped, relative to their
            mean diagonal.
        target_parameters: for the scope ``sensitivity``, the share of all convolution and linear
            weights to keep at most.
        target_macs: the same for multiply-accumulates.
        target_ms: the same for milliseconds of the compiled network at batch 1, as measured.
        target: where to measure these.
    """

    name: ClassVar[str] = "prune"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})

    density: float = _DENSITY
    densities: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    scope: Literal["layer", "global", "sensitivity"] = "layer"
    method: Literal["magnitude", "obd", "obs"] = "magnitude"
    quality: float | None = None
    granularity: Literal["element", "block", "channel"] = "element"
    block: str = _BLOCK
    first: float | None = None
    last: float | None = None
    rounds: int = 1
    retrain: Literal["auto", "none", "all", "fc-conv", "conv-fc"] = "auto"
    dropout: bool = True
    damping: float = 0.01
    target_parameters: float | None = None
    target_macs: float | None = None
    target_ms: float | None = None
    target: str = "cpu"

    def validate(self) -> None:
        """Check the ranges of the options, and that they go together."""
        check_density("density", self.density)
        for pattern, density in self.densities.items():
            check_density(f"densities '{pattern}'", density)
        for option in ("first", "last", "target_parameters", "target_macs"):
            check_density(option, getattr(self, option))
        check_positive("target_ms", self.target_ms)
        check_positive("quality", self.quality)
        check_positive("damping", self.damping)
        self._check_choices()
        if self.rounds < 1:
            raise SpecError("prune rounds", f"expected 1 or more, got {self.rounds}")
        if self.rounds > 1 and self.retrain == "none":
            check_apart("rounds", ["retrain=none"], "without retraining one round does the same")
        self._check_block()
        self._check_quality()
        self._check_targets()

    def check_context(self, context: Context) -> None:
        """Check that training, calibration and evaluation are there where they are needed."""
        check_train(self.rounds, self.retrain, context)
        check_calibration(self.method, context)
        if self.scope == "sensitivity" and context.evaluate is None:
            problem = "'sensitivity' needs an evaluate function, got none"
            hint = "give evaluate=..., or --evaluate on the command line"
            raise SpecError("prune scope", problem, hint)
        if self.target_ms is not None and context.measure is None:
            raise SpecError("prune target_ms", "there is nothing to measure milliseconds with")

    def run(self, program: Program, context: Context) -> PassResult:
        """Prune every convolution and linear weight that the options allow, and retrain.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map, or the
                context lacks what an option asks for, or an evaluation is not finite.
            PassError: when a target cannot be met.
            UnsupportedError: when the method can rank none of the weights.
        """
        self.check_context(context)
        layers = find_candidates(program)
        names = all_names(layers)
        check_patterns("prune densities", self.densities, names)
        check_patterns("prune exclude", self.exclude, names)
        context.analyses.get(cost, program)  # While its weights are still those of its encodings.
        limits = Limits(self.method, self.granularity, self.exclude, self.densities)
        usable = find_usable(program, layers, limits, context)
        for node, detail in other_products(program):
            context.skipped(node, Reason.NOT_APPLICABLE, detail)
        held = held_masks(program, layers)
        pools = self._pools(program, layers, usable, context)
        job = Job(
            program=program,
            layers=layers,
            ranking=ranking_of(self.method, pools, held, self.damping),
            rounds=self.rounds,
            retrain=self.retrain,
            adjust_dropout=self.dropout,
            options=format_pass(self),
            context=context,
        )
        done = run_rounds(job)
        after = encoded(program, usable, done.masks)
        units = job.ranking.units
        remark_layers(program, after, units, held, done.masks, done.refused, context)
        modified = bool(done.masks) or done.trained
        failed = frozenset() if done.masks else self.establishes
        return PassResult(after if modified else program, modified=modified, failed=failed)

    def _check_choices(self) -> None:
        check_choice("scope", self.scope, ("layer", "global", "sensitivity"))
        check_choice("method", self.method, ("magnitude", "obd", "obs"))
        check_choice("granularity", self.granularity, ("element", "block", "channel"))
        orders = ("auto", "none", "all", "fc-conv", "conv-fc")
        check_choice("retrain", self.retrain, orders)

    def _check_block(self) -> None:
        if parse_block(self.block) is None:
            problem = f"expected rows x columns such as '16x1', got '{self.block}'"
            raise SpecError("prune block", problem)
        if self.block != _BLOCK and self.granularity != "block":
            raise SpecError("prune block", "expected granularity=block beside it")
        if self.method == "obs" and self.granularity != "element":
            check_apart("method", [f"granularity={self.granularity}"], "obs drops single elements")

    def _check_quality(self) -> None:
        if self.quality is None:
            return
        given = {
            "density": self.density != _DENSITY,
            f"scope={self.scope}": self.scope != "layer",
            f"method={self.method}": self.method != "magnitude",
        }
        others = [option for option, chosen in given.items() if chosen]
        check_apart("quality", others, "a quality is a threshold on each layer's magnitudes")

    def _check_targets(self) -> None:
        given = [figure for figure in _TARGETS if self._most(figure) is not None]
        if self.scope == "sensitivity" and len(given) != 1:
            expected = ", ".join(f"target_{figure}" for figure in _TARGETS[:-1])
            found = " and ".join(f"target_{figure}" for figure in given) or "none"
            problem = f"'sensitivity' needs one of {expected} and target_ms, got {found}"
            raise SpecError("prune scope", problem)
        if given and self.scope != "sensitivity":
            raise SpecError(f"prune target_{given[0]}", "expected scope=sensitivity beside it")

    def _most(self, figure: Figure) -> float | None:
        targets = {
            "parameters": self.target_parameters,
            "macs": self.target_macs,
            "ms": self.target_ms,
        }
        return targets[figure]

    def _pools(
        self,
        program: Program,
        layers: list[Candidate],
        usable: list[Candidate],
        context: Context,
    ) -> list[Pool]:
        """The weights that compete with each other, with the rule for each such set."""
        own = self._own_densities(program, layers, usable)
        if self.scope == "sensitivity":
            free = [candidate for candidate in usable if candidate.name not in own]
            own |= allocate(program, layers, free, own, self._target(), context)
        together = [one for one in usable if one.name not in own and self.scope == "global"]
        pools = []
        if together:
            pools.append(Pool(tuple(self._units(one) for one in together), self.density))
        for candidate in (one for one in usable if one not in together):
            pools.append(self._pool_of(candidate, own.get(candidate.name)))
        return pools

    def _pool_of(self, candidate: Candidate, density: float | None) -> Pool:
        """The pool of a weight by itself."""
        units = (self._units(candidate),)
        if density is None and self.quality is not None:
            return Pool(units, 1.0, self.quality * deviation(candidate.weight))
        return Pool(units, self.density if density is None else density)

    def _units(self, candidate: Candidate) -> Units:
        return units_of(candidate, self.granularity, self.block)

    def _own_densities(
        self, program: Program, layers: list[Candidate], usable: list[Candidate]
    ) -> dict[str, float]:
        """Densities of the weights that have one of their own, by name."""
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        ordered = sorted(layers, key=lambda candidate: order[candidate.node])
        ends = {}
        if self.last is not None and ordered:
            ends[ordered[-1].name] = self.last
        if self.first is not None and ordered:
            ends[ordered[0].name] = self.first
        given = {one.name: value_for_names(one.spellings, self.densities) for one in usable}
        found = {name: ends.get(name) if own is None else own for name, own in given.items()}
        return {name: density for name, density in found.items() if density is not None}

    def _target(self) -> Target:
        figure = next(figure for figure in _TARGETS if self._most(figure) is not None)
        most = self._most(figure)
        if most is None:
            raise AssertionError("the figure was chosen because it is given")
        by_magnitude = self.method == "magnitude" and self.rounds == 1
        return Target(
            figure, most, self.target, self.granularity, self.block, by_magnitude=by_magnitude
        )
