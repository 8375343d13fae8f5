"""Planning of fixed-point operations, all exact."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from shohin.backends.tvm.cuda.kernels.direct import DirectConv2d
from shohin.backends.tvm.cuda.kernels.layers import Convolution as ConvolutionKernel
from shohin.backends.tvm.cuda.kernels.layers import Linear as LinearKernel
from shohin.backends.tvm.cuda.kernels.points import FixedAverage as AverageKernel
from shohin.backends.tvm.cuda.kernels.tiles import UnitName, choose_tile
from shohin.backends.tvm.cuda.kernels.vectors import MOST_ROWS, VectorProduct
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner
from shohin.backends.tvm.cuda.lowering.weights import has_small_groups
from shohin.backends.tvm.kernels.fixed_ternary import TernaryWeights
from shohin.backends.tvm.kernels.geometry import Geometry
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    FixedAverage,
    FixedConvolution,
    FixedLinear,
)
from shohin.backends.tvm.lowering.values import dtype_text, kernel_steps, numpy_of

_LARGEST_BYTE = 127


def place_convolution(planner: CudaPlanner, op: FixedConvolution) -> None:
    """A convolution of integers: of bytes in tiles, of others one output a thread."""
    filters, small = op.output.shape[1] // op.groups, _bytes_of(op)
    if small is None or has_small_groups(op):
        _place_direct(planner, op, _geometry(op), (op.x.shape[0], op.x.shape[1]))
        return
    unit = _unit(planner)
    tile = choose_tile(unit, filters, op.output.elements // op.output.shape[1], op.groups)
    depth = math.prod(op.weights.codes.shape[1:])
    weights = Weights(small.form, op.groups, filters, depth, tile)
    kernel = ConvolutionKernel(
        unit=unit,
        tile=tile,
        weights=weights,
        scaled=small.factors is not None,
        batch=op.x.shape[0],
        channels=op.x.shape[1],
        geometry=_geometry(op),
        steps=kernel_steps(op),
        source="int8",
        result=dtype_text(op.output.dtype),
    )
    macs = op.output.elements * depth
    planner.call(kernel, _places(planner, op, weights, small), op.label, macs)


def place_linear(planner: CudaPlanner, op: FixedLinear) -> None:
    """A fully connected layer of integers."""
    rows, small = math.prod(op.output.shape[:-1]), _bytes_of(op)
    outputs, depth = (int(size) for size in op.weights.codes.shape)
    if small is None:
        _place_direct(planner, op, Geometry((1, 1), (1, 1)), (rows, depth))
        return
    result, macs = dtype_text(op.output.dtype), op.output.elements * depth
    scaled, steps = small.factors is not None, kernel_steps(op)
    if rows <= MOST_ROWS:
        vector = VectorProduct(small.form, rows, depth, outputs, 0, steps, result, scaled)
        planner.call(vector, _places(planner, op, vector, small), op.label, macs)
        return
    unit = _unit(planner)
    tile = choose_tile(unit, outputs, rows, 1)
    weights = Weights(small.form, 1, outputs, depth, tile)
    kernel = LinearKernel(
        unit=unit,
        tile=tile,
        weights=weights,
        scaled=scaled,
        inputs=rows,
        steps=steps,
        source="int8",
        result=result,
    )
    planner.call(kernel, _places(planner, op, weights, small), op.label, macs)


def _unit(planner: CudaPlanner) -> UnitName:
    return "mma-bytes" if planner.target.has_tensor_cores else "dp4a"


@dataclass(frozen=True, eq=False)
class _Bytes:
    """Weights that products of bytes are formed with.

    Attributes:
        codes: int8 ``[outputs, ...]``: the weights, or 1, 0 and -1.
        pairs: int8 ``[outputs, 2]``, what 1 and -1 stand for; None where they are weights.
        factors: int32 ``[outputs]``, what sums are multiplied by; None for nothing.
    """

    codes: Array
    pairs: Array | None = None
    factors: Array | None = None

    @property
    def form(self) -> Literal["bytes", "ternary-bytes"]:
        """How kernels keep them."""
        return "bytes" if self.pairs is None else "ternary-bytes"


def _bytes_of(op: FixedConvolution | FixedLinear) -> _Bytes | None:
    """The weights as bytes, None where the layer needs wider integers."""
    if op.x.dtype != torch.int8 or op.weights.wide:
        return None
    codes = numpy_of(op.weights.codes)
    ternary = TernaryWeights.of(codes)
    if ternary is None or ternary.largest > _LARGEST_BYTE:
        return _Bytes(codes) if codes.dtype == np.int8 else None
    signs = np.array([0, 1, -1], np.int8)[ternary.codes]
    factors = ternary.factors.astype(np.int32) if ternary.scaled else None
    return _Bytes(signs, ternary.values.astype(np.int8), factors)


def _places(
    planner: CudaPlanner,
    op: FixedConvolution | FixedLinear,
    kernel: Weights | VectorProduct,
    weights: _Bytes,
) -> list[Placement]:
    """Where everything is that a kernel takes, in order."""
    codes, pairs, factors = weights.codes, weights.pairs, weights.factors
    flat = codes.reshape(len(codes), -1) if isinstance(kernel, VectorProduct) else codes
    places = [planner.value(op.x), planner.constant(lambda: kernel.pack(flat))]
    if pairs is not None:
        planner.note(op.label, "estimated: weights of two bits")
        places.append(planner.constant(lambda: kernel.pack_values(pairs)))
    places.append(_biases(planner, op))
    if factors is not None:
        places.append(planner.constant(lambda: factors))
    return [*places, *planner.operands(op), planner.define(op.output)]


def _biases(planner: CudaPlanner, op: FixedConvolution | FixedLinear) -> Placement:
    kind = np.int64 if op.weights.wide else np.int32
    return planner.constant(lambda: numpy_of(op.weights.biases).astype(kind))


def _geometry(op: FixedConvolution) -> Geometry:
    rows, columns = (int(size) for size in op.weights.codes.shape[2:])
    height, width = op.x.shape[2:]
    return Geometry((height, width), (rows, columns), op.stride, op.padding, op.dilation)


def _place_direct(
    planner: CudaPlanner,
    op: FixedConvolution | FixedLinear,
    geometry: Geometry,
    size: tuple[int, int],
) -> None:
    """One output a thread, of any integers.

    Args:
        planner: the planner.
        op: the layer.
        geometry: of its windows.
        size: images, and channels of each.
    """
    codes = op.weights.codes
    kernel = DirectConv2d(
        batch=size[0],
        channels=size[1],
        filters=len(codes),
        groups=op.groups if isinstance(op, FixedConvolution) else 1,
        geometry=geometry,
        source=dtype_text(op.x.dtype),
        weight=dtype_text(codes.dtype),
        total="int64" if op.weights.wide else "int32",
        result=dtype_text(op.output.dtype),
        steps=kernel_steps(op),
    )
    arguments = [
        planner.value(op.x),
        planner.constant(lambda: numpy_of(codes).reshape(-1)),
        _biases(planner, op),
        *planner.operands(op),
        planner.define(op.output),
    ]
    macs = op.output.elements * math.prod(codes.shape[1:])
    planner.call(kernel, arguments, op.label, macs)


def place_average(planner: CudaPlanner, op: FixedAverage) -> None:
    """Averages over windows."""
    batch, channels, height, width = op.x.shape
    kernel = AverageKernel(
        batch * channels,
        channels,
        Geometry((height, width), op.kernel, op.stride, op.padding),
        op.multiplier,
        dtype_text(op.x.dtype),
        dtype_text(op.output.dtype),
        op.x.dtype == torch.int16,
        kernel_steps(op),
    )
    arguments = [planner.value(op.x), *planner.operands(op), planner.define(op.output)]
    planner.call(kernel, arguments, op.label)
