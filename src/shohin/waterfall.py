"""What each step of compression left of the weights, in bytes of the file that holds them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.fixed_point import FixedPoint
from shohin.ir.gaps import best_gap_bits
from shohin.ir.program import single_bytes
from shohin.ir.serialise import ProgramFile
from shohin.ir.ternary import Ternary
from shohin.tables import Grid

STEPS = ("as captured", "pruned", "quantised", "in the file")
_NAMED = 8
_QUANTISED = (Codebook, FixedPoint, Ternary)


@dataclass(frozen=True)
class Fall:
    """One weight.

    Attributes:
        name: its name.
        encoding: how it is stored, in a few words.
        original: bytes of its elements, numbers with a fraction in single precision.
        pruned: bytes of the elements that are kept, and of their places.
        quantised: bytes of the fixed-point integers, or of indices and of the values that elements
            share, and of places.
        stored: bytes that it takes in the file, coded, with its checksum.
    """

    name: str
    encoding: str
    original: int
    pruned: int
    quantised: int
    stored: int

    @property
    def steps(self) -> tuple[int, int, int, int]:
        """The four sizes, in the order of `STEPS`."""
        return self.original, self.pruned, self.quantised, self.stored


@dataclass(frozen=True)
class Waterfall:
    """All weights of a file.

    Attributes:
        falls: one for each weight.
        frame: bytes of the file that belong to no weight: the header, the graph in it, the
            checksum of the whole.
        removed: bytes of what the captured model had and passes removed.
    """

    falls: tuple[Fall, ...]
    frame: int
    removed: int = 0

    @property
    def totals(self) -> tuple[int, int, int, int]:
        """Sums over the weights; the last is the size of the file."""
        sums = [sum(sizes) for sizes in zip(*(fall.steps for fall in self.falls), strict=True)]
        original, pruned, quantised, stored = sums or [0, 0, 0, 0]
        return original + self.removed, pruned, quantised, stored + self.frame

    def grid(self) -> Grid:
        """It as a table."""
        rows = [
            (fall.name, fall.encoding, *(f"{size:,}" for size in fall.steps), _times(fall.steps))
            for fall in self.falls
        ]
        if self.removed:
            rows.append(("removed", "", f"{self.removed:,}", "", "", "", ""))
        rows.append(("header", "", "", "", "", f"{self.frame:,}", ""))
        footer = ("total", "", *(f"{size:,}" for size in self.totals), _times(self.totals))
        heads = tuple(f">{step}" for step in STEPS)
        columns = ("weight", "encoding", *heads, ">smaller")
        return Grid("Bytes", columns, tuple(rows), footer, ("encoding",))


def waterfall(path: str | Path) -> Waterfall:
    """The sizes of the weights of a program file, step by step; one weight in memory at a time.

    Raises:
        ArtifactError: when the file is no intact program file.
    """
    with ProgramFile(path) as file:
        falls = tuple(_fall(name, file.encoding(name), size) for name, size in file.sizes.items())
        captured = file.header.captured_bytes
    frame = Path(path).stat().st_size - sum(fall.stored for fall in falls)
    return Waterfall(falls, frame, max(0, captured - sum(fall.original for fall in falls)))


def _fall(name: str, encoding: Encoding, stored: int) -> Fall:
    original = single_bytes(encoding.dtype, encoding.parameters())
    pruned = original
    if isinstance(encoding, Sparse):
        kept = Dense(encoding.values.materialise().float())
        pruned = Sparse(encoding.mask, kept, best_gap_bits(encoding.mask)).stored_bytes()
    quantised = _uncoded(encoding).stored_bytes() if _is_quantised(encoding) else pruned
    return Fall(name, encoding.describe(), original, pruned, quantised, stored)


def _is_quantised(encoding: Encoding) -> bool:
    return isinstance(encoding.values if isinstance(encoding, Sparse) else encoding, _QUANTISED)


def _uncoded(encoding: Encoding) -> Encoding:
    """The encoding with plain indices and gaps."""
    if isinstance(encoding, Sparse):
        width = best_gap_bits(encoding.mask)
        values = _uncoded(encoding.values)
        return replace(encoding, values=values, gap_bits=width, coder="plain")
    return replace(encoding, coder="plain") if isinstance(encoding, _QUANTISED) else encoding


def _times(steps: Sequence[int]) -> str:
    return f"{steps[0] / steps[-1]:.1f}x" if steps[-1] else ""


def draw_waterfall(found: Waterfall, path: Path) -> Path:
    """Draw the sizes after each step, every weight a part of the bar.

    Args:
        found: what to draw.
        path: a file whose name ends in ``.png``, ``.pdf`` or ``.svg``.

    Raises:
        SpecError: when the name ends in anything else, or matplotlib is not installed.
        ArtifactError: when the file cannot be written.
    """
    from shohin.ir.files import atomic_path
    from shohin.passes.analyses.figures import check_figure

    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    largest = sorted(found.falls, key=lambda fall: -fall.original)[:_NAMED]
    parts = [(fall.name, fall.steps) for fall in largest]
    named = [sum(steps[i] for _, steps in parts) for i in range(len(STEPS))]
    others = tuple(total - part for total, part in zip(found.totals, named, strict=True))
    bottoms = [0.0] * len(STEPS)
    for name, steps in [*parts, ("all else", others)]:
        heights = [size / 1000 for size in steps]
        axes.bar(STEPS, heights, 0.6, bottoms, label=name)
        bottoms = [low + high for low, high in zip(bottoms, heights, strict=True)]
    for place, (top, total) in enumerate(zip(bottoms, found.totals, strict=True)):
        text = f"{total:,}\n{found.totals[0] / max(1, total):.1f}x"
        axes.annotate(text, (place, top), (0, 3), textcoords="offset points", ha="center")
    axes.set_ylabel("kB")
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=130)
    return path
