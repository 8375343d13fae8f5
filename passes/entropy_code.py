"""Entropy coding of weights: as few bits as their frequencies allow."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import fx

from shohin.ir.codebook import Codebook
from shohin.ir.coding import CODERS, Coder, entropy_bits
from shohin.ir.encodings import Encoding, Json, Sparse
from shohin.ir.fixed_point import FixedPoint
from shohin.ir.gaps import gap_codes
from shohin.ir.program import Fact, Program, Stage, readers, tensor_of, tied_names
from shohin.ir.ternary import Ternary
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import NodeCost, Reason
from shohin.passes.sharing.coding import entropy_coded

_GAP_BITS = range(1, 9)
_CODED = (Codebook, FixedPoint, Sparse, Ternary)


@dataclass(frozen=True, kw_only=True)
class EntropyCode(Pass):
    """Store indices and gaps in as few bits as their frequencies allow.

    The indices of codebooks, fixed-point integers of at most 8 bits, the codes of ternary weights
    and the gaps between non-zeros are coded apart, each tensor with a table of its own (Deep
    Compression, arXiv 1510.00149, section 4). Values do not change, and what the coder would not
    make smaller stays as it is. Biases and normalisations that are stored
    as plain numbers have nothing to code, and are passed over in silence. Before::

        @fc.weight: float32[10,64] sparse 10.0% of codebook of 32 (232 bytes)

    After::

        @fc.weight: float32[10,64] sparse 10.0% huffman of huffman codebook of 32 (213 bytes)

    Attributes:
        coder: ``huffman``, canonical codes of whole bits; ``ans``, asymmetric numeral systems,
            closer to the entropy; or ``auto``, for every stream the smaller of the two.
        gap_bits: width of a gap, 1 to 8; none for the one that takes the least, layer by layer.
    """

    name: ClassVar[str] = "entropy-code"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.ENTROPY_CODED})

    coder: Literal["auto", "huffman", "ans"] = "auto"
    gap_bits: int | None = None

    def validate(self) -> None:
        """Check the coder and the width."""
        if self.coder not in ("auto", "huffman", "ans"):
            raise self.invalid_option("coder", "'auto', 'huffman' or 'ans'")
        if self.gap_bits is not None and self.gap_bits not in _GAP_BITS:
            raise self.invalid_option("gap_bits", "1 to 8")

    def run(self, program: Program, context: Context) -> PassResult:
        """Choose a coder for every stream of every encoded weight."""
        encodings = dict(program.encodings)
        weights = list(_weights(program))
        for index, (names, node) in enumerate(weights):
            context.progress(index, len(weights), f"coding {names[0]}")
            held = encodings.get(names[0])
            if held is None and tensor_of(program.module, names[0]).dim() < 2:
                continue
            if held is None or not isinstance(held, _CODED):
                detail = f"{names[0]} is stored as plain numbers"
                context.skipped(node, Reason.NOT_APPLICABLE, detail)
            elif not context.allows(node.name):
                detail = f"{names[0]} may not be changed"
                context.skipped(node, Reason.EXCLUDED_BY_OPTION, detail)
            elif (coded := entropy_coded(held, self._coders(), self.gap_bits)) is held:
                context.skipped(node, *_unchanged(names[0], held))
            else:
                encodings |= dict.fromkeys(names, coded)
                _remark(node, names[0], held, coded, context)
        if all(encodings[name] is program.encodings[name] for name in encodings):
            return PassResult(program, modified=False)
        after = replace(program, encodings=encodings, stage=Stage.ANNOTATED)
        return PassResult(after, modified=True)

    def _coders(self) -> tuple[Coder, ...]:
        return CODERS if self.coder == "auto" else ("plain", self.coder)


def _weights(program: Program) -> Iterator[tuple[list[str], fx.Node]]:
    """The names of each weight, and the first node that reads it."""
    for tied in tied_names(program):
        node = next((node for name in tied for node in readers(program, name)), None)
        if node is not None:
            yield tied, node


def _unchanged(name: str, held: Codebook | FixedPoint | Sparse | Ternary) -> tuple[Reason, str]:
    """Why a weight stays as it is stored."""
    values = held.values if isinstance(held, Sparse) else held
    stored = f"{name} is stored as {held.describe()}, {held.stored_bytes():,} bytes"
    coders = {one.coder for one in (held, values) if isinstance(one, _CODED)}
    if coders == {"plain"}:
        return Reason.TOO_SMALL, f"{stored}; coded it would take no fewer"
    return Reason.ALREADY_ENCODED, f"{stored}; coded again it would be the same"


def _remark(node: fx.Node, name: str, before: Encoding, after: Encoding, context: Context) -> None:
    figures = stream_figures(after)
    sizes, count = (before.stored_bytes(), after.stored_bytes()), after.nonzeros()
    weights = after.values.parameters() if isinstance(after, Sparse) else after.parameters()
    detail = f"{name}: {sizes[0]:,} to {sizes[1]:,} bytes; {_streams(figures, weights)}"
    context.changed(
        node,
        "coded",
        detail,
        before=NodeCost(count, 0, sizes[0]),
        after=NodeCost(count, 0, sizes[1]),
        figures=figures,
    )
    # Reports show notes one by one; of changes they give the number.
    context.noted("streams", detail)


def _streams(figures: Mapping[str, Json], weights: int) -> str:
    """What a weight's indices and gaps take, and the least that they could.

    Args:
        figures: those of `stream_figures`.
        weights: number of elements with an index.
    """

    def number(key: str) -> float:
        return float(str(figures.get(key, 0)))

    parts = []
    labels = (("index", "indices"), ("integer", "integers"), ("code", "codes"), ("gap", "gaps"))
    for prefix, label in labels:
        if f"{prefix}_coder" in figures:
            sizes = (number(f"{prefix}_bytes"), number(f"{prefix}_entropy_bytes"))
            taken, least = (8 * size / max(1, weights) for size in sizes)
            coder = figures[f"{prefix}_coder"]
            parts.append(f"{label} {taken:.2f} bits a weight ({coder}, entropy {least:.2f})")
    if "index_codebook_bytes" in figures:
        parts.append(f"codebook {number('index_codebook_bytes'):,.0f} bytes")
    tables = sum(number(f"{prefix}_table_bytes") for prefix, _ in labels)
    return ", ".join([*parts, f"tables {tables:,.0f} bytes"])


def stream_figures(encoding: Encoding) -> dict[str, Json]:
    """What the parts of a coded weight take, and the least that they could."""
    found: dict[str, Json] = {}
    if isinstance(encoding, Sparse):
        codes = gap_codes(encoding.mask, encoding.gap_bits)
        found["gap_coder"], found["gap_bits"] = encoding.coder, encoding.gap_bits
        found["gap_entropy_bytes"] = entropy_bits(np.bincount(codes)) / 8
        found |= _sizes("gap", encoding)
        encoding = encoding.values
    if isinstance(encoding, Codebook):
        counts = np.bincount(encoding.indices.reshape(-1).numpy())
        found["index_coder"], found["centroids"] = encoding.coder, encoding.centroids.numel()
        found["index_entropy_bytes"] = entropy_bits(counts) / 8
        found |= _sizes("index", encoding)
    if isinstance(encoding, FixedPoint):
        found["integer_coder"] = encoding.coder
        found["integer_entropy_bytes"] = entropy_bits(np.bincount(encoding.symbols())) / 8
        found |= _sizes("integer", encoding)
    if isinstance(encoding, Ternary):
        found["code_coder"] = encoding.coder
        found["code_entropy_bytes"] = entropy_bits(np.bincount(encoding.symbols())) / 8
        found |= _sizes("code", encoding)
    return found


def _sizes(prefix: str, encoding: Encoding) -> dict[str, Json]:
    names = dict.fromkeys(("gaps", "indices", "values", "codes"), "bytes") | {
        "table": "table_bytes"
    }
    names |= {"centroids": "codebook_bytes", "rows": "rows_bytes"}
    return {f"{prefix}_{names[key]}": one.nbytes for key, one in encoding.tensors().items()}
