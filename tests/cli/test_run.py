import numpy as np
import pytest
import torch

import shohin


def test_runs_batch_by_batch(shell, library, program, images, tmp_path) -> None:
    output = tmp_path / "y.npy"
    done = shell("run", library, "--input", images, "--output", output)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"{output}: {output.stat().st_size} bytes"
    with torch.no_grad():
        wanted = shohin.load(program).module(torch.from_numpy(np.load(images))).numpy()
    np.testing.assert_allclose(np.load(output), wanted, rtol=1e-5, atol=1e-5)


def test_a_program_runs_in_pytorch(shell, program, images, tmp_path) -> None:
    output = tmp_path / "y.npz"
    done = shell("run", program, "--input", images, "--output", output)
    assert done.code == 0, done.err
    (result,) = np.load(output).values()
    assert result.shape == (6, 10)


def test_prints_values_without_an_output(shell, library, images) -> None:
    done = shell("run", library, "--input", images)
    assert "float32[6,10]" in done.out.splitlines()[0]
    values = shell("run", library, "--input", images, "--json").json()["outputs"]
    (found,) = values.values()
    assert found["shape"] == [6, 10]
    assert len(found["values"]) == 6


def test_named_arrays(shell, library, images, tmp_path) -> None:
    np.savez(tmp_path / "x.npz", x=np.load(images))
    assert shell("run", library, "--input", tmp_path / "x.npz").code == 0
    np.savez(tmp_path / "y.npz", y=np.load(images))
    done = shell("run", library, "--input", tmp_path / "y.npz")
    done.fails(8, "expected arrays x, got y")


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (np.zeros((2, 1, 8, 9), np.float32), ["expected float32[2,1,8,8], got float32[2,1,8,9]"]),
        (np.zeros((2, 1, 8, 8)), ["got float64[2,1,8,8]", ".astype('float32')"]),
        (np.zeros((3, 1, 8, 8), np.float32), ["multiple of the compiled batch 2, got 3"]),
        (np.zeros((0, 1, 8, 8), np.float32), ["multiple of the compiled batch 2, got 0"]),
        (np.float32(1), ["expected float32[2,1,8,8], got float32[]"]),
        (np.array(["text"]), ["expected float32[2,1,8,8]"]),
        (np.array([{}]), ["of numbers", "write it with numpy.save"]),
    ],
)
def test_arrays_that_do_not_fit(shell, library, tmp_path, array, texts) -> None:
    file = tmp_path / "x.npy"
    np.save(file, array)
    shell("run", library, "--input", file).fails(8, *texts)


def test_wrong_input_files(shell, library, images, tmp_path) -> None:
    shell("run", library, "--input", "none.npy").fails(8, "none.npy: there is no such file")
    shell("run", library, "--input", __file__).fails(8, "expected a .npy or .npz file")
    shell("run", library, "--input", images, "--input", images).fails(8, "expected 1 input (x")
    (tmp_path / "x.npz").write_bytes(b"PK")
    shell("run", library, "--input", tmp_path / "x.npz").fails(8, "expected a .npy or .npz file")


def test_wrong_outputs(shell, library, images) -> None:
    done = shell("run", library, "--input", images, "--output", "y.txt")
    done.fails(8, "ends in .npy or .npz, got '.txt'")
    done = shell("run", library, "--input", images, "--output", "/nowhere/y.npy")
    done.fails(7, "there is no folder /nowhere")


def test_forms_that_cannot_be_loaded(shell, program, images, tmp_path) -> None:
    for name in ("net.a", "net.o"):
        done = shell("run", tmp_path / name, "--input", images)
        done.fails(7, "static libraries and objects cannot be loaded", "compile to .so")
    file = tmp_path / "net"
    shohin.compile(shohin.load(program)).save(file)
    done = shell("run", file, "--input", images)
    done.fails(7, "is a program of its own", f"run it itself: {file} x.npy")
    done = shell("bench", file)
    done.fails(7, "is a program of its own", f"run it itself: {file} x.npy")


def test_libraries_that_are_not_whole(shell, library, images, tmp_path) -> None:
    broken = tmp_path / "net.so"
    whole = library.read_bytes()
    for content, text in (
        (whole[:-1000], "found another file or a truncated one"),
        (whole[:5000] + b"x" + whole[5001:], "its checksum does not match"),
        (b"", "found another file or a truncated one"),
        (b"\x7fELF", "found another file or a truncated one"),
    ):
        broken.write_bytes(content)
        shell("run", broken, "--input", images).fails(7, text)
    shell("run", tmp_path / "none.so", "--input", images).fails(7, "cannot be read")


def test_binaries_for_another_machine(shell, program, images, tmp_path) -> None:
    binary = shohin.compile(shohin.load(program), "arm{cpu=cortex-a72}", batch=2)
    found = "this machine is x86_64, not aarch64"
    library, executable = binary.save(tmp_path / "net.so"), binary.save(tmp_path / "net")
    done = shell("run", library, "--input", images)
    done.fails(7, f"was compiled for cortex-a72, {found}", "run it on the machine it is for")
    done = shell("run", executable, "--input", images)
    done.fails(7, f"a program of its own, compiled for cortex-a72; {found}", "copy it to")


@pytest.mark.parametrize("target", ["arm{cpu=cortex-a72}", "armv7{cpu=cortex-a7}"])
def test_programs_are_known_by_more_than_their_names(
    shell, program, images, tmp_path, target
) -> None:
    """`net.arm` is a program, `net.so.1` a library."""
    binary = shohin.compile(shohin.load(program), target, batch=2)
    named = binary.save(tmp_path / "net").rename(tmp_path / "net.arm")
    done = shell("run", named, "--input", images)
    done.fails(7, f"{named}: is a program of its own", "copy it to")
    assert f"target        {target.split('{')[0]}" in shell("inspect", named).out
    library = binary.save(tmp_path / "net.so").rename(tmp_path / "net.so.1")
    shell("run", library, "--input", images).fails(7, "this machine is x86_64, not", "run it on")
