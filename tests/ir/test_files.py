import os
from pathlib import Path

import pytest

from shohin.errors import ArtifactError
from shohin.ir import atomic_path
from shohin.ir.files import make_folder


def test_a_new_file_appears_whole(tmp_path: Path):
    target = tmp_path / "net.bin"
    with atomic_path(target) as temporary:
        temporary.write_text("whole")
        assert temporary.suffix == ".bin"
        assert not target.exists()
    assert target.read_text() == "whole"
    assert os.listdir(tmp_path) == ["net.bin"]


def test_a_failure_leaves_the_old_file(tmp_path: Path):
    target = tmp_path / "net.bin"
    target.write_text("old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["net.bin"]


def test_permissions_of_the_old_file_stay(tmp_path: Path):
    target = tmp_path / "run"
    target.write_text("old")
    target.chmod(0o755)
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("name", "reason"), [("none/net.bin", "no such file or directory"), (".", "is a directory")]
)
def test_paths_that_cannot_be_written(tmp_path: Path, name, reason):
    target = tmp_path / name
    with pytest.raises(ArtifactError) as error, atomic_path(target):
        pass
    assert str(error.value).startswith(f"{target}: cannot be written: {reason}; choose a folder")


def test_folders_are_made(tmp_path: Path):
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError) as caught:
        make_folder(tmp_path / "file")
    assert str(caught.value) == (
        f"{tmp_path / 'file'}: cannot be made: file exists; choose a folder that you may write to"
    )
