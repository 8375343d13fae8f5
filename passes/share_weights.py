"""Weight sharing: every weight one of a few values."""

import warnings
from collections.abc import Iterator, Sequence
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
    all_names,
    check_patterns,
    find_candidates,
    is_excluded,
    obstacle,
    pieces,
    value_for_names,
)
from shohin.passes.pruning.reconstruction import unsupported
from shohin.passes.remarks import Reason
from shohin.passes.sharing.allocation import options_of
from shohin.passes.sharing.clusters import Initialisation
from shohin.passes.sharing.importance import Importance, importance_of
from shohin.passes.sharing.layers import DTYPES, Layer, Sharing, find_biases, layer_of
from shohin.passes.sharing.making import Made, Maker
from shohin.passes.sharing.targets import make_for_bytes, make_for_drop
from shohin.passes.sharing.tuning import tune_centroids

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
    gradient of a centroid being the mean of those of its weights. (The paper takes the sum; with
    the mean, a learning rate that suits weights suits centroids.) When the training diverges, a
    warning says so and the centroids are those before it.

    Weights of any floating-point type from 16 bits on are clustered in single precision, and
    centroids are stored in the weight's own type. Weights that anything but convolutions and linear
    maps reads, as embeddings that are tied to a head, are left as they are, and so are weights
    with elements that are NaN or infinite.

    Attributes:
        bits: width of an index, 1 to 8.
        conv: the same for convolutions alone; holds under a target, too.
        linear: the same for linear maps alone; holds under a target, too.
        layers: bits by weight name or shell pattern, which win over the three above; they hold
            under a target, too.
        biases: width of the indices of biases, which are shared as well where it is given.
        exclude: weight names or shell patterns to leave as they are.
        start: where k-means starts: ``linear`` spreads centroids evenly from the least to the
            largest weight, ``density`` evenly over their ranks, ``random`` takes some weights.
        importance: what an error of a weight counts: ``none`` all alike, ``hessian`` the second
            derivative of the loss, ``activations`` the mean square of the input it multiplies.
            The last two need calibration batches. Errors of layers without a rule for it count
            alike, with a note: for ``activations``, all but conv2d and linear.
        compensate: let the elements of each layer, and its bias, make up for each other's errors:
            for users who cannot train (GPTQ, arXiv 2210.17323). Needs calibration batches. Layers
            that are neither conv2d nor linear, or very wide, are shared without, with a note.
        tune: ``auto`` trains the centroids where there is a training function, ``all`` insists on
            it, ``none`` never does.
        assignments: ``fixed`` leaves every weight at its centroid while the centroids are trained,
            as the paper does; ``trained`` lets a weight move to another one, by training what it
            would be if it were free (arXiv 1811.05355). With few bits, that loses less.
        target_bytes: instead of `bits`, the least error for which all weights of the program take
            at most so many bytes: the encodings that ``entropy-code`` gives them, those of biases
            and of weights that are not shared included. The file's header comes on top, and some 20
            bytes that frame each weight.
        target_drop: instead of `bits`, the fewest for which the evaluation falls by at most this,
            with biases shared and errors compensated where that is asked for, but before the
            centroids are trained.
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
    assignments: Literal["fixed", "trained"] = "fixed"
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
        if self.assignments == "trained":
            self._check_moving()
        target = "target_bytes" if self.target_bytes is not None else "target_drop"
        if self._has_target and self.bits != _BITS:
            hint = "fix those of some weights by 'conv', 'linear' or 'layers'"
            raise SpecError("share-weights bits", f"does not go together with '{target}'", hint)

    def _check_moving(self) -> None:
        """Check that assignments can be trained with the other options."""
        where, problem = "share-weights assignments", "'trained' does not go together with"
        if self.tune == "none":
            raise SpecError(where, f"{problem} 'tune=none'", "leave out one of the two")
        if self.target_bytes is not None:
            hint = "weights that move take other bytes; give bits by 'conv', 'linear' or 'layers'"
            raise SpecError(where, f"{problem} 'target_bytes'", hint)

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
        for option, found in (("tune", self.tune), ("assignments", self.assignments)):
            if found in ("all", "trained") and context.train is None:
                problem = f"'{found}' needs a train function, got none"
                hint = (
                    "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"
                )
                raise SpecError(f"share-weights {option}", problem, hint)

    def run(self, program: Program, context: Context) -> PassResult:
        """Share the values of every convolution and linear weight that the options allow.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map, or the
                context lacks what an option asks for.
            PassError: when a target cannot be met.
        """
        self.check_context(context)
        found = find_candidates(program)
        names = all_names(found)
        check_patterns("share-weights layers", self.layers, names)
        check_patterns("share-weights exclude", self.exclude, names)
        usable = [one for one in found if self._is_usable(program, one, context)]
        before = context.analyses.get(cost, program)
        made = self._make(self._maker(program, usable, context))
        for sharing in made.refused:
            _remark_refused(sharing, context)
        if not made.sharings:
            return PassResult(program, modified=False)
        shared = self._tune(_encoded(program, made.sharings), context)
        for sharing in made.sharings:
            _remark(before, shared, sharing, context)
        return PassResult(shared, modified=True)

    @property
    def _has_target(self) -> bool:
        return self.target_bytes is not None or self.target_drop is not None

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
        if found is None:
            found = _beyond_single_precision(candidate)
        if found is not None:
            context.skipped(candidate.node, *found)
        return found is None

    def _maker(self, program: Program, usable: Sequence[Candidate], context: Context) -> Maker:
        importance = importance_of(program, usable, self.importance, context)
        return Maker(
            program,
            [layer_of(program, one, importance) for one in usable],
            self._biases(program, context),
            self.biases or _BITS,
            self.start,
            frozenset(self._compensated(program, usable, context)),
            context,
        )

    def _biases(self, program: Program, context: Context) -> list[Candidate]:
        if self.biases is None:
            return []
        found = find_biases(program, find_candidates(program))
        return [one for one in found if self._is_usable(program, one, context)]

    def _compensated(
        self, program: Program, usable: Sequence[Candidate], context: Context
    ) -> Iterator[str]:
        for candidate in usable if self.compensate else ():
            found = unsupported(program, candidate)
            if found is None:
                yield candidate.name
            else:
                context.noted("compensate", f"{found[1]}; it is shared without compensation")

    def _make(self, maker: Maker) -> Made:
        if not self._has_target:
            bits = {layer.name: self._given(layer.candidate) for layer in maker.layers}
            return maker.make(bits)
        options = options_of(maker.layers, maker.cluster, self._widths)
        if self.target_bytes is not None:
            return make_for_bytes(maker, options, self.target_bytes)
        return make_for_drop(maker, options, self.target_drop or 0.0)

    def _widths(self, layer: Layer) -> Sequence[int]:
        """The bits that a layer may have under a target."""
        pinned = self._pinned(layer.candidate)
        return range(1, _MOST_BITS + 1) if pinned is None else [pinned]

    def _pinned(self, candidate: Candidate) -> int | None:
        kind = self.linear if candidate.linear else self.conv
        return value_for_names(candidate.spellings, self.layers) or kind

    def _given(self, candidate: Candidate) -> int:
        return self._pinned(candidate) or self.bits

    def _tune(self, program: Program, context: Context) -> Program:
        if self.tune == "none" or context.train is None:
            return program
        try:
            return tune_centroids(program, context, moving=self.assignments == "trained")
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


