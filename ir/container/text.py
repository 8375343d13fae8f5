"""The header's text, deflated with a dictionary of what headers usually say."""

import zlib
from functools import cache
from importlib.resources import files

from shohin.errors import SpecError
from shohin.ir.container.varints import Cursor, encode_varint

_MOST_RATIO = 1100
"""Deflate makes at most 1032 bytes of one."""

_WINDOW = -15
"""Raw deflate: the section has a checksum of its own."""


def deflate(text: str) -> bytes:
    """The length of a text, and the text deflated."""
    raw = text.encode()
    machine = zlib.compressobj(9, zlib.DEFLATED, _WINDOW, 9, zlib.Z_DEFAULT_STRATEGY, _usual())
    return encode_varint(len(raw)) + machine.compress(raw) + machine.flush()


def inflate(content: bytes) -> str:
    """The text that `deflate` was given.

    Raises:
        SpecError: when the content is malformed.
    """
    cursor = Cursor(content, "header")
    length = cursor.varint()
    data = cursor.rest()
    if length > _MOST_RATIO * len(data):
        raise SpecError("header", f"{len(data)} bytes cannot hold a text of {length}")
    machine = zlib.decompressobj(_WINDOW, _usual())
    try:
        raw = machine.decompress(data, length + 1)
        text = raw.decode()
    except (zlib.error, UnicodeDecodeError) as error:
        raise SpecError("header", f"malformed: {error}") from error
    if len(raw) != length or not machine.eof or machine.unused_data:
        raise SpecError("header", f"expected a text of {length} bytes, got {len(raw)}")
    return text


@cache
def _usual() -> bytes:
    return files(__package__).joinpath("usual.txt").read_bytes()
