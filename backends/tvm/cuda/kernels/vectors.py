"""Fully connected layers of few rows: a warp for every output, which reads its weights once.

Weights are words of a few groups of four elements. The threads of a warp read neighbouring words,
and of every group the inputs that a thread multiplies lie next to those of its neighbour: element
``i`` of group ``g`` in word ``32 * t + l`` belongs to input ``128 * (G * t + g) + 4 * l + i``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.cuda.kernels.grid import (
    WARP,
    WarpKernel,
    device_call,
    finish,
    joined_bytes,
    put,
    warp_sum,
    warp_total,
)
from shohin.backends.tvm.cuda.kernels.weights import (
    byte_tables,
    byte_words,
    code_shift,
    four_bytes,
    pack_codes,
)
from shohin.backends.tvm.kernels.emit import Array, Buffer, Expr, Parameter, ceil_div, local, store
from shohin.backends.tvm.kernels.epilogue import Step, operand_parameters

VectorForm: TypeAlias = Literal[
    "float", "bytes", "ternary-float", "ternary-bytes", "codebook-4", "codebook-8"
]

_FOUR = 4
_GROUPS: dict[VectorForm, int] = {
    "float": 1,
    "bytes": 1,
    "ternary-float": 4,
    "ternary-bytes": 4,
    "codebook-4": 2,
    "codebook-8": 1,
}
"""Groups of four elements of a word; floats are read four at a time."""

MOST_ROWS = 4
"""Rows up to which reading the weights takes longer than the products."""


@dataclass(frozen=True)
class VectorProduct(WarpKernel):
    """``y[m, n] = sum of w[n, k] * x[m, k] + bias[n]``, then steps.

    Attributes:
        form: of the weights.
        rows: of x.
        depth: elements of a row.
        outputs: how many.
        book: values of a codebook.
        steps: on the results.
        result: element type of the results.
        scaled: whether sums of integers are multiplied by a factor of each output.
    """

    form: VectorForm
    rows: int
    depth: int
    outputs: int
    book: int = 0
    steps: tuple[Step, ...] = ()
    result: str = "float32"
    scaled: bool = False

    @property
    def family(self) -> str:
        """``vector``, after the form of the weights."""
        return f"vector_{self.form}".replace("-", "_")

    @property
    def results(self) -> int:
        """Outputs; a warp computes that of all rows."""
        return self.outputs

    @property
    def _integers(self) -> bool:
        return self.form.endswith("bytes")

    @property
    def _turns(self) -> int:
        """Words of a row that each thread reads."""
        return ceil_div(self.depth, _FOUR * WARP * _GROUPS[self.form])

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weights, what they stand for if need be, biases, step operands, output."""
        words = self._turns * WARP
        number, total = ("int8", "int32") if self._integers else ("float32", "float32")
        weights = Parameter("w", (self.outputs, words), "int32")
        if self.form == "float":
            weights = Parameter("w", (self.outputs, ceil_div(self.depth, _FOUR) * _FOUR))
        meaning = {
            "ternary-float": (Parameter("values", (self.outputs, 2)),),
            "ternary-bytes": (Parameter("table", (self.outputs,), "int32"),),
            "codebook-4": (Parameter("book", (self.book,)),),
            "codebook-8": (Parameter("book", (self.book,)),),
        }.get(self.form, ())
        results = (self.rows * self.outputs,)
        return (
            Parameter("x", (self.rows * self.depth,), number),
            weights,
            *meaning,
            Parameter("bias", (self.outputs,), total),
            *((Parameter("factors", (self.outputs,), "int32"),) if self.scaled else ()),
            *operand_parameters(self.steps, results, self.outputs),
            Parameter("y", results, self.result),
        )

    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """An output of every row."""
        x, weights, *rest, y = buffers
        meaning = rest.pop(0) if self._meant else None
        bias = rest.pop(0)
        factors = rest.pop(0) if self.scaled else None
        kind = "int32" if self._integers else "float32"
        sums = local(self.rows, kind)
        for row in range(self.rows):
            store(sums, [row], T.cast(T.int32(0), kind))
        with T.serial(0, self._turns) as turn:
            place = T.bind(turn * WARP + lane)
            word = None if self.form == "float" else T.bind(weights[index, place])
            for group in range(_GROUPS[self.form]):
                first = (turn * _GROUPS[self.form] + group) * (_FOUR * WARP) + lane * _FOUR
                found = partial(self._weights, weights, meaning, (index, place, word, group))
                self._add_group(x, sums, T.bind(first), found)
        for row in range(self.rows):
            total = warp_total(sums[row]) if self._integers else warp_sum(sums[row])
            total = total * factors[index] if factors is not None else total
            with T.If(lane == row), T.Then():
                target = T.bind(row * self.outputs + index)
                value = finish(self.steps, total + bias[index], tuple(rest), target, index)
                put(y, target, value, self.result)

    @property
    def _meant(self) -> bool:
        return self.form not in ("float", "bytes")

    def _weights(
        self, weights: Buffer, meaning: Buffer, place: tuple[Expr, Expr, Expr, int]
    ) -> list[Expr]:
        """Four weights of a group, or one word of four bytes.

        Args:
            weights: numbers, codes or indices.
            meaning: what codes or indices stand for.
            place: output, word of the row, its content, group.
        """
        index, at, word, group = place
        if self.form == "float":
            return _four_at(weights, [index, at * _FOUR])
        if self.form == "bytes":
            return [word]
        if self.form == "ternary-bytes":
            return [T.bind(four_bytes(word, T.int32(group), meaning[index]))]
        elements = range(_FOUR * group, _FOUR * (group + 1))
        if self.form == "ternary-float":
            return [self._ternary(word, code_shift(i), meaning, index) for i in elements]
        bits = 8 if self.form == "codebook-8" else 4
        mask = T.int32((1 << bits) - 1)
        return [
            meaning[T.bitwise_and(T.shift_right(word, T.int32(bits * i)), mask)] for i in elements
        ]

    def _ternary(self, word: Expr, shift: int, values: Buffer, index: Expr) -> Expr:
        code = T.bind(T.bitwise_and(T.shift_right(word, T.int32(shift)), T.int32(3)))
        negative = T.Select(code == 2, values[index, 1], T.float32(0))
        return T.Select(code == 1, values[index, 0], negative)

    def _add_group(
        self, x: Buffer, sums: Buffer, first: Expr, weights: Callable[[], list[Expr]]
    ) -> None:
        """Add the products of four inputs of every row."""
        whole = self.depth % (_FOUR * WARP * _GROUPS[self.form]) == 0
        if whole:
            self._add_inside(x, sums, first, weights(), guarded=False)
            return
        with T.If(first < self.depth), T.Then():
            self._add_inside(x, sums, first, weights(), guarded=self.depth % _FOUR != 0)

    def _add_inside(
        self, x: Buffer, sums: Buffer, first: Expr, weights: list[Expr], *, guarded: bool
    ) -> None:
        factors = [T.bind(weight) for weight in weights]
        for row in range(self.rows):
            place = T.bind(first + row * self.depth)
            if self._integers:
                word = self._guarded_word(x, first, place) if guarded else _word_at(x, place)
                store(sums, [row], device_call("int32", "__dp4a", factors[0], word, sums[row]))
                continue
            values = self._guarded(x, first, place) if guarded else _four_at(x, [place])
            for value, factor in zip(values, factors, strict=True):
                store(sums, [row], sums[row] + value * factor)

    def _guarded(self, x: Buffer, first: Expr, place: Expr) -> list[Expr]:
        """Four inputs, zeros for those that do not exist."""
        zero = T.int8(0) if self._integers else T.float32(0)
        return [T.if_then_else(first + i < self.depth, x[place + i], zero) for i in range(_FOUR)]

    def _guarded_word(self, x: Buffer, first: Expr, place: Expr) -> Expr:
        return joined_bytes(self._guarded(x, first, place))

    def pack(self, weight: Array) -> Array:
        """The weights, their codes or indices, as the kernel reads them.

        Args:
            weight: ``[outputs, depth]``: numbers, codes 1, 0 and -1, or indices.
        """
        groups = _GROUPS[self.form]
        width = self._turns * WARP * groups * _FOUR
        width = ceil_div(self.depth, _FOUR) * _FOUR if self.form == "float" else width
        full = np.zeros((self.outputs, width), weight.dtype)
        full[:, : self.depth] = weight
        if self.form == "float":
            return full
        if self.form == "bytes":
            return byte_words(full)
        split = full.reshape(self.outputs, self._turns, groups, WARP, _FOUR)
        elements = split.transpose(0, 1, 3, 2, 4).reshape(self.outputs, -1)
        if self.form.startswith("ternary"):
            return pack_codes(elements)
        bits = 8 if self.form == "codebook-8" else 4
        fields = elements.astype(np.uint32).reshape(self.outputs, -1, groups * _FOUR)
        shifts = np.arange(groups * _FOUR, dtype=np.uint32) * np.uint32(bits)
        words: Array = np.bitwise_or.reduce(fields << shifts, axis=2).astype(np.uint32)
        return words.view(np.int32)

    def pack_values(self, pairs: Array) -> Array:
        """What ternary codes stand for, as the kernel reads it: of ``[outputs, 2]``."""
        return pairs if self.form == "ternary-float" else byte_tables(pairs)


