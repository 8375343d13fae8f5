"""Row-wise normalisations of plain arrays: softmax and layer norm."""

from collections.abc import Callable
from dataclasses import dataclass

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels import vector_math as vm
from shohin.backends.tvm.kernels.emit import (
    LANES,
    Buffer,
    Expr,
    Kernel,
    Parameter,
    local,
    ramp,
    splat,
    store,
)
from shohin.backends.tvm.kernels.partial import for_each_vector, load_lanes, store_lanes


@dataclass(frozen=True)
class Softmax(Kernel):
    """``y = exp(x - max) / sum`` over the last axis, one row per work item.

    Attributes:
        rows: rows.
        columns: elements of a row.
        logarithm: give the logarithm of it instead.
    """

    rows: int
    columns: int
    logarithm: bool = False

    @property
    def family(self) -> str:
        """``softmax`` or ``log_softmax``."""
        return "log_softmax" if self.logarithm else "softmax"

    @property
    def extent(self) -> int:
        """Rows."""
        return self.rows

    @property
    def operations(self) -> int:
        """About twenty an element, for the exponential."""
        return self.rows * self.columns * 20

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, output."""
        shape = (self.rows, self.columns)
        return Parameter("x", shape), Parameter("y", shape)

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row: its maximum, its exponentials and their sum, then the scaling."""
        x, y = buffers

        def place(last: Expr) -> list[Expr]:
            return [item, last]

        lowest = T.min_value("float32")
        peak = _reduce(x, place, self.columns, lowest, T.max)

        def exponential(start: Expr, valid: int) -> None:
            value = vm.exp(load_lanes(x, place, start, valid) - splat(peak[0]))
            store_lanes(y, place, start, value, valid)

        for_each_vector(self.columns, exponential)
        total = _reduce(y, place, self.columns, T.float32(0), lambda a, b: a + b)

        def scale(start: Expr, valid: int) -> None:
            value = load_lanes(y, place, start, valid) * splat(T.float32(1.0) / total[0])
            store_lanes(y, place, start, value, valid)

        def logarithm(start: Expr, valid: int) -> None:
            shift = splat(peak[0] + T.log(total[0]))
            store_lanes(y, place, start, load_lanes(x, place, start, valid) - shift, valid)

        for_each_vector(self.columns, logarithm if self.logarithm else scale)


@dataclass(frozen=True)
class LayerNorm(Kernel):
    """``y = (x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last axis.

    Attributes:
        rows: rows.
        columns: elements of a row.
        epsilon: added to the variance.
        affine: whether there are weights and biases, one an element.
    """

    rows: int
    columns: int
    epsilon: float
    affine: bool

    @property
    def family(self) -> str:
        """``layer_norm``."""
        return "layer_norm"

    @property
    def extent(self) -> int:
        """Rows."""
        return self.rows

    @property
    def operations(self) -> int:
        """About six an element."""
        return self.rows * self.columns * 6

    def parameters(self) -> tuple[Parameter, ...]:
        """Input, weight and bias if any, output."""
        shape = (self.rows, self.columns)
        affine = ("weight", "bias") if self.affine else ()
        return (
            Parameter("x", shape),
            *(Parameter(name, (self.columns,)) for name in affine),
            Parameter("y", shape),
        )

    def emit(self, item: Expr, buffers: tuple[Buffer, ...]) -> None:
        """One row: mean, variance about it, then the scaling."""
        x, *affine, y = buffers

        def place(last: Expr) -> list[Expr]:
            return [item, last]

        share = T.float32(1.0 / self.columns)
        total = _reduce(x, place, self.columns, T.float32(0), lambda a, b: a + b)
        mean = local(1)
        store(mean, [0], total[0] * share)

        def centre(start: Expr, valid: int) -> None:
            store_lanes(y, place, start, load_lanes(x, place, start, valid) - splat(mean[0]), valid)

        for_each_vector(self.columns, centre)
        squares = _reduce(
            y, place, self.columns, T.float32(0), lambda a, b: a + b, lambda value: value * value
        )
        scale = local(1)
        spread = T.sqrt(squares[0] * share + T.float32(self.epsilon))
        store(scale, [0], T.float32(1.0) / spread)

        def finish(start: Expr, valid: int) -> None:
            value = load_lanes(y, place, start, valid) * splat(scale[0])
            if self.affine:
                weight, bias = (load_lanes(b, lambda last: [last], start, valid) for b in affine)
                value = value * weight + bias
            store_lanes(y, place, start, value, valid)

        for_each_vector(self.columns, finish)


def _reduce(
    buffer: Buffer,
    place: Callable[[Expr], list[Expr]],
    length: int,
    start: Expr,
    combine: Callable[[Expr, Expr], Expr],
    prepare: Callable[[Expr], Expr] = lambda value: value,
) -> Buffer:
    """Reduce a row to one number, a vector at a time; the ragged end one element at a time."""
    whole, rest = divmod(length, LANES)
    result = local(1)
    store(result, [0], start)
    if whole:
        lanes = local(LANES)
        store(lanes, [ramp(0)], splat(start))
        with T.serial(0, whole) as index:
            value = prepare(buffer[tuple(place(ramp(index * LANES)))])
            store(lanes, [ramp(0)], combine(lanes[ramp(0)], value))
        for lane in range(LANES):
            store(result, [0], combine(result[0], lanes[lane]))
    if rest:
        with T.serial(whole * LANES, length) as index:
            store(result, [0], combine(result[0], prepare(buffer[tuple(place(index))])))
    return result
