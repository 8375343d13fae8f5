"""Coded weights come back bit for bit, and damaged ones do no harm."""

import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from decoder import DAMAGED, OK, ZIG, Decoder, build, framed
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shohin.backends.tvm.kernels.list_layout import ListLayout
from shohin.backends.tvm.weights import arrays
from shohin.backends.tvm.weights.arrays import array_jobs, lists_job, raw_job, words_jobs
from shohin.backends.tvm.weights.streams import gap_stream, stream
from shohin.ir.coding import Coder
from shohin.ir.container.varints import encode_varint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="runs the binaries it builds, which are for x86_64 Linux",
)

_dtypes = st.sampled_from(["float32", "uint8", "int16", "int64"])


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    return Decoder(tmp_path_factory.mktemp("decoder"))


def _weights(size: int, values: int, density: float, dtype: str, seed: int) -> NDArray[np.generic]:
    generator = np.random.default_rng(seed)
    table = (100 * generator.standard_normal(values)).astype(dtype)
    skewed = (values * generator.random(size) ** 3).astype(int)
    return np.where(generator.random(size) < density, table[skewed], 0).astype(dtype)


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 9000),
    st.sampled_from([1, 2, 3, 16, 200, 256, 300]),
    st.sampled_from([0.0, 0.01, 0.2, 0.9, 1.0]),
    _dtypes,
    st.integers(0, 99),
)
def test_arrays_come_back(
    decoder: Decoder, size: int, values: int, density: float, dtype: str, seed: int
) -> None:
    array = _weights(size, values, density, dtype, seed)
    status, found = decoder.decode(framed(*array_jobs(64, array)), 64 + array.nbytes)
    assert status == OK
    np.testing.assert_array_equal(found[64:], array.view(np.uint8))
    assert not found[:64].any()


def test_every_bit_of_a_number_counts(decoder: Decoder) -> None:
    array = np.array([0.0, -0.0, np.nan, -np.inf, 1e-45] * 50, np.float32)
    status, found = decoder.decode(framed(*array_jobs(0, array)), array.nbytes)
    assert status == OK
    np.testing.assert_array_equal(found, array.view(np.uint8))


