"""Kernels for GPUs with inputs, and what they should give of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812

from shohin.backends.tvm.cuda.kernels.direct import DirectConv2d, SparseConv2d
from shohin.backends.tvm.cuda.kernels.layers import Convolution, Linear, MatMul
from shohin.backends.tvm.cuda.kernels.pairs import ConvolutionPair
from shohin.backends.tvm.cuda.kernels.points import (
    Copy,
    Elementwise,
    FixedAverage,
    Pool2d,
    Window,
)
from shohin.backends.tvm.cuda.kernels.rows import LayerNorm, PlaneAverage, Softmax
from shohin.backends.tvm.cuda.kernels.tiles import _THREAD_TILES, _WARP_TILES
from shohin.backends.tvm.cuda.kernels.vectors import SparseVectorProduct, VectorProduct
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.cuda.lowering.weights import lists_of
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry

TILES = {"fma": _THREAD_TILES, "dp4a": _THREAD_TILES, "mma-float": _WARP_TILES,
         "mma-bytes": _WARP_TILES}  # fmt: skip
RESCALE = Step("fixed-rescale", (6, -128, 127, 1))


@dataclass
class Case:
    """A kernel, arrays for its parameters but the last, and the result.

    Attributes:
        kernel: what is run.
        inputs: in order.
        wanted: the result, float64 or integers.
        tolerance: of what the largest result is; 0 for every bit.
    """

    kernel: object
    inputs: list
    wanted: np.ndarray
    tolerance: float = 0.0


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(seed, least, most, *shape, dtype=np.int8):
    return np.random.default_rng(seed).integers(least, most + 1, shape).astype(dtype)


def rescaled(sums):
    """`RESCALE`: by 2**-6 to the nearest, ties to even, saturated to bytes."""
    return np.clip(np.rint(sums / 64.0), -128, 127).astype(np.int8)


def rounding(depth):
    """What sums of so many products may be off, of the sum of their absolute values."""
    return (depth + 8) * 2.0**-24


GEOMETRY = Geometry((9, 11), (3, 2), (2, 1), (1, 0, 2, 1), (1, 2))


def convolved(x, weight, geometry, groups=1):
    top, bottom, left, right = geometry.padding
    padded = F.pad(torch.from_numpy(x).double(), (left, right, top, bottom))
    y = F.conv2d(
        padded,
        torch.from_numpy(weight).double(),
        None,
        geometry.stride,
        0,
        geometry.dilation,
        groups,
    )
    return y.numpy()


def float_convolution(
    unit, tile, form="float", groups=1, geometry=GEOMETRY, channels=10, filters=38
):
    batch, depth = 2, channels // groups * geometry.kernel[0] * geometry.kernel[1]
    x = numbers(1, batch, channels, *geometry.size)
    bias, scale = numbers(3, filters), numbers(4, filters)
    steps = (Step("multiply", operand="channel"), Step("add", operand="full"), Step("relu"))
    weights = Weights(form, groups, filters // groups, depth, tile)
    shape = (filters, channels // groups, *geometry.kernel)
    if form == "float":
        weight = numbers(2, *shape)
        packed = [weights.pack(weight)]
    else:
        codes, pairs = integers(2, -1, 1, *shape), numbers(5, filters, 2)
        weight = _meant(codes, pairs)
        packed = [weights.pack(codes), weights.pack_values(pairs)]
    y = convolved(x, weight, geometry, groups) + bias[:, None, None]
    other = numbers(6, *y.shape)
    wanted = np.maximum(y * scale[:, None, None] + other, 0)
    kernel = Convolution(unit=unit, tile=tile, weights=weights, batch=batch, channels=channels,
                         geometry=geometry, steps=steps)  # fmt: skip
    # Products of TF32 leave out 2**-22 of each.
    tolerance = 8 * rounding(depth) + (2.0**-20 if unit == "mma-float" else 0)
    return Case(kernel, [x, *packed, bias, scale, other], wanted, tolerance)


def _meant(codes, pairs):
    shape = (-1, *[1] * (codes.ndim - 1))
    above, below = pairs[:, 0].reshape(shape), pairs[:, 1].reshape(shape)
    return np.where(codes > 0, above, np.where(codes < 0, below, 0)).astype(pairs.dtype)


def pair(unit, tile, rank=37):
    batch, channels, filters, geometry = 2, 10, 38, GEOMETRY
    depth = channels * geometry.kernel[0] * geometry.kernel[1]
    x = numbers(1, batch, channels, *geometry.size)
    first = numbers(2, rank, channels, *geometry.kernel), numbers(3, rank)
    second = numbers(4, filters, rank, 1, 1), numbers(5, filters)
    between = convolved(x, first[0], geometry) + first[1][:, None, None]
    inner = Geometry(geometry.output_size, (1, 1))
    y = convolved(between, second[0], inner) + second[1][:, None, None]
    kernel = ConvolutionPair(
        first=Convolution(unit=unit, tile=tile, weights=Weights("float", 1, rank, depth, tile),
                          batch=batch, channels=channels, geometry=geometry),
        second=Convolution(unit=unit, tile=tile, weights=Weights("float", 1, filters, rank, tile),
                           batch=batch, channels=rank, geometry=inner, steps=(Step("relu"),)),
    )  # fmt: skip
    inputs = [x, kernel.first.weights.pack(first[0]), first[1]]
    inputs += [kernel.second.weights.pack(second[0]), second[1]]
    return Case(kernel, inputs, np.maximum(y, 0), 8 * rounding(depth + rank) + 2.0**-19)


def byte_convolution(unit, tile, form="bytes", groups=1, scaled=False):
    batch, channels, filters, geometry = 2, 10, 38, GEOMETRY
    depth = channels // groups * geometry.kernel[0] * geometry.kernel[1]
    x = integers(1, -128, 127, batch, channels, *geometry.size)
    bias = integers(3, -500, 500, filters, dtype=np.int32)
    weights = Weights(form, groups, filters // groups, depth, tile)
    shape = (filters, channels // groups, *geometry.kernel)
    if form == "bytes":
        weight = integers(2, -127, 127, *shape)
        packed = [weights.pack(weight)]
    else:
        codes, pairs = integers(2, -1, 1, *shape), integers(5, -127, 127, filters, 2)
        weight = _meant(codes, pairs)
        packed = [weights.pack(codes), weights.pack_values(pairs)]
    factors = integers(6, -3, 3, filters, dtype=np.int32)
    sums = convolved(x, weight, geometry, groups)
    sums = sums * factors[:, None, None] if scaled else sums
    wanted = rescaled(sums + bias[:, None, None])
    kernel = Convolution(unit=unit, tile=tile, weights=weights, scaled=scaled, batch=batch,
                         channels=channels, geometry=geometry, steps=(RESCALE,), source="int8",
                         result="int8")  # fmt: skip
    return Case(kernel, [x, *packed, bias, *([factors] if scaled else [])], wanted)


def linear(unit, form, depth, rows=7, outputs=21):
    tile = TILES[unit][-1]
    weights = Weights(form, 1, outputs, depth, tile)
    if form == "float":
        x, weight, bias = numbers(1, rows, depth), numbers(2, outputs, depth), numbers(3, outputs)
        kernel = Linear(unit=unit, tile=tile, weights=weights, inputs=rows)
        wanted = x.astype(np.float64) @ weight.T.astype(np.float64) + bias
        return Case(kernel, [x, weights.pack(weight), bias], wanted, 4 * rounding(depth) + 2.0**-20)
    x, weight = integers(1, -128, 127, rows, depth), integers(2, -127, 127, outputs, depth)
    bias = integers(3, -500, 500, outputs, dtype=np.int32)
    kernel = Linear(unit=unit, tile=tile, weights=weights, inputs=rows, steps=(RESCALE,),
                    source="int8", result="int8")  # fmt: skip
    wanted = rescaled(x.astype(np.int64) @ weight.T.astype(np.int64) + bias)
    return Case(kernel, [x, weights.pack(weight), bias], wanted)


def matmul(unit, transposed, batch=3, rows=19, columns=23, depth=37):
    a, b = numbers(1, batch, rows, depth), numbers(2, batch, depth, columns)
    kernel = MatMul(unit=unit, tile=TILES[unit][-1], batch=batch, rows=rows, columns=columns,
                    depth=depth, transposed=transposed, scale=0.5)  # fmt: skip
    wanted = 0.5 * (a.astype(np.float64) @ b.astype(np.float64))
    given = b.transpose(0, 2, 1) if transposed else b
    return Case(kernel, [a, given], wanted, 4 * rounding(depth) + 2.0**-20)


def vector(form, rows, depth, outputs=11, scaled=False):
    if form.endswith("bytes"):
        return _byte_vector(form, rows, depth, outputs, scaled)
    x, bias = numbers(1, rows, depth), numbers(3, outputs)
    kernel = VectorProduct(form, rows, depth, outputs, 0, (Step("relu"),))
    if form == "float":
        weight = numbers(2, outputs, depth)
        packed = [kernel.pack(weight)]
    elif form == "ternary-float":
        codes, pairs = integers(2, -1, 1, outputs, depth), numbers(4, outputs, 2)
        weight = _meant(codes, pairs)
        packed = [kernel.pack(codes), kernel.pack_values(pairs)]
    else:
        book = numbers(4, 256 if form == "codebook-8" else 16)
        indices = integers(2, 0, len(book) - 1, outputs, depth, dtype=np.int64)
        kernel, weight = replace(kernel, book=len(book)), book[indices]
        packed = [kernel.pack(indices), book]
    wanted = np.maximum(x.astype(np.float64) @ weight.T.astype(np.float64) + bias, 0)
    return Case(kernel, [x, *packed, bias], wanted, 4 * rounding(depth))


def _byte_vector(form, rows, depth, outputs, scaled):
    x = integers(1, -128, 127, rows, depth)
    bias = integers(3, -500, 500, outputs, dtype=np.int32)
    factors = integers(5, -3, 3, outputs, dtype=np.int32)
    kernel = VectorProduct(form, rows, depth, outputs, 0, (RESCALE,), "int8", scaled)
    if form == "bytes":
        weight = integers(2, -127, 127, outputs, depth)
        packed = [kernel.pack(weight)]
    else:
        codes, pairs = integers(2, -1, 1, outputs, depth), integers(4, -127, 127, outputs, 2)
        weight = _meant(codes, pairs)
        packed = [kernel.pack(codes), kernel.pack_values(pairs)]
    sums = x.astype(np.int64) @ weight.T.astype(np.int64)
    sums = sums * factors if scaled else sums
    return Case(kernel, [x, *packed, bias, *([factors] if scaled else [])], rescaled(sums + bias))


def _few(seed, *shape):
    weight = numbers(seed, *shape)
    weight[np.random.default_rng(seed).random(shape) > 0.1] = 0
    return weight


def sparse_vector(index, rows=3, depth=500, outputs=13):
    x, weight, bias = numbers(1, rows, depth), _few(2, outputs, depth), numbers(3, outputs)
    weight[4] = 0
    start, columns, values = lists_of(weight)
    kernel = SparseVectorProduct(rows, depth, outputs, len(values), index, (Step("relu"),))
    wanted = np.maximum(x.astype(np.float64) @ weight.T.astype(np.float64) + bias, 0)
    return Case(kernel, [x, start, columns.astype(index), values, bias], wanted, 4 * rounding(50))


def sparse_convolution(size):
    geometry = Geometry(size, (3, 3), (1, 2))
    x, weight, bias = numbers(1, 2, 5, *size), _few(2, 6, 5, 3, 3), numbers(3, 6)
    start, kept, values = lists_of(weight.reshape(6, -1))
    channel, tap = np.divmod(kept, 9)
    offsets = (channel * size[0] + tap // 3) * size[1] + tap % 3
    kernel = SparseConv2d(batch=2, channels=5, filters=6, geometry=geometry, kept=len(values),
                          steps=(Step("relu"),))  # fmt: skip
    wanted = np.maximum(convolved(x, weight, geometry) + bias[:, None, None], 0)
    inputs = [x, start, offsets.astype(np.int32), values, bias]
    return Case(kernel, inputs, wanted, 4 * rounding(45))


def direct(groups, total="float32"):
    filters, channels = 12, 6
    shape = (filters, channels // groups, *GEOMETRY.kernel)
    if total == "float32":
        x, weight, bias = numbers(1, 2, channels, 9, 11), numbers(2, *shape), numbers(3, filters)
        kernel = DirectConv2d(batch=2, channels=channels, filters=filters, groups=groups,
                              geometry=GEOMETRY)  # fmt: skip
        wanted = convolved(x, weight, GEOMETRY, groups) + bias[:, None, None]
        return Case(kernel, [x, weight, bias], wanted, 4 * rounding(weight[0].size))
    x = integers(1, -(2**15), 2**15 - 1, 2, channels, 9, 11, dtype=np.int16)
    weight = integers(2, -(2**15), 2**15 - 1, *shape, dtype=np.int16)
    bias = integers(3, -(2**40), 2**40, filters, dtype=np.int64)
    step = Step("fixed-rescale", (24, -(2**15), 2**15 - 1, 1))
    kernel = DirectConv2d(batch=2, channels=channels, filters=filters, groups=groups,
                          geometry=GEOMETRY, source="int16", weight="int16", total="int64",
                          result="int16", steps=(step,))  # fmt: skip
    sums = convolved(x, weight, GEOMETRY, groups) + bias[:, None, None]
    wanted = np.clip(np.rint(sums / 2.0**24), -(2**15), 2**15 - 1).astype(np.int16)
    return Case(kernel, [x, weight, bias], wanted)


def pool(mode, counts):
    geometry = Geometry((9, 11), (3, 2), (2, 2), (1, 0, 1, 0))
    x = numbers(1, 3, 9, 11)
    x[0, 4, 5] = np.nan
    y = torch.from_numpy(x).double()[None]
    if mode == "max":
        wanted = F.max_pool2d(y, (3, 2), 2, (1, 1)).numpy()
        size, reach = wanted.shape[2:], (0, 0)
    else:
        wanted = F.avg_pool2d(y, (3, 2), 2, (1, 1), True, counts).numpy()
        size, reach = wanted.shape[2:], (10, 12) if counts else (0, 0)
    return Case(Pool2d(mode, 3, geometry, size, reach), [x], wanted, rounding(6))


def window():
    x = numbers(1, 2, 3, 5, 6)
    kernel = Window(2, 3, (5, 6), 4, (4, 4), (-1, -1, 1), (2, 1), 7.0)
    wanted = np.full((2, 4, 4, 4), 7.0)
    for row in range(4):
        if 0 <= row * 2 - 1 < 5:
            wanted[:, 1:, row, :] = x[:, :, row * 2 - 1, 1:5]
    return Case(kernel, [x], wanted)


def elementwise():
    x, scale, other = numbers(1, 2, 5, 7), numbers(2, 5), numbers(3, 2, 5, 7)
    x[0, 0, :3] = [np.nan, np.inf, -np.inf]
    steps = (Step("multiply", operand="channel"), Step("add", operand="full"), Step("relu"),
             Step("sigmoid"))  # fmt: skip
    y = np.maximum(x.astype(np.float64) * scale[:, None] + other, 0)
    return Case(Elementwise(2, 5, 7, steps), [x, scale, other], 1 / (1 + np.exp(-y)), 5e-7)


def to_integers():
    x = numbers(1, 400) * 40
    x[:4] = [np.nan, np.inf, -np.inf, 0.5]
    kernel = Elementwise(1, 1, 400, (Step("fixed-round", (0, -128, 127, 1)),), "float32", "int8")
    return Case(kernel, [x], np.clip(np.rint(np.nan_to_num(x)), -128, 127).astype(np.int8))


def softmax(logarithm):
    x = numbers(1, 11, 70) * 5
    y = torch.from_numpy(x).double()
    wanted = F.log_softmax(y, 1) if logarithm else F.softmax(y, 1)
    return Case(Softmax(11, 70, logarithm), [x], wanted.numpy(), 2e-6)


def layer_norm():
    x, weight, bias = numbers(1, 11, 70), numbers(2, 70), numbers(3, 70)
    given = [torch.from_numpy(one).double() for one in (x, weight, bias)]
    wanted = F.layer_norm(given[0], (70,), given[1], given[2], 1e-5).numpy()
    return Case(LayerNorm(11, 70, 1e-5, True), [x, weight, bias], wanted, 2e-6)


def fixed_average():
    x = integers(1, -128, 127, 6, 9, 11)
    geometry = Geometry((9, 11), (3, 3), (2, 2), (1, 1, 1, 1))
    step = Step("fixed-rescale", (10, -128, 127, 1))
    kernel = FixedAverage(6, 3, geometry, 114, "int8", "int8", False, (step,))
    sums = F.avg_pool2d(torch.from_numpy(x).double()[None], 3, 2, 1, divisor_override=1).numpy()
    return Case(kernel, [x], np.clip(np.rint(sums * 114 / 2.0**10), -128, 127).astype(np.int8))


def place_averages():
    x = numbers(1, 13, 77)
    return Case(PlaneAverage(13, 77), [x], x.astype(np.float64).mean(1), rounding(77))


def all_cases():
    """Every kernel in every form, by name."""
    made = {}
    for unit in ("fma", "mma-float"):
        for tile in TILES[unit]:
            made[f"conv_{unit}_{tile.rows}x{tile.columns}"] = float_convolution(unit, tile)
        made[f"conv_{unit}_ternary"] = float_convolution(unit, TILES[unit][2], "ternary-float")
        made[f"conv_{unit}_groups"] = float_convolution(unit, TILES[unit][-1], groups=2)
        made[f"linear_{unit}"] = linear(unit, "float", 33)
        made |= {f"pair_{unit}_{t.rows}x{t.columns}": pair(unit, t) for t in TILES[unit][1:3]}
        made[f"matmul_{unit}"] = matmul(unit, False)
        made[f"matmul_{unit}_transposed"] = matmul(unit, True)
    for unit in ("dp4a", "mma-bytes"):
        for tile in TILES[unit]:
            made[f"conv_{unit}_{tile.rows}x{tile.columns}"] = byte_convolution(unit, tile)
        small = TILES[unit][-1]
        made[f"conv_{unit}_ternary"] = byte_convolution(unit, small, "ternary-bytes")
        made[f"conv_{unit}_scaled"] = byte_convolution(unit, small, "ternary-bytes", scaled=True)
        made[f"conv_{unit}_groups"] = byte_convolution(unit, small, groups=2)
        made[f"linear_{unit}"] = linear(unit, "bytes", 33)
    for form in ("float", "bytes", "ternary-float", "ternary-bytes", "codebook-4", "codebook-8"):
        for rows, depth in ((1, 1024), (4, 1030), (2, 516)):
            made[f"vector_{form}_{rows}x{depth}"] = vector(form, rows, depth)
    made["vector_scaled"] = vector("ternary-bytes", 2, 600, scaled=True)
    made |= {f"sparse_vector_{index}": sparse_vector(index) for index in ("uint16", "int32")}
    made["sparse_conv_small"] = sparse_convolution((7, 9))
    made["sparse_conv_large"] = sparse_convolution((40, 50))
    made |= {f"direct_{groups}": direct(groups) for groups in (1, 2, 6)}
    made["direct_wide"] = direct(2, "int64")
    made["pool_max"] = pool("max", False)
    made |= {f"pool_average_{counts}": pool("average", counts) for counts in (False, True)}
    made["window"] = window()
    made["copy"] = Case(Copy(5, 3, 3, 0), [numbers(1, 5, 3)], numbers(1, 5, 3))
    made["elementwise"], made["to_integers"] = elementwise(), to_integers()
    made |= {f"softmax_{logarithm}": softmax(logarithm) for logarithm in (False, True)}
    made["layer_norm"], made["fixed_average"] = layer_norm(), fixed_average()
    made["plane_average"] = place_averages()
    return {name.replace("-", "_"): case for name, case in made.items()}
