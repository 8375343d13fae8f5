import random

import numpy as np
import pytest
import torch
from harness import EPS, Bounded, KernelLibrary, random_array, to_blocked, to_plain
from torch import Tensor
from torch.nn import functional

from shohin.backends.tvm.kernels.pool import GlobalAverage, Pool2d


def _max(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
    batch: int = 1,
) -> Pool2d:
    probe = functional.max_pool2d(
        torch.zeros(1, 1, *size), kernel, stride, padding, dilation, ceil_mode
    )
    output = (probe.shape[2], probe.shape[3])
    return Pool2d("max", batch, 2, size, output, kernel, stride, padding, dilation)


def _average(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] = (0, 0),
    ceil_mode: bool = False,
    count: bool = True,
    divisor: int = 0,
    batch: int = 1,
) -> Pool2d:
    probe = functional.avg_pool2d(torch.zeros(1, 1, *size), kernel, stride, padding, ceil_mode)
    output = (probe.shape[2], probe.shape[3])
    return Pool2d(
        "average",
        batch,
        2,
        size,
        output,
        kernel,
        stride,
        padding,
        count_padding=count,
        divisor=divisor,
    )


_CHOSEN = {
    "max 2x2": _max((6, 8), (2, 2), (2, 2)),
    "max 3x3 stride 2 padded": _max((7, 9), (3, 3), (2, 2), (1, 1)),
    "max ceil": _max((6, 7), (3, 3), (2, 2), ceil_mode=True),
    "max ceil padded, last window starts in the padding": _max(
        (5, 5), (2, 2), (2, 3), (1, 1), ceil_mode=True
    ),
    "max ceil, window cut to one pixel": _max((7, 10), (3, 3), (3, 3), ceil_mode=True),
    "max dilated": _max((9, 11), (3, 2), (1, 2), (1, 1), (2, 3)),
    "max dilated, outer taps outside": _max((4, 4), (3, 3), (1, 1), (1, 1), (2, 2)),
    "max overlapping, batch 3": _max((5, 6), (3, 3), (1, 1), (1, 1), batch=3),
    "max whole image": _max((4, 5), (4, 5), (1, 1)),
    "average 2x2": _average((6, 8), (2, 2), (2, 2)),
    "average with padding": _average((7, 7), (3, 3), (2, 2), (1, 1)),
    "average without padding": _average((7, 7), (3, 3), (2, 2), (1, 1), count=False),
    "average ceil": _average((6, 7), (3, 3), (2, 2), (1, 1), ceil_mode=True),
    "average ceil without padding": _average(
        (6, 7), (3, 3), (2, 2), (1, 1), ceil_mode=True, count=False
    ),
    "average ceil beyond the padding": _average((5, 8), (4, 4), (3, 3), (1, 1), ceil_mode=True),
    "average divisor": _average((6, 8), (3, 2), (2, 2), (1, 1), divisor=5),
    "average divisor ceil": _average((6, 7), (3, 3), (2, 2), (1, 1), ceil_mode=True, divisor=7),
    "average 1x1 stride 2, batch 2": _average((5, 6), (1, 1), (2, 2), batch=2),
}


def _draw(seed: int) -> Pool2d:
    choose = random.Random(seed)
    kernel = (choose.randint(1, 4), choose.randint(1, 4))
    padding = (choose.randint(0, kernel[0] // 2), choose.randint(0, kernel[1] // 2))
    size = (choose.randint(4, 12), choose.randint(4, 12))
    stride = (choose.randint(1, 4), choose.randint(1, 4))
    ceil_mode = choose.random() < 0.5
    if choose.random() < 0.5:
        dilation = (choose.randint(1, 2), 1) if size[0] > 6 else (1, 1)
        return _max(size, kernel, stride, padding, dilation, ceil_mode)
    divisor = choose.choice([0, 0, 3])
    return _average(size, kernel, stride, padding, ceil_mode, choose.random() < 0.5, divisor)


_POOLS = {**_CHOSEN, **{f"random {seed}": _draw(seed) for seed in range(25)}}
_GLOBAL = [GlobalAverage(2, 2, pixels) for pixels in (1, 2, 3, 4, 5, 7, 49, 64)]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary([*_POOLS.values(), *_GLOBAL])


def _matching_geometry(pool: Pool2d) -> bool:
    """The ceil_mode that gives the kernel's output size."""
    for ceil_mode in (False, True):
        probe = functional.max_pool2d(
            torch.zeros(1, 1, *pool.size),
            pool.kernel,
            pool.stride,
            pool.padding,
            pool.dilation,
            ceil_mode,
        )
        if tuple(probe.shape[2:]) == pool.output_size:
            return ceil_mode
    raise AssertionError("no such geometry")


@pytest.mark.parametrize("name", _POOLS)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    pool = _POOLS[name]
    ceil_mode = _matching_geometry(pool)
    x = random_array(np.random.default_rng(1), pool.batch, 32, *pool.size)
    found = to_plain(library.run(pool, [to_blocked(x)]), 32)
    image = torch.from_numpy(x)
    if pool.mode == "max":
        expected = functional.max_pool2d(
            image, pool.kernel, pool.stride, pool.padding, pool.dilation, ceil_mode
        )
        np.testing.assert_array_equal(found, expected.numpy())
        return

    def average(values: Tensor) -> Tensor:
        return functional.avg_pool2d(
            values,
            pool.kernel,
            pool.stride,
            pool.padding,
            ceil_mode,
            pool.count_padding,
            pool.divisor or None,
        )

    # One rounding for each addition, two for the reciprocal and the product.
    terms = pool.kernel[0] * pool.kernel[1] + 2
    bound = terms * EPS / 2 * average(image.double().abs())
    Bounded(average(image.double()), bound).check(found)


@pytest.mark.parametrize("kernel", _GLOBAL)
def test_global_average(library: KernelLibrary, kernel: GlobalAverage) -> None:
    x = random_array(np.random.default_rng(2), kernel.extent, kernel.pixels, 16)
    exact = torch.from_numpy(x).double()
    bound = (kernel.pixels + 2) * EPS / 2 * exact.abs().mean(1)
    Bounded(exact.mean(1), bound).check(library.run(kernel, [x]))


def test_maximum_of_very_negative_numbers(library: KernelLibrary) -> None:
    pool = _POOLS["max 3x3 stride 2 padded"]
    x = np.full((1, 32, 7, 9), -3.3e38, np.float32)
    found = library.run(pool, [to_blocked(x)])
    assert (found == np.float32(-3.3e38)).all()


def test_maximum_of_infinities(library: KernelLibrary) -> None:
    pool = _POOLS["max 3x3 stride 2 padded"]
    x = np.full((1, 32, 7, 9), -np.inf, np.float32)
    assert (library.run(pool, [to_blocked(x)]) == -np.inf).all()
