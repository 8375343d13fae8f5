"""Magnitude pruning in one shot."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from shohin.errors import SpecError, near_name_hint
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.program import Fact, Program, Stage, encoding_of, readers, tensor_of, weight_names
from shohin.passes.analyses.cost import cost
from shohin.passes.analyses.operators import weighted_operation
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import NodeCost, Reason


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A weight that is read by convolutions or linear maps, and the first of them."""

    name: str
    node: fx.Node
    weight: Tensor


def _candidates(program: Program) -> list[_Candidate]:
    found = []
    for name in weight_names(program):
        nodes = [node for node in readers(program, name) if _reads_as_weight(node, name)]
        if nodes:
            found.append(_Candidate(name, nodes[0], tensor_of(program.module, name)))
    return found


def _reads_as_weight(node: fx.Node, name: str) -> bool:
    operation = weighted_operation(node)
    return operation is not None and operation.weight.target == name


def _obstacle(program: Program, candidate: _Candidate) -> tuple[Reason, str] | None:
    """Why a weight cannot be pruned, or None."""
    name, weight = candidate.name, candidate.weight
    others = [node.name for node in readers(program, name) if not _reads_as_weight(node, name)]
    if others:
        return Reason.OTHER_USERS, f"{name} is also read by {', '.join(others)}"
    encoding = program.encodings.get(name)
    if encoding is not None and not _is_plain(encoding):
        return Reason.ALREADY_ENCODED, f"{name} is stored as {encoding.describe()}"
    if not weight.is_floating_point():
        return Reason.NOT_APPLICABLE, f"{name} has elements of type {weight.dtype}"
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        return Reason.NOT_FINITE, f"{name} has {bad} elements that are NaN or infinite"
    return None


