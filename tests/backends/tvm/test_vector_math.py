from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from harness import Array, KernelLibrary
from torch import Tensor
from torch.nn import functional

from shohin.backends.tvm.kernels import vector_math as vm
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Kernel, Parameter, ramp, store

_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {
    "exp": vm.exp,
    "erf": vm.erf,
    "tanh": vm.tanh,
    "sigmoid": vm.sigmoid,
    "gelu": vm.gelu,
    "gelu_tanh": vm.gelu_tanh,
}
_COUNT = 1 << 16
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST_NORMAL = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True)
class _Function(Kernel):
    """One function of many numbers, 16 or one at a time."""

    name: str
    lanes: int

    @property
    def family(self) -> str:
        return self.name

    @property
    def extent(self) -> int:
        return _COUNT // self.lanes

    def parameters(self) -> tuple[Parameter, ...]:
        return Parameter("x", (_COUNT,)), Parameter("y", (_COUNT,))

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        x, y = buffers
        place = ramp(item * self.lanes, self.lanes)
        store(y, [place], _FUNCTIONS[self.name](x[place]))


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_Function(name, lanes) for name in _FUNCTIONS for lanes in (16, 1))


@dataclass(frozen=True)
class _Points:
    x: Array
    found: Array

    def difference(self, exact: Callable[[Tensor], Tensor]) -> tuple[Array, Array]:
        """Absolute differences from a function in float64, and its values."""
        values = exact(torch.from_numpy(self.x).double()).numpy()
        return np.abs(self.found.astype(np.float64) - values), values


def _evaluate(library: KernelLibrary, name: str, low: float, high: float) -> _Points:
    x = np.linspace(low, high, _COUNT).astype(np.float32)
    return _Points(x, library.run(_Function(name, 16), [x]))


def _relative(points: _Points, exact: Callable[[Tensor], Tensor]) -> float:
    difference, values = points.difference(exact)
    return float((difference / np.abs(values)).max())


@pytest.mark.parametrize("name", _FUNCTIONS)
def test_one_lane_is_as_good_as_sixteen(library: KernelLibrary, name: str) -> None:
    points = _evaluate(library, name, -20, 20)
    alone = library.run(_Function(name, 1), [points.x])
    np.testing.assert_allclose(alone, points.found, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("low", "high"), [(-87.3, 88.3), (-1.0, 1.0), (-1e-3, 1e-3), (80, 88.3)])
def test_exp(library: KernelLibrary, low: float, high: float) -> None:
    assert _relative(_evaluate(library, "exp", low, high), torch.exp) < 2e-7


def test_exp_beyond_its_range(library: KernelLibrary) -> None:
    small = _evaluate(library, "exp", -_LARGEST, -87.3)
    assert ((small.found >= 0) & (small.found < 1.3e-38)).all()
    large = _evaluate(library, "exp", 88.3, _LARGEST)
    assert (large.found > 2.2e38).all()
    ends = np.zeros(_COUNT, np.float32)
    ends[:2] = [-np.inf, np.inf]
    found = library.run(_Function("exp", 16), [ends])
    assert found[0] < 1.3e-38
    assert found[1] > 2.2e38
    assert found[2] == 1


@pytest.mark.parametrize(("low", "high"), [(-5, 5), (-0.1, 0.1), (3, 5), (-_LARGEST, _LARGEST)])
def test_erf(library: KernelLibrary, low: float, high: float) -> None:
    difference, _ = _evaluate(library, "erf", low, high).difference(torch.erf)
    assert difference.max() < 5e-7


@pytest.mark.parametrize(
    ("low", "high"), [(-10, 10), (-0.1, 0.1), (7, 9), (1e-30, 1e-3), (-_LARGEST, _LARGEST)]
)
def test_tanh(library: KernelLibrary, low: float, high: float) -> None:
    points = _evaluate(library, "tanh", low, high)
    points = _Points(points.x[points.x != 0], points.found[points.x != 0])
    assert _relative(points, torch.tanh) < 1e-6
    assert np.abs(points.found).max() <= 1 + 1e-6


@pytest.mark.parametrize(("low", "high"), [(-87, 100), (-1, 1), (-30, -10)])
def test_sigmoid(library: KernelLibrary, low: float, high: float) -> None:
    assert _relative(_evaluate(library, "sigmoid", low, high), torch.sigmoid) < 5e-7


def test_sigmoid_far_out(library: KernelLibrary) -> None:
    points = _evaluate(library, "sigmoid", -_LARGEST, _LARGEST)
    difference, _ = points.difference(torch.sigmoid)
    assert difference.max() < _SMALLEST_NORMAL


# x times half the error of erf or tanh, and a rounding of the result.
@pytest.mark.parametrize(("low", "high"), [(-6, 6), (-0.1, 0.1), (-50, 50), (-1e4, 1e4)])
def test_gelu(library: KernelLibrary, low: float, high: float) -> None:
    points = _evaluate(library, "gelu", low, high)
    difference, values = points.difference(functional.gelu)
    assert (difference <= 2.5e-7 * np.abs(points.x) + 2e-7 * np.abs(values)).all()


@pytest.mark.parametrize(("low", "high"), [(-6, 6), (-0.1, 0.1), (-50, 50), (-1e4, 1e4)])
def test_gelu_tanh(library: KernelLibrary, low: float, high: float) -> None:
    points = _evaluate(library, "gelu_tanh", low, high)
    difference, values = points.difference(lambda x: functional.gelu(x, approximate="tanh"))
    assert (difference <= 5e-7 * np.abs(points.x) + 2e-7 * np.abs(values)).all()
