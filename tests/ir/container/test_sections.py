import hashlib
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import ArtifactError, SpecError
from shohin.ir.container.sections import MAGIC, VERSION, SectionReader, SectionWriter
from shohin.ir.container.text import deflate, inflate
from shohin.ir.container.varints import Cursor, encode_varint


def write(path, sections):
    with path.open("wb") as file:
        writer = SectionWriter(file)
        for tag, parts in sections:
            writer.section(tag, parts)
        writer.end()
    return path


@pytest.fixture
def written(tmp_path):
    return write(tmp_path / "net", [("HEAD", [b"hello"]), ("none", []), ("WGHT", [b"a", b"bc"])])


def read(path):
    with path.open("rb") as file:
        reader = SectionReader(file, path)
        reader.check_digest()
        return {section.tag: reader.content(section) for section in reader.sections}


def test_the_bytes_are_those_of_the_format(written):
    head = b"HEAD\x05hello"
    data = MAGIC + VERSION.to_bytes(2, "little") + head
    data += zlib.crc32(head).to_bytes(4, "little")
    data += b"none\x00" + zlib.crc32(b"none\x00").to_bytes(4, "little")
    data += b"WGHT\x03abc" + zlib.crc32(b"WGHT\x03abc").to_bytes(4, "little")
    done = b"DONE\x20" + hashlib.sha256(data).digest()
    assert written.read_bytes() == data + done + zlib.crc32(done).to_bytes(4, "little")


def test_sections_come_back(written):
    found = read(written)
    assert [*found] == ["HEAD", "none", "WGHT", "DONE"]
    assert (found["HEAD"], found["none"], found["WGHT"]) == (b"hello", b"", b"abc")


def test_required_sections_begin_with_a_capital(written):
    with written.open("rb") as file:
        sections = SectionReader(file, written).sections
    assert [section.required for section in sections] == [True, False, True, True]


def test_every_truncation_is_refused(written):
    data = written.read_bytes()
    for length in range(len(data)):
        written.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match=r"truncated|not a program file"):
            read(written)


def test_every_flipped_bit_is_refused(written):
    data = written.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            written.write_bytes(broken)
            with pytest.raises(ArtifactError):
                read(written)


def test_bytes_after_the_end_are_refused(written):
    size = len(written.read_bytes())
    written.write_bytes(written.read_bytes() + b"!")
    with pytest.raises(ArtifactError, match=f"expected its end at byte {size}, found 1 more"):
        read(written)


def test_huge_lengths_are_refused(written):
    data = written.read_bytes()
    for length in (2**63 - 1, 2**62, 1 << 40):
        written.write_bytes(data[:14] + encode_varint(length) + data[15:])
        with pytest.raises(
            ArtifactError, match=r"truncated: expected \d+ bytes or more for section"
        ):
            read(written)


@pytest.mark.parametrize(("version", "hint"), [(3, "update shohin"), (1, "write it again with")])
def test_other_versions_are_refused(written, version, hint):
    data = bytearray(written.read_bytes())
    data[8] = version
    written.write_bytes(data)
    with pytest.raises(ArtifactError, match=f"expected format version 2, got {version}; {hint}"):
        read(written)


def test_a_file_that_shrinks_while_it_is_read(written):
    with written.open("rb", buffering=0) as file:
        reader = SectionReader(file, written)
        with written.open("r+b") as other:
            other.truncate(30)
        with pytest.raises(ArtifactError, match="truncated while it was read: expected"):
            reader.check_digest()


@given(st.integers(0, 2**63 - 1))
def test_varints_come_back(number):
    data = encode_varint(number)
    assert len(data) == max(1, -(-number.bit_length() // 7))
    cursor = Cursor(data, "test")
    assert cursor.varint() == number
    assert cursor.done()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x80\x00", "longer than it needs to be"),
        (b"\xff" * 10, "expected a number of at most 9 bytes"),
        (b"\x80", "expected 1 more bytes, found 0"),
    ],
)
def test_malformed_varints(data, problem):
    with pytest.raises(SpecError, match=problem):
        Cursor(data, "test").varint()


@pytest.mark.parametrize("number", [-1, 2**63])
def test_numbers_that_are_no_varints(number):
    with pytest.raises(SpecError, match=f"expected 0 to 2\\^63 - 1, got {number}"):
        encode_varint(number)


@given(st.text())
def test_texts_come_back(text):
    assert inflate(deflate(text)) == text


def test_usual_texts_take_little():
    text = '"name":"relu_1","op":"call_function","target":"aten.relu.default"},'
    assert len(deflate(text)) < 16


def test_texts_of_false_lengths_are_refused():
    data = deflate("x" * 5000)
    bare = data[2:]
    for length in (0, 10, 4999, 5001):
        with pytest.raises(SpecError, match=f"expected a text of {length} bytes, got"):
            inflate(encode_varint(length) + bare)
    with pytest.raises(SpecError, match="bytes cannot hold a text of 1099511627776"):
        inflate(encode_varint(1 << 40) + bare)
    with pytest.raises(SpecError, match="malformed"):
        inflate(b"\x03\xff\xff\xff")
    with pytest.raises(SpecError, match="expected a text of"):
        inflate(data + b"more")
