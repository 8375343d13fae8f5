"""How sensitive a model is to the pruning of each of its layers (Han et al., arXiv 1506.02626)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
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
    targets = _chosen_targets(program, names)
    store = _Store(_cache_file(program, workdir), resume)
    report = progress or _ignore
    total, done = 1 + len(targets) * len(chosen), 0
    report(done, total, "the whole model")
    baseline = store.get(_WHOLE, "", lambda: _measure(evaluate, program.module, "the whole"))
    curves = []
    for target in targets:
        points = []
        for density in chosen:
            done += 1
            report(done, total, f"{target.name} at {100 * density:g} %")
            points.append((density, _point(program, target, density, evaluate, store, baseline)))
        curves.append(LayerCurve(target.name, target.node.name, tuple(points)))
    report(total, total, "")
    return Sensitivity(tuple(curves), baseline)


@dataclass(frozen=True, eq=False)
class _Target:
    """A weight that is read by convolutions or linear maps alone, and the first of them."""

    name: str
    node: fx.Node
    weight: Tensor


def _point(
    program: Program,
    target: _Target,
    density: float,
    evaluate: Callable[[nn.Module], float],
    store: "_Store",
    baseline: float,
) -> float:
    """The measure of the model with one weight pruned."""
    count = max(1, round(density * target.weight.numel()))
    if count == target.weight.numel():
        return baseline

    def measure() -> float:
        with _pruned(target.weight, count):
            what = f"{target.name} at density {density:.4g}"
            return _measure(evaluate, program.module, what)

    return store.get((target.name, density), target.node.name, measure)


@contextmanager
def _pruned(weight: Tensor, count: int) -> Iterator[None]:
    """All but the largest elements of a weight are zero inside the block."""
    saved = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.masked_fill_(~_largest(saved.abs(), count), 0.0)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(saved)


def _largest(magnitudes: Tensor, count: int) -> Tensor:
    """Where the `count` largest elements are; of equal ones the first."""
    flat = magnitudes.flatten()
    least = torch.kthvalue(flat, flat.numel() - count + 1).values
    mask = flat > least
    ties = torch.nonzero(flat == least).flatten()
    mask[ties[: count - int(mask.sum())]] = True
    return mask.view(magnitudes.shape)


def _measure(evaluate: Callable[[nn.Module], float], module: nn.Module, what: str) -> float:
    found = evaluate(module)
    try:
        number = float(found)
    except (TypeError, ValueError) as error:
        problem = f"expected it to return a number, got {type(found).__name__}"
        raise SpecError("evaluate", problem) from error
    if not math.isfinite(number):
        raise SpecError("evaluate", f"expected a finite number for {what}, got {number}")
    return number


def _check_densities(densities: Sequence[float]) -> tuple[float, ...]:
    chosen = tuple(sorted({float(density) for density in densities}))
    if not chosen:
        raise SpecError("densities", "expected at least one, got none")
    wrong = [density for density in chosen if not 0 < density <= 1]
    if wrong:
        raise SpecError("densities", f"expected numbers above 0 and at most 1, got {wrong[0]:g}")
    return chosen


def _chosen_targets(program: Program, names: Sequence[str] | None) -> list[_Target]:
    targets = list(_targets(program))
    if names is None:
        return targets
    known = [target.name for target in targets]
    for pattern in names:
        if not any(fnmatchcase(name, pattern) for name in known):
            problem = f"'{pattern}' matches no weight of a convolution or linear map"
            raise SpecError("names", problem, near_name_hint(pattern, known))
    return [one for one in targets if any(fnmatchcase(one.name, pattern) for pattern in names)]


def _targets(program: Program) -> Iterator[_Target]:
    seen: set[int] = set()
    for name in weight_names(program):
        nodes, weight = list(readers(program, name)), tensor_of(program.module, name)
        prunable = weight.is_floating_point() and bool(torch.isfinite(weight).all())
        if not prunable or not nodes or id(weight) in seen:
            continue
        if all(_reads_as_weight(node, name) for node in nodes):
            seen.add(id(weight))
            yield _Target(name, nodes[0], weight)


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


def _cache_file(program: Program, workdir: str | Path | None) -> Path | None:
    if workdir is None:
        return None
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(str(folder), f"cannot be made: {error.strerror}") from error
    return folder / f"sensitivity-{content_hash(program)[:32]}.csv"


def _ignore(done: int, total: int, label: str) -> None:
    """Progress callback for callers that want none."""
