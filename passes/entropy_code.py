"""Entropy coding of weights: as few bits as their frequencies allow."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import fx

from shohin.ir.codebook import Codebook
from shohin.ir.coding import Coder, encode_smallest, entropy_bits
from shohin.ir.encodings import Encoding, Json, Sparse
from shohin.ir.gaps import codes_of, gap_codes, gaps_of, likely_gap_bits
from shohin.ir.program import Fact, Program, Stage, readers, tensor_of, tied_names
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.remarks import NodeCost, Reason

_GAP_BITS = range(1, 9)
_TRIED_WIDTHS = 3


@dataclass(frozen=True, kw_only=True)
class EntropyCode(Pass):
    """Store indices and gaps in as few bits as their frequencies allow.

    The indices of codebooks and the gaps between non-zeros are coded apart, each tensor with a
    table of its own (Deep Compression, arXiv 1510.00149, section 4). Values do not change, and
    what the coder would make larger stays as it is. Before::

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
            if held is None or not isinstance(held, (Codebook, Sparse)):
                detail = f"{names[0]} is stored as plain numbers"
                context.skipped(node, Reason.NOT_APPLICABLE, detail)
            elif not context.allows(node.name):
                detail = f"{names[0]} may not be changed"
                context.skipped(node, Reason.EXCLUDED_BY_OPTION, detail)
            else:
                coded = self._coded(held)
                encodings |= dict.fromkeys(names, coded)
                _remark(node, names[0], held, coded, context)
        if all(encodings[name] is program.encodings[name] for name in encodings):
            return PassResult(program, modified=False)
        after = replace(program, encodings=encodings, stage=Stage.ANNOTATED)
        return PassResult(after, modified=True)

    def _coded(self, encoding: Encoding) -> Encoding:
        if isinstance(encoding, Codebook):
            symbols = encoding.indices.reshape(-1).numpy()
            coder, _ = self._smallest(symbols, encoding.centroids.numel())
            return replace(encoding, coder=coder)
        if isinstance(encoding, Sparse):
            width, coder = self._gaps(encoding)
            values = self._coded(encoding.values)
            return replace(encoding, values=values, gap_bits=width, coder=coder)
        return encoding

    def _gaps(self, sparse: Sparse) -> tuple[int, Coder]:
        """Width and coder of the gaps."""
        gaps = gaps_of(sparse.mask)
        likely = likely_gap_bits(gaps)[:_TRIED_WIDTHS]
        options = {
            width: self._smallest(codes_of(gaps, width).astype(np.uint8), 1 << width)
            for width in ([self.gap_bits] if self.gap_bits else likely)
        }
        best = min(options, key=lambda width: (options[width][1], width))
        plain = -(-sparse.codes() * sparse.gap_bits // 8)
        if sparse.coder == "plain" and not self.gap_bits and plain <= options[best][1]:
            return sparse.gap_bits, "plain"
        return best, options[best][0]

    def _smallest(self, symbols: NDArray[np.uint8], alphabet: int) -> tuple[Coder, int]:
        """The coder that takes the fewest bytes, and how many."""
        coders: tuple[Coder, ...] = ("plain", "huffman", "ans")
        chosen = coders if self.coder == "auto" else ("plain", self.coder)
        best, coded = encode_smallest(symbols, alphabet, chosen)
        return best, sum(tensor.numel() for tensor in coded.values())


def _weights(program: Program) -> Iterator[tuple[list[str], fx.Node]]:
    """The names of each weight, and the first node that reads it."""
    for tied in tied_names(program):
        node = next((node for name in tied for node in readers(program, name)), None)
        if node is not None:
            yield tied, node


def _remark(node: fx.Node, name: str, before: Encoding, after: Encoding, context: Context) -> None:
    figures = stream_figures(after)
    sizes = before.stored_bytes(), after.stored_bytes()
    count = after.nonzeros()
    context.changed(
        node,
        "coded",
        f"{name}: {sizes[0]:,} to {sizes[1]:,} bytes, "
        f"{8 * sizes[1] / max(1, count):.2f} bits a weight that is not zero",
        before=NodeCost(count, 0, sizes[0]),
        after=NodeCost(count, 0, sizes[1]),
        figures=figures,
    )


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
    return found


def _sizes(prefix: str, encoding: Encoding) -> dict[str, Json]:
    names = {"gaps": "bytes", "indices": "bytes", "table": "table_bytes"}
    names["centroids"] = "codebook_bytes"
    return {f"{prefix}_{names[key]}": one.nbytes for key, one in encoding.tensors().items()}
