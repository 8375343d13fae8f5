from functools import partial
from pathlib import Path

import numpy as np
import pytest
from harness import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.backends.tvm.lowering.memory import (
    ALIGNMENT,
    Buffer,
    ConstantFile,
    align,
    plan_arena,
)

_lives = st.tuples(st.integers(1, 5000), st.integers(0, 30), st.integers(0, 10))


def _buffer(size: int, first: int, length: int) -> Buffer:
    buffer = Buffer("arena", size)
    buffer.touch(first)
    buffer.touch(first + length)
    return buffer


@settings(deadline=None)
@given(st.lists(_lives, max_size=25))
def test_no_two_live_buffers_overlap(lives: list[tuple[int, int, int]]) -> None:
    buffers = [_buffer(*life) for life in lives]
    total = plan_arena(buffers)
    for index, one in enumerate(buffers):
        assert one.offset % ALIGNMENT == 0
        assert one.offset + one.bytes <= total
        for other in buffers[:index]:
            together = one.first <= other.last and other.first <= one.last
            apart = (
                one.offset + one.bytes <= other.offset or other.offset + other.bytes <= one.offset
            )
            assert apart or not together
    calls = range(max((b.last for b in buffers), default=0) + 1)
    needed = max(sum(b.bytes for b in buffers if b.first <= call <= b.last) for call in calls)
    assert needed <= total <= sum(align(b.bytes) for b in buffers)


def test_memory_is_used_again() -> None:
    first, second, third = (_buffer(1000, at, 1) for at in (0, 2, 4))
    assert plan_arena([first, second, third]) == align(1000)
    assert {b.offset for b in (first, second, third)} == {0}


def test_a_call_does_not_read_what_it_overwrites() -> None:
    assert plan_arena([_buffer(64, 0, 1), _buffer(64, 1, 1)]) == 128


def test_only_the_arena_is_planned() -> None:
    unused = Buffer("arena", 100)
    kinds = [Buffer(kind, 100, first=0, last=3) for kind in ("input", "output", "constant")]
    assert plan_arena([unused, *kinds]) == 0
    assert plan_arena([]) == 0


def test_touch_widens_a_life() -> None:
    buffer = Buffer("arena", 4)
    for call in (5, 3, 9):
        buffer.touch(call)
    assert (buffer.first, buffer.last) == (5, 9)


def test_constants_are_aligned_and_kept_once(tmp_path: Path) -> None:
    constants = ConstantFile(tmp_path / "constants.bin")
    arrays: list[Array] = [
        np.arange(3, dtype=np.float32),
        np.arange(5, dtype=np.int64),
        np.ones((2, 40), np.float32),
        np.array(7, np.float32),
        np.zeros(1, np.uint8),
    ]
    places = [constants.add(array.view) for array in arrays]
    again = [constants.add(array.copy) for array in arrays]
    content = (tmp_path / "constants.bin").read_bytes()
    assert len(content) == constants.size
    for array, place, other in zip(arrays, places, again, strict=True):
        start = place.buffer.offset
        assert start % ALIGNMENT == 0
        assert place.buffer is other.buffer
        assert place.buffer.bytes == array.nbytes
        assert content[start : start + array.nbytes] == array.tobytes()
    assert len({place.buffer.offset for place in places}) == len(arrays)


def test_equal_bytes_of_another_length_are_kept_apart(tmp_path: Path) -> None:
    constants = ConstantFile(tmp_path / "constants.bin")
    short, long = (constants.add(partial(np.zeros, n, np.float32)) for n in (3, 4))
    assert short.buffer is not long.buffer


def test_a_transposed_constant_is_written_row_by_row(tmp_path: Path) -> None:
    constants = ConstantFile(tmp_path / "constants.bin")
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    constants.add(lambda: array)
    expected = np.ascontiguousarray(array).tobytes()
    assert (tmp_path / "constants.bin").read_bytes() == expected


def test_an_empty_constant(tmp_path: Path) -> None:
    constants = ConstantFile(tmp_path / "constants.bin")
    assert constants.add(lambda: np.zeros((0, 3), np.float32)).buffer.bytes == 0


@pytest.mark.parametrize(("size", "aligned"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_align(size: int, aligned: int) -> None:
    assert align(size) == aligned
