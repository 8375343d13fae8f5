"""How sensitive a model is to the pruning of each of its layers (Han et al., arXiv 1506.02626)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from shohin.errors import ArtifactError, SpecError, near_name_hint
from shohin.ir.program import Program, readers, tensor_of, weight_names
from shohin.ir.serialise import content_hash
from shohin.passes.analyses.curves import LayerCurve, Sensitivity
from shohin.passes.analyses.operators import weighted_operation

__all__ = ["DENSITIES", "LayerCurve", "Sensitivity", "measure_sensitivity"]

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_WHOLE = ("", 1.0)


def measure_sensitivity(
    program: Program,
    evaluate: Callable[[nn.Module], float],
    densities: Sequence[float] = DENSITIES,
    *,
    names: Sequence[str] | None = None,
    workdir: str | Path | None = None,
    resume: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """Prune each convolution and linear map alone to several densities, and measure the model.

    Of `n` weights the ``round(density * n)`` of the largest magnitude are kept, at least one; of
    equal magnitudes the first. Nothing is retrained. Afterwards, and also after an error or an
    interruption, the weights are what they were, bit for bit. At density 1 a layer is whole, so
    that the measure of the model as it is stands for all.

    Args:
        program: the model. Weights that are not floating-point or not finite are left out.
        evaluate: measures a module, higher is better; must not train it.
        densities: shares of a layer's weights to keep, above 0 and at most 1, in any order.
        names: names of weights, or shell patterns; None for all.
        workdir: folder for a file of the points measured so far, rewritten after each. It belongs
            to this very program, but not to `evaluate`: use another folder when that changes.
        resume: take points from that file; otherwise it is begun anew.
        progress: called as ``progress(done, total, label)``, where each measurement is one step.

    Raises:
        SpecError: when a density is out of range, a name matches no weight that can be pruned, or
            `evaluate` gives no finite number.
        ArtifactError: when the file of points is malformed or cannot be written.
    """
    chosen = _check_densities(densities)
    prunables = _chosen_prunables(program, names)
    points = curves_file(program, workdir)
    return measure_curves(
        program.module, prunables, evaluate, chosen, points, resume=resume, progress=progress
    )


@dataclass(frozen=True, eq=False)
class Prunable:
    """A weight to be pruned by itself.

    Attributes:
        name: its name.
        node: the first convolution or linear map that reads it.
        weight: the tensor, as it lies in the module.
        mask: gives, for a density, where elements are kept.
    """

    name: str
    node: fx.Node
    weight: Tensor
    mask: Callable[[float], Tensor]


def measure_curves(
    module: nn.Module,
    prunables: Sequence[Prunable],
    evaluate: Callable[[nn.Module], float],
    densities: Sequence[float],
    points: Path | None,
    *,
    resume: bool = True,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """As `measure_sensitivity`, of given weights that are pruned in any way.

    Args:
        module: what the weights belong to.
        prunables: the weights.
        evaluate: measures a module, higher is better.
        densities: ascending.
        points: file of the points measured so far; None for none.
        resume: take points from that file.
        progress: as of `measure_sensitivity`.

    Raises:
        SpecError: when `evaluate` gives no finite number.
        ArtifactError: when the file of points is malformed or cannot be written.
    """
    store, report = _Store(points, resume), progress or _ignore
    total, done = 1 + len(prunables) * len(densities), 0
    report(done, total, "the whole model")
    baseline = store.get(_WHOLE, "", lambda: _measure(evaluate, module, "the whole model"))
    curves = []
    for one in prunables:
        measured = []
        for density in densities:
            done += 1
            report(done, total, f"{one.name} at {100 * density:g} %")
            what = f"{one.name} at density {density:g}"
            with _pruned(one, density) as changed:
                key = (one.name, density) if changed else _WHOLE
                point = store.get(key, one.node.name, lambda: _measure(evaluate, module, what))  # noqa: B023 - called at once
            measured.append((density, point))
        curves.append(LayerCurve(one.name, one.node.name, tuple(measured)))
    report(total, total, "")
    return Sensitivity(tuple(curves), baseline)


@contextmanager
def _pruned(one: Prunable, density: float) -> Iterator[bool]:
    """A weight is pruned inside the block, which is told whether that changes anything."""
    saved, dropped = one.weight.detach().clone(), ~one.mask(density)
    try:
        with torch.no_grad():
            one.weight.masked_fill_(dropped, 0.0)
        yield bool(saved[dropped].any())
    finally:
        with torch.no_grad():
            one.weight.copy_(saved)


def _largest(weight: Tensor, density: float) -> Tensor:
    """Where the elements of the largest magnitudes are, at least one; of equal ones the first."""
    magnitudes = weight.detach().abs()
    flat = magnitudes.flatten()
    count = max(1, round(density * flat.numel()))
    least = torch.kthvalue(flat, flat.numel() - count + 1).values
    mask = flat > least
    ties = torch.nonzero(flat == least).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(magnitudes.shape)


def _measure(evaluate: Callable[[nn.Module], float], module: nn.Module, what: str) -> float:
    found, problem = evaluate(module), f"expected a finite number for {what}, got "
    try:
        number = float(found)
    except (TypeError, ValueError) as error:
        raise SpecError("evaluate", f"{problem}{type(found).__name__}") from error
    if not math.isfinite(number):
        hint = "let it give a low number where the outputs of a pruned network are not finite"
        raise SpecError("evaluate", f"{problem}{number}", hint)
    return number


def _check_densities(densities: Sequence[float]) -> tuple[float, ...]:
    chosen = tuple(sorted({float(density) for density in densities}))
    if not chosen:
        raise SpecError("densities", "expected at least one, got none")
    wrong = [density for density in chosen if not 0 < density <= 1]
    if wrong:
        raise SpecError("densities", f"expected numbers above 0 and at most 1, got {wrong[0]:g}")
    return chosen


def _chosen_prunables(program: Program, names: Sequence[str] | None) -> list[Prunable]:
    found = list(_prunables(program))
    if names is None:
        return found
    known = [one.name for one in found]
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in known):
            problem = f"'{pattern}' matches no weight of a convolution or linear map"
            raise SpecError("names", problem, near_name_hint(pattern, known))
    return [one for one in found if any(fnmatchcase(one.name, pattern) for pattern in names)]


def _prunables(program: Program) -> Iterator[Prunable]:
    seen: set[int] = set()
    for name in weight_names(program):
        nodes, weight = list(readers(program, name)), tensor_of(program.module, name)
        prunable = weight.is_floating_point() and bool(torch.isfinite(weight).all())
        if not prunable or not nodes or id(weight) in seen:
            continue
        if all(_reads_as_weight(node, name) for node in nodes):
            seen.add(id(weight))
            yield Prunable(name, nodes[0], weight, partial(_largest, weight))


def _reads_as_weight(node: fx.Node, name: str) -> bool:
    operation = weighted_operation(node)
    return operation is not None and operation.weight.target == name


class _Store:
    """The points measured so far, in memory and in a file.

    Args:
        path: the file; None for none.
        resume: whether to begin with what is in it.
    """

    def __init__(self, path: Path | None, resume: bool) -> None:
        self._path = path
        self._nodes: dict[str, str] = {}
        self._known: dict[tuple[str, float], float] = {}
        if path is not None and resume and path.exists():
            self._take(Sensitivity.read_csv(path))

    def get(self, key: tuple[str, float], node: str, measure: Callable[[], float]) -> float:
        """The point of a weight and density, measured and written when it is not known."""
        if key not in self._known:
            self._known[key] = measure()
            self._nodes[key[0]] = node
            self._write()
        return self._known[key]

    def _take(self, found: Sensitivity) -> None:
        self._known[_WHOLE] = found.baseline
        for curve in found.layers:
            self._nodes[curve.weight] = curve.node
            self._known |= {(curve.weight, density): value for density, value in curve.points}

    def _write(self) -> None:
        if self._path is None:
            return
        curves = tuple(
            LayerCurve(name, node, self._points(name)) for name, node in self._nodes.items() if name
        )
        Sensitivity(curves, self._known[_WHOLE]).save_csv(self._path)

    def _points(self, weight: str) -> tuple[tuple[float, float], ...]:
        known = self._known.items()
        return tuple(sorted((key[1], value) for key, value in known if key[0] == weight))


def curves_file(program: Program, workdir: str | Path | None, ending: str = "") -> Path | None:
    """Where points are kept; with an ending of the name where not single elements are pruned."""
    if workdir is None:
        return None
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(str(folder), f"cannot be made: {error.strerror}") from error
    return folder / f"sensitivity-{content_hash(program)[:32]}{ending}.csv"


def _ignore(done: int, total: int, label: str) -> None:
    """Progress callback for callers that want none."""
