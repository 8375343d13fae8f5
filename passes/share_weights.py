"""Weight sharing: every weight one of a few values."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from shohin.errors import DivergedError, ShohinWarning, SpecError
from shohin.ir.encodings import Sparse
from shohin.ir.program import Fact, Program, Stage, encoding_of
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.pruning.candidates import (
    Candidate,
    check_patterns,
    find_candidates,
    is_excluded,
    obstacle,
    value_for,
)
from shohin.passes.remarks import Reason
from shohin.passes.sharing.allocation import bits_for_bytes, bits_for_drop, options_of
from shohin.passes.sharing.clusters import Initialisation
from shohin.passes.sharing.compensation import compensate
from shohin.passes.sharing.importance import Importance, importance_of
from shohin.passes.sharing.layers import Layer, Sharing, find_biases, layer_of, share
from shohin.passes.sharing.tuning import replaced, tune_centroids

_BITS = 5
_MOST_BITS = 8


@dataclass(frozen=True, kw_only=True)
class ShareWeights(Pass):
    """Let the weights of a layer share a few values, whose indices are stored.

    The kept weights of every convolution and linear map are clustered by k-means (Deep Compression,
    arXiv 1510.00149, section 3); zeros of a sparse weight stay zeros. Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] sparse 10.0% (320 bytes)

    After, every kept weight is one of 2^bits centroids::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] sparse 10.0% of codebook of 32 (232 bytes)

    Where a training function is given, the centroids are trained with the assignments fixed, the
    gradient of a centroid being the sum of those of its weights. When the training diverges, a
    warning says so and the centroids are those before it.

    Attributes:
        bits: width of an index, 1 to 8.
        conv: the same for convolutions alone.
        linear: the same for linear maps alone.
        layers: bits by weight name or shell pattern, which win over the three above.
        biases: width of the indices of biases, which are shared as well where it is given.
        exclude: weight names or shell patterns to leave as they are.
        start: where k-means starts: ``linear`` spreads centroids evenly from the least to the
            largest weight, ``density`` evenly over their ranks, ``random`` takes some weights.
        importance: what an error of a weight counts: ``none`` all alike, ``hessian`` the second
            derivative of the loss, ``activations`` the mean square of the input it multiplies.
            The last two need calibration batches.
        compensate: let the elements of each layer, and its bias, make up for each other's errors:
            for users who cannot train (GPTQ, arXiv 2210.17323). Needs calibration batches.
        tune: ``auto`` trains the centroids where there is a training function, ``all`` insists on
            it, ``none`` never does.
        target_bytes: instead of `bits`, the least error whose entropy-coded weights take at most so
            many bytes.
        target_drop: instead of `bits`, the fewest for which the evaluation falls by at most this,
            before the centroids are trained.
    """

    name: ClassVar[str] = "share-weights"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.SHARED})
    invalidates: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})

    bits: int = _BITS
    conv: int | None = None
    linear: int | None = None
    layers: dict[str, int] = field(default_factory=dict)
    biases: int | None = None
    exclude: tuple[str, ...] = ()
    start: Initialisation = "linear"
    importance: Importance = "none"
    compensate: bool = False
    tune: Literal["auto", "all", "none"] = "auto"
    target_bytes: int | None = None
    target_drop: float | None = None

    def validate(self) -> None:
        """Check the ranges of the options, and that they go together."""
        given = {"bits": self.bits, "conv": self.conv, "linear": self.linear}
        given["biases"] = self.biases
        given |= {f"layers '{pattern}'": bits for pattern, bits in self.layers.items()}
        for option, bits in given.items():
            if bits is not None and not 1 <= bits <= _MOST_BITS:
                raise SpecError(f"share-weights {option}", f"expected 1 to 8 bits, got {bits}")
        if self.target_bytes is not None and self.target_bytes < 1:
            raise self.invalid_option("target_bytes", "1 or more")
        if self.target_drop is not None and not 0 <= self.target_drop < float("inf"):
            raise self.invalid_option("target_drop", "0 or more")
        if self.target_bytes is not None and self.target_drop is not None:
            problem = "does not go together with 'target_drop'"
            raise SpecError("share-weights target_bytes", problem, "give one of the two")

    def check_context(self, context: Context) -> None:
        """Check that calibration, evaluation and training are there where they are needed."""
        if (self.importance != "none" or self.compensate) and not _has_batches(context):
            option = "compensate" if self.compensate else "importance"
            value = "true" if self.compensate else self.importance
            problem = f"'{value}' needs calibration batches, got none"
            hint = "give calibration=[(inputs,), ...], or --data on the command line"
            raise SpecError(f"share-weights {option}", problem, hint)
        if self.target_drop is not None and context.evaluate is None:
            hint = "give evaluate=..., or --evaluate on the command line"
            raise SpecError("share-weights target_drop", "needs an evaluate function", hint)
        if self.tune == "all" and context.train is None:
            hint = "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"
            raise SpecError("share-weights tune", "'all' needs a train function, got none", hint)

    def run(self, program: Program, context: Context) -> PassResult:
        """Share the values of every convolution and linear weight that the options allow.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map, or the
                context lacks what an option asks for.
            PassError: when a target cannot be met.
        """
        self.check_context(context)
        found = find_candidates(program)
        names = [candidate.name for candidate in found]
        check_patterns("share-weights layers", self.layers, names)
        check_patterns("share-weights exclude", self.exclude, names)
        usable = [one for one in found if self._is_usable(program, one, context)]
        importance = importance_of(program, usable, self.importance, context)
        layers = [layer_of(program, one, importance) for one in usable]
        every = self._share(program, layers, context)
        sharings = [one for one in every if _is_smaller(program, one, context)]
        before = context.analyses.get(cost, program)
        if self.compensate and sharings:
            sharings = compensate(program, sharings, context)
        biases = self._share_biases(program, context)
        sharings += [one for one in biases if _is_smaller(program, one, context)]
        if not sharings:
            return PassResult(program, modified=False)
        shared = self._tune(_encoded(program, sharings), context)
        for sharing in sharings:
            _remark(before, shared, sharing, context)
        return PassResult(shared, modified=True)

    def _is_usable(self, program: Program, candidate: Candidate, context: Context) -> bool:
        if is_excluded(candidate, self.exclude, context):
            return False
        if not context.allows(candidate.node.name):
            detail = f"{candidate.name} may not be changed"
            context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
            return False
        found = obstacle(program, candidate)
        if found is None and not _count(program, candidate):
            found = Reason.TOO_SMALL, f"{candidate.name} has no elements left"
        if found is None and candidate.weight.dtype != torch.float32:
            dtype = candidate.weight.dtype
            found = Reason.NOT_APPLICABLE, f"{candidate.name} has elements of type {dtype}"
        if found is not None:
            context.skipped(candidate.node, *found)
        return found is None

    def _share(self, program: Program, layers: Sequence[Layer], context: Context) -> list[Sharing]:
        bits = self._bits(program, layers, context)
        done = []
        for index, layer in enumerate(layers):
            context.progress(index, len(layers), f"clusters of {layer.name}")
            done.append(self._cluster(layer, bits[layer.name], context))
        return done

    def _share_biases(self, program: Program, context: Context) -> list[Sharing]:
        if self.biases is None:
            return []
        found = find_biases(program, find_candidates(program))
        usable = [one for one in found if self._is_usable(program, one, context)]
        layers = [layer_of(program, one, {}) for one in usable]
        return [self._cluster(layer, self.biases, context) for layer in layers]

    def _cluster(self, layer: Layer, bits: int, context: Context) -> Sharing:
        return share(layer, bits, self.start, context.seed)

    def _bits(
        self, program: Program, layers: Sequence[Layer], context: Context
    ) -> Mapping[str, int]:
        fixed = {layer.name: self._given(layer.candidate) for layer in layers}
        if self.target_bytes is None and self.target_drop is None:
            return fixed
        own = {one.name: value_for(one.name, self.layers) for one in layers}
        options = {
            layer.name: options_of(
                [layer],
                lambda layer, bits: self._cluster(layer, bits, context),
                range(1, _MOST_BITS + 1) if own[layer.name] is None else [fixed[layer.name]],
            )[layer.name]
            for layer in layers
        }
        if self.target_bytes is not None:
            return bits_for_bytes(options, self.target_bytes)
        return bits_for_drop(options, self._acceptable(program, layers, context))

    def _given(self, candidate: Candidate) -> int:
        kind = self.linear if candidate.linear else self.conv
        return value_for(candidate.name, self.layers) or kind or self.bits

    def _acceptable(
        self, program: Program, layers: Sequence[Layer], context: Context
    ) -> Callable[[Mapping[str, int]], bool]:
        """Tells whether the evaluation with so many bits for each layer falls by little enough."""
        evaluate, drop = context.evaluate, self.target_drop
        if evaluate is None or drop is None:
            raise AssertionError("checked before the passes ran")
        before = float(evaluate(program.module))

        def acceptable(bits: Mapping[str, int]) -> bool:
            sharings = [self._cluster(layer, bits[layer.name], context) for layer in layers]
            with replaced({one.layer.candidate: one.encoding() for one in sharings}):
                found = float(evaluate(program.module))
            context.progress(0, 1, f"evaluation {found:.4g} of {before:.4g}")
            return found >= before - drop

        return acceptable

    def _tune(self, program: Program, context: Context) -> Program:
        if self.tune == "none" or context.train is None:
            return program
        try:
            return tune_centroids(program, context)
        except DivergedError as error:
            text = f"{error}; the centroids are those before the training"
            context.noted("diverged", text)
            warnings.warn(f"share-weights, {text}", ShohinWarning, stacklevel=2)
            return program


def _has_batches(context: Context) -> bool:
    return next(iter(context.calibration), None) is not None


def _count(program: Program, candidate: Candidate) -> int:
    """Elements that are to be clustered."""
    held = program.encodings.get(candidate.name)
    return held.values.parameters() if isinstance(held, Sparse) else candidate.weight.numel()


def _is_smaller(program: Program, sharing: Sharing, context: Context) -> bool:
    """Whether sharing saves bytes; a remark says so where it does not."""
    candidate = sharing.layer.candidate
    sizes = sharing.encoding().stored_bytes(), encoding_of(program, candidate.name).stored_bytes()
    if sizes[0] < sizes[1]:
        return True
    detail = f"{candidate.name} would take {sizes[0]} bytes, and takes {sizes[1]}"
    context.skipped(candidate.node, Reason.TOO_SMALL, detail)
    return False


def _encoded(program: Program, sharings: Sequence[Sharing]) -> Program:
    """The program with shared weights, whose values are those of their encodings."""
    encodings = dict(program.encodings)
    for sharing in sharings:
        candidate, encoding = sharing.layer.candidate, sharing.encoding()
        encodings |= dict.fromkeys(candidate.names, encoding)
        with torch.no_grad():
            candidate.weight.copy_(encoding.materialise())
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def _remark(before: Cost, after: Program, sharing: Sharing, context: Context) -> None:
    candidate, count = sharing.layer.candidate, sharing.centroids.size
    spent = before.nodes[candidate.node.name]
    stored = encoding_of(after, candidate.name).stored_bytes()
    spared = stored - before.weights[candidate.name].stored_bytes
    context.changed(
        candidate.node,
        "shared",
        f"{candidate.name}: {sharing.indices.size} weights share {count} values",
        before=spent.for_remark(),
        after=replace(spent.for_remark(), stored_bytes=spent.stored_bytes + spared),
    )
