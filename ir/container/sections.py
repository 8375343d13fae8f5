"""Sections of a file: a tag, a length, the content, a checksum.

::

    magic     8 bytes    89 53 48 4F 48 49 4E 0A
    version   2 bytes    lowest first
    sections
      tag     4 letters; one that begins with a small letter may be skipped by who does not know it
      length  a varint, bytes of the content
      content
      check   4 bytes, CRC-32 of tag, length and content, lowest first
    the last section, DONE, holds the SHA-256 of all bytes before it
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

from shohin.errors import ArtifactError, SpecError
from shohin.ir.container.varints import MOST_BYTES, Cursor, encode_varint

MAGIC = b"\x89SHOHIN\n"
VERSION = 2
END = "DONE"
BROKEN = "write it again, or take an intact copy"

_PIECE = 1 << 20
_CHECK_BYTES = 4

Content: TypeAlias = bytes | memoryview


class SectionWriter:
    """Writes a file section by section.

    Args:
        file: an empty binary file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._write(MAGIC + VERSION.to_bytes(2, "little"))

    def section(self, tag: str, parts: Iterable[Content]) -> None:
        """Write one section.

        Args:
            tag: four ASCII letters.
            parts: the content, in pieces; none of them is copied.
        """
        views = [memoryview(part).cast("B") for part in parts]
        head = tag.encode("ascii") + encode_varint(sum(len(view) for view in views))
        check = zlib.crc32(head)
        self._write(head)
        for view in views:
            check = zlib.crc32(view, check)
            self._write(view)
        self._write(check.to_bytes(_CHECK_BYTES, "little"))

    def end(self) -> None:
        """Write the last section."""
        self.section(END, [self._digest.digest()])

    def _write(self, data: Content) -> None:
        self._digest.update(data)
        self._file.write(data)


@dataclass(frozen=True)
class Section:
    """Where a section lies.

    Attributes:
        tag: four letters.
        start: offset of the tag.
        content: offset of the content.
        length: of the content, bytes.
    """

    tag: str
    start: int
    content: int
    length: int

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.content + self.length + _CHECK_BYTES

    @property
    def required(self) -> bool:
        """Whether a reader that does not know the tag must refuse the file."""
        return self.tag[0].isupper()


class SectionReader:
    """Reads the sections of an open file in any order; contents only when they are asked for.

    Args:
        file: a binary file that can be moved about in.
        path: its name, for errors.

    Raises:
        ArtifactError: when the file is foreign, of a newer version, or its sections do not fill
            it exactly.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = file.seek(0, os.SEEK_END)
        self.version = self._check_start()
        self.sections = tuple(self._scan())

    def content(self, section: Section) -> bytes:
        """The content of a section, its checksum compared.

        Raises:
            ArtifactError: when it is not what was written.
        """
        head = self._read(section.start, section.content - section.start)
        content = self._read(section.content, section.length)
        check = self._read(section.content + section.length, _CHECK_BYTES)
        if zlib.crc32(content, zlib.crc32(head)).to_bytes(_CHECK_BYTES, "little") != check:
            raise self._broken(section, "the checksum is wrong")
        return content

    def check_digest(self) -> None:
        """Compare the SHA-256 of the whole file.

        Raises:
            ArtifactError: when it is another.
        """
        last = self.sections[-1]
        digest = hashlib.sha256()
        for start in range(0, last.start, _PIECE):
            digest.update(self._read(start, min(_PIECE, last.start - start)))
        if self.content(last) != digest.digest():
            raise self._broken(last, "the SHA-256 of the file is another")

    def _check_start(self) -> int:
        start = self._read(0, min(self._size, len(MAGIC) + 2))
        if start[: len(MAGIC)] != MAGIC[: len(start)]:
            raise ArtifactError(str(self._path), "not a program file")
        if len(start) < len(MAGIC) + 2:
            raise ArtifactError(str(self._path), f"truncated after {self._size} bytes", BROKEN)
        version = int.from_bytes(start[len(MAGIC) :], "little")
        if version != VERSION:
            problem = f"expected format version {VERSION}, got {version}"
            hint = "update shohin" if version > VERSION else "write it again with this shohin"
            raise ArtifactError(str(self._path), problem, hint)
        return version

    def _scan(self) -> Iterator[Section]:
        place = len(MAGIC) + 2
        while True:
            section = self._section_at(place)
            yield section
            place = section.end
            if section.tag == END:
                break
        if place != self._size:
            problem = f"expected its end at byte {place}, found {self._size - place} more bytes"
            raise ArtifactError(str(self._path), problem, BROKEN)

    def _section_at(self, place: int) -> Section:
        head = self._read(place, min(4 + MOST_BYTES, self._size - place))
        cursor = Cursor(head, f"section at byte {place}")
        try:
            tag = bytes(cursor.take(4)).decode("ascii")
            length = cursor.varint()
        except (SpecError, UnicodeDecodeError) as error:
            problem = f"truncated or corrupted: {error}"
            raise ArtifactError(str(self._path), problem, BROKEN) from error
        if not tag.isalpha():
            problem = f"corrupted: section at byte {place} has no tag"
            raise ArtifactError(str(self._path), problem, BROKEN)
        section = Section(tag, place, place + 4 + len(encode_varint(length)), length)
        if section.end > self._size:
            problem = f"expected {section.end} bytes or more for section {tag}, got {self._size}"
            raise ArtifactError(str(self._path), f"truncated: {problem}", BROKEN)
        return section

    def _read(self, place: int, count: int) -> bytes:
        self._file.seek(place)
        data = self._file.read(count)
        if len(data) != count:
            problem = f"truncated while it was read: expected {count} bytes at {place}"
            raise ArtifactError(str(self._path), f"{problem}, got {len(data)}", BROKEN)
        return data

    def _broken(self, section: Section, problem: str) -> ArtifactError:
        where = f"section {section.tag} at byte {section.start}"
        return ArtifactError(str(self._path), f"corrupted: {where}: {problem}", BROKEN)
