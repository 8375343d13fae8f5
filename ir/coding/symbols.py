"""One stream of symbols with its table, in any of the coders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.coding import ans, huffman
from shohin.ir.packing import pack_bits, unpack_bits

Coder: TypeAlias = Literal["plain", "huffman", "ans"]
CODERS: tuple[Coder, ...] = get_args(Coder)

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class _Method:
    """How a coder describes frequencies, and uses the description."""

    table_bits: int
    describe: Callable[[NDArray[np.integer]], Bytes]
    encode: Callable[[Bytes, Bytes], Bytes]
    decode: Callable[[Bytes, Bytes, int], Bytes]


_METHODS: Mapping[str, _Method] = {
    "huffman": _Method(4, huffman.code_lengths, huffman.encode, huffman.decode),
    "ans": _Method(6, ans.frequency_levels, ans.encode, ans.decode),
}


def encode_symbols(symbols: Bytes, alphabet: int, coder: Coder) -> dict[str, Tensor]:
    """Symbols as bytes.

    Args:
        symbols: uint8 ``[n]``, below `alphabet`.
        alphabet: number of different symbols there may be, 1 to 256.
        coder: ``plain`` for so many bits each.

    Returns:
        The ``stream``, and the ``table`` of frequencies unless the coder is plain.
    """
    if coder == "plain":
        return {"stream": torch.from_numpy(pack_bits(symbols, _width(alphabet)))}
    method = _METHODS[coder]
    table = method.describe(np.bincount(symbols, minlength=alphabet))
    return {
        "table": torch.from_numpy(pack_bits(table, method.table_bits)),
        "stream": torch.from_numpy(method.encode(symbols, table)),
    }


def decode_symbols(tensors: Mapping[str, Tensor], alphabet: int, coder: str, count: int) -> Bytes:
    """The symbols that `encode_symbols` was given.

    Raises:
        SpecError: when the coder is unknown, or the bytes are not of so many symbols.
        KeyError: when a tensor is missing.
    """
    stream = tensors["stream"].numpy()
    if coder == "plain":
        return unpack_bits(stream, _width(alphabet), count).astype(np.uint8)
    if coder not in _METHODS:
        raise SpecError("coder", f"expected {', '.join(CODERS)}, got '{coder}'")
    method = _METHODS[coder]
    table = unpack_bits(tensors["table"].numpy(), method.table_bits, alphabet)
    return method.decode(stream, table.astype(np.uint8), count)


def coded_bytes(symbols: Bytes, alphabet: int, coder: Coder) -> int:
    """Size of what `encode_symbols` gives."""
    return _size(encode_symbols(symbols, alphabet, coder))


def encode_smallest(
    symbols: Bytes, alphabet: int, coders: Sequence[Coder] = CODERS
) -> tuple[Coder, dict[str, Tensor]]:
    """What `encode_symbols` gives in the coder that takes the fewest bytes, the first of equals.

    Args:
        symbols: uint8 ``[n]``, below `alphabet`.
        alphabet: number of different symbols there may be, 1 to 256.
        coders: those to choose from.
    """
    coded = {coder: encode_symbols(symbols, alphabet, coder) for coder in coders}
    best = min(coders, key=lambda coder: _size(coded[coder]))
    return best, coded[best]


def entropy_bits(counts: NDArray[np.integer]) -> float:
    """Bits that symbols of given frequencies need at least, all together."""
    used = counts[counts > 0].astype(np.float64)
    total = float(used.sum())
    return float(-(used * np.log2(used / total)).sum()) if total else 0.0


def _width(alphabet: int) -> int:
    return max(1, (alphabet - 1).bit_length())


def _size(coded: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in coded.values())
