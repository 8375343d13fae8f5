"""Sums of products of small integers: the instructions that processors have for them.

A unit multiplies a few neighbouring inputs (a *group*) of every lane at once: the lanes of a
register are outputs, each with the weights of a group side by side, and all lanes are given the
same inputs. Every unit is exact, whatever the numbers are, as long as weights are symmetric (the
least integer of their width does not occur).

| unit | instructions | lanes | group |
|---|---|---|---|
| ``vnni`` | ``vpdpbusd`` | 16, or 8 | 4 |
| ``maddubs`` | ``pmaddubsw``, ``pmaddwd``; signs moved by ``psignb`` | 8, or 4 | 4 |
| ``sdot`` | ``sdot`` | 4 | 4 |
| ``smull8``, ``vmull8`` | ``smull``, ``sadalp``; on 32-bit ARM ``vmull``, ``vpadal`` | 4 | 2 |
| ``maddwd`` | ``pmaddwd``, for inputs of 16 bits | 16, 8, or 4 | 2 |
| ``smull16``, ``vmull16`` | ``smlal``, ``vmlal``: the same for ARM | 4 | 1 |
| ``widened8``, ``widened16`` | none: plain products of factors of 32 bits | 4 | 1 |

``pmaddubsw`` multiplies unsigned by signed bytes and adds two products in 16 bits, with
saturation: inputs of at most 128 keep the sums below it. ``vpdpbusd`` takes unsigned inputs as
well: signed ones are raised by 128, and what that adds is taken off the bias.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.byte_tables import TableName, look_up
from shohin.backends.tvm.kernels.emit import Expr, splat
from shohin.backends.tvm.kernels.vector_math import lanes_of
from shohin.backends.tvm.processor import Processor

UnitName: TypeAlias = Literal[
    "vnni",
    "maddubs",
    "sdot",
    "smull8",
    "vmull8",
    "maddwd",
    "smull16",
    "vmull16",
    "widened8",
    "widened16",
]

RAISED = 128
"""What ``vnni`` adds to signed inputs."""

_VNNI = {16: "llvm.x86.avx512.vpdpbusd.512", 8: "llvm.x86.avx512.vpdpbusd.256"}
_MADDUBS = {8: "llvm.x86.avx2.pmadd.ub.sw", 4: "llvm.x86.ssse3.pmadd.ub.sw.128"}
_MADDWD = {
    16: "llvm.x86.avx512.pmaddw.d.512",
    8: "llvm.x86.avx2.pmadd.wd",
    4: "llvm.x86.sse2.pmadd.wd",
}
_SIGN = {8: "llvm.x86.avx2.psign.b", 4: "llvm.x86.ssse3.psign.b.128"}
_SHUFFLES = {
    64: "llvm.x86.avx512.pshuf.b.512",
    32: "llvm.x86.avx2.pshuf.b",
    16: "llvm.x86.ssse3.pshuf.b.128",
}
_LONG_BYTES: dict[str, tuple[str, str]] = {
    "smull8": ("llvm.aarch64.neon.smull.v8i16", "llvm.aarch64.neon.saddlp.v4i32.v8i16"),
    "vmull8": ("llvm.arm.neon.vmulls.v8i16", "llvm.arm.neon.vpaddls.v4i32.v8i16"),
}
"""Products of bytes, and sums of two neighbouring ones."""
_LONG_WORDS: dict[str, str] = {
    "smull16": "llvm.aarch64.neon.smull.v4i32",
    "vmull16": "llvm.arm.neon.vmulls.v4i32",
}
_GROUPS: dict[UnitName, int] = {
    "vnni": 4,
    "maddubs": 4,
    "sdot": 4,
    "smull8": 2,
    "vmull8": 2,
    "maddwd": 2,
    "smull16": 1,
    "vmull16": 1,
    "widened8": 1,
    "widened16": 1,
}
_WORDS = ("maddwd", *_LONG_WORDS, "widened16")


@dataclass(frozen=True)
class DotUnit:
    """Instructions for sums of products.

    Attributes:
        name: which.
        lanes: outputs of a register.
    """

    name: UnitName
    lanes: int

    @property
    def group(self) -> int:
        """Neighbouring inputs of a lane."""
        return _GROUPS[self.name]

    @property
    def input_type(self) -> str:
        """Element type of inputs and of packed weights."""
        return "int16" if self.name in _WORDS else "int8"

    @property
    def width(self) -> int:
        """Elements of a register: those of a group for every lane."""
        return self.lanes * self.group

    @property
    def chains(self) -> bool:
        """Whether products of several groups can be added in 16 bits, where these suffice."""
        return self.name == "maddubs"

    def raises(self, signed: bool) -> bool:
        """Whether it adds `RAISED` to the inputs."""
        return signed and self.name == "vnni"

    def inputs(self, values: Expr, signed: bool) -> "Inputs":
        """A group of inputs in every lane.

        Args:
            values: the group, as many lanes as it has.
            signed: whether any may be negative.
        """
        return self.all_inputs(self._spread(values), signed)

    def all_inputs(self, values: Expr, signed: bool) -> "Inputs":
        """A register of inputs, a different group in every lane.

        Args:
            values: as many as a register has elements.
            signed: whether any may be negative.
        """
        if self.raises(signed):
            lifted = T.bitwise_xor(
                T.reinterpret(f"int32x{self.lanes}", values), _highest(self.lanes)
            )
            return Inputs(T.bind(T.reinterpret(self._register, lifted)), None)
        if self.name == "maddubs" and signed:
            same = T.bind(values)
            return Inputs(T.bind(self._call(_SIGN, self._register, same, same)), same)
        return Inputs(T.bind(values), None)

    def add(self, sums: Expr, inputs: "Inputs", weights: Expr) -> Expr:
        """Sums with the products of a group added.

        Args:
            sums: int32 lanes.
            inputs: what `inputs` gave.
            weights: lanes times group.
        """
        if self.name == "vnni":
            return self._call(_VNNI, f"int32x{self.lanes}", sums, inputs.values, weights)
        if self.name == "maddubs":
            return sums + self.widen(self.products(inputs, weights))
        if self.name == "sdot":
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
            return T.call_llvm_pure_intrin("int32x4", name, sums, weights, inputs.values)
        if self.name in _LONG_BYTES:
            multiply, add = _LONG_BYTES[self.name]
            products = _pure("int16x8", multiply, weights, inputs.values)
            return sums + _pure("int32x4", add, products)
        if self.name == "widened8":
            return sums + _widened_products(weights, inputs.values)
        return sums + self.pair_sums(inputs, weights)

    def products(self, inputs: "Inputs", weights: Expr) -> Expr:
        """Sums of two products each, int16, where the unit chains."""
        signed = (
            weights
            if inputs.signs is None
            else self._call(_SIGN, self._register, weights, inputs.signs)
        )
        return self._call(_MADDUBS, f"int16x{2 * self.lanes}", inputs.values, signed)

    def plain_inputs(self, values: Expr) -> Expr:
        """A group of inputs in every lane, for the units that multiply them by unsigned weights."""
        return T.bind(self._spread(values))

    def unsigned_products(self, weights: Expr, inputs: Expr) -> Expr:
        """Sums of two products each, int16, of weights below 16 and any inputs."""
        return self._call(_MADDUBS, f"int16x{2 * self.lanes}", weights, inputs)

    def add_unsigned(self, sums: Expr, weights: Expr, inputs: Expr) -> Expr:
        """Sums with the products of a group added, of weights below 16 and any inputs."""
        if self.name == "vnni":
            return self._call(_VNNI, f"int32x{self.lanes}", sums, weights, inputs)
        if self.name == "maddubs":
            return sums + self.widen(self.unsigned_products(weights, inputs))
        # The others multiply signed bytes, as which such weights are the same.
        return self.add(sums, Inputs(inputs, None), weights)

    def widen(self, products: Expr) -> Expr:
        """Sums of two neighbouring 16-bit sums, int32."""
        ones = splat(T.int16(1), 2 * self.lanes)
        return self._call(_MADDWD, f"int32x{self.lanes}", products, ones)

    def pair_sums(self, inputs: "Inputs", weights: Expr) -> Expr:
        """The products of a group of 16-bit inputs, added in 32 bits."""
        if self.name in _LONG_WORDS:
            return _pure("int32x4", _LONG_WORDS[self.name], weights, inputs.values)
        if self.name == "widened16":
            return _widened_products(weights, inputs.values)
        return self._call(_MADDWD, f"int32x{self.lanes}", inputs.values, weights)

    @property
    def looks_up(self) -> bool:
        """Whether its registers are bytes that an instruction can take out of a table."""
        return self.input_type == "int8" and self.name != "widened8"

    def look_up(self, table: Expr, index: Expr) -> Expr:
        """Bytes of a table, as many as the index has; only where `looks_up`.

        Args:
            table: 16 bytes for every 16 of the index, of which these are taken.
            index: 0 to 15. On x86 the bits 4 to 6 make no difference.
        """
        size = lanes_of(index)
        if self.name in ("vnni", "maddubs"):
            return _pure(f"int8x{size}", _SHUFFLES[size], table, index)
        name: TableName = "vtbl" if self.name == "vmull8" else "tbl"
        return look_up(name, [T.bind(table)], index)

    def total(self, sums: Expr) -> Expr:
        """The sum of all lanes of 32-bit sums."""
        name = f"llvm.vector.reduce.add.v{self.lanes}i32"
        return _pure("int32", name, sums)

    @property
    def _register(self) -> str:
        return f"{self.input_type}x{self.width}"

    def _spread(self, values: Expr) -> Expr:
        if self.group == 1:
            return splat(values, self.lanes)
        bits = self.group * int(self.input_type.removeprefix("int"))
        return T.reinterpret(self._register, splat(T.reinterpret(f"int{bits}", values), self.lanes))

    def _call(self, names: dict[int, str], kind: str, *arguments: Expr) -> Expr:
        return _pure(kind, names[self.lanes], *arguments)


@dataclass(frozen=True)
class Inputs:
    """A group of inputs as a unit takes it.

    Attributes:
        values: in every lane.
        signs: whose signs the weights take over, where the values have lost theirs.
    """

    values: Expr
    signs: Expr | None


def unit_of(target: Processor, *, words: bool) -> DotUnit:
    """The unit of a processor for factors of bytes, or of 16 bits."""
    name, lanes = target.dot_unit(16 if words else 8)
    return DotUnit(cast(UnitName, name), lanes)


def widened(values: Expr, source: str, wanted: str) -> Expr:
    """Integers of the type that a unit wants."""
    if source == wanted:
        return values
    lanes = lanes_of(values)
    return T.cast(values, f"{wanted}x{lanes}" if lanes > 1 else wanted)


def _widened_products(one: Expr, other: Expr) -> Expr:
    kind = f"int32x{lanes_of(one)}"
    return T.cast(one, kind) * T.cast(other, kind)


def _pure(kind: str, name: str, *arguments: Expr) -> Expr:
    return T.call_llvm_pure_intrin(kind, name, *arguments)


def _highest(lanes: int) -> Expr:
    """The highest bit of every byte."""
    return splat(T.int32(-0x7F7F7F80), lanes)
