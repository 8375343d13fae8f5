"""The tensors of one weight as the content of a section."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.container.varints import Cursor, encode_varint

# Numbers in files: never change one, add at the end.
_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
_NAMES = (
    "values",
    "gaps",
    "table",
    "centroids",
    "indices",
    "values/values",
    "values/centroids",
    "values/indices",
    "values/table",
    "codes",
    "rows",
    "scales/values",
)
_SPELLED = 255
_MOST_AXES = 64


def encode_tensors(ordinal: int, tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a section, in pieces.

    Args:
        ordinal: of the weight among those of the file.
        tensors: by name.

    Raises:
        SpecError: when a file cannot hold a tensor's element type.
    """
    yield encode_varint(ordinal)
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise SpecError(f"tensor '{name}'", f"a file cannot hold elements of {tensor.dtype}")
        sizes = b"".join(encode_varint(size) for size in tensor.shape)
        yield _encode_name(name) + bytes([_DTYPES.index(tensor.dtype), tensor.dim()]) + sizes
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data.cast("B")


def decode_tensors(content: bytes) -> tuple[int, dict[str, Tensor]]:
    """Ordinal and tensors of a section.

    Raises:
        SpecError: when the content is malformed.
    """
    cursor = Cursor(content, "tensors")
    ordinal = cursor.varint()
    tensors: dict[str, Tensor] = {}
    while not cursor.done():
        name = _decode_name(cursor)
        if name in tensors:
            raise SpecError("tensors", f"two are named '{name}'")
        tensors[name] = _decode_tensor(cursor)
    return ordinal, tensors


def _decode_tensor(cursor: Cursor) -> Tensor:
    kind, axes = cursor.byte(), cursor.byte()
    if kind >= len(_DTYPES) or axes > _MOST_AXES:
        raise SpecError("tensors", f"unknown element type {kind}, or {axes} axes")
    shape = [cursor.varint() for _ in range(axes)]
    dtype = _DTYPES[kind]
    data = cursor.take(math.prod(shape) * dtype.itemsize)
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool and max(data) > 1:
        raise SpecError("tensors", "a truth value is neither 0 nor 1")
    # A copy, because the bytes may lie at any address, and cannot be written to.
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _encode_name(name: str) -> bytes:
    if name in _NAMES:
        return bytes([_NAMES.index(name)])
    text = name.encode()
    return bytes([_SPELLED]) + encode_varint(len(text)) + text


def _decode_name(cursor: Cursor) -> str:
    code = cursor.byte()
    if code == _SPELLED:
        try:
            return bytes(cursor.take(cursor.varint())).decode()
        except UnicodeDecodeError as error:
            raise SpecError("tensors", "a name is no text") from error
    if code >= len(_NAMES):
        raise SpecError("tensors", f"unknown name {code}")
    return _NAMES[code]
