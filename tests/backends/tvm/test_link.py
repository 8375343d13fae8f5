import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Array, zig
from small_nets import captured, net
from torch import nn

from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import compile_program, symbol_prefix
from shohin.backends.tvm.forms import form_of, libc_of
from shohin.backends.tvm.link import PUBLIC_FUNCTIONS
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.trailer import read_trailer
from shohin.errors import SpecError

_CALLER = """
#include "net.h"
#include <stdio.h>

int main(void) {
    float x[2][3][6][6], y[2][5];
    for (int i = 0; i < 216; ++i) ((float *)x)[i] = (float)(i % 7) - 3.0f;
    shohin_instance *instance;
    if (net_create(2, &instance) != SHOHIN_OK) return 1;
    const void *inputs[] = {x};
    void *outputs[] = {y};
    if (net_run(instance, inputs, outputs) != SHOHIN_OK) return 2;
    net_destroy(instance);
    for (int i = 0; i < 10; ++i) printf("%a\\n", ((float *)y)[i]);
    return net_info()->input_count == 1 ? 0 : 3;
}
"""


_TWO_MODELS = """
#include "net.h"
#include "other.h"
#include <stdio.h>

int main(void) {
    shohin_instance *first, *second;
    if (net_create(1, &first) != SHOHIN_OK || other_create(1, &second) != SHOHIN_OK) return 1;
    static float x[216], y[10], u[14], v[6];
    const void *inputs[] = {x}, *others[] = {u};
    void *outputs[] = {y}, *results[] = {v};
    if (net_run(first, inputs, outputs) != SHOHIN_OK) return 2;
    if (other_run(second, others, results) != SHOHIN_OK) return 3;
    printf("%s %s\\n", net_info()->name, other_info()->name);
    net_destroy(first);
    other_destroy(second);
    return 0;
}
"""


def _compile() -> Binary:
    module = net(
        lambda s, x: s.l(s.c(x).relu().flatten(1)), c=nn.Conv2d(3, 20, 3), l=nn.Linear(320, 5)
    )
    return compile_program(captured(module, (3, 6, 6)), CpuTarget("x86-64-v2", 2), 2)


@pytest.fixture(scope="module")
def binary() -> Binary:
    return _compile()


@pytest.fixture
def image() -> Array:
    return (np.arange(216) % 7 - 3).astype(np.float32).reshape(2, 3, 6, 6)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("net.so", "so"),
        ("a.b/net.a", "static"),
        ("net.o", "object"),
        ("net.h", "c-header"),
        ("net.exe", "exe"),
        ("net", "exe"),
        ("a.b/net", "exe"),
    ],
)
def test_form(name: str, form: str) -> None:
    assert form_of(Path(name)) == form


@pytest.mark.parametrize(("name", "suffix"), [("net.dll", ".dll"), ("net.so.1", ".1")])
def test_form_of_another_ending(name: str, suffix: str) -> None:
    with pytest.raises(SpecError) as caught:
        form_of(Path(name))
    assert str(caught.value) == (
        f"{name}: expected a name that ends in .so, .a, .o, .h or in nothing, got '{suffix}'; "
        "net.so is a shared library, net.a a static one, net.o an object, net an executable, "
        "net.h the header; or say which by the format"
    )
    assert form_of(Path(name), "static") == "static"


def test_unknown_forms_and_libraries() -> None:
    with pytest.raises(SpecError) as caught:
        form_of(Path("net.so"), "sos")
    assert str(caught.value) == (
        "format: expected so, static, object, exe or c-header, got 'sos'; did you mean 'so'?"
    )
    with pytest.raises(SpecError) as caught:
        form_of(Path("a.b/net.h"), "static")
    assert str(caught.value) == (
        "a.b/net.h: the header of a form 'static' would be written over it; "
        "choose a name that does not end in .h"
    )
    with pytest.raises(SpecError, match=r"^libc: expected glibc or musl, got 'uclibc'$"):
        libc_of("exe", "uclibc")


def test_c_libraries_by_default() -> None:
    assert libc_of("exe") == "musl"
    assert libc_of("exe", "glibc") == "glibc"
    assert libc_of("so") == "glibc"


def needed(path: Path) -> set[str]:
    """Libraries that a file loads."""
    found = re.findall(rb"\0(lib(?:c|m|pthread)\.[\w.]+|ld-[\w.-]+)(?=\0)", path.read_bytes())
    return {name.decode() for name in found}


