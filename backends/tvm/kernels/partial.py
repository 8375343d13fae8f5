"""Vectors of which only the first lanes exist, at ragged edges: no access past the end."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import LANES, Buffer, Expr, constant, local, ramp, store

Place = Callable[[Expr], list[Expr]]
"""Indices of a buffer's element or lanes, given the last index."""


def pieces(valid: int) -> list[tuple[int, int]]:
    """``(offset, lanes)`` of the powers of two that make up `valid` lanes: 13 is 8 + 4 + 1."""
    cut = []
    offset = 0
    for lanes in (16, 8, 4, 2, 1):
        if valid - offset >= lanes:
            cut.append((offset, lanes))
            offset += lanes
    return cut


def load_lanes(buffer: Buffer, place: Place, start: Expr, valid: int = LANES) -> Expr:
    """16 lanes from `start`; lanes at and past `valid` are zero and are not read."""
    if valid >= LANES:
        return buffer[tuple(place(ramp(start)))]
    scratch = local(LANES, str(buffer.dtype))
    store(scratch, [ramp(0)], constant(0, str(buffer.dtype)))
    for offset, lanes in pieces(valid):
        store(scratch, [ramp(offset, lanes)], buffer[tuple(place(ramp(start + offset, lanes)))])
    return scratch[ramp(0)]


def store_lanes(buffer: Buffer, place: Place, start: Expr, value: Expr, valid: int = LANES) -> None:
    """Store the first `valid` of 16 lanes from `start`."""
    if valid >= LANES:
        store(buffer, place(ramp(start)), value)
        return
    scratch = local(LANES, str(buffer.dtype))
    store(scratch, [ramp(0)], value)
    for offset, lanes in pieces(valid):
        store(buffer, place(ramp(start + offset, lanes)), scratch[ramp(offset, lanes)])


def for_each_vector(length: int, body: Callable[[Expr, int], None]) -> None:
    """Run ``body(start, valid)`` over the vectors of a row, the ragged last one apart.

    Args:
        length: elements of the row.
        body: emits the code of one vector.
    """
    whole, rest = divmod(length, LANES)
    if whole:
        with T.serial(0, whole) as index:
            body(index * LANES, LANES)
    if rest:
        body(whole * LANES, rest)
