"""Sharing with as many bits as a target allows, checked on what comes of it."""

from shohin.errors import PassError
from shohin.passes.sharing.allocation import (
    Bits,
    Options,
    bits_for_bytes,
    bits_for_drop,
    check_finite,
    coded_bytes,
)
from shohin.passes.sharing.coding import coded_bytes_beside
from shohin.passes.sharing.making import Made, Maker
from shohin.passes.training import restore, snapshot

_TRIES = 10


def make_for_bytes(maker: Maker, options: Options, most: int) -> Made:
    """Share with the least error whose entropy-coded encodings are within a number of bytes.

    Args:
        maker: its program is changed in place.
        options: of its layers.
        most: bytes of all weights and biases of the program together.

    Raises:
        PassError: when the fewest bits take more, with both numbers.
    """
    rest = coded_bytes_beside(maker.program, maker.names)
    beside = rest + maker.share_biases().coded_bytes
    # Compensation assigns elements anew: how much larger they get is known afterwards only.
    growth, last = 0, None
    found = beside
    for _ in range(_TRIES):
        bits = bits_for_bytes(options, most - beside - growth)
        expected = beside + coded_bytes(options, bits)
        if bits == last:
            break
        found, last = expected, bits
        if expected > most:
            break
        before = snapshot(maker.program)
        made = maker.make(bits)
        found = rest + made.coded_bytes
        if found <= most:
            return made
        restore(maker.program, before)
        growth = found - expected
    problem = f"expected at most {most:,} bytes, got {found:,} at the fewest bits"
    detail = f"{problem}, {rest:,} of them of what is not shared"
    raise PassError("share-weights target_bytes", detail, "prune first, or choose more")


def make_for_drop(maker: Maker, options: Options, drop: float) -> Made:
    """Share with the fewest bits for which the evaluation falls by little enough.

    Args:
        maker: its program is changed in place; its context gives the evaluation.
        options: of its layers.
        drop: by how much it may fall.

    Raises:
        PassError: when it falls by more with the most bits, or is not finite before.
    """
    before = _evaluate(maker)
    check_finite(before)
    least = before - drop

    def measure(bits: Bits) -> float:
        with maker.undone():
            maker.make(bits)
            found = _evaluate(maker)
        maker.context.progress(0, 1, f"evaluation {found:.4g} of {before:.4g}")
        return found

    made = maker.make(bits_for_drop(options, measure, least))
    found = _evaluate(maker)
    if not found >= least:
        problem = f"expected an evaluation of at least {least:.6g} again, got {found:.6g}"
        hint = "let the evaluate function give the same number for the same weights"
        raise PassError("share-weights target_drop", problem, hint)
    text = f"{found:.6g} with shared values, {before:.6g} before"
    maker.context.noted("evaluation", text, before=before, after=found)
    return made


def _evaluate(maker: Maker) -> float:
    evaluate = maker.context.evaluate
    if evaluate is None:
        raise AssertionError("checked before the passes ran")
    return float(evaluate(maker.program.module))
