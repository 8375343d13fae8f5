"""Fixed-point numbers: ``value = integer * 2**-fraction``, and weights that are stored as such.

Formats, rounding and saturation are defined here once, for passes, operators and backends (Qiu et
al., "Going Deeper with Embedded FPGA Platform for Convolutional Neural Network", FPGA 2016).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError, near_name_hint
from shohin.ir.coding import Coder, decode_symbols, encode_symbols
from shohin.ir.encodings import Encoding, Json, check_coder, register_encoding, shape_of
from shohin.ir.packing import pack_bits, unpack_bits

Rounding: TypeAlias = Literal["nearest-even", "truncate"]
"""``nearest-even`` takes the nearest integer, of two equally near ones the even one; ``truncate``
the next lower one, as an arithmetic shift to the right does."""

LEAST_BITS, MOST_BITS = 2, 16
MOST_CODED_BITS = 8
"""Width of integers that can be entropy coded."""

FRACTIONS = range(-64, 65)
"""Fractional lengths: scales that single precision has, with room for the integers."""

MOST_APART = 36
"""Bits between the radixes of summands: 16-bit ones have exact sums in double precision."""


def check_rounding(rounding: str) -> Rounding:
    """The rounding mode of that name.

    Raises:
        SpecError: when there is none.
    """
    for known in get_args(Rounding):
        if known == rounding:
            return known  # type: ignore[no-any-return]
    hint = near_name_hint(rounding, get_args(Rounding))
    raise SpecError("rounding", f"unknown mode '{rounding}'", hint)


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest integer of a two's complement number."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def quantize(
    values: Tensor,
    bits: int,
    fraction: int,
    rounding: Rounding = "nearest-even",
    *,
    symmetric: bool = False,
) -> Tensor:
    """Round to the nearest numbers that a format has; beyond its range to its limits.

    NaN becomes 0. All steps but the rounding are exact.

    Args:
        values: floating-point tensor.
        bits: width of the integer.
        fraction: fractional length.
        rounding: how to round.
        symmetric: leave out the least integer, so that every number has its negative.
    """
    low, high = limits(bits)
    scaled = values.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf) * 2.0**fraction
    rounded = scaled.round() if rounding == "nearest-even" else scaled.floor()
    clamped: Tensor = rounded.clamp(-high if symmetric else low, high)
    # Adding 0.0 makes a 0.0 of every -0.0: integers have but one zero.
    return (clamped + 0.0) * 2.0**-fraction


def is_on_grid(values: Tensor, bits: int, fraction: int) -> bool:
    """Whether a format has every one of the numbers."""
    return torch.equal(quantize(values, bits, fraction), values)


def integers(values: Tensor, fraction: int) -> Tensor:
    """The integers, int64, of numbers that lie on a grid."""
    return (values.detach().double() * 2.0**fraction).round().long()


def largest_sums(weights: Tensor, biases: Tensor | None, data_bits: int) -> Tensor:
    """The largest absolute sum of products that any data can give, for each output: float64.

    Args:
        weights: integers `[outputs, ...]`.
        biases: integers at the radix of the products `[outputs]`, or None.
        data_bits: width of the integers that the weights are multiplied with.
    """
    found = weights.double().abs().flatten(1).sum(1) * float(1 << (data_bits - 1))
    return found if biases is None else found + biases.double().abs()


@register_encoding("fixed-point")
@dataclass(frozen=True, eq=False)
class FixedPoint(Encoding):
    """Every element is an integer of a few bits times a power of two.

    Attributes:
        codes: the integers, int16 tensor of the weight's shape.
        bits: width of an integer, 2 to 16.
        fractions: fractional lengths, one for all elements or one for each row of axis 0.
        element_type: of the dense tensor.
        coder: how the integers are stored; those of more than 8 bits are plain.
    """

    codes: Tensor
    bits: int
    fractions: tuple[int, ...]
    element_type: torch.dtype = torch.float32
    coder: Coder = "plain"

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int16:
            raise SpecError("fixed-point codes", f"expected int16, got {self.codes.dtype}")
        if not LEAST_BITS <= self.bits <= MOST_BITS:
            raise SpecError(
                "fixed-point bits", f"expected {LEAST_BITS} to {MOST_BITS}, got {self.bits}"
            )
        rows = self.codes.shape[0] if self.codes.dim() else 1
        if len(self.fractions) not in (1, rows):
            expected = f"expected 1 fractional length or {rows}"
            raise SpecError("fixed-point fractions", f"{expected}, got {len(self.fractions)}")
        outside = [one for one in self.fractions if one not in FRACTIONS]
        if outside:
            expected = f"expected {FRACTIONS[0]} to {FRACTIONS[-1]}"
            raise SpecError("fixed-point fractions", f"{expected}, got {outside[0]}")
        low, high = limits(self.bits)
        if self.codes.numel() and not low <= int(self.codes.min()) <= int(self.codes.max()) <= high:
            problem = f"expected {low} to {high}, got {int(self.codes.min())} to "
            raise SpecError("fixed-point codes", f"{problem}{int(self.codes.max())}")
        if check_coder(self.coder) != "plain" and self.bits > MOST_CODED_BITS:
            expected = f"expected at most {MOST_CODED_BITS} bits to code, got {self.bits}"
            raise SpecError("fixed-point coder", expected)

    @classmethod
    def from_values(cls, values: Tensor, bits: int, fractions: Sequence[int]) -> "FixedPoint":
        """Encode numbers that lie on the grid."""
        scale = _scales(tuple(fractions), values.dim())
        codes = (values.detach().double() * scale).round().to(torch.int16)
        return cls(codes, bits, tuple(fractions), values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""
        return self.element_type

    def materialise(self) -> Tensor:
        """Integers times powers of two."""
        scale = 1 / _scales(self.fractions, self.codes.dim())
        return (self.codes.double() * scale).to(self.element_type)

    def nonzeros(self) -> int:
        """Number of integers that are not zero."""
        return int(torch.count_nonzero(self.codes))

    def stored_bytes(self) -> int:
        """Integers in so many bits each, or as they are coded."""
        return self._stored_bytes

    @cached_property
    def _stored_bytes(self) -> int:
        if self.coder == "plain":
            return -(-self.codes.numel() * self.bits // 8)
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def describe(self) -> str:
        """``8-bit fixed point /7``; several fractional lengths as their range."""
        low, high = min(self.fractions), max(self.fractions)
        fraction = f"{low}" if low == high else f"{low}..{high}"
        coder = "" if self.coder == "plain" else f"{self.coder} "
        return f"{coder}{self.bits}-bit fixed point /{fraction}"

    def symbols(self) -> NDArray[np.uint16]:
        """The integers as whole numbers from 0, in row-major order."""
        low, _ = limits(self.bits)
        flat = self.codes.reshape(-1).numpy().astype(np.int32) - low
        return flat.astype(np.uint16)

    def tensors(self) -> Mapping[str, Tensor]:
        """The integers in so many bits each, or coded with the table of their frequencies."""
        symbols = self.symbols()
        if self.coder == "plain":
            return {"values": torch.from_numpy(pack_bits(symbols, self.bits))}
        coded = encode_symbols(symbols.astype(np.uint8), 1 << self.bits, self.coder)
        return {"values": coded["stream"], "table": coded["table"]}

    def attributes(self) -> Mapping[str, Json]:
        """The shape, the format, the element type, and the coder."""
        dtype = str(self.element_type).removeprefix("torch.")
        coder: dict[str, Json] = {} if self.coder == "plain" else {"coder": self.coder}
        shape: list[Json] = [*self.shape]
        fractions: list[Json] = [*self.fractions]
        return {"shape": shape, "bits": self.bits, "fractions": fractions, "dtype": dtype, **coder}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, Encoding],
    ) -> "FixedPoint":
        """Rebuild from the stored integers."""
        shape, bits = shape_of(attributes), attributes["bits"]
        fractions, coder = attributes["fractions"], check_coder(attributes.get("coder", "plain"))
        dtype = getattr(torch, str(attributes["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SpecError("fixed-point", f"expected a float type, got {attributes['dtype']!r}")
        if type(bits) is not int or not LEAST_BITS <= bits <= MOST_BITS:
            raise SpecError("fixed-point bits", f"expected a width, got {bits!r}")
        if not isinstance(fractions, list) or any(type(one) is not int for one in fractions):
            raise SpecError("fixed-point fractions", f"expected a list, got {fractions!r}")
        count = math.prod(shape)
        if coder == "plain":
            symbols: NDArray[np.unsignedinteger] = unpack_bits(
                tensors["values"].numpy(), bits, count
            )
        elif bits > MOST_CODED_BITS:
            raise SpecError("fixed-point coder", f"expected none for {bits} bits, got '{coder}'")
        else:
            parts = {"stream": tensors["values"], "table": tensors["table"]}
            symbols = decode_symbols(parts, 1 << bits, coder, count)
        low, _ = limits(bits)
        codes = torch.from_numpy((symbols.astype(np.int32) + low).astype(np.int16))
        given = tuple(int(str(one)) for one in fractions)
        return cls(codes.reshape(shape), bits, given, dtype, coder)


def _scales(fractions: tuple[int, ...], axes: int) -> Tensor:
    """Powers of two to multiply with, along axis 0 where there are several."""
    scales = torch.tensor([2.0**one for one in fractions], dtype=torch.float64)
    return scales.reshape(-1, *[1] * (axes - 1)) if len(fractions) > 1 else scales