def _is_plain(encoding: Encoding) -> bool:
    """Whether the elements are stored as they are, all of them or those under a mask."""
    return isinstance(encoding.values if isinstance(encoding, Sparse) else encoding, Dense)


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Bool vector of the `count` largest elements, of equal ones the first."""
    if count == 0:
        return torch.zeros_like(magnitudes, dtype=torch.bool)
    threshold = torch.kthvalue(magnitudes, magnitudes.numel() - count + 1).values
    mask = magnitudes > threshold
    ties = torch.nonzero(magnitudes == threshold).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def _masks(pool: list[_Candidate], density: float) -> list[Tensor]:
    """One mask per weight, together keeping the largest `density` of the pool."""
    weights = [candidate.weight.detach() for candidate in pool]
    magnitudes = torch.cat([weight.flatten().abs() for weight in weights])
    kept = _largest(magnitudes, round(density * magnitudes.numel()))
    parts = torch.split(kept, [weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]


def _prune(
    program: Program, candidate: _Candidate, mask: Tensor, context: Context
) -> Sparse | None:
    """Zero a weight outside the mask; its encoding, or None when it is left as it is."""
    name, node, weight = candidate.name, candidate.node, candidate.weight
    held = program.encodings.get(name)
    mask = mask & held.mask if isinstance(held, Sparse) else mask
    kept, before = int(mask.sum()), _kept_before(candidate, held)
    if kept == before:
        context.skipped(node, Reason.NOT_APPLICABLE, f"{name} has {kept} of {weight.numel()} left")
        return None
    if kept == 0:
        detail = f"of the {weight.numel()} elements of {name} none would be left"
        context.skipped(node, Reason.TOO_SMALL, detail)
        return None
    if not context.allows(node.name):
        context.skipped(node, Reason.EXCLUDED_BY_OPTION, f"{name} may not be changed")
        return None
    cost_before = context.analyses.get(cost, program).nodes[node.name]
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)
    encoding = Sparse.from_dense(weight, mask)
    context.changed(
        node,
        "pruned",
        f"{name}: {kept} of {weight.numel()} elements kept",
        before=cost_before.for_remark(),
        after=NodeCost(
            cost_before.nonzeros - before + kept,
            cost_before.macs * kept // weight.numel(),
            cost_before.stored_bytes
            - encoding_of(program, name).stored_bytes()
            + encoding.stored_bytes(),
        ),
    )
    return encoding


def _kept_before(candidate: _Candidate, held: Encoding | None) -> int:
    return held.values.parameters() if isinstance(held, Sparse) else candidate.weight.numel()


def _check_density(where: str, density: float) -> None:
    if not 0 < density <= 1:
        raise SpecError(where, f"expected 0 < density <= 1, got {density}")


@dataclass(frozen=True, kw_only=True)
class Prune(Pass):
    """Keep the largest weights of convolutions and linear maps and drop the others.

    The magnitude criterion of Han et al. (arXiv 1506.02626) in one shot, without retraining. Of
    `n` weights ``round(density * n)`` are kept; of equal magnitudes the first are. A weight that
    several operators share is pruned once; one that is sparse already only becomes sparser.
    Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] dense (2560 bytes)

    After, the weight is zero outside the mask of its encoding::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
      weights
        @fc.weight: float32[10,64] sparse 10.0% (320 bytes)

    Attributes:
        density: share of the weights to keep, above 0 and at most 1.
        densities: density by weight name or shell pattern; the name itself or else the first
            pattern that matches wins over `density`.
        exclude: weight names or shell patterns to leave as they are.
        scope: ``layer`` keeps `density` of every weight tensor, ``global`` keeps `density` of all
            of them together, so that layers of small weights lose more. Weights with a density
            of their own are pruned by themselves in both.
    """

    name: ClassVar[str] = "prune"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PRUNED})

    density: float = 0.1
    densities: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    scope: Literal["layer", "global"] = "layer"

    def validate(self) -> None:
        """Check the ranges of the densities and the scope."""
        _check_density("prune density", self.density)
        for pattern, density in self.densities.items():
            _check_density(f"prune densities '{pattern}'", density)
        if self.scope not in ("layer", "global"):
            raise SpecError("prune scope", f"expected 'layer' or 'global', got '{self.scope}'")

    def run(self, program: Program, context: Context) -> PassResult:
        """Prune every convolution and linear weight that the options allow.

        Raises:
            SpecError: when a pattern matches no weight of a convolution or linear map.
        """
        found = _candidates(program)
        self._check_patterns([candidate.name for candidate in found])
        usable = [one for one in found if self._is_usable(program, one, context)]
        encodings = dict(program.encodings)
        for pool, density in self._pools(usable):
            for candidate, mask in zip(pool, _masks(pool, density), strict=True):
                encoding = _prune(program, candidate, mask, context)
                encodings |= {candidate.name: encoding} if encoding else {}
        if encodings == dict(program.encodings):
            return PassResult(program, modified=False)
        pruned = replace(program, encodings=encodings, stage=Stage.ANNOTATED)
        return PassResult(pruned, modified=True)

    def _check_patterns(self, names: list[str]) -> None:
        options = [("densities", self.densities), ("exclude", self.exclude)]
        for option, pattern in ((option, one) for option, given in options for one in given):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SpecError(
                    f"prune {option} '{pattern}'",
                    "expected a convolution or linear weight, got no match",
                    near_name_hint(pattern, names),
                )

    def _is_usable(self, program: Program, candidate: _Candidate, context: Context) -> bool:
        if any(fnmatchcase(candidate.name, pattern) for pattern in self.exclude):
            detail = f"{candidate.name} matches the option 'exclude'"
            context.skipped(candidate.node, Reason.EXCLUDED_BY_OPTION, detail)
            return False
        obstacle = _obstacle(program, candidate)
        if obstacle:
            context.skipped(candidate.node, *obstacle)
        return obstacle is None

    def _pools(self, usable: list[_Candidate]) -> Iterable[tuple[list[_Candidate], float]]:
        """The weights that compete with each other, with the density of each such set."""
        own = {candidate.name: self._own_density(candidate.name) for candidate in usable}
        pooled = [one for one in usable if own[one.name] is None and self.scope == "global"]
        if pooled:
            yield pooled, self.density
        for candidate in usable:
            if candidate not in pooled:
                yield [candidate], own[candidate.name] or self.density

    def _own_density(self, name: str) -> float | None:
        if name in self.densities:
            return self.densities[name]
        matching = (d for pattern, d in self.densities.items() if fnmatchcase(name, pattern))
        return next(matching, None)
