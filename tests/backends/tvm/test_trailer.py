from pathlib import Path

import pytest

from shohin.backends.tvm.trailer import append_trailer, read_trailer
from shohin.errors import ArtifactError
from shohin.ir.encodings import Json

_METADATA: dict[str, Json] = {"name": "net", "sizes": [1, 2], "text": "é"}
_FOREIGN = "expected a binary that shohin made, found another file or a truncated one"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.so"
    path.write_bytes(b"\x7fELF" + bytes(3000))
    append_trailer(path, _METADATA)
    return path


def test_round_trip(file: Path) -> None:
    assert read_trailer(file) == _METADATA
    assert file.read_bytes().startswith(b"\x7fELF" + bytes(3000))


def test_equal_contents_give_equal_files(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\x7fELF" + bytes(3000))
    append_trailer(other, dict(reversed(_METADATA.items())))
    assert other.read_bytes() == file.read_bytes()


def test_every_flipped_byte_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for place in [0, 5, 2000, *range(3000, len(whole))]:
        broken = bytearray(whole)
        broken[place] ^= 1
        file.write_bytes(broken)
        with pytest.raises(ArtifactError):
            read_trailer(file)


def test_corruption(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError) as caught:
        read_trailer(file)
    assert str(caught.value) == (
        f"{file}: is corrupted: its checksum does not match; copy it again"
    )


@pytest.mark.parametrize("kept", [0, 1, 16, 55, 56, 1000, 3000, -1])
def test_truncation(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ArtifactError) as caught:
        read_trailer(file)
    assert str(caught.value) == (f"{file}: {_FOREIGN}; compile it again, or copy it again in full")


def test_a_cut_at_the_front(file: Path) -> None:
    file.write_bytes(file.read_bytes()[1:])
    with pytest.raises(ArtifactError, match="checksum"):
        read_trailer(file)


def test_only_the_tail(file: Path) -> None:
    file.write_bytes(file.read_bytes()[-56:])
    with pytest.raises(ArtifactError, match="checksum"):
        read_trailer(file)


def test_something_appended(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(ArtifactError, match=_FOREIGN):
        read_trailer(file)


def test_foreign(tmp_path: Path) -> None:
    path = tmp_path / "other.so"
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(ArtifactError, match=_FOREIGN):
        read_trailer(path)


def test_missing(tmp_path: Path) -> None:
    path = tmp_path / "none.so"
    with pytest.raises(ArtifactError) as caught:
        read_trailer(path)
    assert str(caught.value) == f"{path}: cannot be read: No such file or directory"


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: Is a directory"):
        read_trailer(tmp_path)