def test_what_is_loaded(binary: Binary, image: Array, tmp_path: Path) -> None:
    static = binary.save(tmp_path / "a", form="exe")
    loading = binary.save(tmp_path / "b.bin", form="exe", libc="glibc")
    shared = binary.save(tmp_path / "c.so")
    musl = binary.save(tmp_path / "d", form="so", libc="musl")
    assert needed(static) == set()
    assert "libc.so.6" in needed(loading)
    assert "libc.so.6" in needed(shared)
    assert needed(musl) == {"libc.so"}
    assert (tmp_path / "d.h").exists()
    np.save(tmp_path / "x.npy", image)
    said = {_said(path, tmp_path / "x.npy") for path in (static, loading)}
    assert len(said) == 1
    for path in (static, loading, shared, musl):
        assert read_trailer(path)["name"] == "net"


def _said(program: Path, image: Path) -> str:
    return subprocess.run([program, image], check=True, capture_output=True, text=True).stdout


def test_the_header_alone(binary: Binary, tmp_path: Path) -> None:
    binary.save(tmp_path / "net.h")
    binary.save(tmp_path / "other.txt", form="c-header")
    assert "SHOHIN_DECLARE_MODEL(net)" in (tmp_path / "net.h").read_text()
    assert (tmp_path / "net.h").read_text() == (tmp_path / "other.txt").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"net.h", "other.txt"}


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("net", "net"), ("ResNet-20", "resnet_20"), ("3d net", "model_3d_net"), ("日本", "model")],
)
def test_symbol_prefix(name: str, prefix: str) -> None:
    assert symbol_prefix(name) == prefix


def test_two_models_in_one_program(binary: Binary, tmp_path: Path) -> None:
    program = captured(net(lambda s, x: s.l(x), l=nn.Linear(7, 3)), (7,))
    other = compile_program(replace(program, name="other"), CpuTarget("x86-64-v2"), 2)
    binary.save(tmp_path / "net.a")
    other.save(tmp_path / "other.a")
    (tmp_path / "main.c").write_text(_TWO_MODELS)
    zig(["cc", "main.c", "net.a", "other.a", "-pthread", "-lm", "-o", "main"], tmp_path)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    assert done.stdout == "net other\n"


@pytest.mark.parametrize("suffix", [".o", ".a"])
def test_a_c_program_links_it(binary: Binary, image: Array, suffix: str, tmp_path: Path) -> None:
    binary.save(tmp_path / f"net{suffix}")
    (tmp_path / "main.c").write_text(_CALLER)
    flags = ["-Wall", "-Wextra", "-Werror", "-pthread", "-lm"]
    zig(["cc", "main.c", f"net{suffix}", *flags, "-o", "main"], tmp_path)
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True)
    found = [float.fromhex(line) for line in done.stdout.split()]
    np.testing.assert_array_equal(np.array(found, np.float32).reshape(2, 5), binary(image))


def test_the_executable_needs_nothing(binary: Binary, image: Array, tmp_path: Path) -> None:
    program = binary.save(tmp_path / "net")
    empty = tmp_path / "empty"
    empty.mkdir()
    np.save(tmp_path / "x.npy", image)
    subprocess.run(
        ["env", "-i", program, tmp_path / "x.npy", "--output", tmp_path / "y.npy"],
        cwd=empty,
        env={},
        check=True,
        capture_output=True,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), binary(image))
    assert not list(empty.iterdir())
    assert os.access(program, os.X_OK)
    dynamic = b"libc.so" in program.read_bytes()
    assert not dynamic


def test_the_executable_has_a_trailer(binary: Binary, tmp_path: Path) -> None:
    program = binary.save(tmp_path / "net")
    assert read_trailer(program)["name"] == "net"


def test_the_shared_library_exports_its_interface_alone(binary: Binary, tmp_path: Path) -> None:
    library = binary.save(tmp_path / "net.so")
    done = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("nm is not installed")
    symbols = {line.split()[-1] for line in done.stdout.splitlines()}
    assert symbols == {f"net_{name}" for name in PUBLIC_FUNCTIONS}
    assert f"SHOHIN_DECLARE_MODEL({library.stem})" in library.with_suffix(".h").read_text()


@pytest.mark.parametrize("name", ["net.so", "net", "net.a", "net.o", "net.h"])
def test_the_same_program_gives_the_same_bytes(binary: Binary, name: str, tmp_path: Path) -> None:
    again = _compile()
    contents = []
    for index, one in enumerate((binary, again)):
        folder = tmp_path / str(index)
        folder.mkdir()
        one.save(folder / (name if name != "net.h" else "net.so"))
        contents.append((folder / name).read_bytes())
    assert contents[0] == contents[1]
    assert str(tmp_path).encode() not in contents[0]


@pytest.mark.parametrize("name", ["net.so", "net"])
def test_no_path_of_this_machine_is_inside(binary: Binary, name: str, tmp_path: Path) -> None:
    content = binary.save(tmp_path / name).read_bytes()
    assert b"/shohin-" not in content
    assert str(Path(torch.__file__).parent).encode() not in content
