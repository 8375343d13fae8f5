"""Convolution kernels with random numbers, and what they must give."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from harness import (
    Array,
    Bounded,
    KernelLibrary,
    apply_steps,
    random_array,
    sum_of_products,
    to_blocked,
    to_plain,
)
from torch import Tensor
from torch.nn import functional

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.depthwise import DepthwiseConv2d
from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.geometry import Geometry


def blocked_operand(array: Array) -> Array:
    """A full operand in blocked layout; one number a channel as it is."""
    return to_blocked(array) if array.ndim == 4 else array


def wide(array: Array) -> Tensor:
    """An operand in float64, broadcast over pixels where it has one number a channel."""
    tensor = torch.from_numpy(array).double()
    return tensor if tensor.ndim == 4 else tensor.reshape(1, -1, 1, 1)


def padded(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Zeros around an image; padding is (top, bottom, left, right)."""
    top, bottom, left, right = padding
    return functional.pad(x, (left, right, top, bottom))


def check_convolution(library: KernelLibrary, kernel: Conv2d | DepthwiseConv2d) -> None:
    """Compare a convolution with torch in float64."""
    generator = np.random.default_rng(7)
    if isinstance(kernel, Conv2d):
        groups, filters = kernel.groups, kernel.filters
    else:
        groups = filters = kernel.channels
    geometry = kernel.geometry
    x = random_array(generator, kernel.batch, kernel.channels, *geometry.size)
    weight = random_array(generator, filters, kernel.channels // groups, *geometry.kernel)
    bias = random_array(generator, filters)
    stored = x
    if isinstance(kernel, Conv2d) and kernel.last_channels:
        unused = slice(kernel.channels - LANES + kernel.last_channels, None)
        x[:, unused], weight[:, unused] = 0.0, 0.0
        stored = x.copy()
        stored[:, unused] = np.nan
    shapes = {"full": (kernel.batch, filters, *geometry.output_size), "channel": (filters,)}
    operands = [
        random_array(generator, *shapes[step.operand])
        for step in kernel.steps
        if step.operand != "none"
    ]
    image, taps, shift = (torch.from_numpy(array).double() for array in (x, weight, bias))

    def convolve(image: Tensor, taps: Tensor, shift: Tensor) -> Tensor:
        return functional.conv2d(
            padded(image, geometry.padding),
            taps,
            shift,
            geometry.stride,
            dilation=geometry.dilation,
            groups=groups,
        )

    expected_sums = sum_of_products(
        convolve(image, taps, shift),
        convolve(image.abs(), taps.abs(), shift.abs()),
        terms=weight[0].size,
    )
    expected = apply_steps(kernel.steps, expected_sums, [wide(array) for array in operands])
    plain = isinstance(kernel, Conv2d) and kernel.plain_input
    packed = pack_filters(weight, kernel) if isinstance(kernel, Conv2d) else pack_depthwise(weight)
    found = library.run(
        kernel,
        [
            stored if plain else to_blocked(stored),
            packed,
            bias,
            *(blocked_operand(o) for o in operands),
        ],
    )
    assert np.isnan(found[:, filters // LANES :]).all(), "wrote beside its part"
    expected.check(to_plain(found, filters))


def pack_filters(weight: Array, kernel: Conv2d) -> Array:
    """``[O, C, KH, KW]`` to ``[O/NR, C/16, KH, KW, 16, NR]``, element by element."""
    tiles, input_blocks, _, _, lanes, nr = kernel.weight_shape()
    packed = np.empty(kernel.weight_shape(), np.float32)
    for tile in range(tiles):
        for block in range(input_blocks):
            part = weight[tile * nr : (tile + 1) * nr, block * lanes : (block + 1) * lanes]
            packed[tile, block] = part.transpose(2, 3, 1, 0)
    return packed


def pack_depthwise(weight: Array) -> Array:
    """``[C, 1, KH, KW]`` to ``[C/16, KH, KW, 16]``."""
    blocks = weight[:, 0].reshape(-1, LANES, *weight.shape[2:])
    return np.ascontiguousarray(blocks.transpose(0, 2, 3, 1))


@dataclass(frozen=True)
class Layer:
    """A convolution without groups.

    Attributes:
        weight: ``[O, C, KH, KW]``.
        bias: ``[O]``.
        geometry: where its windows lie.
    """

    weight: Array
    bias: Array
    geometry: Geometry

    def sums(self, given: Bounded) -> Bounded:
        """What it gives in float32 for an image that is only known within bounds."""
        weight, bias = (torch.from_numpy(array).double() for array in (self.weight, self.bias))
        sizes = given.exact.abs() + given.bound
        rounded = sum_of_products(
            self._convolve(given.exact, weight, bias),
            self._convolve(sizes, weight.abs(), bias.abs()),
            terms=self.weight[0].size,
        )
        carried = self._convolve(given.bound, weight.abs(), torch.zeros_like(bias))
        return Bounded(rounded.exact, rounded.bound + carried)

    def _convolve(self, image: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        geometry = self.geometry
        image = padded(image, geometry.padding)
        return functional.conv2d(image, weight, bias, geometry.stride, dilation=geometry.dilation)


def exactly(image: Array) -> Bounded:
    """An image that is known."""
    exact = torch.from_numpy(image).double()
    return Bounded(exact, torch.zeros_like(exact))


def draw_geometry(choose: random.Random) -> Geometry:
    """Random sizes of which at least one window fits in the padded image."""
    while True:
        size = (choose.randint(1, 12), choose.randint(1, 40))
        kernel = (choose.choice([1, 2, 3, 5]), choose.choice([1, 2, 3, 5, 7]))
        stride = (choose.randint(1, 4), choose.randint(1, 4))
        top, bottom, left, right = (choose.choice([0, 0, 1, 2, 3]) for _ in range(4))
        dilation = (choose.choice([1, 1, 2, 3]), choose.choice([1, 1, 2, 3]))
        geometry = Geometry(size, kernel, stride, (top, bottom, left, right), dilation)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        if size[0] + top + bottom >= reach[0] and size[1] + left + right >= reach[1]:
            return geometry
