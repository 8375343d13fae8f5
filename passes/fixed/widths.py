"""Widths of weights, as small as an accuracy budget allows.

In the manner of Ristretto (Gysel et al., arXiv 1605.06402): first each layer alone is given fewer
and fewer bits, all others as they are, and the network is evaluated. Then widths are chosen for all
layers so that what they lose, added up, is within the budget, and what comes of that is checked.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shohin.errors import ArtifactError, PassError
from shohin.ir.files import atomic_path
from shohin.ir.fixed_point import LEAST_BITS

_TRIES = 6
_SMALLER = 0.6
"""What the budget of the sum is multiplied with where the sum promised too much."""


@dataclass(frozen=True)
class Candidate:
    """A layer whose width is to be chosen.

    Attributes:
        name: of its weight.
        elements: number of weights.
        bits: the width that it has, and at most gets.
    """

    name: str
    elements: int
    bits: int


@dataclass
class Evaluations:
    """What single layers with fewer bits come to, kept in a file so that a search can go on.

    Attributes:
        path: the file; None where nothing is kept.
        known: evaluations by weight and bits.
    """

    path: Path | None
    known: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path | None, identity: Sequence[str], resume: bool) -> "Evaluations":
        """Those of a run; empty where none are kept, or they are not to be used.

        Args:
            folder: where files are kept, or None.
            identity: of program, options and seed: evaluations of others are not used.
            resume: whether to go on from what is there.

        Raises:
            ArtifactError: when the file cannot be read.
        """
        key = hashlib.sha256(json.dumps([*identity]).encode()).hexdigest()[:32]
        path = None if folder is None else folder / f"fixed-point-widths-{key}.json"
        if path is None or not resume or not path.exists():
            return cls(path)
        try:
            known = json.loads(path.read_text())
            return cls(path, {str(name): float(value) for name, value in known.items()})
        except (OSError, ValueError, TypeError, AttributeError) as error:
            hint = "delete it to evaluate anew"
            raise ArtifactError(str(path), f"cannot be read: {error}", hint) from error

    def get(self, name: str, bits: int, measure: Callable[[str, int], float]) -> float:
        """The evaluation with one layer at so many bits, measured where it is not known."""
        key = f"{name} {bits}"
        if key not in self.known:
            self.known[key] = measure(name, bits)
            self._write()
        return self.known[key]

    def _write(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(self.known, indent=1))


@dataclass(frozen=True)
class Search:
    """Chooses widths.

    Attributes:
        candidates: the layers.
        reference: evaluation of the float network, from which drops are counted.
        most_drop: by how much the evaluation may fall.
        alone: evaluates the network with one layer at so many bits.
        together: evaluates the network with all layers at given widths.
        evaluations: what `alone` gave before.
        progress: called as ``progress(done, total, label)``.
    """

    candidates: Sequence[Candidate]
    reference: float
    most_drop: float
    alone: Callable[[str, int], float]
    together: Callable[[Mapping[str, int]], float]
    evaluations: Evaluations
    progress: Callable[[int, int, str], None]

    @property
    def least(self) -> float:
        """What an evaluation has to be."""
        return self.reference - self.most_drop

    def run(self) -> dict[str, int]:
        """The fewest bits that are within the budget.

        Raises:
            PassError: when the network with the most bits is not.
        """
        most = {one.name: one.bits for one in self.candidates}
        found = self.together(most)
        if not found >= self.least:
            problem = f"expected an evaluation of at least {self.least:.6g}, got {found:.6g}"
            hint = "choose a larger drop, or more bits by 'weights' and 'data'"
            raise PassError("fixed-point max_drop", f"{problem} with the most bits", hint)
        drops = self._measure(found)
        budget = found - self.least
        for _ in range(_TRIES):
            chosen = choose_widths(self.candidates, drops, budget)
            if chosen == most or self.together(chosen) >= self.least:
                return chosen
            budget *= _SMALLER
        return most

    def _measure(self, most: float) -> dict[str, dict[int, float]]:
        """What each layer loses with fewer bits, until that is more than the budget."""
        drops: dict[str, dict[int, float]] = {}
        for done, one in enumerate(self.candidates):
            losses = drops.setdefault(one.name, {one.bits: 0.0})
            for bits in range(one.bits - 1, LEAST_BITS - 1, -1):
                self.progress(done, len(self.candidates), f"{one.name} with {bits} bits")
                found = self.evaluations.get(one.name, bits, self.alone)
                losses[bits] = max(0.0, most - found) if not math.isnan(found) else math.inf
                if not found >= self.least:
                    break
        return drops


def choose_widths(
    candidates: Sequence[Candidate], drops: Mapping[str, Mapping[int, float]], budget: float
) -> dict[str, int]:
    """Widths whose losses add up to at most a budget: most bits saved for what they lose first.

    Args:
        candidates: the layers.
        drops: by layer and bits, what the evaluation loses.
        budget: what all may lose together.
    """
    chosen = {one.name: one.bits for one in candidates}
    left = budget
    while True:
        steps = [
            (loss / (one.elements * (chosen[one.name] - bits)), bits, one.name, loss)
            for one in candidates
            for bits, total in drops[one.name].items()
            if bits < chosen[one.name]
            and (loss := total - drops[one.name][chosen[one.name]]) <= left
        ]
        if not steps:
            return chosen
        _, bits, name, loss = min(steps)
        chosen[name] = bits
        left -= loss
