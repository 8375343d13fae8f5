"""Branches of kernels: none is emitted where the condition is known when the code is made."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T  # noqa: N812

from shohin.backends.tvm.kernels.emit import Expr

Emit = Callable[[], None]


def either(condition: Expr, then: Emit, otherwise: Emit) -> None:
    """Emit one of two, or a branch between them.

    Args:
        condition: an expression, or a bool where it is known.
        then: emits the code for true.
        otherwise: emits the code for false.
    """
    if isinstance(condition, bool):
        (then if condition else otherwise)()
        return
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()


def whole_or_rest(piece: Expr, size: int, length: int, emit: Callable[[int], None]) -> None:
    """Emit a piece of a length that is cut in pieces of equal size but for a ragged last one.

    Args:
        piece: number of the piece.
        size: elements of a whole piece.
        length: elements of all pieces.
        emit: emits the code of a piece of so many elements.
    """
    whole, rest = divmod(length, size)
    is_whole = piece < whole if whole and rest else rest == 0
    either(is_whole, lambda: emit(size), lambda: emit(rest))
