"""Kernels that integers share with floats, and averages, between guards."""

import numpy as np
import pytest
import torch
from fixed_points import apply_fixed, random_integers
from harness import KernelLibrary, to_blocked, to_plain
from torch.nn import functional

from shohin.backends.tvm.kernels.depthwise import DepthwiseConv2d
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.fixed_average import FixedAverage
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.kernels.layout import ToBlocked, ToPlain
from shohin.backends.tvm.kernels.pointwise import Pointwise
from shohin.backends.tvm.kernels.pool import Pool2d
from shohin.backends.tvm.kernels.window import Window

_RESCALE = Step("fixed-rescale", (3, -128, 127, 1))
_SMALL = Step("fixed-rescale", (-2, -128, 127, 1))


def run(kernel, *arrays):
    return KernelLibrary([kernel]).run(kernel, list(arrays))


def draw(*shape, dtype="int8"):
    return random_integers(np.random.default_rng(6), shape, dtype)


_WINDOWS = {
    "global": Geometry((7, 6), (7, 6)),
    "halves": Geometry((6, 8), (2, 2), (2, 2)),
    "padded": Geometry((5, 7), (3, 3), (2, 2), (1, 1, 1, 1)),
    "one pixel": Geometry((1, 1), (1, 1)),
    "uneven": Geometry((4, 9), (1, 5), (3, 2), (0, 0, 2, 2)),
}


@pytest.mark.parametrize("dtype", ["int8", "int16"])
@pytest.mark.parametrize("name", _WINDOWS)
def test_averages(name, dtype):
    geometry, wide = _WINDOWS[name], dtype == "int16"
    steps = (Step("fixed-rescale", (14, *_limits(dtype), 1)),)
    kernel = FixedAverage(2, 2, geometry, 1365, dtype, dtype, wide, steps)
    x = draw(2, 20, *geometry.size, dtype=dtype)
    top, bottom, left, right = geometry.padding
    image = functional.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    sums = functional.avg_pool2d(image, geometry.kernel, geometry.stride, divisor_override=1)
    expected = apply_fixed(steps, sums.numpy().astype(np.int64) * 1365, [])
    assert np.array_equal(to_plain(run(kernel, to_blocked(x)), 20), expected)


def _limits(dtype):
    return np.iinfo(dtype).min, np.iinfo(dtype).max


@pytest.mark.parametrize("dtype", ["int8", "int16"])
def test_maximum_pooling(dtype):
    kernel = Pool2d("max", 2, 2, (6, 9), (3, 4), (3, 3), (2, 2), (1, 0), dtype=dtype)
    x = draw(2, 25, 6, 9, dtype=dtype)
    image = functional.pad(torch.from_numpy(x).double(), (0, 0, 1, 1), value=-1e9)
    expected = functional.max_pool2d(image, 3, 2)[:, :, :3, :4]
    assert np.array_equal(to_plain(run(kernel, to_blocked(x)), 25), expected.numpy())


def test_slices_and_padding():
    kernel = Window(1, 20, (5, 6), 24, (4, 5), (-3, 1, -1), (1, 1), dtype="int8")
    x = draw(1, 20, 5, 6)
    expected = np.zeros((1, 24, 4, 5), np.int8)
    expected[:, 3:23, :, 1:] = x[:, :, 1:, :4]
    assert np.array_equal(to_plain(run(kernel, to_blocked(x)), 24), expected)


@pytest.mark.parametrize("channels", [3, 16, 21])
@pytest.mark.parametrize("pixels", [5, 16, 35])
def test_layouts(channels, pixels):
    x = draw(2, channels, pixels)
    there = ToBlocked(2, channels, pixels, "int8", "int8")
    back = ToPlain(2, channels, pixels, "int8", "int8")
    blocked = run(there, x)
    assert np.array_equal(blocked, to_blocked(x[..., None]).reshape(blocked.shape))
    assert np.array_equal(run(back, blocked), x)


@pytest.mark.parametrize("fraction", [1, -13])
@pytest.mark.parametrize("nearest", [0, 1])
def test_images_are_rounded_on_the_way(nearest, fraction):
    """Ties, limits, infinities, NaN and numbers next to zero among them."""
    x = (np.random.default_rng(1).standard_normal((1, 3, 40)) * 40).astype(np.float32)
    x[0, 0, :8] = [0.25, 0.75, np.inf, -np.inf, np.nan, -0.25, -1e-42, 1e-45]
    steps = (Step("fixed-round", (fraction, -128, 127, nearest)),)
    found = run(ToBlocked(1, 3, 40, "float32", "int8", steps), x)
    scaled = np.nan_to_num(x.astype(np.float64) * 2.0**fraction, nan=0.0, posinf=1e9, neginf=-1e9)
    rounded = np.rint(scaled) if nearest else np.floor(scaled)
    expected = np.clip(rounded, -128, 127).astype(np.int8)
    assert np.array_equal(found[0, 0, :, :3].T, expected[0])
    assert not found[0, 0, :, 3:].any()


