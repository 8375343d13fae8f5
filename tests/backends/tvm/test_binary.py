import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Array
from small_nets import captured, net
from torch import Tensor, nn

from shohin.backends.tvm import binary as module
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.manifest import manifest_of
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.trailer import append_trailer
from shohin.errors import ArtifactError, InputError, SpecError, UnsupportedError


def _net() -> nn.Module:
    return net(
        lambda s, x, y: (s.l(s.c(x).relu().flatten(1)) + y, y.argmax(1)),
        c=nn.Conv2d(3, 20, 3, padding=1),
        l=nn.Linear(720, 5),
    )


@pytest.fixture(scope="module")
def binary() -> Binary:
    return compile_program(captured(_net(), (3, 6, 6), (5,)), CpuTarget(threads=2), 2)


@pytest.fixture(scope="module")
def single() -> Binary:
    return compile_program(captured(net(lambda s, x: x.relu() * 2), (3,)), CpuTarget(), 2)


def _inputs(seed: int = 0, batch: int = 2) -> list[Array]:
    generator = np.random.default_rng(seed)
    shapes = [(batch, 3, 6, 6), (batch, 5)]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def _expected(inputs: list[Array]) -> list[Array]:
    with torch.no_grad():
        results = _net()(*(torch.from_numpy(array) for array in inputs))
    return [result.numpy() for result in results]


def _agree(found: list[Array], expected: list[Array]) -> None:
    # 720 products of magnitude 0.3 and 27 below them: 750 roundings of sums of about 10.
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_array_equal(found[1], expected[1])


def test_numpy_in_numpy_out(binary: Binary) -> None:
    inputs = _inputs()
    results = binary(*inputs)
    assert isinstance(results, tuple)
    assert [type(result) for result in results] == [np.ndarray, np.ndarray]
    _agree(list(results), _expected(inputs))


def test_torch_in_torch_out(binary: Binary) -> None:
    inputs = _inputs()
    results = binary(*(torch.from_numpy(array).requires_grad_() for array in inputs))
    assert all(isinstance(result, Tensor) for result in results)
    _agree([result.numpy() for result in results], _expected(inputs))


def test_one_output_is_no_tuple(single: Binary) -> None:
    x = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
    np.testing.assert_array_equal(single(x), np.maximum(x, 0) * 2)
    assert isinstance(single(torch.from_numpy(x)), Tensor)


