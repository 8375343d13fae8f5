"""Why a kernel has the tile it has."""

from dataclasses import dataclass

from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.target import host_runs
from shohin.backends.tvm.tuning.tuner import VARIANTS, WORTH_MEASURING, Tuner


@dataclass(frozen=True)
class Choice:
    """The tile of a kernel and what it was compared with.

    Attributes:
        tile: the tile chosen, as text.
        candidates: tiles in the order of the cost model, each with its milliseconds on one thread,
            None where it was not measured.
        reason: why this one, a sentence for people.
    """

    tile: str
    candidates: tuple[tuple[str, float | None], ...]
    reason: str


def explain(kernel: Kernel, tuner: Tuner) -> Choice:
    """Why the tuner chooses the tile it does for a kernel.

    Args:
        kernel: any variant.
        tuner: the target and the cache of measurements.
    """
    considered = kernel.variants(tuner.target.registers())[: VARIANTS[tuner.tune]]
    known = tuner.cache.read(kernel, tuner.target)
    times = known.milliseconds if known and tuner.tune != "off" else {}
    candidates = tuple((v.tile_text(), times.get(v.tile_text())) for v in considered)
    chosen = tuner.choose(kernel).tile_text()
    return Choice(chosen, candidates, _reason(kernel, tuner, candidates))


def _reason(kernel: Kernel, tuner: Tuner, candidates: tuple[tuple[str, float | None], ...]) -> str:
    if len(candidates) <= 1 and tuner.tune != "off":
        return "there is one tile"
    if tuner.tune == "off":
        foreign = host_runs(tuner.target.resolved())
        return f"cost model: {foreign or 'tuning is off'}"
    if kernel.operations < WORTH_MEASURING:
        return f"cost model: {kernel.operations:,} operations are too few to matter"
    times = [ms for _, ms in candidates if ms is not None]
    if len(times) < len(candidates):
        return "cost model: not measured yet"
    first = candidates[0][1] or 0.0
    return (
        f"fastest of {len(times)} measured: {min(times):.4f} ms; the cost model's favourite "
        f"{first:.4f} ms, the slowest {max(times):.4f} ms"
    )
