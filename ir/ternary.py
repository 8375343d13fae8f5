"""Ternary weights: every element is a positive value, zero, or a negative one.

As trained ternary quantization makes them (Zhu et al., "Trained Ternary Quantization", arXiv
1612.01064).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.coding import Coder, decode_symbols, encode_symbols
from shohin.ir.encodings import Dense, Encoding, Json, check_coder, register_encoding, shape_of

_ALPHABET = 3


@register_encoding("ternary")
@dataclass(frozen=True, eq=False)
class Ternary(Encoding):
    """Every element is ``positive``, 0 or ``-negative``; which of them takes two bits.

    Attributes:
        codes: int8 tensor of the weight's shape; 1, 0 and -1.
        scales: encoding of ``[positive, negative]``, a vector of two for all elements, or one row
            of two for each row of axis 0. Above 0 as they are trained; anything finite will do.
        rows: what the values of each row of axis 0 are multiplied by on top, a vector of the
            scales' element type, as a folded batch normalisation has it; None for 1.
        coder: how the codes are stored; ``plain`` for two bits each.
    """

    codes: Tensor
    scales: Encoding
    rows: Tensor | None = None
    coder: Coder = "plain"

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8:
            raise SpecError("ternary codes", f"expected int8, got {self.codes.dtype}")
        # Not by absolute values: that of the least int8 is itself.
        low, high = map(int, self.codes.aminmax()) if self.codes.numel() else (0, 0)
        if low < -1 or high > 1:
            raise SpecError("ternary codes", f"expected -1, 0 and 1, got {low} to {high}")
        if not self.dtype.is_floating_point:
            raise SpecError("ternary scales", f"expected a floating-point type, got {self.dtype}")
        count = self.codes.shape[0] if self.codes.dim() else 1
        if self.scales.shape not in ((2,), (count, 2)):
            expected = f"expected shape (2,) or ({count}, 2)"
            raise SpecError("ternary scales", f"{expected}, got {self.scales.shape}")
        if self.rows is not None and self.rows.shape != (count,):
            found = tuple(self.rows.shape)
            raise SpecError("ternary rows", f"expected shape ({count},), got {found}")
        if self.rows is not None and self.rows.dtype != self.dtype:
            raise SpecError("ternary rows", f"expected {self.dtype}, got {self.rows.dtype}")
        check_coder(self.coder)

    @classmethod
    def of(cls, codes: Tensor, positive: float, negative: float, dtype: torch.dtype) -> "Ternary":
        """A weight of one pair of values."""
        return cls(codes, Dense(torch.tensor([positive, negative], dtype=dtype)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""
        return self.scales.dtype

    def pairs(self) -> Tensor:
        """What 1 and -1 stand for in each row, the second without its sign: ``[rows or 1, 2]``."""
        pairs = self.scales.materialise().detach().reshape(-1, 2)
        return pairs if self.rows is None else pairs * self.rows.detach().reshape(-1, 1)

    def materialise(self) -> Tensor:
        """The dense tensor."""
        positive, negative = self.pairs().unbind(1)
        axes = (-1, *[1] * (self.codes.dim() - 1)) if self.codes.dim() else ()
        zero = torch.zeros((), dtype=self.dtype)
        below = torch.where(self.codes < 0, zero - negative.reshape(axes), zero)
        return torch.where(self.codes > 0, positive.reshape(axes), below)

    def times_rows(self, factors: Tensor) -> "Ternary":
        """The weight whose rows of axis 0 are multiplied by numbers, plainly stored ones.

        Args:
            factors: a vector; products are computed in float64 and rounded once.
        """
        if self.scales.shape == (2,):
            held = torch.ones_like(factors) if self.rows is None else self.rows.detach()
            rows = held.double() * factors.double()
            return replace(self, rows=rows.to(self.dtype))
        pairs = self.scales.materialise().detach().double() * factors.double().reshape(-1, 1)
        if self.rows is not None:
            pairs = pairs * self.rows.detach().double().reshape(-1, 1)
        return replace(self, scales=Dense(pairs.to(self.dtype)), rows=None)

    def nonzeros(self) -> int:
        """Number of codes that are not zero."""
        return int(torch.count_nonzero(self.codes))

    @property
    def density(self) -> float:
        """Share of the codes that are not zero, 0 to 1."""
        return self.nonzeros() / max(1, self.codes.numel())

    def stored_bytes(self) -> int:
        """Codes, their table where they are coded, scales and rows."""
        return self._stored_bytes

    @cached_property
    def _stored_bytes(self) -> int:
        own = sum(tensor.nbytes for tensor in self.tensors().values())
        return own + self.scales.stored_bytes()

    def code_bits(self) -> float:
        """Stored bits of codes and their table for each element."""
        own = self.tensors()
        taken = sum(own[name].nbytes for name in ("codes", "table") if name in own)
        return 8 * taken / max(1, self.codes.numel())

    def describe(self) -> str:
        """``ternary 61.2%``, the share of elements that are not zero."""
        coder = "" if self.coder == "plain" else f"{self.coder} "
        rows = "" if self.rows is None and self.scales.shape == (2,) else " by row"
        inner = "" if isinstance(self.scales, Dense) else f" of {self.scales.describe()}"
        return f"{coder}ternary {100 * self.density:.1f}%{rows}{inner}"

    def symbols(self) -> NDArray[np.uint8]:
        """The codes as whole numbers from 0, in row-major order."""
        return (self.codes.reshape(-1).numpy() + 1).astype(np.uint8)

    def tensors(self) -> Mapping[str, Tensor]:
        """The codes, the table of their frequencies if they are coded, and the rows."""
        coded = encode_symbols(self.symbols(), _ALPHABET, self.coder)
        parts = {"codes": coded["stream"]}
        if self.coder != "plain":
            parts["table"] = coded["table"]
        if self.rows is not None:
            parts["rows"] = self.rows.detach()
        return parts

    def attributes(self) -> Mapping[str, Json]:
        """The shape, and the coder."""
        shape: list[Json] = [*self.shape]
        return {"shape": shape, **({} if self.coder == "plain" else {"coder": self.coder})}

    def children(self) -> Mapping[str, Encoding]:
        """The encoding of the scales."""
        return {"scales": self.scales}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, Encoding],
    ) -> "Ternary":
        """Rebuild from the stored codes and the scales."""
        shape, coder = shape_of(attributes), check_coder(attributes.get("coder", "plain"))
        parts = {"stream": tensors["codes"]}
        if coder != "plain":
            parts["table"] = tensors["table"]
        symbols = decode_symbols(parts, _ALPHABET, coder, math.prod(shape))
        codes = torch.from_numpy(symbols.astype(np.int8) - 1).reshape(shape)
        return cls(codes, children["scales"], tensors.get("rows"), coder)
