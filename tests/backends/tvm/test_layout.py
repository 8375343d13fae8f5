import numpy as np
import pytest
from harness import Array, KernelLibrary, random_array, to_blocked

from shohin.backends.tvm.kernels.layout import Copy, ToBlocked, ToPlain, Transpose

_SHAPES = [
    (1, 1, 1),
    (1, 16, 1),
    (2, 16, 9),
    (1, 3, 12),
    (3, 20, 7),
    (2, 50, 5),
    (1, 48, 16),
    (2, 17, 1),
    (1, 31, 25),
    (1, 15, 33),
    (2, 33, 32),
    (1, 16, 17),
    (2, 37, 50),
    (1, 20, 15),
    (3, 5, 64),
]
_MATRICES = [(1, 1, 1), (2, 5, 7), (1, 16, 32), (3, 1, 9), (1, 33, 2)]
_COPIES = [
    Copy(10, 3, 7),
    Copy(100, 0, 100),
    Copy(64, 16, 33),
    Copy(9, 8, 1, "int64"),
    Copy(40, 5, 30, "int8"),
    Copy(40, 7, 31, "uint8"),
    Copy(40, 5, 30, "int32"),
    Copy(40, 5, 30, "int16"),
    Copy(40, 3, 21, "float16"),
    Copy(33, 1, 20, "bool"),
]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    conversions = [kind(*shape) for shape in _SHAPES for kind in (ToBlocked, ToPlain)]
    return KernelLibrary([*conversions, *(Transpose(*shape) for shape in _MATRICES), *_COPIES])


def _image(shape: tuple[int, int, int]) -> Array:
    return random_array(np.random.default_rng(5), *shape)


@pytest.mark.parametrize("shape", _SHAPES)
def test_to_blocked(library: KernelLibrary, shape: tuple[int, int, int]) -> None:
    x = _image(shape)
    found = library.run(ToBlocked(*shape), [x])
    np.testing.assert_array_equal(found, to_blocked(x[..., None])[:, :, :, 0])


@pytest.mark.parametrize("shape", _SHAPES)
def test_to_plain(library: KernelLibrary, shape: tuple[int, int, int]) -> None:
    x = _image(shape)
    blocked = to_blocked(x[..., None])[:, :, :, 0].copy()
    ragged = shape[1] % 16
    if ragged:
        blocked[:, -1, :, ragged:] = np.nan
    np.testing.assert_array_equal(library.run(ToPlain(*shape), [blocked]), x)


@pytest.mark.parametrize("shape", _MATRICES)
def test_transpose(library: KernelLibrary, shape: tuple[int, int, int]) -> None:
    x = _image(shape)
    np.testing.assert_array_equal(library.run(Transpose(*shape), [x]), x.transpose(0, 2, 1))


@pytest.mark.parametrize("kernel", _COPIES)
def test_copy(library: KernelLibrary, kernel: Copy) -> None:
    x = np.random.default_rng(6).integers(0, 2, kernel.size).astype(kernel.dtype)
    expected = x[kernel.offset : kernel.offset + kernel.count]
    np.testing.assert_array_equal(library.run(kernel, [x]), expected)
