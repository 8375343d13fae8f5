"""The last bytes of a shared library or executable: what it is, and that it is whole.

After the linker's own content come a JSON object, its length (8 bytes, little endian), the
SHA-256 of everything before it (32 bytes), and a magic text (16 bytes). Loaders of the operating
system ignore what follows their content.
"""

import hashlib
import json
import struct
from pathlib import Path

from shohin.errors import ArtifactError
from shohin.ir.encodings import Json

MAGIC = b"shohin-binary-1\n"
_TAIL = struct.Struct("<Q32s16s")


def append_trailer(path: Path, metadata: dict[str, Json]) -> None:
    """Add the trailer to a file."""
    text = json.dumps(metadata, sort_keys=True).encode()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(text)
        length = struct.pack("<Q", len(text))
        file.write(length)
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(digest + MAGIC)


def read_trailer(path: Path) -> dict[str, Json]:
    """Check that a file is one of ours and whole, and give its metadata.

    Raises:
        ArtifactError: when it is missing, foreign, truncated or corrupted.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - _TAIL.size))
            tail = file.read(_TAIL.size)
    except OSError as error:
        raise ArtifactError(str(path), f"cannot be read: {error.strerror}") from error
    if len(tail) < _TAIL.size or not tail.endswith(MAGIC):
        raise ArtifactError(
            str(path),
            "expected a binary that shohin made, found another file or a truncated one",
            "compile it again, or copy it again in full",
        )
    length, digest, _ = _TAIL.unpack(tail)
    end = size - _TAIL.size
    if length > end or digest != _digest(path, end + 8):
        raise ArtifactError(str(path), "is corrupted: its checksum does not match", "copy it again")
    with path.open("rb") as file:
        file.seek(end - length)
        metadata: dict[str, Json] = json.loads(file.read(length))
    return metadata


def _digest(path: Path, size: int) -> bytes:
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        left = size
        while left:
            chunk = file.read(min(left, 1 << 20))
            hasher.update(chunk)
            left -= len(chunk)
    return hasher.digest()
