"""Convolutions and layers of many rows, as tiled products of weights and what they read."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import finish, joined_bytes, put
from shohin.backends.tvm.cuda.kernels.tiles import TiledProduct
from shohin.backends.tvm.cuda.kernels.weights import Weights
from shohin.backends.tvm.kernels.emit import Buffer, Expr, Parameter
from shohin.backends.tvm.kernels.epilogue import Step, operand_parameters
from shohin.backends.tvm.kernels.geometry import Geometry

_BYTES = 4

Gather: TypeAlias = Callable[[Expr, Expr], Expr]
"""Gives an element by its index, and whether it exists: zero where it does not."""


@dataclass(frozen=True, kw_only=True)
class WeightedProduct(TiledProduct):
    """A tiled product whose left operand is weights.

    Attributes:
        weights: that operand.
        scaled: whether sums of integers are multiplied by a factor of each output.
        steps: on the results.
        source: element type of what is read.
        result: element type of the results.
    """

    weights: Weights
    scaled: bool = False
    steps: tuple[Step, ...] = ()
    source: str = "float32"
    result: str = "float32"

    @property
    def _outputs(self) -> int:
        return self.weights.products * self.weights.rows

    def left(self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr]) -> Expr:
        """A weight, or four."""
        return self.weights.word(self._split(buffers)[0], place)

    def _split(
        self, buffers: tuple[Buffer, ...]
    ) -> tuple[tuple[Buffer, ...], tuple[Buffer, ...], tuple[Buffer, ...]]:
        """Buffers of the weights, of biases and factors, and of the steps."""
        first = 1 + len(self.weights.parameters())
        last = first + 1 + self.scaled
        return buffers[1:first], buffers[first:last], buffers[last:-1]

    def _parameters(self, inputs: int, outputs: int) -> tuple[Parameter, ...]:
        return (
            Parameter("x", (inputs,), self.source),
            *self.weights.parameters(),
            Parameter("bias", (self._outputs,), self.word),
            *((Parameter("factors", (self._outputs,), "int32"),) if self.scaled else ()),
            *operand_parameters(self.steps, (outputs,), self._outputs),
            Parameter("y", (outputs,), self.result),
        )

    def _store(self, buffers: tuple[Buffer, ...], channel: Expr, place: Expr, total: Expr) -> None:
        _, (bias, *factors), operands = self._split(buffers)
        total = total * factors[0][channel] if factors else total
        value = finish(self.steps, total + bias[channel], operands, place, channel)
        put(buffers[-1], place, value, self.result)

    def biased(self, buffers: tuple[Buffer, ...], channel: Expr, total: Expr) -> Expr:
        """A sum with its bias; zero for a channel that does not exist."""
        bias = self._split(buffers)[1][0]
        zero = _zero(self.source)
        return T.if_then_else(channel < self._outputs, total + bias[channel], zero)

    def _gathered(self, word: Expr, element: "Gather") -> Expr:
        """A word of the right operand: a float, or four bytes."""
        if self.word == "float32":
            return element(word, word < self.weights.depth)
        indices = [word * _BYTES + part for part in range(_BYTES)]
        return joined_bytes([element(one, one < self.weights.depth) for one in indices])

    @property
    def _whole(self) -> bool:
        """Whether no word that is read lies beyond the weights."""
        words = self.weights.words
        full = words * _BYTES if self.word == "int32" else words
        return words % self.tile.step == 0 and full == self.weights.depth


@dataclass(frozen=True)
class _Window:
    """The window of an output pixel.

    Attributes:
        image: first element of the group's channels in the image.
        row: of the window's first tap.
        column: of the window's first tap.
        exists: whether there is such a pixel.
    """

    image: Expr
    row: Expr
    column: Expr
    exists: Expr


@dataclass(frozen=True, kw_only=True)
class Convolution(WeightedProduct):
    """2-d convolution: columns are output pixels of all images, words are taps.

    Attributes:
        batch: images.
        channels: of an image.
        geometry: where windows lie.
    """

    batch: int
    channels: int
    geometry: Geometry

    @property
    def family(self) -> str:
        """``conv2d``, after the form of the weights."""
        return f"conv2d_{self.weights.form}".replace("-", "_")

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Groups, filters of a group, pixels, words."""
        pixels = self.batch * math.prod(self.geometry.output_size)
        return self.weights.products, self.weights.rows, pixels, self.weights.words

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, biases, step operands, output."""
        inputs = self.batch * self.channels * math.prod(self.geometry.size)
        return self._parameters(inputs, self.size[2] * self._outputs)

    def column(self, product: Expr, column: Expr) -> _Window:
        """Where the window of a pixel lies."""
        height, width = self.geometry.output_size
        image = T.floordiv(column, height * width)
        row = T.floormod(T.floordiv(column, width), height)
        plane = math.prod(self.geometry.size)
        of_group = self.channels // self.weights.products
        return _Window(
            T.bind((image * self.channels + product * of_group) * plane),
            T.bind(self.geometry.row(row, 0)),
            T.bind(self.geometry.column(T.floormod(column, width), 0)),
            T.bind(column < self.size[2]),
        )

    def right(self, buffers: tuple[Buffer, ...], known: _Window, word: Expr) -> Expr:
        """A tap, or four, of the window of a pixel; zero outside of the image."""
        x, shape = buffers[0], self.geometry
        (height, width), (rows, columns) = shape.size, shape.kernel

        def tap(index: Expr, exists: Expr) -> Expr:
            channel = T.floordiv(index, rows * columns)
            row = known.row + T.floormod(T.floordiv(index, columns), rows) * shape.dilation[0]
            column = known.column + T.floormod(index, columns) * shape.dilation[1]
            row, column = T.bind(row), T.bind(column)
            inside = T.And(T.And(row >= 0, row < height), T.And(column >= 0, column < width))
            inside = T.And(inside, known.exists)
            inside = inside if self._whole else T.And(inside, exists)
            place = known.image + (channel * height + row) * width + column
            return T.if_then_else(inside, x[place], _zero(self.source))

        return self._gathered(word, tap)

    def finish(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr], total: Expr
    ) -> None:
        """Store a pixel of a channel."""
        product, row, column = place
        pixels = math.prod(self.geometry.output_size)
        channel = T.bind(product * self.weights.rows + row)
        image = T.floordiv(column, pixels)
        target = (image * self._outputs + channel) * pixels + T.floormod(column, pixels)
        self._store(buffers, channel, T.bind(target), total)


@dataclass(frozen=True, kw_only=True)
class Linear(WeightedProduct):
    """A fully connected layer of many rows: columns are rows of the input.

    Attributes:
        inputs: rows of the input.
    """

    inputs: int

    @property
    def family(self) -> str:
        """``linear``, after the form of the weights."""
        return f"linear_{self.weights.form}".replace("-", "_")

    @property
    def size(self) -> tuple[int, int, int, int]:
        """One product: outputs, rows of the input, words."""
        return 1, self.weights.rows, self.inputs, self.weights.words

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, biases, step operands, output."""
        return self._parameters(self.inputs * self.weights.depth, self.inputs * self._outputs)

    def column(self, product: Expr, column: Expr) -> tuple[Expr, Expr]:
        """Where a row begins, and whether it exists."""
        return T.bind(column * self.weights.depth), T.bind(column < self.inputs)

    def right(self, buffers: tuple[Buffer, ...], known: tuple[Expr, Expr], word: Expr) -> Expr:
        """An element of a row, or four."""
        start, row_exists = known

        def element(index: Expr, exists: Expr) -> Expr:
            inside = row_exists if self._whole else T.And(row_exists, exists)
            return T.if_then_else(inside, buffers[0][start + index], _zero(self.source))

        return self._gathered(word, element)

    def finish(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr], total: Expr
    ) -> None:
        """Store an output of a row."""
        _, row, column = place
        self._store(buffers, row, T.bind(column * self._outputs + row), total)


