"""Weight sharing: a weight of few different values (Deep Compression, arXiv 1510.00149)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.coding import Coder, decode_symbols, encode_symbols
from shohin.ir.encodings import (
    Encoding,
    Json,
    check_coder,
    register_encoding,
    same_bits,
    shape_of,
)

MOST_CENTROIDS = 256


@register_encoding("codebook")
@dataclass(frozen=True, eq=False)
class Codebook(Encoding):
    """Every element is one of a few centroids; its index is stored.

    Attributes:
        centroids: the values, 1 to 256 of them, of the weight's element type.
        indices: uint8 tensor of the weight's shape.
        coder: how the indices are stored.
    """

    centroids: Tensor
    indices: Tensor
    coder: Coder = "plain"

    def __post_init__(self) -> None:
        count = self.centroids.numel()
        if self.centroids.dim() != 1 or not 1 <= count <= MOST_CENTROIDS:
            shape = list(self.centroids.shape)
            raise SpecError("codebook", f"expected 1 to {MOST_CENTROIDS} centroids, got {shape}")
        if self.indices.dtype != torch.uint8:
            raise SpecError("codebook indices", f"expected uint8, got {self.indices.dtype}")
        largest = int(self.indices.max()) if self.indices.numel() else 0
        if largest >= count:
            raise SpecError("codebook indices", f"expected below {count}, got {largest}")
        check_coder(self.coder)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return tuple(self.indices.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the dense tensor."""
        return self.centroids.dtype

    @property
    def bits(self) -> int:
        """Width of an index before entropy coding, 1 to 8."""
        return max(1, (self.centroids.numel() - 1).bit_length())

    def materialise(self) -> Tensor:
        """The centroid of every element."""
        flat = self.indices.reshape(-1).int()  # Indexing by bytes is a mask to PyTorch.
        return self.centroids.detach().index_select(0, flat).reshape(self.indices.shape)

    def nonzeros(self) -> int:
        """Number of elements whose centroid is not zero."""
        counts = np.bincount(self.indices.reshape(-1).numpy(), minlength=self.centroids.numel())
        return int(counts[(self.centroids.detach() != 0).numpy()].sum())

    def stored_bytes(self) -> int:
        """Centroids and indices."""
        return self._stored_bytes

    @cached_property
    def _stored_bytes(self) -> int:
        if self.coder == "plain":
            table = self._narrow().nbytes
            return table + -(-self.indices.numel() * self.bits // 8)
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def _narrow(self) -> Tensor:
        """The centroids in half precision where that loses nothing."""
        centroids = self.centroids.detach()
        half = centroids.half()
        return half if same_bits(half.to(centroids.dtype), centroids) else centroids

    def describe(self) -> str:
        """``codebook of 32``."""
        coder = "" if self.coder == "plain" else f"{self.coder} "
        return f"{coder}codebook of {self.centroids.numel()}"

    def tensors(self) -> Mapping[str, Tensor]:
        """The centroids, the indices, and the table of their frequencies if they are coded."""
        flat = self.indices.reshape(-1).numpy()
        coded = encode_symbols(flat, self.centroids.numel(), self.coder)
        parts = {"centroids": self._narrow(), "indices": coded["stream"]}
        return parts if self.coder == "plain" else {**parts, "table": coded["table"]}

    def attributes(self) -> Mapping[str, Json]:
        """The shape, the element type, and the coder."""
        dtype = str(self.dtype).removeprefix("torch.")
        coder: dict[str, Json] = {} if self.coder == "plain" else {"coder": self.coder}
        return {"shape": list(self.shape), "dtype": dtype, **coder}

    @classmethod
    def from_parts(
        cls,
        tensors: Mapping[str, Tensor],
        attributes: Mapping[str, Json],
        children: Mapping[str, Encoding],
    ) -> "Codebook":
        """Rebuild from the centroids and the stored indices."""
        dtype = getattr(torch, str(attributes["dtype"]), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SpecError("codebook", f"expected a floating-point type, got {attributes}")
        shape, coder = shape_of(attributes), check_coder(attributes.get("coder", "plain"))
        centroids = tensors["centroids"].to(dtype)
        parts = {"stream": tensors["indices"]}
        if coder != "plain":
            parts["table"] = tensors["table"]
        symbols = decode_symbols(parts, centroids.numel(), coder, math.prod(shape))
        return cls(centroids, torch.from_numpy(symbols).reshape(shape), coder)