def _word_at(x: Buffer, place: Expr) -> Expr:
    """Four bytes that lie side by side, at a multiple of four."""
    return device_call("int32", "shohin_word_at", T.address_of(x[place]))


def _four_at(x: Buffer, place: list[Expr]) -> list[Expr]:
    """Four floats that lie side by side, at a multiple of four."""
    four = local(_FOUR)
    addresses = T.address_of(four[0]), T.address_of(x[tuple(place)])
    T.evaluate(T.call_extern("int32", "shohin_load_four", *addresses))
    return [four[i] for i in range(_FOUR)]


@dataclass(frozen=True)
class SparseVectorProduct(WarpKernel):
    """The same with the weights that are not zero alone, in lists (compressed sparse rows).

    Attributes:
        rows: of x.
        depth: elements of a row.
        outputs: how many.
        kept: weights that are not zero.
        index: element type of their columns.
        steps: on the results.
    """

    rows: int
    depth: int
    outputs: int
    kept: int
    index: Literal["uint16", "int32"]
    steps: tuple[Step, ...] = ()

    @property
    def family(self) -> str:
        """``vector_sparse``."""
        return "vector_sparse"

    @property
    def results(self) -> int:
        """Outputs; a warp computes that of all rows."""
        return self.outputs

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, where lists begin, columns, weights, biases, step operands, output."""
        results = (self.rows * self.outputs,)
        return (
            Parameter("x", (self.rows * self.depth,)),
            Parameter("start", (self.outputs + 1,), "int32"),
            Parameter("columns", (self.kept,), self.index),
            Parameter("w", (self.kept,)),
            Parameter("bias", (self.outputs,)),
            *operand_parameters(self.steps, results, self.outputs),
            Parameter("y", results),
        )

    def emit_result(self, index: Expr, lane: Expr, buffers: tuple[Buffer, ...]) -> None:
        """An output of every row."""
        x, start, columns, weights, bias, *operands, y = buffers
        sums = local(self.rows)
        for row in range(self.rows):
            store(sums, [row], T.float32(0))
        first, last = T.bind(start[index]), T.bind(start[index + 1])
        with T.serial(0, T.floordiv(last - first + (WARP - 1), WARP)) as turn:
            place = T.bind(first + turn * WARP + lane)
            with T.If(place < last), T.Then():
                column = T.bind(T.cast(columns[place], "int32"))
                weight = T.bind(weights[place])
                for row in range(self.rows):
                    store(sums, [row], sums[row] + weight * x[column + row * self.depth])
        for row in range(self.rows):
            total = warp_sum(sums[row])
            with T.If(lane == row), T.Then():
                target = T.bind(row * self.outputs + index)
                value = finish(self.steps, total + bias[index], tuple(operands), target, index)
                put(y, target, value, "float32")
