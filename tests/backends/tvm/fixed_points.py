"""Integer kernels with random numbers, and what they must give, bit for bit."""

from collections.abc import Sequence

import numpy as np
from harness import Array

from shohin.backends.tvm.kernels.epilogue import Step


def rescale(x: Array, shift: int, low: int, high: int, nearest: int) -> Array:
    """Integers shifted to the right, rounded and saturated, in exact arithmetic."""
    if shift <= 0:
        return np.clip(x * 2**-shift, low, high)
    whole, rest = np.floor_divide(x, 2**shift), np.mod(x, 2**shift)
    if nearest:
        half = 2 ** (shift - 1)
        whole = whole + ((rest > half) | ((rest == half) & (whole % 2 != 0)))
    return np.clip(whole, low, high)


def apply_fixed(steps: Sequence[Step], x: Array, operands: Sequence[Array]) -> Array:
    """What a chain of integer steps gives.

    Args:
        steps: the steps.
        x: int64 sums.
        operands: of the steps that have one, in order, broadcast to the sums.
    """
    remaining = iter(operands)
    for step in steps:
        operand = next(remaining) if step.operand != "none" else None
        x = _apply(step, x, operand)
    return x


def _apply(step: Step, x: Array, operand: Array | None) -> Array:
    numbers = [int(one) for one in step.constants]
    if step.kind == "fixed-relu":
        return np.maximum(x, 0)
    if step.kind == "fixed-real":
        return x.astype(np.float32) * np.float32(2.0 ** -numbers[0])
    if step.kind == "fixed-rescale" and operand is not None:
        parts = [rescale(x, int(s), *numbers) for s in np.unique(operand)]
        shifts = np.broadcast_to(operand, x.shape)
        found = np.zeros_like(x)
        for shift, part in zip(np.unique(operand), parts, strict=True):
            found = np.where(shifts == shift, part, found)
        return found
    if operand is not None:
        operand = operand.astype(np.int64)
    if step.kind == "fixed-add":
        x = x * 2 ** numbers[0] + operand * 2 ** numbers[1]
        numbers = numbers[2:]
    elif step.kind == "fixed-multiply":
        x = x * operand
    return rescale(x, *numbers)


def random_integers(
    generator: np.random.Generator, shape: tuple[int, ...], dtype: str, *, symmetric: bool = False
) -> Array:
    """Integers of a type, its limits among them."""
    limits = np.iinfo(dtype)
    low = -limits.max if symmetric else limits.min
    numbers = generator.integers(low, limits.max, shape, dtype=dtype, endpoint=True)
    ends = generator.random(shape)
    numbers[ends < 0.05] = low
    numbers[ends > 0.95] = limits.max
    return numbers
