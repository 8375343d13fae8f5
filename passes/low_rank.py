"""Convolutions and linear maps split into factors of low rank."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch

from shohin.errors import ShohinWarning, SpecError
from shohin.ir.encodings import Encoding
from shohin.ir.program import Fact, Program, weight_names
from shohin.passes.analyses.cost import cost
from shohin.passes.analyses.shapes import shapes
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.factoring.chains import Chains, Made
from shohin.passes.factoring.energies import Energies, energies_of
from shohin.passes.factoring.factors import Ranks, Scheme
from shohin.passes.factoring.given import RANK_OPTIONS, GivenRanks
from shohin.passes.factoring.latency import LatencyTable
from shohin.passes.factoring.layers import Layer, Wanted, find_layers
from shohin.passes.factoring.planning import Budget, Planner, Unit
from shohin.passes.factoring.remarking import remark_layers
from shohin.passes.factoring.responses import FirstImages, Observed, Sampling, observe
from shohin.passes.factoring.solvers import Schedule
from shohin.passes.factoring.splitting import Solver
from shohin.passes.factoring.tuning import train_factors
from shohin.passes.pruning.candidates import (
    all_names,
    check_patterns,
    find_candidates,
)
from shohin.passes.remarks import Reason

_SPEEDUP = 2.0
_MOST_OUTPUTS = 4096
"""Of a layer whose responses are looked at: moments of all pairs of them are needed."""

_TIME_TOLERANCE = 1.1
"""Of a budget of time: layers take a little less or more beside others than alone."""


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """Split layers into factors of low rank that leave the responses after the ReLU as they are.

    A ``k x k`` convolution becomes a ``k x k`` of fewer filters and a ``1 x 1`` (Zhang et al.,
    "Accelerating Very Deep Convolutional Networks for Classification and Detection", arXiv
    1505.06798). Its responses on calibration batches lie near a subspace, and the factors are
    fitted to them, layer by layer. Linear maps are split alike. Before::

        %conv2d = aten.conv2d(%x, @conv.weight, @conv.bias, padding=[1, 1])

    After, with rank 16::

        %conv2d_default = aten.conv2d(%x, @conv.factors.0.weight, padding=[1, 1])
        %conv2d_default_1 = aten.conv2d(%conv2d_default, @conv.factors.1.weight,
                                        @conv.factors.1.bias)

    How much each layer is split follows from a budget for the whole network: the ranks are those
    that keep most of the energy of the responses, over all layers (section 2.3 of the paper). A
    layer whose factors are not measured to be faster than it was is left alone, with both times.
    Which layers these are depends on the machine; ``compare=macs`` does not measure.

    Layers that give outputs of the program, as a classifier's last one, stay as they are unless an
    option has a rank for their very name.

    Layers that only ReLUs read are fitted with the ReLU; responses that anything else reads are
    reproduced as they are. Batch normalisation has to be folded before. Where a training function
    is given the network is trained afterwards.

    Attributes:
        speedup: by which to divide the multiply-accumulates of the network; 2 where no budget and
            no ranks are given.
        latency: instead, the share of the milliseconds to keep at most, as measured on `target` at
            batch 1.
        parameters: instead, the share of the weights of convolutions and linear maps to keep.
        ranks: ranks by weight name or shell pattern; they are taken as they are, and other layers
            stay as they were unless a budget is given, too.
        spatial_ranks: filters of the ``k x 1`` by weight name or shell pattern.
        inner_ranks: filters of the first ``1 x 1`` of the scheme ``bottleneck``, likewise.
        exclude: weight names or shell patterns to leave as they are.
        scheme: ``channel`` splits as above; ``spatial`` into ``k x 1`` and ``1 x k`` (Jaderberg et
            al., arXiv 1405.3866); ``3d`` into ``k x 1``, ``1 x k`` and ``1 x 1``;
            ``bottleneck`` into ``1 x 1``, ``k x k`` and ``1 x 1`` (Kim et al., arXiv 1511.06530).
            The last two split layers without height and width as ``channel`` does.
        solver: ``linear`` keeps the principal components of the responses, ``nonlinear`` fits them
            after the ReLU, ``asymmetric`` fits those of the original network for the inputs that
            the layers before it, already split, leave. ``weights`` needs no calibration batches and
            truncates singular values of the weights.
        selection: ``energy`` as above; ``uniform`` splits all layers alike.
        multiple: of what ranks are chosen as multiples; 16 fill the vectors of the kernels.
        images: most examples of the calibration batches to read.
        positions: responses of each example that are looked at in a layer, at random positions.
        penalties: of the alternating solver, what errors of the relaxed responses count in each
            stage (lambda in the paper).
        iterations: iterations of each stage, at most.
        compare: ``time`` measures what is split on `target`; ``macs`` believes the counts.
        target: where to measure.
        tune: ``auto`` trains the network afterwards where there is a training function, ``all``
            insists on it, ``none`` never does.
        figures: draw energies, errors and ranks into the work directory; needs matplotlib.
    """

    name: ClassVar[str] = "low-rank"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.BN_FOLDED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LOW_RANK})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED, Fact.DEAD_REMOVED})

    speedup: float | None = None
    latency: float | None = None
    parameters: float | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    spatial_ranks: dict[str, int] = field(default_factory=dict)
    inner_ranks: dict[str, int] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    scheme: Scheme = "channel"
    solver: Solver = "asymmetric"
    selection: Literal["energy", "uniform"] = "energy"
    multiple: int = 16
    images: int = 3000
    positions: int = 10
    penalties: tuple[float, ...] = (0.1, 1.0)
    iterations: tuple[int, ...] = (30, 20)
    compare: Literal["time", "macs"] = "time"
    target: str = "cpu"
    tune: Literal["auto", "all", "none"] = "auto"
    figures: bool = False

    def validate(self) -> None:
        """Check the ranges of the options, and that they go together."""
        budgets = [n for n in ("speedup", "latency", "parameters") if getattr(self, n) is not None]
        if len(budgets) > 1:
            problem = f"does not go together with '{budgets[1]}'"
            raise SpecError(f"low-rank {budgets[0]}", problem, "give one of the two")
        if self.speedup is not None and not 1 <= self.speedup < float("inf"):
            raise self.invalid_option("speedup", "1 or more")
        for option in ("latency", "parameters"):
            value = getattr(self, option)
            if value is not None and not 0 < value <= 1:
                raise self.invalid_option(option, "above 0 and at most 1")
        for option in ("multiple", "images", "positions"):
            if getattr(self, option) < 1:
                raise self.invalid_option(option, "1 or more")
        for option in RANK_OPTIONS:
            for pattern, rank in getattr(self, option).items():
                if rank < 1:
                    raise SpecError(
                        f"low-rank {option} '{pattern}'", f"expected 1 or more, got {rank}"
                    )
        self._check_scheme()
        self._check_schedule()

    def _check_scheme(self) -> None:
        for option, schemes in RANK_OPTIONS.items():
            if getattr(self, option) and self.scheme not in schemes:
                problem = f"does not go together with scheme={self.scheme}"
                hint = f"choose scheme={' or scheme='.join(schemes)}"
                raise SpecError(f"low-rank {option}", problem, hint)

    def _check_schedule(self) -> None:
        if len(self.penalties) != len(self.iterations):
            problem = f"expected one for each of {len(self.penalties)} penalties"
            raise SpecError("low-rank iterations", f"{problem}, got {len(self.iterations)}")
        if any(not 0 < penalty < float("inf") for penalty in self.penalties):
            raise self.invalid_option("penalties", "numbers above 0")
        if any(count < 0 for count in self.iterations):
            raise self.invalid_option("iterations", "0 or more each")

    def check_context(self, context: Context) -> None:
        """Check that calibration, measuring and training are there where they are needed."""
        if self.solver != "weights" and next(iter(context.calibration), None) is None:
            problem = f"'{self.solver}' needs calibration batches, got none"
            hint = "give calibration=[(inputs,), ...], or --data; or choose solver=weights"
            raise SpecError("low-rank solver", problem, hint)
        if self.latency is not None and context.profile is None:
            raise SpecError("low-rank latency", "there is nothing to measure milliseconds with")
        if self.tune == "all" and context.train is None:
            hint = "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"
            raise SpecError("low-rank tune", "'all' needs a train function, got none", hint)
        if self.figures:
            from shohin.passes.factoring.figures import check_folder

            check_folder(context.workdir)

    def run(self, program: Program, context: Context) -> PassResult:
        """Split the layers that the options allow, fit their factors, and train.

        Raises:
            SpecError: when a pattern matches no weight, a rank is out of range, or the context
                lacks what an option asks for.
            PassError: when a budget cannot be met, or responses are not finite.
        """
        self.check_context(context)
        candidates = find_candidates(program)
        names = all_names(candidates)
        for option in (*RANK_OPTIONS, "exclude"):
            check_patterns(f"low-rank {option}", getattr(self, option), names)
        layouts = context.analyses.get(shapes, program)
        before = context.analyses.get(cost, program)
        most = math.inf if self.solver == "weights" else _MOST_OUTPUTS
        wanted = Wanted(
            exclude=self.exclude,
            named=[name for option in RANK_OPTIONS for name in getattr(self, option)],
            spatial_only=self.scheme == "spatial",
            most_outputs=most,
        )
        layers = find_layers(program, candidates, layouts, wanted, context)
        chosen_by_user = GivenRanks(
            self.scheme, {name: getattr(self, name) for name in RANK_OPTIONS}
        )
        given = chosen_by_user.of(layers, context)
        if self._budget_unit is None:
            chosen_by_user.remark_others(layers, context)
            layers = [layer for layer in layers if layer.name in given]
        batches = FirstImages(context.calibration, self.images, program.inputs)
        sampling = Sampling(self.images, self.positions, context.seed)
        observed = self._observe(program, layers, batches, sampling, context)
        energies = {
            layer.name: energies_of(layer, self.scheme, observed.get(layer.name))
            for layer in layers
        }
        layers = [one for one in layers if _varies(one, energies[one.name], context)]
        table = self._table(program, context)
        budget = self._budget(program, layers, table, context)
        planner = Planner(
            layers, energies, self.scheme, self.multiple, given, budget, table, context
        )
        chosen = planner.plan()
        chains = Chains(
            program,
            layers,
            chosen,
            observed,
            self.solver,
            self._schedule(),
            batches,
            sampling,
            context,
        )
        made = chains.make()
        program = replace(program, encodings=_encodings_left(program))
        if made and self.tune != "none" and context.train is not None:
            program = train_factors(program, context)
        remark_layers(layers, planner, chosen, made, before, program, context)
        self._check_time(program, budget, context)
        if self.figures and context.workdir is not None:
            self._draw(context.workdir, layers, energies, chosen, made)
        failed = frozenset() if made else self.establishes
        return PassResult(program, modified=bool(made), failed=failed)

    def _observe(
        self,
        program: Program,
        layers: Sequence[Layer],
        batches: FirstImages,
        sampling: Sampling,
        context: Context,
    ) -> dict[str, Observed]:
        if self.solver == "weights":
            return {}
        found = observe(
            program, layers, batches, sampling, context.progress,
            with_moments=self.scheme != "channel",
        )  # fmt: skip
        return {layer.name: one for layer, one in zip(layers, found, strict=True)}

    @property
    def _budget_unit(self) -> Unit | None:
        """What is budgeted; None where only the ranks of the options count."""
        if self.latency is not None:
            return "ms"
        if self.parameters is not None:
            return "parameters"
        if self.speedup is None and any(getattr(self, option) for option in RANK_OPTIONS):
            return None
        return "macs"

    def _budget(
        self,
        program: Program,
        layers: Sequence[Layer],
        table: LatencyTable | None,
        context: Context,
    ) -> Budget | None:
        unit, evenly = self._budget_unit, self.selection == "uniform"
        if unit == "ms" and table is not None:
            total = table.fit(program, layers)
            return Budget("ms", total, (self.latency or 1.0) * total, evenly)
        if unit == "parameters":
            weights = sum(one.weight.numel() for one in find_candidates(program))
            return Budget("parameters", weights, (self.parameters or 1.0) * weights, evenly)
        if unit is None:
            return None
        macs = context.analyses.get(cost, program).macs
        return Budget("macs", macs, macs / (self.speedup or _SPEEDUP), evenly)

    def _check_time(self, program: Program, budget: Budget | None, context: Context) -> None:
        """Note what a budget of time has come to."""
        if budget is None or budget.unit != "ms" or context.profile is None:
            return
        found = sum(context.profile(program, self.target).values())
        text = f"{found:.3g} ms of {budget.total:.3g}, expected at most {budget.most:.3g}"
        context.noted("latency", text, before=budget.total, after=found, most=budget.most)
        if found > _TIME_TOLERANCE * budget.most:
            hint = "choose a lower latency"
            warnings.warn(f"low-rank latency: {text}; {hint}", ShohinWarning, stacklevel=2)

    def _table(self, program: Program, context: Context) -> LatencyTable | None:
        if context.profile is None or (self.compare == "macs" and self.latency is None):
            return None
        layouts = context.analyses.get(shapes, program)
        folder, resume = context.workdir, context.resume
        return LatencyTable.of(context.profile, self.target, layouts, folder, resume)

    def _schedule(self) -> Schedule | None:
        if self.solver in ("weights", "linear"):
            return None
        return Schedule(self.penalties, self.iterations)

    def _draw(
        self,
        folder: Path,
        layers: Sequence[Layer],
        energies: Mapping[str, Energies],
        chosen: Mapping[str, Ranks],
        made: Mapping[str, Made],
    ) -> None:
        from shohin.passes.factoring.figures import draw_all

        errors = {name: one.error for name, one in made.items() if one.error is not None}
        draw_all(folder, layers, energies, chosen, errors)


def _encodings_left(program: Program) -> dict[str, Encoding]:
    """The encodings of the weights that are still there."""
    names = set(weight_names(program))
    return {name: one for name, one in program.encodings.items() if name in names}


def _varies(layer: Layer, energies: Energies, context: Context) -> bool:
    """Whether there is anything that ranks can be chosen by; a remark says so where not."""
    if bool(torch.isfinite(energies.channel).all()):
        return True
    detail = f"{layer.name} is zero, or its responses are the same on all calibration batches"
    context.skipped(layer.node, Reason.NOT_APPLICABLE, detail)
    return False
