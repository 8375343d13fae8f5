import os
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
from shohin.backends.tvm.link import PUBLIC_FUNCTIONS, form_of
from shohin.backends.tvm.target import CpuTarget
from shohin.backends.tvm.trailer import read_trailer
from shohin.errors import ArtifactError

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
        ("net.so", "shared"),
        ("a.b/net.a", "static"),
        ("net.o", "object"),
        ("net", "executable"),
        ("a.b/net", "executable"),
    ],
)
def test_form(name: str, form: str) -> None:
    assert form_of(Path(name)) == form


@pytest.mark.parametrize(("name", "suffix"), [("net.dll", ".dll"), ("net.so.1", ".1")])
def test_form_of_another_ending(name: str, suffix: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        form_of(Path(name))
    assert str(caught.value) == (
        f"{name}: expected a name that ends in .so, .a, .o or in nothing, got '{suffix}'; "
        "net.so is a shared library, net.a a static one, net.o an object, net an executable"
    )


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
