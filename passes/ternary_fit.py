"""Ternary weights without training: fitted to what layers respond on calibration data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.encodings import Dense
from shohin.ir.program import Fact, Program, Stage
from shohin.ir.ternary import Ternary
from shohin.passes.analyses.cost import cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    find_candidates,
)
from shohin.passes.pruning.reconstruction import Layer, Surgeon, find_layers, unsupported
from shohin.passes.sharing.compensation import with_bias, without_bias
from shohin.passes.ternarising.fitting import Fit, Plain, Scales, best_threshold, fit_ternary
from shohin.passes.ternarising.layers import Choice, usable_layers
from shohin.passes.ternarising.remarking import remark_ternary
from shohin.passes.ternarising.surgery import surgeon_of


@dataclass(frozen=True, kw_only=True)
class FitTernary(Pass):
    """Make weights ternary without training, for users who cannot train.

    Layers are taken in data-flow order. For each, codes and scales are those of the least squared
    error of its responses on the calibration batches: against what the original network responds,
    for the inputs that the layers before it leave, ternary as they are by then. Accuracy falls by
    far more than with ``ternary``, which trains. Before::

        %conv2d = aten.conv2d(%x, @conv.weight, @conv.bias, padding=[1, 1])
      weights
        @conv.weight: float32[16,16,3,3]

    After, two bits say which of the values a weight is::

        %conv2d = aten.conv2d(%x, @conv.weight, @conv.bias, padding=[1, 1])
      weights
        @conv.weight: float32[16,16,3,3] ternary 61.2% by row (648 bytes)

    Layers that are neither conv2d nor linear, or very wide, are fitted to their weights alone, with
    a note. Batch normalisation has to be folded before, so that biases can be corrected. Layers
    that read inputs of the program and layers that give its outputs stay in full precision.

    Attributes:
        scales: ``row`` for one absolute value for each output channel, ``layer`` for a positive and
            a negative value of the layer, as ``ternary`` has them.
        compensate: let elements make up for the rounding of those before them, one column after the
            other (GPTQ, arXiv 2210.17323).
        keep_first: leave layers that read inputs of the program as they are.
        keep_last: leave layers that give outputs of the program as they are.
        exclude: weight names or shell patterns to leave as they are.
    """

    name: ClassVar[str] = "ternary-fit"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.BN_FOLDED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.TERNARY})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})

    scales: Scales = "row"
    compensate: bool = True
    keep_first: bool = True
    keep_last: bool = True
    exclude: tuple[str, ...] = ()

    def check_context(self, context: Context) -> None:
        """Refuse to run without calibration batches.

        Raises:
            SpecError: saying how to give them.
        """
        if next(iter(context.calibration), None) is None:
            hint = "give calibration=[(inputs,), ...], or --data on the command line"
            raise SpecError("ternary-fit", "needs calibration batches, got none", hint)

    def run(self, program: Program, context: Context) -> PassResult:
        """Fit every convolution and linear weight that the options allow.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map, or there are
                no calibration batches.
            PassError: naming a layer whose inputs are not finite.
        """
        self.check_context(context)
        found = find_candidates(program)
        check_patterns("ternary-fit exclude", self.exclude, all_names(found))
        choice = Choice(self.exclude, self.keep_first, self.keep_last)
        usable = usable_layers(program, found, choice, context)
        if not usable:
            return PassResult(program, modified=False, failed=self.establishes)
        before = context.analyses.get(cost, program)
        made = dict(self._make(program, usable, context))
        encodings = dict(program.encodings)
        for candidate in usable:
            encoding, lost = made[candidate.name]
            encodings |= dict.fromkeys(candidate.names, encoding)
            detail = (
                "fitted to the weights"
                if lost is None
                else f"{100 * lost:.1f}% of the responses lost"
            )
            remark_ternary(candidate, encoding, detail, {"lost": lost}, before, context)
        return PassResult(
            replace(program, encodings=encodings, stage=Stage.ANNOTATED), modified=True
        )

    def _make(
        self, program: Program, usable: Sequence[Candidate], context: Context
    ) -> Iterator[tuple[str, tuple[Ternary, float | None]]]:
        """Write the ternary weights; by name, with the share of the responses that is lost."""
        obstacles = {one.name: unsupported(program, one) for one in usable}
        # Before anything is written, since what it holds against is the program as it is now.
        surgeon = surgeon_of(program, context)
        # Layers after them make up for the errors of those that are not looked at, too.
        for candidate in usable:
            obstacle = obstacles[candidate.name]
            if obstacle is not None:
                context.noted("weights", f"{obstacle[1]}; it is fitted to its weights alone")
                yield candidate.name, (self._fit_weights(candidate), None)
        looked_at = [name for name, obstacle in obstacles.items() if obstacle is None]
        for done, layer in enumerate(find_layers(program, looked_at)):
            context.progress(done, len(looked_at), f"responses of {layer.name}")
            yield layer.name, self._fit(surgeon, layer)

    def _fit_weights(self, candidate: Candidate) -> Ternary:
        """The ternary weight of least squared error of the weights, which is written."""
        weight = candidate.weight.detach()
        # Rows of a transposed convolution's weight are no output channels.
        scales: Scales = "layer" if candidate.transposed else self.scales
        rows = weight.flatten(1)
        wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        made = _encoded(best_threshold(Plain(wide), scales), weight, scales)
        with torch.no_grad():
            candidate.weight.copy_(made.materialise())
        return made

    def _fit(self, surgeon: Surgeon, layer: Layer) -> tuple[Ternary, float]:
        """The ternary weight, which is written, and the share of the responses that is lost."""
        problem = surgeon.problem(layer)
        weights = without_bias(problem)
        fit = fit_ternary(weights, self.scales, compensate=self.compensate)
        made = _encoded(fit, layer.weight, self.scales)
        surgeon.write(layer, with_bias(problem, made.materialise().flatten(1).double()))
        reached = float((weights.target * weights.start).sum())
        return made, 1 - float(fit.gain.sum()) / reached if reached > 0 else 0.0


def _encoded(fit: Fit, weight: Tensor, scales: Scales) -> Ternary:
    codes, dtype = fit.codes.reshape(weight.shape), weight.dtype
    if scales == "row":
        return Ternary(codes, Dense(torch.ones(2, dtype=dtype)), fit.pairs[:, 0].to(dtype))
    return Ternary(codes, Dense(fit.pairs[0].to(dtype)))
