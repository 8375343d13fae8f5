"""Trained ternary weights: every weight a learned positive value, zero, or a learned negative."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.encodings import Json
from shohin.ir.program import Fact, Program, Stage
from shohin.ir.ternarising import Sparsity, Start, Threshold, Zeros
from shohin.ir.ternary import Ternary
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    find_candidates,
    value_for_names,
)
from shohin.passes.ternarising.figures import CURVES, check_folder, draw_curves
from shohin.passes.ternarising.history import History
from shohin.passes.ternarising.layers import (
    Choice,
    StartScales,
    start_of,
    usable_layers,
    without_survivors,
)
from shohin.passes.ternarising.remarking import remark_ternary
from shohin.passes.ternarising.starting import fitted_starts
from shohin.passes.ternarising.training import train_ternary

_THRESHOLD = 0.05
_ZEROS = ("threshold", "thresholds", "sparsity")
"""Options that say which elements are zero."""


@dataclass(frozen=True, kw_only=True)
class TrainTernary(Pass):
    """Train the weights of each layer to be one of three values: ``Wp``, 0 and ``-Wn``.

    Trained ternary quantization (Zhu et al., arXiv 1612.01064). While the network trains, every
    weight has a latent form in full precision. Where that is above a threshold, a share of the
    layer's largest, the weight is ``Wp``; below the negative threshold it is ``-Wn``; else it is 0.
    Both scales of a layer are learned by gradient descent, and so are the latent weights, through
    the ternary ones. Starts from a trained network as well as from a random one. Before::

        %conv2d = aten.conv2d(%x, @conv.weight, padding=[1, 1])
      weights
        @conv.weight: float32[16,16,3,3]

    After, two bits say which of the values a weight is::

        %conv2d = aten.conv2d(%x, @conv.weight, padding=[1, 1])
      weights
        @conv.weight: float32[16,16,3,3] ternary 61.2% (584 bytes)

    Layers that read inputs of the program and layers that give its outputs stay in full precision,
    as the article has it. Batch normalisations train as such, so fold them afterwards; the folded
    scales are stored by row then. A `Trainer` penalises latent weights and scales alike by its
    weight decay, and biases and normalisations not at all, as the authors' script does. When it
    diverges, training stops, with a warning, and the state after the last good epoch is kept.

    ``ternary-fit`` makes weights ternary without training.

    Attributes:
        threshold: share of the largest absolute latent weight of a layer up to which elements are
            zero, from 0 to below 1; none for 0.05, as in the article, or for what is fitted.
        thresholds: the same by weight name or shell pattern.
        sparsity: share of the elements of each layer that are zero in every step, from 0 to below
            1, the article's other way; in place of the threshold.
        start: ``means`` lets both scales start at the mean absolute weight among those that are
            not zero, and measures them in it; ``ones`` lets them start at 1, as the authors' script
            does, which suits networks whose layers are normalised afterwards; ``fitted`` begins
            with what ``ternary-fit`` finds for whole layers, thresholds included, which needs
            calibration batches and a trained network, and takes the fewest epochs.
        keep_first: leave layers that read inputs of the program as they are.
        keep_last: leave layers that give outputs of the program as they are.
        exclude: weight names or shell patterns to leave as they are.
        figures: draw loss, scales and zeros over the epochs into the work directory.
    """

    name: ClassVar[str] = "ternary"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.TERNARY})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})

    threshold: float | None = None
    thresholds: dict[str, float] = field(default_factory=dict)
    sparsity: float | None = None
    start: StartScales = "means"
    keep_first: bool = True
    keep_last: bool = True
    exclude: tuple[str, ...] = ()
    figures: bool = False

    def validate(self) -> None:
        """Check thresholds and sparsity."""
        for option in ("threshold", "sparsity"):
            share = getattr(self, option)
            if share is not None and not 0 <= share < 1:
                raise self.invalid_option(option, "from 0 to below 1")
        for pattern, threshold in self.thresholds.items():
            if not 0 <= threshold < 1:
                where = f"ternary thresholds '{pattern}'"
                raise SpecError(where, f"expected from 0 to below 1, got {threshold}")
        given = [name for name in _ZEROS if getattr(self, name) not in (None, {})]
        other = "start=fitted" if self.start == "fitted" else "sparsity"
        clash = [name for name in given if name != other]
        if clash and (self.start == "fitted" or self.sparsity is not None):
            problem = f"does not go together with '{other}'"
            raise SpecError(f"ternary {clash[0]}", problem, "give one of the two")

    def check_context(self, context: Context) -> None:
        """Refuse to run without a training function, or to draw where that cannot be.

        Raises:
            SpecError: naming what is missing.
        """
        if context.train is None:
            hint = (
                "give train=shohin.Trainer(loader, epochs=...), or --train on the command line; "
                "ternary-fit needs calibration batches only"
            )
            raise SpecError("ternary", "needs a train function, got none", hint)
        if self.start == "fitted" and next(iter(context.calibration), None) is None:
            hint = "give calibration=[(inputs,), ...], or --data on the command line"
            problem = "'fitted' needs calibration batches, got none"
            raise SpecError("ternary start", problem, hint)
        if self.figures:
            check_folder(context.workdir)

    def run(self, program: Program, context: Context) -> PassResult:
        """Train every convolution and linear weight that the options allow.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map, or there is
                no training function.
            DivergedError: when the training diverges before its first epoch is over.
        """
        self.check_context(context)
        found = find_candidates(program)
        check_patterns("ternary thresholds", self.thresholds, all_names(found))
        check_patterns("ternary exclude", self.exclude, all_names(found))
        choice = Choice(self.exclude, self.keep_first, self.keep_last)
        layers = self._layers(program, found, choice, context)
        if not layers:
            return PassResult(program, modified=False, failed=self.establishes)
        before = context.analyses.get(cost, program)
        starts, latent = self._starts(program, layers, context)
        history = History(context.workdir if context.site_filter is None else None)
        trained = train_ternary(program, starts, latent, history, context)
        trained = replace(trained, stage=Stage.ANNOTATED)
        for candidate in layers:
            _remark(candidate, before, trained, context)
        if self.figures and context.workdir is not None:
            draw_curves(context.workdir / CURVES, history.points)
        return PassResult(trained, modified=True)

    def _layers(
        self, program: Program, found: Sequence[Candidate], choice: Choice, context: Context
    ) -> list[Candidate]:
        usable = usable_layers(program, found, choice, context)
        zeros = [self._zeros(one) for one in usable]
        killed = without_survivors(usable, zeros, context)
        return [one for one, none_left in zip(usable, killed, strict=True) if not none_left]

    def _starts(
        self, program: Program, layers: Sequence[Candidate], context: Context
    ) -> tuple[dict[str, Start], dict[str, Tensor]]:
        """Where weights start, under all their names; and latent weights other than theirs."""
        starts = {one: start_of(one, self._zeros(one), self.start) for one in layers}
        latent = {}
        if self.start == "fitted":
            for candidate, fitted in fitted_starts(program, layers, context):
                starts[candidate] = fitted.start
                latent[candidate.name] = fitted.latent
        return {name: start for one, start in starts.items() for name in one.names}, latent

    def _zeros(self, candidate: Candidate) -> Zeros:
        if self.sparsity is not None:
            return Sparsity(self.sparsity)
        given = value_for_names(candidate.spellings, self.thresholds)
        plain = _THRESHOLD if self.threshold is None else self.threshold
        return Threshold(plain if given is None else given)


def _remark(candidate: Candidate, before: Cost, trained: Program, context: Context) -> None:
    stored = trained.encodings[candidate.name]
    if not isinstance(stored, Ternary):
        raise AssertionError("every layer that was trained is ternary")
    if not stored.nonzeros():
        context.noted("all-zeros", f"{candidate.name} has become all zeros while it trained")
    positive, negative = stored.pairs()[0].tolist()
    detail = f"the others {positive:.4g} and {-negative:.4g}"
    figures: dict[str, Json] = {"positive": positive, "negative": negative}
    remark_ternary(candidate, stored, detail, figures, before, context)