def test_results_are_not_overwritten_by_the_next_run(single: Binary) -> None:
    first = single(np.ones((2, 3), np.float32))
    single(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(first, np.full((2, 3), 2))


def test_inputs_in_any_memory(binary: Binary) -> None:
    inputs = _inputs()
    expected = binary(*inputs)
    image = np.ascontiguousarray(inputs[0].transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    raw = np.zeros(image.size + 1, np.float32)
    shifted = raw[1:].reshape(image.shape)
    shifted[...] = image
    flipped = image[:, :, ::-1].copy()[:, :, ::-1]
    readonly = image.copy()
    readonly.flags.writeable = False
    channels_last = torch.from_numpy(inputs[0]).to(memory_format=torch.channels_last).numpy()
    for other in (image, shifted, flipped, readonly, channels_last):
        for found, wanted in zip(binary(other, inputs[1]), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_wrong_count(binary: Binary) -> None:
    with pytest.raises(InputError) as caught:
        binary.run(_inputs()[:1])
    assert str(caught.value) == (
        "net: expected 2 inputs (inputs_0: float32[2,3,6,6], inputs_1: float32[2,5]), got 1"
    )


def test_wrong_shape(single: Binary) -> None:
    with pytest.raises(InputError) as caught:
        single(np.zeros((2, 4), np.float32))
    assert str(caught.value) == (
        "input 'inputs_0': expected float32[2,3], got float32[2,4]; "
        "reshape it, or compile the model for this shape"
    )


def test_wrong_batch(single: Binary) -> None:
    with pytest.raises(InputError) as caught:
        single(np.zeros((6, 3), np.float32))
    assert str(caught.value) == (
        "input 'inputs_0': expected float32[2,3], got float32[6,3]; "
        "compile with batch=6, or use run_batches"
    )


@pytest.mark.parametrize("dtype", ["float64", "int32", ">f4"])
def test_wrong_type(single: Binary, dtype: str) -> None:
    with pytest.raises(InputError) as caught:
        single(np.zeros((2, 3), dtype))
    assert str(caught.value) == (
        f"input 'inputs_0': expected float32[2,3], got {dtype}[2,3]; "
        "convert it with .astype('float32')"
    )


def test_no_array(single: Binary) -> None:
    with pytest.raises(InputError) as caught:
        single([1.0, 2.0, 3.0])  # type: ignore[call-overload]
    assert str(caught.value) == "input 0: expected a numpy array or torch tensor, got list"


def test_threads_run_at_the_same_time(binary: Binary) -> None:
    inputs = [_inputs(seed) for seed in range(6)]
    expected = [binary.run(given) for given in inputs]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(40):
            found = binary.run(inputs[index])
            if any(f.tobytes() != e.tobytes() for f, e in zip(found, expected[index], strict=True)):
                failures.append(index)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_the_number_of_threads_does_not_change_a_bit(binary: Binary, tmp_path: Path) -> None:
    path = binary.save(tmp_path / "net.so")
    inputs = _inputs()
    expected = binary.run(inputs)
    for threads in (1, 2, 3, 5):
        found = Binary.load(path, threads).run(inputs)
        assert [f.tobytes() for f in found] == [e.tobytes() for e in expected]


def test_run_batches(binary: Binary) -> None:
    inputs = _inputs(batch=6)
    _agree(binary.run_batches(inputs), _expected(inputs))


def test_run_batches_that_do_not_divide(binary: Binary) -> None:
    for size in (0, 3):
        with pytest.raises(InputError) as caught:
            binary.run_batches(_inputs(batch=size))
        assert str(caught.value) == f"net: expected a multiple of the compiled batch 2, got {size}"
    mixed = [_inputs(batch=2)[0], _inputs(batch=4)[1]]
    with pytest.raises(InputError) as caught:
        binary.run_batches(mixed)
    assert str(caught.value) == "net: expected inputs of one batch size, got [2, 4]"


def test_run_batches_without_a_batch_axis() -> None:
    program = captured(net(lambda s, x: x.sum()), (3,))
    with pytest.raises(InputError) as caught:
        compile_program(program, CpuTarget(), 2).run_batches([np.zeros((2, 3), np.float32)])
    assert str(caught.value) == (
        "net: has no batch axis, so its inputs cannot be split in batches; "
        "give inputs of exactly the compiled shape"
    )


def test_load_of_a_saved_library(binary: Binary, tmp_path: Path) -> None:
    path = binary.save(tmp_path / "net.so")
    loaded = Binary.load(path)
    assert loaded.info == binary.info
    inputs = _inputs()
    for found, expected in zip(loaded.run(inputs), binary.run(inputs), strict=True):
        np.testing.assert_array_equal(found, expected)
    again = loaded.save(tmp_path / "again.so")
    assert again.read_bytes() == path.read_bytes()
    assert stat.S_IMODE(again.stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("name", "libc"), [("n.a", None), ("n.o", None), ("n", None), ("n.so", "musl")]
)
def test_a_loaded_library_stays_one(
    binary: Binary, name: str, libc: str | None, tmp_path: Path
) -> None:
    loaded = Binary.load(binary.save(tmp_path / "net.so"))
    with pytest.raises(ArtifactError) as caught:
        loaded.save(tmp_path / name, libc=libc)
    assert str(caught.value) == (
        f"{tmp_path / name}: a loaded shared library cannot be linked anew; "
        "compile the program again"
    )
    assert not (tmp_path / name).exists()
    assert loaded.save(tmp_path / "n.h").exists()


@pytest.mark.parametrize("name", ["net.so", "net.a", "net"])
def test_an_unwritable_path(binary: Binary, name: str, tmp_path: Path) -> None:
    path = tmp_path / "none" / name
    with pytest.raises(ArtifactError) as caught:
        binary.save(path)
    assert str(caught.value).startswith(f"{path}: cannot be written: no such file or directory; ")


def test_load_of_what_is_broken(binary: Binary, tmp_path: Path) -> None:
    path = binary.save(tmp_path / "net.so")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        Binary.load(path)
    with pytest.raises(ArtifactError, match="No such file"):
        Binary.load(tmp_path / "none.so")


def test_load_of_what_is_no_library(binary: Binary, tmp_path: Path) -> None:
    path = tmp_path / "net.so"
    path.write_bytes(b"text")
    append_trailer(path, manifest_of(binary.info, "net"))
    with pytest.raises(ArtifactError, match="cannot be loaded"):
        Binary.load(path)


def test_load_for_another_processor(
    binary: Binary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = binary.save(tmp_path / "net.so")
    monkeypatch.setattr(module, "host_runs", lambda processor: "this machine lacks avx2")
    with pytest.raises(ArtifactError) as caught:
        Binary.load(path)
    processor = binary.info.tools["processor"]
    assert str(caught.value) == (
        f"{path}: was compiled for {processor}, this machine lacks avx2; "
        "run it on the machine it is for, or compile it for this one, "
        "e.g. with cpu{arch=x86-64-v3}"
    )


def test_profile(binary: Binary) -> None:
    steps = binary.profile(_inputs(), runs=5)
    labels = [label for label, _ in steps]
    assert any(label.startswith("c: conv 3x3 3->20 6x6") for label in labels)
    assert any(label.startswith("l: linear 720->5") for label in labels)
    assert all(time >= 0 for _, time in steps)
    assert 0 < sum(time for _, time in steps) < 1000


def test_memory_use(binary: Binary) -> None:
    weights = 4 * (3 * 9 * 32 + 32 + 720 * 16 + 16)
    assert weights <= binary.constant_bytes < 2 * weights
    image = 2 * 32 * 36 * 4
    assert image <= binary.arena_bytes < 2 * image


def test_info(binary: Binary) -> None:
    info = binary.info
    assert (info.name, info.batch) == ("net", 2)
    assert [spec.describe() for spec in info.inputs] == ["float32[2,3,6,6]", "float32[2,5]"]
    assert [spec.describe() for spec in info.outputs] == ["float32[2,5]", "int64[2]"]
    assert set(info.tools) >= {"shohin", "torch", "tvm", "zig", "processor"}


def test_outputs_have_names_of_their_own() -> None:
    def function(s: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        y, z = x + 1, x + 2
        return y, y, z, z

    compiled = compile_program(captured(net(function), (3,)), CpuTarget(), 2)
    names = [spec.name for spec in compiled.info.outputs]
    assert len(set(names)) == 4


def test_the_batch_must_be_positive() -> None:
    with pytest.raises(SpecError, match=r"^batch: expected 1 or more, got 0$"):
        compile_program(captured(_net(), (3, 6, 6), (5,)), CpuTarget(), 0)


def test_a_type_that_cannot_cross_the_interface() -> None:
    program = captured(net(lambda s, x: x.relu().to(torch.bfloat16)), (3,))
    with pytest.raises(UnsupportedError):
        compile_program(program, CpuTarget(), 2)


def test_progress() -> None:
    seen: list[tuple[int, int, str]] = []
    compile_program(
        captured(net(lambda s, x: x.relu()), (3,)), CpuTarget(), 2, lambda *now: seen.append(now)
    )
    assert [label for _, _, label in seen] == ["planning", "generating code", "linking", "done"]
    assert seen[-1][0] == seen[-1][1]
