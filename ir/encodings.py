"""Encodings: how a weight is stored.

An encoding is the one contract between the passes (that choose it), the container (that stores
it) and the backends (that pick a kernel by it). It can `materialise()` the dense tensor, bit for
bit the tensor in the module, and tells its size in bytes.

Encodings compose: the values of a `Sparse` weight are themselves an encoding (of a vector), so a
codebook over the non-zeros of a sparse weight is `Sparse(mask, Codebook(...))`.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import ArtifactError, SpecError, near_name_hint
from shohin.ir.coding import CODERS, Coder, decode_symbols, encode_symbols
from shohin.ir.gaps import best_gap_bits, count_codes, gap_codes, gaps_of, mask_of
from shohin.ir.packing import MOST_BITS, pack_bits, unpack_bits

Json: TypeAlias = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

_MOST_CODED_BITS = 8
_PIECE = 1 << 22
"""Elements of a tensor that are compared together, so that no copy of it is made."""


class Encoding(ABC):
    """How one weight is stored. Immutable.

    A subclass is complete when `decode(encode(e))` gives an equal encoding: it names its tensors
    (`tensors`), its plain values (`attributes`) and its inner encodings (`children`), and can be
    rebuilt from these three (`from_parts`).
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""

    @abstractmethod
    def materialise(self) -> Tensor:
        """The dense tensor, bit for bit the one in the program's module."""

    def is_stored_form_of(self, tensor: Tensor) -> bool:
        """Whether `materialise` gives a tensor bit for bit."""
        return same_bits(self.materialise(), tensor)

    @abstractmethod
    def stored_bytes(self) -> int:
        """Size in bytes of the stored form, indices and tables included, before entropy coding."""

    @abstractmethod
    def describe(self) -> str:
        """One short text for printers and reports, e.g. ``sparse 10.0%``."""

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors that define this encoding, by name, children's left out."""

    def attributes(self) -> Mapping[str, Json]:
        """The plain values that define this encoding."""
        return {}

    def children(self) -> Mapping[str, "Encoding"]:
        """The inner encodings, by name."""
        return {}

    @classmethod
    @abstractmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, "Encoding"],
    ) -> "Encoding":
        """Rebuild the encoding from what the three methods above gave."""

    def nonzeros(self) -> int:
        """Number of weights that are not zero."""
        return int(torch.count_nonzero(self.materialise()))

    def parameters(self) -> int:
        """Number of elements of the dense tensor."""
        return math.prod(self.shape)


_KINDS: dict[str, type[Encoding]] = {}
EncodingType = TypeVar("EncodingType", bound=type[Encoding])


def register_encoding(kind: str) -> Callable[[EncodingType], EncodingType]:
    """Class decorator that gives an encoding its `kind` and makes `decode` know it.

    Raises:
        SpecError: when another class has that kind already.
    """

    def register(encoding: EncodingType) -> EncodingType:
        known = _KINDS.setdefault(kind, encoding)
        if known.__qualname__ != encoding.__qualname__:
            raise SpecError(kind, f"this encoding is {known.__qualname__} already")
        encoding.kind = kind
        return encoding

    return register


