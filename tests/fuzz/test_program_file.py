"""Program files whose sections are damaged and then sealed again with the right checksums."""

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import shohin
from shohin.errors import ArtifactError
from shohin.ir.container.sections import SectionReader, SectionWriter
from shohin.ir.container.text import deflate, inflate
from shohin.ir.container.varints import encode_varint
from shohin.ir.program import tensor_of, weight_names

Sections = tuple[tuple[str, bytes], ...]


@cache
def _sections() -> Sections:
    """Those of a file in which every kind of encoding and coder occurs."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 40), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 8)).eval()
    program = shohin.capture(model, (torch.ones(2, 2, 6, 6),), name="fuzz")
    names = [name for name in weight_names(program) if name.endswith("weight")]
    densities = f"prune{{densities={{{names[1]}: 0.2, {names[2]}: 0.5}}}}"
    shared = f"share-weights{{bits=4 exclude=[{names[2]}]}}"
    result = shohin.optimize(program, f"{densities}, {shared}, entropy-code", drift=False)
    with tempfile.TemporaryDirectory() as folder:
        path = result.save(Path(folder) / "net.shohin")
        with path.open("rb") as file:
            reader = SectionReader(file, path)
            return tuple((one.tag, reader.content(one)) for one in reader.sections[:-1])


def _write(sections: Sections, path: Path) -> Path:
    with path.open("wb") as file:
        writer = SectionWriter(file)
        for tag, content in sections:
            writer.section(tag, [content])
        writer.end()
    return path


def _read_all(path: Path) -> None:
    """Load a program, and every weight of it."""
    program = shohin.load(path)
    for name in weight_names(program):
        tensor_of(program.module, name).sum()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "net.shohin"


def _read_or_refuse(sections: Sections, path: Path) -> None:
    message = str(path)
    try:
        _read_all(_write(sections, path))
    except ArtifactError as error:
        message = str(error)
    assert str(path) in message


def test_the_file_is_sound(path: Path) -> None:
    _read_all(_write(_sections(), path))


_fuzz = settings(
    deadline=None, max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@_fuzz
@given(
    which=st.integers(0, 100),
    place=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 6),
    inserted=st.binary(max_size=6),
)
def test_damaged_sections_are_read_or_refused(
    path: Path, which: int, place: float, removed: int, inserted: bytes
) -> None:
    sections = list(_sections())
    index = which % len(sections)
    tag, content = sections[index]
    start = int(place * len(content))
    sections[index] = (tag, content[:start] + inserted + content[start + removed :])
    _read_or_refuse(tuple(sections), path)


@_fuzz
@given(data=st.data())
def test_damaged_headers_are_read_or_refused(path: Path, data: st.DataObject) -> None:
    (tag, content), *others = _sections()
    header = json.loads(inflate(content))
    _damage(header, data.draw)
    _read_or_refuse(((tag, deflate(json.dumps(header, sort_keys=True))), *others), path)


@_fuzz
@given(order=st.permutations(range(5)), count=st.integers(1, 8))
def test_missing_and_moved_sections_are_refused(path: Path, order: list[int], count: int) -> None:
    sections = _sections()
    chosen = tuple(sections[i % len(sections)] for i in [*order, 0][:count])
    _read_or_refuse(chosen, path)


def _damage(header: dict[str, Any], draw: Callable[..., Any]) -> None:
    """Replace something of a JSON object, at any depth."""
    holder: Any = header
    while True:
        key = draw(
            st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        )
        inner = holder[key]
        if not isinstance(inner, (dict, list)) or not inner or draw(st.booleans()):
            break
        holder = inner
    if draw(st.booleans()) and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw(
            st.none()
            | st.booleans()
            | st.integers(-(2**70), 2**70)
            | st.floats()
            | st.text(max_size=5)
            | st.lists(st.integers(-5, 5), max_size=3)
            | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
        )


def test_a_length_of_many_bytes(path: Path) -> None:
    whole = _write(_sections(), path).read_bytes()
    path.write_bytes(whole[:14] + encode_varint((1 << 63) - 1) + whole[16:])
    with pytest.raises(ArtifactError, match=str(path)):
        shohin.load(path)
