import numpy as np
import pytest
import torch
from harness import EPS, Bounded, KernelLibrary, random_array
from torch.nn import functional

from shohin.backends.tvm.kernels.normalise import LayerNorm, Softmax

_SHAPES = [(1, 1), (5, 1), (3, 7), (2, 16), (4, 33), (1, 10), (7, 64), (2, 1000)]
_EPSILON = 1e-5


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    softmax = [Softmax(*shape, logarithm=choice) for shape in _SHAPES for choice in (False, True)]
    norms = [LayerNorm(*shape, _EPSILON, choice) for shape in _SHAPES for choice in (False, True)]
    return KernelLibrary([*softmax, *norms])


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("shape", _SHAPES)
def test_softmax(library: KernelLibrary, shape: tuple[int, int], spread: float) -> None:
    x = random_array(np.random.default_rng(10), *shape) * np.float32(spread)
    found = library.run(Softmax(*shape), [x])
    exact = torch.softmax(torch.from_numpy(x).double(), 1)
    # x - max is rounded once, which e^ turns into a relative error of eps / 2 * |x - max|, below
    # e^-87 into nothing; the sum adds half an eps a term, the exponential 2e-7.
    shift = (torch.from_numpy(x).double() - torch.from_numpy(x).double().amax(1, True)).abs()
    relative = EPS / 2 * (2 * shift.clamp(max=100) + shape[1] + 4) + 4e-7
    Bounded(exact, relative * exact + 2e-38).check(found)
    np.testing.assert_allclose(found.sum(1), 1, rtol=(shape[1] + 4) * EPS)


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e4, 1e30])
@pytest.mark.parametrize("shape", _SHAPES)
def test_log_softmax(library: KernelLibrary, shape: tuple[int, int], spread: float) -> None:
    x = random_array(np.random.default_rng(11), *shape) * np.float32(spread)
    found = library.run(Softmax(*shape, logarithm=True), [x])
    wide = torch.from_numpy(x).double()
    # The shift max + log(sum) is rounded at the magnitude of the maximum.
    bound = 2 * EPS * (wide.abs() + wide.abs().amax(1, True)) + (shape[1] + 8) * EPS
    Bounded(torch.log_softmax(wide, 1), bound).check(found)


def test_softmax_of_equal_huge_numbers(library: KernelLibrary) -> None:
    found = library.run(Softmax(4, 33), [np.full((4, 33), 3e38, np.float32)])
    np.testing.assert_allclose(found, 1 / 33, rtol=40 * EPS)


def test_softmax_leaves_out_minus_infinity(library: KernelLibrary) -> None:
    x = random_array(np.random.default_rng(12), 3, 7)
    x[:, 2] = -np.inf
    found = library.run(Softmax(3, 7), [x])
    assert (found[:, 2] <= 2e-38).all()
    np.testing.assert_allclose(found.sum(1), 1, rtol=12 * EPS)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", _SHAPES)
def test_layer_norm(
    library: KernelLibrary, shape: tuple[int, int], affine: bool, mean: float
) -> None:
    generator = np.random.default_rng(13)
    x = random_array(generator, *shape) + np.float32(mean)
    weight, bias = random_array(generator, shape[1]), random_array(generator, shape[1])
    given = [weight, bias] if affine else []
    found = library.run(LayerNorm(*shape, _EPSILON, affine), [x, *given])
    wide = torch.from_numpy(x).double()
    plain = functional.layer_norm(wide, (shape[1],), eps=_EPSILON)
    gain, shift = (torch.from_numpy(array).double() for array in (weight, bias))
    exact = plain * gain + shift if affine else plain
    # The mean is off by half an eps of the magnitude for each addition (16 lanes in parallel,
    # 16 more to join them and the tail), and so is x - mean; divided by the deviation that is the
    # error of a result, which the variance's own relative error adds to.
    additions = shape[1] // 16 + 32
    centre = EPS / 2 * (additions + 2) * wide.abs().amax(1, True)
    deviation = (wide.var(1, unbiased=False, keepdim=True) + _EPSILON).sqrt()
    off = centre / deviation
    bound = off * (1 + plain.abs()) + off**2 * plain.abs() + EPS * (additions + 4) * plain.abs()
    if affine:
        bound = bound * gain.abs() + 2 * EPS * exact.abs() + EPS * shift.abs()
    Bounded(exact, bound + 1e-30).check(found)


@pytest.mark.parametrize("affine", [False, True])
def test_layer_norm_of_equal_numbers(library: KernelLibrary, affine: bool) -> None:
    x = np.full((2, 16), 4.0, np.float32)
    given = [np.ones(16, np.float32), np.full(16, 0.5, np.float32)] if affine else []
    found = library.run(LayerNorm(2, 16, _EPSILON, affine), [x, *given])
    assert (found == (0.5 if affine else 0.0)).all()
