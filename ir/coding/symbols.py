"""One stream of symbols with its table, in any of the coders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.coding import ans, groups
from shohin.ir.coding.groups import width_of
from shohin.ir.packing import pack_bits, unpack_bits

Coder: TypeAlias = Literal["plain", "huffman", "ans"]
CODERS: tuple[Coder, ...] = get_args(Coder)

Bytes: TypeAlias = NDArray[np.uint8]


_LEVEL_BITS = 6


@dataclass(frozen=True)
class _Method:
    """How a coder makes a table and a stream of symbols, and symbols of these."""

    encode: Callable[[Bytes, int], tuple[Bytes, Bytes]]
    decode: Callable[[Bytes, Bytes, int, int], Bytes]


def _encode_ans(symbols: Bytes, alphabet: int) -> tuple[Bytes, Bytes]:
    levels = ans.frequency_levels(np.bincount(symbols, minlength=alphabet))
    return pack_bits(levels, _LEVEL_BITS), ans.encode(symbols, levels)


def _decode_ans(table: Bytes, stream: Bytes, alphabet: int, count: int) -> Bytes:
    levels = unpack_bits(table, _LEVEL_BITS, alphabet).astype(np.uint8)
    return ans.decode(stream, levels, count)


_METHODS: Mapping[str, _Method] = {
    "huffman": _Method(groups.encode, groups.decode),
    "ans": _Method(_encode_ans, _decode_ans),
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
        return {"stream": torch.from_numpy(pack_bits(symbols, width_of(alphabet)))}
    table, stream = _METHODS[coder].encode(symbols, alphabet)
    return {"table": torch.from_numpy(table), "stream": torch.from_numpy(stream)}


def decode_symbols(tensors: Mapping[str, Tensor], alphabet: int, coder: str, count: int) -> Bytes:
    """The symbols that `encode_symbols` was given.

    Raises:
        SpecError: when the coder is unknown, or the bytes are none, or not of so many symbols.
        KeyError: when a tensor is missing.
    """
    stream = _bytes(tensors["stream"])
    if coder == "plain":
        return unpack_bits(stream, width_of(alphabet), count).astype(np.uint8)
    if coder not in _METHODS:
        raise SpecError("coder", f"expected {', '.join(CODERS)}, got '{coder}'")
    return _METHODS[coder].decode(_bytes(tensors["table"]), stream, alphabet, count)


def _bytes(tensor: Tensor) -> Bytes:
    if tensor.dtype != torch.uint8 or tensor.dim() != 1:
        found = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        raise SpecError("coded symbols", f"expected a vector of bytes, got {found}")
    held: Bytes = tensor.numpy()
    return held


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


def _size(coded: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in coded.values())
