"""How ``.npy`` files are read and written in C."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
from stub_models import FLAGS, MUSL, RUNTIME, npy, zig

# Reads a .npy file of any type and shape and writes it again.
COPY = r"""
#include "shohin_npy.h"

#include <stdlib.h>

int main(int count, char **arguments) {
    shohin_npy file;
    shohin_npy_error error;
    if (count != 3) return 2;
    if (!shohin_npy_open(arguments[1], &file, &error)) return puts(error.text), 1;
    if (!file.supported) return puts(file.dtype_name), 1;
    void *data = malloc(file.bytes + 1);
    if (!shohin_npy_read(&file, data, &error)) return puts(error.text), 1;
    shohin_npy_close(&file);
    if (!shohin_npy_write(arguments[2], file.dtype, file.rank, file.shape, data, &error))
        return puts(error.text), 1;
    free(data);
    return 0;
}
"""


@pytest.fixture(scope="module")
def copier(folder: Path) -> Path:
    source = folder / "copy.c"
    source.write_text(COPY)
    zig("cc", *FLAGS, *MUSL, source, RUNTIME / "shohin_npy.c", "-o", folder / "copy")
    return folder / "copy"


DTYPES = ["float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy_round_trip(copier: Path, tmp_path: Path, dtype: str) -> None:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(), (5,), (2, 3, 4), (0, 3), (1,) * 20]
    for version, shape in [*((1, shape) for shape in shapes), (2, (3, 2)), (3, (3, 2))]:
        array = np.asarray(
            rng.integers(0, 2, shape) if dtype == "bool" else rng.normal(0, 50, shape)
        )
        array = array.astype(np.int64).astype(dtype)
        with (tmp_path / "in.npy").open("wb") as stream:
            np.lib.format.write_array(stream, array, version=(version, 0))
        done = subprocess.run(
            [copier, "in.npy", "out.npy"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (0, "")
        got = np.load(tmp_path / "out.npy")
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(got, array)
        written = (tmp_path / "out.npy").read_bytes()
        assert written.endswith(b"\n" + array.tobytes())
        assert (len(written) - array.nbytes) % 64 == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npy", "out.npy"]


def test_every_cut_of_a_file_is_refused(copier: Path, tmp_path: Path) -> None:
    whole = npy("{'descr': '|i1', 'fortran_order': False, 'shape': (3,), }\n", b"abc")
    for length in range(len(whole)):
        (tmp_path / "x.npy").write_bytes(whole[:length])
        done = subprocess.run(
            [copier, tmp_path / "x.npy", tmp_path / "y.npy"], stdout=-3, check=False
        )
        assert done.returncode == 1
    assert not (tmp_path / "y.npy").exists()