def test_large_arrays_are_cut_for_threads(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE", 4096)
    array = _weights(300_001, 250, 1.0, "float32", 0)
    jobs = array_jobs(0, array)
    assert len(jobs) == 74
    for threads in (1, 2, 5):
        status, found = decoder.decode(framed(*jobs), array.nbytes, threads)
        assert status == OK
        np.testing.assert_array_equal(found, array.view(np.uint8))


@pytest.mark.parametrize("coder", ["plain", "huffman", "ans"])
@pytest.mark.parametrize("count", [1, 2, 5, 40, 2047, 2048, 2049, 7000])
def test_every_coder(decoder: Decoder, coder: Coder, count: int) -> None:
    symbols = _weights(count, 200, 0.8, "uint8", count).astype(np.uint8)
    table = np.arange(256, dtype=np.uint8)[::-1]
    job = bytes([1]) + b"".join(map(encode_varint, (0, 1, 1))) + stream(symbols, 256, [coder])
    status, found = decoder.decode(framed(job + table.tobytes()), count)
    assert status == OK
    np.testing.assert_array_equal(found, table[symbols])


@pytest.mark.parametrize(
    ("alphabet", "rare"), [(2, 0.02), (2, 0.3), (4, 0.05), (3, 0.05), (11, 0.02)]
)
@pytest.mark.parametrize("count", [9, 2047, 2048, 2049, 7001])
def test_symbols_that_share_codes(decoder: Decoder, alphabet: int, rare: float, count: int) -> None:
    generator = np.random.default_rng(count)
    symbols = np.where(generator.random(count) < rare, alphabet - 1, 0).astype(np.uint8)
    symbols[0] = 1
    table = np.arange(alphabet, dtype=np.uint8)[::-1]
    job = (
        bytes([1])
        + b"".join(map(encode_varint, (0, 1, 1)))
        + stream(symbols, alphabet, ["huffman"])
    )
    status, found = decoder.decode(framed(job + table.tobytes()), count)
    assert status == OK
    np.testing.assert_array_equal(found, table[symbols])
    # More symbols share a code than 8 bits hold; symbols beyond the alphabet; no such coder.
    place = 1 + 3
    for method in (1 | 3 << 2 if alphabet > 2 else 1 | 4 << 2, 0 | 1 << 2, 2 | 1 << 2, 3):
        other = job[:place] + bytes([method]) + job[place + 1 :]
        assert decoder.decode(framed(other + table.tobytes()), count)[0] == DAMAGED


@pytest.mark.parametrize("coder", [0, 1, 2])
def test_streams_of_nothing(decoder: Decoder, coder: int) -> None:
    table = bytes([1, 0][:coder])
    empty = bytes([coder]) + encode_varint(2) + encode_varint(0) + table + encode_varint(0)
    job = bytes([1]) + b"".join(map(encode_varint, (0, 1, 1))) + empty + bytes(2)
    assert decoder.decode(framed(job), 0)[0] == OK
    assert decoder.decode(framed(job[:-3] + encode_varint(1) + bytes(3)), 0)[0] == DAMAGED


_layouts = st.builds(
    ListLayout,
    taps=st.lists(st.integers(0, 50), min_size=1, max_size=9, unique=True).map(tuple),
    stride=st.integers(51, 200),
    channels=st.integers(1, 40),
    step=st.sampled_from([1, 4, 8]),
    paired=st.booleans(),
)


@settings(deadline=None, max_examples=120)
@given(
    _layouts,
    st.integers(1, 30),
    st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    st.sampled_from(["uint16", "int32"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_lists_come_back(
    decoder: Decoder,
    layout: ListLayout,
    lists: int,
    density: float,
    dtype: str,
    has_starts: bool,
    seed: int,
) -> None:
    # Filled-up entries can be told from others only where the distances of a list ascend.
    layout = replace(layout, taps=(0,), paired=False) if layout.step > 1 else layout
    kept = np.random.default_rng(seed).random(lists * layout.places) < density
    distance, start = layout.arrays(np.flatnonzero(kept), lists)
    entries, starts = distance.astype(dtype), start.astype(np.int32)
    place = -(-entries.nbytes // 64) * 64
    job = lists_job((0, place if has_starts else None), entries, starts, layout)
    assert job is not None
    status, found = decoder.decode(framed(job), place + starts.nbytes)
    assert status == OK
    np.testing.assert_array_equal(found[: entries.nbytes], entries.view(np.uint8))
    expected = starts.view(np.uint8) if has_starts else 0
    np.testing.assert_array_equal(found[place:], expected)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("words", [1, 700])
def test_words_come_back(
    decoder: Decoder, bits: int, words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "PIECE", 4096)
    per_word = 32 // bits
    indices = _weights(words * per_word, 1 << bits, 0.7, "int64", bits).astype(np.int64) % (
        1 << bits
    )
    packed = np.zeros(words, np.uint32)
    for place, part in enumerate(indices.reshape(words, per_word).T):
        packed |= part.astype(np.uint32) << np.uint32(place * bits)
    status, found = decoder.decode(framed(*words_jobs(64, packed, bits)), 64 + packed.nbytes)
    assert status == OK
    np.testing.assert_array_equal(found[64:], packed.view(np.uint8))


def test_arrays_that_are_no_lists_are_told() -> None:
    layout = ListLayout((0, 1), 10, 4)
    start = np.array([0, 2], np.int32)
    assert lists_job((0, None), np.array([0, 5], np.uint16), start, layout) is None
    assert lists_job((0, None), np.array([1, 0], np.uint16), start, layout) is None
    assert lists_job((0, None), np.array([0], np.uint16), start, layout) is None
    assert lists_job((0, None), np.array([0, 11], np.uint16), start, layout) is not None


@pytest.mark.parametrize(
    ("job", "problem"),
    [
        (raw_job(60, np.zeros(8, np.uint8)), "beyond the end"),
        (raw_job(1 << 62, np.zeros(8, np.uint8)), "far beyond the end"),
        (raw_job(0, np.zeros(8, np.uint8))[:-1], "cut off"),
        (bytes([5, 0, 0]), "of no known kind"),
        (bytes([4, 0, 0, 1]) + stream(np.zeros(32, np.uint8), 1), "indices of no bits"),
        (bytes([4, 0, 4, 2]) + stream(np.zeros(8, np.uint8), 16), "too few indices"),
        (bytes([1]) + b"".join(map(encode_varint, (0, 3, 1))), "elements of 3 bytes"),
        (array_jobs(2, np.repeat(np.arange(9, dtype=np.int32), 9))[0], "between elements"),
        (
            bytes([2, 0, 1, 8]) + gap_stream(np.array([8])) + b"\0\1",
            "a position behind the last",
        ),
        (bytes([2, 0, 1, 8]) + gap_stream(np.array([1, 2])) + b"\0\1", "too few values"),
        (bytes([2, 0, 1, 8]) + gap_stream(np.array([1])) + b"\0\1\1", "too many values"),
    ],
)
def test_damaged_jobs_are_refused(decoder: Decoder, job: bytes, problem: str) -> None:
    status, _ = decoder.decode(framed(job), 64)
    assert status == DAMAGED, problem


def test_a_length_beyond_the_end_is_refused(decoder: Decoder) -> None:
    for coded in (b"\x05\0", b"\xff" * 9 + b"\1", b"\x80"):
        assert decoder.decode(coded, 64)[0] == DAMAGED


def corpus() -> tuple[bytes, int]:
    """Coded weights of every kind, and their size."""
    values = [_weights(3000, 20, density, "float32", 1) for density in (1.0, 0.1)]
    floats = _weights(300, 256, 0.1, "float32", 2)
    jobs = [raw_job(0, np.arange(64, dtype=np.uint8))]
    jobs += [job for i, array in enumerate(values) for job in array_jobs(64 + 12000 * i, array)]
    jobs += array_jobs(24064, floats)
    for index, layout in enumerate(
        (ListLayout((0, 3, 9), 12, 20, paired=True), ListLayout((0,), 1, 60, step=4))
    ):
        kept = np.random.default_rng(index).random(18 * layout.places) < 0.2
        distance, start = layout.arrays(np.flatnonzero(kept), 18)
        place = 25600 + 4096 * index
        starts = (place + 3072, np.asarray(start, np.int32))
        job = lists_job((place, starts[0]), distance.astype(np.uint16), starts[1], layout)
        assert job is not None
        jobs.append(job)
    words = _weights(500, 250, 0.5, "int64", 3).astype(np.uint32)
    jobs += words_jobs(33792, words, 5)
    place = 33792 + words.nbytes
    for values, coder in ((2, "huffman"), (4, "huffman"), (200, "huffman"), (200, "ans")):
        indices = _weights(5000, values, 0.3, "uint8", 4) % values
        head = b"".join(map(encode_varint, (place, 1, 1)))
        jobs.append(bytes([1]) + head + stream(indices, values, [coder]) + bytes(range(values)))
        place += indices.size
    return framed(*jobs), place


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its sanitizers")
def test_damaged_weights_do_no_harm(decoder: Decoder, tmp_path: Path) -> None:
    coded, size = corpus()
    assert decoder.decode(coded, size)[0] == OK
    path, program = tmp_path / "coded.bin", tmp_path / "fuzz"
    path.write_bytes(coded)
    try:
        build(
            ["gcc", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover"], program
        )
    except subprocess.CalledProcessError as error:
        pytest.skip(f"gcc has no sanitizers here: {error.stderr.strip()[-200:]}")
    done = subprocess.run(
        [str(program), "20000", "1", str(size), str(path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    tries, refused = map(int, done.stdout.split())
    # Many bits are weights, whose damage cannot be seen; most of the frame's is.
    assert tries == 20_000
    assert 0.5 < refused / tries < 1


def test_the_harness_builds_without_warnings(tmp_path: Path) -> None:
    build(ZIG, tmp_path / "fuzz")
    done = subprocess.run([str(tmp_path / "fuzz")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")
