"""Fully connected layers of integers whose weights are ternary, packed two bits each.

Few rows are bound by streaming the weights, so these are as small as can be, and little is done to
make bytes of them. The lanes of a register are neighbouring inputs of one output: inputs are read
as they lie, and one pair of tables serves a whole output, whatever its integers are.

Weights are packed ``[N/NR, K/(4 R), NR, R]`` for registers of R bytes; the byte i of a register has
the codes of the inputs i, R + i, 2 R + i and 3 R + i. The inputs behind the last whole register
follow, ``[NR, r]``, r a quarter of them.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.control import whole_or_rest
from shohin.backends.tvm.kernels.dots import RAISED, DotUnit, Inputs
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Array,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    blocks,
    ceil_div,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.epilogue import Step, apply_steps, operand_parameters
from shohin.backends.tvm.kernels.fixed_ternary import CODES, RowTables, packed
from shohin.backends.tvm.kernels.partial import load_lanes, store_lanes

_WORD_BYTES = 4

_AHEAD = 2048
"""Bytes that codes are fetched ahead: a core that waits for no more than 64 bytes at a time is a
third slower on weights that come from memory (measured on Zen 3)."""

_LINE = 64
"""Bytes of a line of a cache."""


@dataclass(frozen=True)
class DotTile:
    """Sums that are in registers together.

    Attributes:
        rows: rows of the result.
        outputs: columns of the result, a power of two up to 16.
        splits: independent sums of an output, 1, 2 or 4, to hide the latency of instructions that
            add to their sums.
    """

    rows: int
    outputs: int
    splits: int = 1


@dataclass(frozen=True)
class FixedTernaryLinear(Kernel):
    """``y = steps(x @ w.T + bias)`` with ``x`` ``[M, K]`` and ``y`` ``[M, N]``, ``w`` ternary.

    Attributes:
        rows: M.
        depth: K.
        columns: N.
        unit: the instructions, of bytes.
        signed: whether an input may be negative.
        result: element type of the output.
        tile: sums.
        chain: registers of inputs whose products are added in 16 bits, 1, 2 or 4.
        scaled: whether sums are multiplied by a factor of their output.
        steps: on the sums; ``full`` operands are ``[M, N]``, ``channel`` ones are along N, padded
            like the bias to whole blocks.
    """

    rows: int
    depth: int
    columns: int
    unit: DotUnit
    signed: bool
    result: str
    tile: DotTile
    chain: int = 1
    scaled: bool = False
    steps: tuple[Step, ...] = ()

    tiling = frozenset({"tile"})

    @property
    def family(self) -> str:
        """``fixed_ternary_linear``."""
        return "fixed_ternary_linear"

    @property
    def row_tiles(self) -> int:
        """Tiles along M."""
        return ceil_div(self.rows, self.tile.rows)

    @property
    def padded_columns(self) -> int:
        """Columns in whole blocks of 16."""
        return blocks(self.columns) * LANES

    @property
    def extent(self) -> int:
        """Blocks of columns times tiles along M."""
        return blocks(self.columns) * self.row_tiles

    @property
    def operations(self) -> int:
        """Multiply-accumulates, by four."""
        return self.rows * self.depth * self.columns // 4

    @property
    def whole(self) -> int:
        """Registers of codes that are full, for each output."""
        return self.depth // (CODES * self.unit.width)

    @property
    def left(self) -> int:
        """Inputs behind those."""
        return self.depth - self.whole * CODES * self.unit.width

    @property
    def left_bytes(self) -> int:
        """Bytes of their codes."""
        return ceil_div(self.left, CODES)

    @property
    def tile_bytes(self) -> int:
        """Bytes of the codes of a tile of outputs."""
        return self.tile.outputs * (self.whole * self.unit.width + self.left_bytes)

    def variants(self, registers: int) -> tuple[Kernel, ...]:
        """The layer in every tile shape."""
        return tuple(replace(self, tile=tile) for tile in dot_tile_options(self.unit, self.rows))

    def tile_text(self) -> str:
        """Rows times outputs times sums along K."""
        return f"{self.tile.rows}x{self.tile.outputs}x{self.tile.splits}"

    def weight_bytes(self) -> int:
        """Size of the packed codes: in whole words, and with room to read a whole register."""
        tiles = ceil_div(self.columns, self.tile.outputs)
        behind = self.unit.width - self.left_bytes if self.left else 0
        return ceil_div(tiles * self.tile_bytes + behind, _WORD_BYTES) * _WORD_BYTES

    def parameters(self) -> tuple[Parameter, ...]:
        """Rows, codes, what they stand for, factors if any, bias, step operands, rows."""
        result, width = (self.rows, self.columns), self.padded_columns
        factors = [Parameter("factors", (width,), "int32")] if self.scaled else []
        return (
            Parameter("x", (self.rows, self.depth), "int8"),
            Parameter("weight", (self.weight_bytes(),), "uint8"),
            Parameter("pairs", (width,), "int32"),
            *factors,
            Parameter("bias", (width,), "int32"),
            *operand_parameters(self.steps, result, width),
            Parameter("y", result, self.result),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """Sixteen columns of a tile of rows; ragged edges are separate code."""
        emitter = _BlockEmitter(self, item, buffers)

        def over_columns(rows: int) -> None:
            whole_or_rest(
                emitter.block, LANES, self.columns, lambda valid: emitter.emit(rows, valid)
            )

        whole_or_rest(emitter.row_tile, self.tile.rows, self.rows, over_columns)

    def pack(self, codes: NDArray[np.uint8]) -> Array:
        """Codes ``[N, K]`` as the kernel reads them."""
        outputs, width = self.tile.outputs, self.unit.width
        tiles, cut = ceil_div(self.columns, outputs), self.depth - self.left
        full = np.zeros((tiles * outputs, cut + CODES * self.left_bytes), np.uint8)
        full[: codes.shape[0], : codes.shape[1]] = codes
        whole = packed(full[:, :cut].reshape(tiles, outputs, self.whole, CODES, width), 3)
        left = packed(full[:, cut:].reshape(tiles, outputs, CODES, self.left_bytes), 2)
        parts = [whole.transpose(0, 2, 1, 3).reshape(tiles, -1), left.reshape(tiles, -1)]
        found = np.zeros(self.weight_bytes(), np.uint8)
        found[: tiles * self.tile_bytes] = np.concatenate(parts, 1).reshape(-1)
        return found

    def biases(self, weight: Array, bias: Array) -> Array:
        """Integers ``[N]`` that are added to the sums, padded to whole blocks.

        Args:
            weight: integers ``[N, K]``.
            bias: integers ``[N]``.
        """
        found = np.zeros(self.padded_columns, np.int32)
        found[: bias.size] = bias
        if self.unit.raises(self.signed):
            found[: len(weight)] -= RAISED * weight.astype(np.int64).sum(1)
        return found


class _BlockEmitter:
    """Emits sixteen columns; holds what full and ragged ones share."""

    def __init__(self, kernel: FixedTernaryLinear, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        self.kernel, self.unit = kernel, kernel.unit
        self.x, self.weight, self.pairs, *rest = buffers
        self.factors = rest.pop(0) if kernel.scaled else None
        self.bias, *operands, self.y = rest
        self.operands = tuple(operands)
        self.row_tile = T.floormod(item, kernel.row_tiles)
        self.block = T.floordiv(item, kernel.row_tiles)

    def emit(self, rows: int, valid: int) -> None:
        """A block of `rows` by `valid` results."""
        outputs = self.kernel.tile.outputs
        totals = local(rows * LANES, "int32")
        for row in range(rows):
            store(totals, [ramp(row * LANES)], splat(T.int32(0)))
        left = self._left_inputs(rows)
        with T.serial(0, ceil_div(valid, outputs)) as part:
            self._part(totals, part, rows, left)
        for row in range(rows):
            self._finish(totals[ramp(row * LANES)], row, valid)

    def _left_inputs(self, rows: int) -> Buffer:
        """The inputs behind the last whole register, in four registers for each row."""
        kernel, width, size = self.kernel, self.unit.width, self.kernel.left_bytes
        if not kernel.left:
            return None
        # What is not there must count for nothing, even once inputs are raised.
        nothing = -RAISED if self.unit.raises(kernel.signed) else 0
        found = local(rows * CODES * width, "int8")
        for row in range(rows):
            for place in range(CODES):
                start = (row * CODES + place) * width
                store(found, [ramp(start, width)], splat(T.int8(nothing), width))
                count = min(size, kernel.left - place * size)
                if count > 0:
                    first = kernel.depth - kernel.left + place * size
                    read = self.x[self._row(row), ramp(first, count)]
                    store(found, [ramp(start, count)], read)
        return found

    def _part(self, totals: Buffer, part: Expr, rows: int, left: Buffer) -> None:
        """The sums of a tile of outputs."""
        kernel, width = self.kernel, self.unit.width
        outputs = kernel.tile.outputs
        tile = self.block * (LANES // outputs) + part
        pairs = [self.pairs[tile * outputs + output] for output in range(outputs)]
        sums = _Sums(kernel, rows, [RowTables(self.unit, pair) for pair in pairs])
        base = tile * kernel.tile_bytes

        with T.serial(0, kernel.whole) as register:
            self._fetch(base + register * outputs * width, outputs * width)
            given = [
                [self._read(row, register * CODES + place) for place in range(CODES)]
                for row in range(rows)
            ]
            for output in range(outputs):
                start = base + (register * outputs + output) * width
                sums.add(output, self._codes(start), given)
        if left is not None:
            starts = [[(r * CODES + i) * width for i in range(CODES)] for r in range(rows)]
            given = [[self._inputs(left[ramp(i, width)]) for i in row] for row in starts]
            base = base + kernel.whole * outputs * width
            for output in range(outputs):
                sums.add(output, self._codes(base + output * kernel.left_bytes), given)
        for row in range(rows):
            for output in range(outputs):
                place = row * LANES + part * outputs + output
                store(totals, [place], self.unit.total(sums.total(row, output)))

    def _fetch(self, start: Expr, size: int) -> None:
        """Fetch into the cache what will follow so many codes."""
        last = self.kernel.weight_bytes() - 1
        for line in range(0, size, _LINE):
            place = T.address_of(self.weight[T.min(start + (_AHEAD + line), last)])
            flags = (T.int32(0), T.int32(3), T.int32(1))  # To read, to keep, data.
            T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", place, *flags))

    def _read(self, row: int, register: Expr) -> Inputs:
        width = self.unit.width
        return self._inputs(self.x[self._row(row), ramp(register * width, width)])

    def _inputs(self, values: Expr) -> Inputs:
        return self.unit.all_inputs(values, self.kernel.signed)

    def _codes(self, start: Expr) -> Expr:
        return T.bind(self.weight[ramp(start, self.unit.width)])

    def _row(self, row: int) -> Expr:
        return self.row_tile * self.kernel.tile.rows + row

    def _finish(self, total: Expr, row: int, valid: int) -> None:
        kernel, column = self.kernel, self.block * LANES

        def place(last: Expr) -> list[Expr]:
            return [self._row(row), last]

        if self.factors is not None:
            total = total * self.factors[ramp(column)]
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
    """Sums of a tile in registers: splits times rows times outputs."""

    def __init__(self, kernel: FixedTernaryLinear, rows: int, tables: list[RowTables]) -> None:
        self._kernel, self._unit, self._rows, self._tables = kernel, kernel.unit, rows, tables
        self._splits = kernel.tile.splits
        count = self._splits * rows * len(tables)
        self._numbers = local(count * self._unit.lanes, "int32")
        for index in range(count):
            zero = splat(T.int32(0), self._unit.lanes)
            store(self._numbers, [ramp(index * self._unit.lanes, self._unit.lanes)], zero)

    def add(self, output: int, codes: Expr, inputs: list[list[Inputs]]) -> None:
        """Add the products of a register of codes of an output.

        Args:
            output: of the tile.
            codes: the register.
            inputs: for each row, four registers.
        """
        tables = self._tables[output]
        weights = [T.bind(tables.expand(codes, place)) for place in range(CODES)]
        for row, given in enumerate(inputs):
            for turn, start in enumerate(range(0, len(weights), self._kernel.chain)):
                chained = slice(start, start + self._kernel.chain)
                self._chain(self._at(turn, row, output), given[chained], weights[chained])

    def _chain(self, at: Expr, inputs: list[Inputs], weights: list[Expr]) -> None:
        held, unit = self._numbers[at], self._unit
        if len(inputs) == 1:
            store(self._numbers, [at], unit.add(held, inputs[0], weights[0]))
            return
        pairs = zip(inputs, weights, strict=True)
        products = [unit.products(given, weight) for given, weight in pairs]
        store(self._numbers, [at], held + unit.widen(sum(products[1:], products[0])))

    def total(self, row: int, output: int) -> Expr:
        """The sums of an output, still in lanes."""
        parts = [self._numbers[self._at(split, row, output)] for split in range(self._splits)]
        return sum(parts[1:], parts[0])

    def _at(self, turn: int, row: int, output: int) -> Expr:
        index = (turn % self._splits * self._rows + row) * len(self._tables) + output
        return ramp(index * self._unit.lanes, self._unit.lanes)


def chain_of(longest: int) -> int:
    """The chain of a kernel, 1, 2 or 4: a longer one saves nothing beside the tables.

    Args:
        longest: registers whose products can be added in 16 bits.
    """
    return 1 << (min(longest, CODES).bit_length() - 1)


def dot_tile_options(unit: DotUnit, rows: int) -> list[DotTile]:
    """Tiles, likeliest fastest first.

    Args:
        unit: the instructions.
        rows: M.
    """
    most = min(rows, 4)
    heights = dict.fromkeys((most, ceil_div(most, 2)))
    splits = (1,) if unit.chains else (2, 1)
    return [
        DotTile(ceil_div(rows, ceil_div(rows, height)), outputs, split)
        for height in heights
        for outputs in (2, 4, 1)
        for split in splits
    ]