def _beyond_single_precision(candidate: Candidate) -> tuple[Reason, str] | None:
    """Why a weight cannot be clustered in single precision; None when it can."""
    name, weight = candidate.name, candidate.weight.detach()
    if weight.dtype not in DTYPES:
        return Reason.NOT_APPLICABLE, f"{name} has elements of type {weight.dtype}"
    largest = torch.finfo(torch.float32).max
    if weight.dtype == torch.float64 and any(
        bool((p.abs() > largest).any()) for p in pieces(weight)
    ):
        return Reason.NOT_APPLICABLE, f"{name} has elements beyond single precision"
    return None


def _remark_refused(sharing: Sharing, context: Context) -> None:
    candidate = sharing.layer.candidate
    sizes = sharing.encoding().stored_bytes(), sharing.layer.stored.stored_bytes()
    detail = f"{candidate.name} would take {sizes[0]} bytes, and takes {sizes[1]}"
    context.skipped(candidate.node, Reason.TOO_SMALL, detail)


def _encoded(program: Program, sharings: Sequence[Sharing]) -> Program:
    """The program with the encodings of its shared weights."""
    encodings = dict(program.encodings)
    for sharing in sharings:
        encodings |= dict.fromkeys(sharing.layer.candidate.names, sharing.encoding())
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
