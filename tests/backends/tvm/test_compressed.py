"""Binaries whose weights are coded in the file: the same numbers, in fewer bytes."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_nets import captured, net
from torch import Tensor, nn

import shohin
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.csource import CODED_FILE
from shohin.backends.tvm.kernels.list_layout import ListLayout
from shohin.backends.tvm.lowering.memory import ConstantFile
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.trailer import append_trailer, read_trailer
from shohin.backends.tvm.weights.file import write_coded
from shohin.errors import ArtifactError, SpecError
from shohin.ir.container.varints import Cursor
from shohin.ir.program import Program

_SMALL = "prune{density=0.1}, share-weights{bits=4}, entropy-code"


def _image_net() -> nn.Module:
    """Dense and sparse convolutions, also strided and with an odd number of filters."""

    def function(s: nn.Module, x: Tensor) -> Tensor:
        x = s.last(s.third(s.second(s.first(x).relu()).relu()).relu())
        return s.head(x.flatten(1))

    return net(
        function,
        first=nn.Conv2d(3, 32, 3, padding=1),
        second=nn.Conv2d(32, 32, 3, padding=1, stride=2),
        third=nn.Conv2d(32, 17, 3, padding=1, dilation=1),
        last=nn.Conv2d(17, 24, 1),
        head=nn.Linear(24 * 36, 200),
    )


def _program(pipeline: str) -> Program:
    program = captured(_image_net(), (3, 12, 12), batch=1)
    return shohin.optimize(program, pipeline, drift=False).program if pipeline else program


def _both(program: Program, threads: int = 1) -> tuple[Binary, Binary]:
    target = CpuTarget(threads=threads)
    plain = compile_program(program, target, 1)
    return plain, compile_program(program, target, 1, weights="compressed")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("pipeline", "least"),
    [
        (_SMALL, 5.0),
        ("prune{density=0.1}", 1.3),
        ("prune{density=0.1 granularity=block}, share-weights{bits=4}", 4.0),
        ("share-weights{bits=8}", 3.0),
        ("share-weights{bits=4}", 5.0),
        ("prune{density=0.5}, share-weights{bits=5}", 4.0),
        ("", 1.0),
    ],
)
def test_equal_outputs_from_fewer_bytes(pipeline: str, least: float, threads: int) -> None:
    plain, coded = _both(_program(pipeline), threads)
    assert coded.constant_bytes == plain.constant_bytes == plain.info.weight_bytes
    assert plain.info.weight_bytes / coded.info.weight_bytes > least
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_array_equal(coded(x), plain(x))


def test_they_take_about_as_much_as_in_the_program_file() -> None:
    program = _program(_SMALL)
    _, coded = _both(program)
    encoded = sum(encoding.stored_bytes() for encoding in program.encodings.values())
    biases = sum(p.nbytes for p in program.module.parameters() if p.dim() == 1)
    assert coded.info.weight_bytes < 1.1 * (encoded + biases)


def test_starts_of_lists_are_made_once(tmp_path: Path) -> None:
    """Also where they take more bytes than the lists: two threads would write to one place."""
    layout = ListLayout((0,), 1, 8)
    distance, start = layout.arrays(np.array([3, 70, 200]), 32)
    constants = ConstantFile(tmp_path / "constants.bin")
    index = constants.add(lambda: distance.astype(np.uint16))
    constants.mark_lists(index, constants.add(lambda: start.astype(np.int32)), layout)
    coded = tmp_path / "coded.bin"
    write_coded(constants, coded, lambda _: None)
    jobs = Cursor(coded.read_bytes(), "jobs")
    length = jobs.varint()
    assert len(jobs.rest()) == length


def test_every_form_of_binary_carries_them(tmp_path: Path) -> None:
    plain, coded = _both(_program(_SMALL))
    saved = plain.constant_bytes - coded.info.weight_bytes
    for name in ("net.so", "net.a", "net.o", "net"):
        sizes = [one.save(tmp_path / name).stat().st_size for one in (plain, coded)]
        # The decoder and the table of its symbols take some.
        assert sizes[0] - sizes[1] > saved - 30_000
    loaded = Binary.load(coded.save(tmp_path / "again.so"))
    assert loaded.info.weights == "compressed"
    assert loaded.info.weight_bytes == coded.info.weight_bytes
    x = np.ones((1, 3, 12, 12), np.float32)
    np.testing.assert_array_equal(loaded(x), plain(x))


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    program = _program(_SMALL)
    files = []
    for name in ("a.so", "b.so"):
        binary = compile_program(program, CpuTarget(), 1, weights="compressed")
        files.append(binary.save(tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_instances_of_several_threads_share_the_weights() -> None:
    plain, coded = _both(_program(_SMALL))
    x = np.ones((1, 3, 12, 12), np.float32)
    expected, found = plain(x), []

    def work() -> None:
        found.append(coded(x))

    for _ in range(2):  # All instances of the first round are gone in the second.
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 8
    for one in found:
        np.testing.assert_array_equal(one, expected)


def test_damaged_weights_are_refused_by_the_binary_itself(tmp_path: Path) -> None:
    _, coded = _both(_program(_SMALL))
    path = coded.save(tmp_path / "net.so")
    assert coded._build is not None
    weights = (coded._build.parts.folder / CODED_FILE).read_bytes()
    metadata, content = read_trailer(path), path.read_bytes()
    at = content.index(weights)
    damaged = bytearray(content[: len(content) - 1000])
    damaged[at] ^= 0x7F  # The length of the first job.
    path.write_bytes(damaged)
    append_trailer(path, metadata)
    with pytest.raises(ArtifactError, match="the coded weights are damaged: copy the binary again"):
        Binary.load(path)(np.ones((1, 3, 12, 12), np.float32))


def test_forms_that_are_not_known() -> None:
    program = _program("")
    with pytest.raises(SpecError, match="weights: expected 'plain' or 'compressed', got 'small'"):
        shohin.compile(program, weights="small")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="weights: expected 'plain', got 'compressed'"):
        shohin.compile(program, "reference", weights="compressed")
