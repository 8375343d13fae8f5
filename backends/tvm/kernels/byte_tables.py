"""Tables of bytes in registers: the instructions that take bytes out of them by an index each.

| name | instruction | table |
|---|---|---|
| ``pshufb`` | ``pshufb`` of SSSE3 | 16 bytes |
| ``tbl`` | ``tbl`` of 64-bit ARM | 16, 32 or 64 bytes |
| ``vtbl`` | ``vtbl`` of 32-bit ARM, eight bytes at a time | 16 or 32 bytes |
"""

from collections.abc import Sequence
from typing import Literal, TypeAlias

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Expr
from shohin.backends.tvm.kernels.vector_math import lanes_of

TableName: TypeAlias = Literal["pshufb", "tbl", "vtbl"]

REGISTER = 16
"""Bytes of a register."""

MOST_REGISTERS: dict[TableName, int] = {"pshufb": 1, "tbl": 4, "vtbl": 2}
"""Registers of the largest table."""


def look_up(name: TableName, table: Sequence[Expr], index: Expr) -> Expr:
    """Bytes of a table, as many as the index has.

    Args:
        name: the instruction.
        table: 1, 2 or 4 registers of 16 bytes, bound.
        index: 8 or 16 numbers below the size of the table.
    """
    if name == "pshufb":
        return _call("llvm.x86.ssse3.pshuf.b.128", *table, index)
    if name == "tbl":
        kind = f"v{lanes_of(index)}i8"
        return _call(f"llvm.aarch64.neon.tbl{len(table)}.{kind}", *table, index)
    return _by_halves(table, index)


def _by_halves(table: Sequence[Expr], index: Expr) -> Expr:
    """By registers of eight bytes, the only ones that ``vtbl`` takes."""
    halves = [half for register in table for half in _halves(register)]
    name = f"llvm.arm.neon.vtbl{len(halves)}"
    if lanes_of(index) == REGISTER // 2:
        return _call(name, *halves, index)
    found = [_call(name, *halves, half) for half in _halves(T.bind(index))]
    return tirx.Shuffle(found, list(range(REGISTER)))


def _halves(register: Expr) -> list[Expr]:
    middle = REGISTER // 2
    return [tirx.Shuffle([register], list(range(i, i + middle))) for i in (0, middle)]


def _call(name: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(f"int8x{lanes_of(arguments[-1])}", name, *arguments)
