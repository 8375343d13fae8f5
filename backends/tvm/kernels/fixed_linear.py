"""Fully connected layers of integers.

Weights are packed ``[N/NR, K/G, NR * G]``, groups of G neighbouring inputs beside each other, zeros
behind the last. Those of four bits are packed two groups to a byte, the first in the low half, each
raised by 8 so that it is not negative: products with the inputs then have to lose eight times the
sum of the inputs, which is found on the way.
"""

from dataclasses import dataclass, replace

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.dots import RAISED, DotUnit, Inputs, widened
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    ceil_div,
    constant,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.matmul import MatrixTile, matrix_tile_options
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes

HALF_BYTE_OFFSET = 8
"""What weights of four bits are raised by."""

_MOST_STORED = 1.04
"""Columns of tiles over those that there are: small models are what integers are for."""

_UNROLLED = 8
"""Groups of inputs of one turn of the loop."""


@dataclass(frozen=True)
class FixedLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with ``x`` ``[M, K]`` and ``y`` ``[M, N]``.

    Attributes:
        rows: M.
        depth: K.
        columns: N.
        unit: the instructions.
        signed: whether an input may be negative.
        result: element type of the output.
        tile: sums.
        chain: groups of inputs whose products are added in 16 bits.
        wide: whether sums have 64 bits.
        source: element type of the inputs, which the unit may want wider.
        weight_type: element type of the packed weights.
        half_bytes: whether two weights share a byte.
        steps: on the sums; ``full`` operands are ``[M, N]``, ``channel`` ones are along N, padded
            like the bias to whole tiles.
    """

    rows: int
    depth: int
    columns: int
    unit: DotUnit
    signed: bool
    result: str
    tile: MatrixTile
    chain: int = 1
    wide: bool = False
    source: str = "int8"
    weight_type: str = "int8"
    half_bytes: bool = False
    steps: tuple[Step, ...] = ()

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``fixed_linear``."""
        return "fixed_linear"

    @property
    def tile_columns(self) -> int:
        """Columns of a whole tile."""
        return LANES * self.tile.column_blocks

    @property
    def column_tiles(self) -> int:
        """Tiles along N."""
        return ceil_div(self.columns, self.tile_columns)

    @property
    def row_tiles(self) -> int:
        """Tiles along M."""
        return ceil_div(self.rows, self.tile.rows)

    @property
    def padded_columns(self) -> int:
        """Columns in whole tiles."""
        return self.column_tiles * self.tile_columns

    @property
    def input_groups(self) -> int:
        """Groups of inputs, an even number of them where two share bytes."""
        groups = ceil_div(self.depth, self.unit.group)
        return groups + groups % 2 if self.half_bytes else groups

    @property
    def extent(self) -> int:
        """Tiles."""
        return self.column_tiles * self.row_tiles

    @property
    def operations(self) -> int:
        """Multiply-accumulates, by four."""
        return self.rows * self.depth * self.columns // 4

    @property
    def sum_type(self) -> str:
        """Element type of the sums."""
        return "int64" if self.wide else "int32"

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The layer in every tile shape that fits the registers."""
        options = fixed_tile_options(self.rows, self.columns, registers)
        return tuple(replace(self, tile=tile) for tile in options)

    def tile_text(self) -> str:
        """Rows times column blocks times sums along K."""
        return f"{self.tile.rows}x{self.tile.column_blocks}x{self.tile.splits}"

    def weight_shape(self) -> tuple[int, int, int]:
        """Shape of the packed weights."""
        groups = self.input_groups // 2 if self.half_bytes else self.input_groups
        return (self.column_tiles, groups, self.tile_columns * self.unit.group)

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, weights, bias, step operands, rows."""
        result = (self.rows, self.columns)
        return (
            Parameter("x", (self.rows, self.depth), self.source),
            Parameter("weight", self.weight_shape(), self.weight_type),
            Parameter("bias", (self.padded_columns,), self.sum_type),
            *operand_parameters(self.steps, result, self.padded_columns),
            Parameter("y", result, self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One tile of the result; ragged edges are separate code."""
        emitter = _TileEmitter(self, item, buffers)

        def over_columns(rows: int) -> None:
            whole_or_rest(
                emitter.column_tile,
                self.tile_columns,
                self.columns,
                lambda width: emitter.emit(rows, width),
            )

        whole_or_rest(emitter.row_tile, self.tile.rows, self.rows, over_columns)

    def pack(self, weight: Array) -> Array:
        """Integers ``[N, K]`` as the kernel reads them."""
        tiles, _, _ = self.weight_shape()
        nr, size, groups = self.tile_columns, self.unit.group, self.input_groups
        full = np.zeros((tiles * nr, groups * size), np.int16)
        full[: weight.shape[0], : weight.shape[1]] = weight
        split = full.reshape(tiles, nr, groups, size).transpose(0, 2, 1, 3)
        ordered = split.reshape(tiles, groups, nr * size)
        if not self.half_bytes:
            return np.ascontiguousarray(ordered).astype(self.weight_type)
        raised = (ordered + HALF_BYTE_OFFSET).astype(np.uint8)
        packed: Array = raised[:, ::2] | raised[:, 1::2] << 4
        return np.ascontiguousarray(packed).view(np.int8)

    def biases(self, weight: Array, bias: Array) -> Array:
        """Integers ``[N]`` that the sums start from, padded to whole tiles."""
        found = np.zeros(self.padded_columns, self.sum_type)
        found[: bias.size] = bias
        if self.unit.raises(self.signed) and not self.half_bytes:
            found[: len(weight)] -= RAISED * weight.astype(np.int64).sum(1)
        return found


class _TileEmitter:
    """Emits one tile; holds what full and ragged tiles share."""

    def __init__(self, kernel: FixedLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.unit = kernel, kernel.unit
        self.x, self.weight, self.bias, *operands, self.y = buffers
        self.operands = tuple(operands)
        self.row_tile = T.floormod(item, kernel.row_tiles)
        self.column_tile = T.floordiv(item, kernel.row_tiles)

    def emit(self, rows: int, columns: int) -> None:
        """A tile of `rows` by `columns` results."""
        kernel = self.kernel
        sums = _Sums(kernel, rows, blocks(columns))
        whole = kernel.depth // self.unit.group
        whole -= whole % 2 if kernel.half_bytes else 0
        turns, rest = divmod(whole, _UNROLLED)
        with T.serial(0, turns) as turn:
            self._turn(sums, turn * _UNROLLED, _UNROLLED)
        self._turn(sums, turns * _UNROLLED, rest)
        if kernel.input_groups > whole:
            self._turn(sums, whole, kernel.input_groups - whole, ragged=True)
        for row in range(rows):
            for block in range(blocks(columns)):
                valid = min(LANES, columns - block * LANES)
                self._finish(sums.total(row, block), row, block, valid)

    def _turn(self, sums: "_Sums", first: Expr, count: int, *, ragged: bool = False) -> None:
        """Add the products of so many groups of inputs."""
        step = 2 if self.kernel.half_bytes else self.kernel.chain
        for start in range(0, count, step):
            groups = [first + start + i for i in range(min(step, count - start))]
            if self.kernel.half_bytes:
                self._add_half_bytes(sums, groups, start // step, ragged)
            else:
                self._add(sums, groups, start // step, ragged)

    def _add(self, sums: "_Sums", groups: list[Expr], turn: int, ragged: bool) -> None:
        inputs = [
            [
                self.unit.inputs(self._read(row, group, ragged), self.kernel.signed)
                for group in groups
            ]
            for row in range(sums.rows)
        ]
        for piece in range(sums.pieces):
            weights = [self._weights(group, piece) for group in groups]
            for row in range(sums.rows):
                sums.add(turn, row, piece, inputs[row], weights)

    def _add_half_bytes(self, sums: "_Sums", groups: list[Expr], turn: int, ragged: bool) -> None:
        unit = self.unit
        inputs = [
            [unit.plain_inputs(self._read(row, group, ragged)) for group in groups]
            for row in range(sums.rows)
        ]
        for row in range(sums.rows):
            sums.add_inputs(row, inputs[row])
        for piece in range(sums.pieces):
            packed = self._weights(T.floordiv(groups[0], 2), piece)
            halves = _halves(packed, unit.lanes * unit.group)[: len(groups)]
            for row in range(sums.rows):
                sums.add_unsigned(turn, row, piece, inputs[row], halves)

    def _read(self, row: int, group: Expr, ragged: bool) -> Expr:
        size = self.unit.group
        place = self.row_tile * self.kernel.tile.rows + row
        source, wanted = self.kernel.source, self.unit.input_type
        if not ragged:
            return widened(self.x[place, ramp(group * size, size)], source, wanted)
        scratch = local(size, source)
        for lane in range(size):
            index = int(group) * size + lane
            value = self.x[place, index] if index < self.kernel.depth else constant(0, source, 1)
            store(scratch, [lane], value)
        return widened(scratch[ramp(0, size)], source, wanted)

    def _weights(self, group: Expr, piece: int) -> Expr:
        size = self.unit.lanes * self.unit.group
        read = self.weight[self.column_tile, group, ramp(piece * size, size)]
        return T.bind(widened(read, self.kernel.weight_type, self.unit.input_type))

    def _finish(self, total: Expr, row: int, block: int, valid: int) -> None:
        kernel = self.kernel
        column = (self.column_tile * kernel.tile.column_blocks + block) * LANES

        def place(last: Expr) -> list[Expr]:
            return [self.row_tile * kernel.tile.rows + row, last]

        result = apply_steps(
            kernel.steps,
            total + self.bias[ramp(column)],
            self.operands,
            lambda buffer: load_lanes(buffer, place, column, valid),
            lambda buffer: buffer[ramp(column)],
        )
        if kernel.result != "float32":
            result = T.cast(result, f"{kernel.result}x{LANES}")
        store_lanes(self.y, place, column, result, valid)


class _Sums:
    """Sums of a tile in registers: splits times rows times pieces."""

    def __init__(self, kernel: FixedLinear, rows: int, column_blocks: int) -> None:
        self.kernel, self.unit = kernel, kernel.unit
        self.rows, self.splits = rows, 1 if kernel.wide else kernel.tile.splits
        self.pieces = column_blocks * LANES // kernel.unit.lanes
        count = self.splits * rows * self.pieces
        self.numbers = local(count * kernel.unit.lanes, kernel.sum_type)
        for index in range(count):
            store(self.numbers, [self._lanes(index)], self._zero())
        self.inputs: Buffer = None
        if kernel.half_bytes:
            self.inputs = local(rows * kernel.unit.lanes, "int32")
            for row in range(rows):
                store(self.inputs, [self._lanes(row)], self._zero())

    def add(
        self, turn: int, row: int, piece: int, inputs: list[Inputs], weights: list[Expr]
    ) -> None:
        """Add the products of a few groups."""
        at, unit = self._at(turn, row, piece), self.unit
        held = self.numbers[at]
        if self.kernel.wide:
            for given, weight in zip(inputs, weights, strict=True):
                held = held + T.cast(unit.pair_sums(given, weight), f"int64x{unit.lanes}")
            store(self.numbers, [at], held)
        elif len(inputs) == 1:
            store(self.numbers, [at], unit.add(held, inputs[0], weights[0]))
        else:
            pairs = zip(inputs, weights, strict=True)
            products = [unit.products(given, weight) for given, weight in pairs]
            store(self.numbers, [at], held + unit.widen(sum(products[1:], products[0])))

    def add_unsigned(
        self, turn: int, row: int, piece: int, inputs: list[Expr], weights: list[Expr]
    ) -> None:
        """Add the products of two groups, weights below 16."""
        at, unit = self._at(turn, row, piece), self.unit
        if unit.chains and len(inputs) > 1:
            pairs = zip(weights, inputs, strict=True)
            products = [unit.unsigned_products(weight, given) for weight, given in pairs]
            found = self.numbers[at] + unit.widen(sum(products[1:], products[0]))
            store(self.numbers, [at], found)
            return
        for weight, given in zip(weights, inputs, strict=True):
            store(self.numbers, [at], unit.add_unsigned(self.numbers[at], weight, given))

    def add_inputs(self, row: int, inputs: list[Expr]) -> None:
        """Add inputs to the sum of all inputs of a row."""
        at, size = self._lanes(row), self.unit.lanes * self.unit.group
        ones = T.bind(splat(T.int8(1), size))
        for given in inputs:
            store(self.inputs, [at], self.unit.add_unsigned(self.inputs[at], ones, given))

    def total(self, row: int, block: int) -> Expr:
        """The sums of sixteen columns."""
        lanes, found = self.unit.lanes, local(LANES, self.kernel.sum_type)
        for part in range(LANES // lanes):
            piece = block * (LANES // lanes) + part
            parts = [self.numbers[self._at(s, row, piece)] for s in range(self.splits)]
            total = sum(parts[1:], parts[0])
            if self.inputs is not None:
                offset = splat(T.int32(HALF_BYTE_OFFSET), lanes)
                total = total - self.inputs[self._lanes(row)] * offset
            store(found, [ramp(part * lanes, lanes)], total)
        return found[ramp(0)]

    def _at(self, turn: int, row: int, piece: int) -> Expr:
        return self._lanes((turn % self.splits * self.rows + row) * self.pieces + piece)

    def _lanes(self, index: int) -> Expr:
        return ramp(index * self.unit.lanes, self.unit.lanes)

    def _zero(self) -> Expr:
        zero = T.int64(0) if self.kernel.wide else T.int32(0)
        return splat(zero, self.unit.lanes)


def fixed_tile_options(rows: int, columns: int, registers: int) -> list[MatrixTile]:
    """Tiles that hardly store more columns than there are, cheapest first by the cost model.

    Args:
        rows: M.
        columns: N.
        registers: vectors of 16 sums and weights that registers hold.
    """
    options = matrix_tile_options(rows, columns, registers)
    count = blocks(columns)
    stored = [ceil_div(count, one.column_blocks) * one.column_blocks for one in options]
    return [one for one, held in zip(options, stored, strict=True) if held <= _MOST_STORED * count]


def _halves(packed: Expr, size: int) -> list[Expr]:
    """The low and the high halves of bytes."""
    words = T.reinterpret(f"int32x{size // 4}", packed)
    mask = splat(T.int32(0x0F0F0F0F), size // 4)
    low = T.bitwise_and(words, mask)
    high = T.bitwise_and(T.shift_right(words, splat(T.int32(4), size // 4)), mask)
    return [T.bind(T.reinterpret(f"int8x{size}", half)) for half in (low, high)]