@pytest.mark.parametrize("size", [7, 16, 1025])
def test_steps_on_their_own(size):
    x, y = draw(1, size), draw(1, size, dtype="int16")
    steps = (
        Step("fixed-add", (1, 0, 2, -128, 127, 1), "full", "int16"),
        Step("fixed-relu"),
        Step("fixed-multiply", (5, -32768, 32767, 0), "full", "int8"),
        _SMALL,
    )
    kernel = Pointwise(1, 1, size, "inner", steps, "int8", "int8")
    expected = apply_fixed(steps, x.astype(np.int64), [y, x])
    assert np.array_equal(run(kernel, x, y, x), expected)
    real = Pointwise(1, 1, size, "inner", (Step("fixed-real", (3,)),), "int16", "float32")
    assert np.array_equal(run(real, y), (y / 8).astype(np.float32))


def test_sums_whose_radixes_lie_far_apart():
    x, y = draw(1, 64, dtype="int16"), draw(1, 64, dtype="int16")
    steps = (Step("fixed-add", (0, 24, 20, -32768, 32767, 1), "full", "int16"),)
    kernel = Pointwise(1, 1, 64, "inner", steps, "int16", "int16")
    assert np.array_equal(run(kernel, x, y), apply_fixed(steps, x.astype(np.int64), [y]))


@pytest.mark.parametrize("shift", [0, 1, 30, 31, 32, 40, -1, -15, -40])
@pytest.mark.parametrize("nearest", [0, 1])
def test_shifts_of_every_length(shift, nearest):
    x = draw(1, 200, dtype="int16")
    steps = (Step("fixed-rescale", (shift, -32768, 32767, nearest)),)
    kernel = Pointwise(1, 1, 200, "inner", steps, "int16", "int16")
    assert np.array_equal(run(kernel, x), apply_fixed(steps, x.astype(np.int64), []))


@pytest.mark.parametrize("shift", [-23, -16, -15, -1, 0, 9])
def test_shifts_of_results_that_only_floats_read(shift):
    x = draw(1, 200)
    steps = (
        Step("fixed-rescale", (shift, -(1 << 31), (1 << 31) - 1, 1)),
        Step("fixed-real", (20,)),
    )
    kernel = Pointwise(1, 1, 200, "inner", steps, "int8", "float32")
    assert np.array_equal(run(kernel, x), apply_fixed(steps, x.astype(np.int64), []))


def test_averages_of_more_than_32_bits():
    steps = (Step("fixed-rescale", (30, -32768, 32767, 1)),)
    kernel = FixedAverage(
        1, 1, Geometry((300, 300), (300, 300)), 11930, "int16", "int16", True, steps
    )
    x = np.full((1, LANES, 300, 300), 32767, np.int16)
    x[0, 3] = -32768
    expected = apply_fixed(steps, x.astype(np.int64).sum((2, 3), keepdims=True) * 11930, [])
    assert np.array_equal(to_plain(run(kernel, to_blocked(x)), LANES), expected)


@pytest.mark.parametrize(("source", "weight"), [("int8", "int8"), ("int16", "int8")])
def test_depthwise_convolutions(source, weight):
    geometry = Geometry((6, 11), (3, 3), (2, 1), (1, 1, 1, 1))
    kernel = DepthwiseConv2d(
        2, 2 * LANES, geometry, 3, (_RESCALE, Step("fixed-relu")),
        source=source, weight_type=weight, sum_type="int32", result="int8",
    )  # fmt: skip
    x = draw(2, 32, 6, 11, dtype=source)
    taps = random_integers(np.random.default_rng(2), (32, 1, 3, 3), weight, symmetric=True)
    bias = np.random.default_rng(3).integers(-900, 900, 32).astype(np.int32)
    sums = functional.conv2d(
        torch.from_numpy(x).double(), torch.from_numpy(taps).double(),
        torch.from_numpy(bias).double(), (2, 1), 1, groups=32,
    )  # fmt: skip
    packed = np.ascontiguousarray(taps[:, 0].reshape(2, LANES, 3, 3).transpose(0, 2, 3, 1))
    expected = apply_fixed(kernel.steps, sums.numpy().astype(np.int64), [])
    assert np.array_equal(to_plain(run(kernel, to_blocked(x), packed, bias), 32), expected)
