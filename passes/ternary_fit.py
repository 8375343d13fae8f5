"""Ternary weights without training: fitted to what layers respond on calibration data."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.encodings import Dense
from shohin.ir.program import Fact, Program, Stage
from shohin.ir.ternary import Ternary
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pruning.candidates import (
    Candidate,
    all_names,
    check_patterns,
    find_candidates,
)
from shohin.passes.pruning.moments import Sampling
from shohin.passes.pruning.reconstruction import Layer, Surgeon, find_layers, unsupported
from shohin.passes.sharing.compensation import with_bias, without_bias
from shohin.passes.ternarising.fitting import Fit, Scales, fit_ternary
from shohin.passes.ternarising.layers import Choice, usable_layers

_DAMPING = 0.01
_POSITIONS = 1024
_COHERENCE = 4.0
_MEMORY = 1 << 30  # bytes of activations that are kept between layers


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

    Batch normalisation has to be folded before, so that biases can be corrected. Layers that read
    inputs of the program and layers that give its outputs stay in full precision.

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
        usable = [
            one
            for one in usable_layers(program, found, choice, context)
            if _can_fit(program, one, context)
        ]
        if not usable:
            return PassResult(program, modified=False, failed=self.establishes)
        before = context.analyses.get(cost, program)
        surgeon = Surgeon(
            program,
            list(context.calibration),
            _DAMPING,
            Sampling(_POSITIONS, context.seed, _COHERENCE),
            _MEMORY,
        )
        by_name = {one.name: one for one in usable}
        encodings = dict(program.encodings)
        for done, layer in enumerate(find_layers(program, list(by_name))):
            context.progress(done, len(by_name), f"responses of {layer.name}")
            candidate = by_name[layer.name]
            made, lost = self._fit(surgeon, layer)
            encodings |= dict.fromkeys(candidate.names, made)
            _remark(candidate, made, lost, before, context)
        return PassResult(
            replace(program, encodings=encodings, stage=Stage.ANNOTATED), modified=True
        )

    def _fit(self, surgeon: Surgeon, layer: Layer) -> tuple[Ternary, float]:
        """The ternary weight, which is written, and the share of the responses that is lost."""
        problem = surgeon.problem(layer)
        weights = without_bias(problem)
        fit = fit_ternary(weights, self.scales, compensate=self.compensate)
        made = _encoded(fit, layer.weight, self.scales)
        surgeon.write(layer, with_bias(problem, made.materialise().flatten(1).double()))
        reached = float((weights.target * weights.start).sum())
        return made, 1 - float(fit.gain.sum()) / reached if reached > 0 else 0.0


def _can_fit(program: Program, candidate: Candidate, context: Context) -> bool:
    found = unsupported(program, candidate)
    if found is not None:
        context.skipped(candidate.node, *found)
    return found is None


def _encoded(fit: Fit, weight: Tensor, scales: Scales) -> Ternary:
    codes, dtype = fit.codes.reshape(weight.shape), weight.dtype
    if scales == "row":
        return Ternary(codes, Dense(torch.ones(2, dtype=dtype)), fit.pairs[:, 0].to(dtype))
    return Ternary(codes, Dense(fit.pairs[0].to(dtype)))


def _remark(
    candidate: Candidate, made: Ternary, lost: float, before: Cost, context: Context
) -> None:
    spent = before.nodes[candidate.node.name]
    spared = made.stored_bytes() - before.weights[candidate.name].stored_bytes
    zeros = 1 - made.density
    context.changed(
        candidate.node,
        "ternary",
        f"{candidate.name}: {100 * zeros:.1f}% zeros, {100 * lost:.1f}% of the responses lost",
        before=spent.for_remark(),
        after=replace(spent.for_remark(), stored_bytes=spent.stored_bytes + spared),
        figures={"zeros": zeros, "lost": lost, "code_bits": made.code_bits()},
    )