@register_encoding("dense")
@dataclass(frozen=True, eq=False)
class Dense(Encoding):
    """Every element stored as it is."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""
        return self.values.dtype

    def materialise(self) -> Tensor:
        """The tensor itself."""
        return self.values

    def stored_bytes(self) -> int:
        """Elements times their width."""
        return self.values.numel() * self.values.element_size()

    def describe(self) -> str:
        """``dense``."""
        return "dense"

    def tensors(self) -> Mapping[str, Tensor]:
        """The values."""
        return {"values": self.values}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, Encoding],
    ) -> "Dense":
        """Rebuild from the values."""
        return cls(tensors["values"])


@register_encoding("sparse")
@dataclass(frozen=True, eq=False)
class Sparse(Encoding):
    """Only the elements under a mask are stored, with their positions.

    The stored form is the relative index of Deep Compression: the gap to the previous non-zero
    in `gap_bits` bits, with fillers for longer gaps (see `shohin.ir.gaps`).

    Attributes:
        mask: bool tensor of the weight's shape, true where an element is kept.
        values: encoding of the kept elements, a vector in row-major order.
        gap_bits: width of a stored gap, 1 to 16; at most 8 where gaps are entropy coded.
        coder: how the gaps are stored.
    """

    mask: Tensor
    values: Encoding
    gap_bits: int = 8
    coder: Coder = "plain"

    def __post_init__(self) -> None:
        kept = int(torch.count_nonzero(self.mask))
        if self.mask.dtype != torch.bool:
            raise SpecError("sparse mask", f"expected bool, got {self.mask.dtype}")
        if self.values.shape != (kept,):
            raise SpecError("sparse values", f"expected shape ({kept},), got {self.values.shape}")
        most = MOST_BITS if self.coder == "plain" else _MOST_CODED_BITS
        if not 1 <= self.gap_bits <= most:
            raise SpecError("sparse gap_bits", f"expected 1 to {most}, got {self.gap_bits}")
        check_coder(self.coder)

    @classmethod
    def from_dense(cls, weight: Tensor, mask: Tensor, gap_bits: int | None = None) -> "Sparse":
        """Encode a weight whose elements outside the mask are zero.

        Args:
            weight: dense tensor, already zero outside the mask.
            mask: bool tensor of the same shape.
            gap_bits: width of a stored gap; None for the width that needs the fewest bits.
        """
        width = best_gap_bits(mask) if gap_bits is None else gap_bits
        return cls(mask, Dense(weight.detach()[mask]), width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.mask.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""
        return self.values.dtype

    @property
    def density(self) -> float:
        """Share of the elements that are kept, 0 to 1."""
        return self.values.parameters() / max(1, self.mask.numel())

    def materialise(self) -> Tensor:
        """The dense tensor, zero outside the mask."""
        dense = torch.zeros(self.shape, dtype=self.dtype)
        dense[self.mask] = self.values.materialise()
        return dense

    def is_stored_form_of(self, tensor: Tensor) -> bool:
        """Whether `materialise` gives a tensor bit for bit; found without making it."""
        if tensor.shape != self.mask.shape or tensor.dtype != self.dtype:
            return False
        flat, values = tensor.detach().reshape(-1), self.values.materialise()
        start = 0
        masks = torch.split(self.mask.reshape(-1), _PIECE)
        for piece, mask in zip(torch.split(flat, _PIECE), masks, strict=True):
            end = start + int(torch.count_nonzero(mask))
            dense = torch.zeros_like(piece).masked_scatter_(mask, values[start:end])
            if not same_bits(dense, piece):
                return False
            start = end
        return True

    def nonzeros(self) -> int:
        """Number of kept elements that are not zero."""
        return self.values.nonzeros()

    def codes(self) -> int:
        """Number of stored gaps, fillers included."""
        return count_codes(gaps_of(self.mask), self.gap_bits)

    def stored_bytes(self) -> int:
        """Kept values and gaps, fillers included."""
        return self.values.stored_bytes() + self._gap_bytes

    @cached_property
    def _gap_bytes(self) -> int:
        if self.coder == "plain":
            return -(-self.codes() * self.gap_bits // 8)
        return sum(tensor.numel() for tensor in self.tensors().values())

    def describe(self) -> str:
        """``sparse 10.0%``, followed by how the values are stored unless they are dense."""
        inner = "" if isinstance(self.values, Dense) else f" of {self.values.describe()}"
        coder = "" if self.coder == "plain" else f" {self.coder}"
        return f"sparse {100 * self.density:.1f}%{coder}{inner}"

    def tensors(self) -> Mapping[str, Tensor]:
        """The gaps, and the table of their frequencies where they are entropy coded."""
        codes = gap_codes(self.mask, self.gap_bits)
        if self.coder == "plain":
            return {"gaps": torch.from_numpy(pack_bits(codes, self.gap_bits))}
        coded = encode_symbols(codes.astype(np.uint8), 1 << self.gap_bits, self.coder)
        return {"gaps": coded["stream"], "table": coded["table"]}

    def attributes(self) -> Mapping[str, Json]:
        """The shape, and the width, number and coder of the gaps."""
        return {
            "gap_bits": self.gap_bits,
            "codes": self.codes(),
            "shape": list(self.shape),
            **({} if self.coder == "plain" else {"coder": self.coder}),
        }

    def children(self) -> Mapping[str, Encoding]:
        """The encoding of the kept values."""
        return {"values": self.values}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, Encoding],
    ) -> "Sparse":
        """Rebuild from the gaps and the values."""
        bits, count = (int(str(attributes[name])) for name in ("gap_bits", "codes"))
        coder = check_coder(attributes.get("coder", "plain"))
        if not 1 <= bits <= (MOST_BITS if coder == "plain" else _MOST_CODED_BITS):
            raise SpecError("sparse", f"malformed attributes {dict(attributes)}")
        if coder == "plain":
            codes: NDArray[np.unsignedinteger] = unpack_bits(tensors["gaps"].numpy(), bits, count)
        else:
            parts = {"stream": tensors["gaps"], "table": tensors["table"]}
            codes = decode_symbols(parts, 1 << bits, coder, count)
        mask = mask_of(codes, bits, shape_of(attributes))
        return cls(mask, children["values"], bits, coder)


def shape_of(attributes: Mapping[str, Json]) -> tuple[int, ...]:
    """The shape among an encoding's plain values.

    Raises:
        SpecError: when it is no list of sizes.
    """
    sizes = attributes.get("shape")
    if not isinstance(sizes, list) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise SpecError("encoding shape", f"expected sizes, got {sizes!r}")
    return tuple(int(str(size)) for size in sizes)


def check_coder(coder: object) -> Coder:
    """The coder of that name.

    Raises:
        SpecError: when there is none.
    """
    found = next((known for known in CODERS if known == coder), None)
    if found is None:
        raise SpecError("coder", f"unknown '{coder}'", near_name_hint(str(coder), CODERS))
    return found


def same_bits(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors have the same shape, type and bits; NaN equals the same NaN."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    bits = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in (one, two)]
    return torch.equal(*(vector.view(torch.uint8) for vector in bits))


def encode(encoding: Encoding) -> tuple[Json, dict[str, Tensor]]:
    """Split an encoding in a JSON description and its tensors, for a file.

    Returns:
        What `describe_encoding` and `encoded_tensors` give.
    """
    return describe_encoding(encoding), encoded_tensors(encoding)


def describe_encoding(encoding: Encoding) -> Json:
    """The plain values of an encoding and of its children, for a file."""
    children = {name: describe_encoding(child) for name, child in encoding.children().items()}
    return {
        "kind": encoding.kind,
        "attributes": dict(encoding.attributes()),
        "children": children,
    }


def encoded_tensors(encoding: Encoding) -> dict[str, Tensor]:
    """The tensors of an encoding and of its children, by their path (``values/indices``)."""
    tensors = dict(encoding.tensors())
    for name, child in encoding.children().items():
        inner = encoded_tensors(child)
        tensors |= {f"{name}/{key}": tensor for key, tensor in inner.items()}
    return tensors


def decode(description: Json, tensors: Mapping[str, Tensor]) -> Encoding:
    """Rebuild an encoding from what `encode` gave.

    Raises:
        ArtifactError: when the description is malformed or names an unknown kind.
    """
    if not isinstance(description, dict):
        raise ArtifactError("encoding", f"expected an object, got {json.dumps(description)[:60]}")
    kind = str(description.get("kind"))
    if kind not in _KINDS:
        raise ArtifactError("encoding", f"unknown kind '{kind}'", near_name_hint(kind, [*_KINDS]))
    inner, attributes = description.get("children"), description.get("attributes")
    if not isinstance(inner, dict) or not isinstance(attributes, dict):
        raise ArtifactError(f"encoding '{kind}'", "expected objects 'children' and 'attributes'")
    children = {name: decode(child, _under(name, tensors)) for name, child in inner.items()}
    try:
        return _KINDS[kind].from_parts(tensors, attributes, children)
    except (KeyError, ValueError, SpecError) as error:
        raise ArtifactError(f"encoding '{kind}'", f"cannot be rebuilt: {error}") from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}