@dataclass(frozen=True, kw_only=True)
class MatMul(TiledProduct):
    """``scale * a @ b`` of computed matrices.

    Attributes:
        batch: products.
        rows: of a.
        columns: of the result.
        depth: columns of a.
        transposed: whether b is ``[columns, depth]``.
        scale: of the results.
        steps: on the results.
    """

    batch: int
    rows: int
    columns: int
    depth: int
    transposed: bool = False
    scale: float = 1.0
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``matmul``."""
        return "matmul"

    @property
    def size(self) -> tuple[int, int, int, int]:
        """Products, rows, columns, depth."""
        return self.batch, self.rows, self.columns, self.depth

    def parameters(self) -> tuple[Parameter, ...]:
        """Both factors, step operands, output."""
        outputs = self.batch * self.rows * self.columns
        return (
            Parameter("a", (self.batch * self.rows * self.depth,)),
            Parameter("b", (self.batch * self.depth * self.columns,)),
            *operand_parameters(self.steps, (outputs,), self.columns),
            Parameter("y", (outputs,)),
        )

    def left(self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr]) -> Expr:
        """An element of a."""
        product, row, word = place
        value = buffers[0][(product * self.rows + row) * self.depth + word]
        return T.if_then_else(T.And(row < self.rows, word < self.depth), value, T.float32(0))

    def column(self, product: Expr, column: Expr) -> tuple[Expr, Expr]:
        """The product, and the column."""
        return product, column

    def right(self, buffers: tuple[Buffer, ...], known: tuple[Expr, Expr], word: Expr) -> Expr:
        """An element of b."""
        product, column = known
        inner = column * self.depth + word if self.transposed else word * self.columns + column
        value = buffers[1][product * (self.depth * self.columns) + inner]
        inside = T.And(column < self.columns, word < self.depth)
        return T.if_then_else(inside, value, T.float32(0))

    def finish(
        self, buffers: tuple[Buffer, ...], place: tuple[Expr, Expr, Expr], total: Expr
    ) -> None:
        """Store an element of the product."""
        product, row, column = place
        target = T.bind((product * self.rows + row) * self.columns + column)
        value = total if self.scale == 1.0 else total * T.float32(self.scale)
        operands = tuple(buffers[2:-1])
        put(buffers[-1], target, finish(self.steps, value, operands, target, column), "float32")


def _zero(dtype: str) -> Expr:
    return T.float32(0) if dtype == "float32" else T.int8(0)
