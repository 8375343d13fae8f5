"""Entropy coding of small whole numbers: indices of codebooks, gaps between non-zeros."""

from shohin.ir.coding.entropy import entropy_bits
from shohin.ir.coding.symbols import (
    CODERS,
    Coder,
    coded_bytes,
    decode_symbols,
    encode_smallest,
    encode_symbols,
)

__all__ = [
    "CODERS",
    "Coder",
    "coded_bytes",
    "decode_symbols",
    "encode_smallest",
    "encode_symbols",
    "entropy_bits",
]
