import math
from typing import get_args

import numpy as np
import pytest
import torch
from harness import (
    ALL_STEPS,
    SCALAR_STEPS,
    UNARY_STEPS,
    Array,
    Bounded,
    KernelLibrary,
    apply_steps,
    random_array,
)

from shohin.backends.tvm.kernels.emit import LANES, Parameter
from shohin.backends.tvm.kernels.epilogue import (
    BINARY,
    UNARY,
    OperandKind,
    Step,
    operand_parameters,
)
from shohin.backends.tvm.kernels.pointwise import Pointwise

_CHANNEL = Step("multiply", operand="channel")
_FULL = Step("subtract", operand="full")

_STEPS = {
    f"step {step.kind} {step.operand}": Pointwise(2, 1, 37, "inner", (step,)) for step in ALL_STEPS
}
_CHOSEN = {
    "one number": Pointwise(1, 1, 1, "inner", (Step("relu"),)),
    "whole chunks": Pointwise(1, 2, 1024, "rows", (Step("relu"),)),
    "chunks and a ragged rest": Pointwise(3, 1, 1031, "inner", (Step("relu"), _FULL)),
    "one element behind a chunk": Pointwise(1, 1, 1025, "inner", (_FULL,)),
    "less than a chunk": Pointwise(5, 7, 9, "rows", (Step("relu"), _FULL)),
    "lanes": Pointwise(2, 3, 5 * LANES, "lanes", (_CHANNEL,)),
    "lanes, one pixel": Pointwise(2, 3, LANES, "lanes", (_CHANNEL, _FULL)),
    "rows": Pointwise(2, 5, 16, "rows", (_CHANNEL,)),
    "ragged rows": Pointwise(2, 5, 49, "rows", (_CHANNEL, _FULL)),
    "rows of one pixel": Pointwise(3, 5, 1, "rows", (_CHANNEL,)),
    "inner": Pointwise(4, 1, 32, "inner", (_CHANNEL,)),
    "ragged inner": Pointwise(4, 1, 45, "inner", (_CHANNEL, _FULL, Step("tanh"))),
    "short inner": Pointwise(4, 1, 3, "inner", (_CHANNEL,)),
    "two channel operands": Pointwise(
        2, 3, 21, "rows", (_CHANNEL, Step("relu"), Step("add", operand="channel"))
    ),
    "chain": Pointwise(
        2, 3, 50, "rows", (_FULL, Step("gelu"), _CHANNEL, Step("clamp", (-1.0, 1.0)), _FULL)
    ),
    **{
        f"{length} elements": Pointwise(1, 1, length, "inner", (Step("negate"), _CHANNEL))
        for length in range(1, 34)
    },
}
_CASES = {**_STEPS, **_CHOSEN}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


def _spread(kernel: Pointwise, numbers: Array) -> Array:
    """One number a channel, over all elements."""
    shape = (kernel.outer, kernel.channels, kernel.inner)
    if kernel.channel == "rows":
        return np.broadcast_to(numbers[None, :, None], shape)
    if kernel.channel == "inner":
        return np.broadcast_to(numbers, shape)
    lanes = np.tile(numbers.reshape(kernel.channels, LANES), (1, kernel.inner // LANES))
    return np.broadcast_to(lanes, shape)


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    kernel = _CASES[name]
    generator = np.random.default_rng(4)
    shape = (kernel.outer, kernel.channels, kernel.inner)
    width = {"lanes": kernel.channels * LANES, "rows": kernel.channels, "inner": kernel.inner}
    x = 2 * random_array(generator, *shape)
    operands = [
        random_array(generator, *(shape if step.operand == "full" else (width[kernel.channel],)))
        for step in kernel.steps
        if step.operand != "none"
    ]
    start = torch.from_numpy(x).double()
    spread = [o if o.ndim == 3 else _spread(kernel, o) for o in operands]
    expected = apply_steps(
        kernel.steps,
        Bounded(start, torch.zeros_like(start)),
        [torch.from_numpy(o.copy()).double() for o in spread],
    )
    found = library.run(kernel, [x, *operands])
    expected.check(found.reshape(shape))


def test_every_kind_of_step_is_tested() -> None:
    extra = {"clamp", "leaky-relu", "elu"}
    assert {step.kind for step in UNARY_STEPS} == set(UNARY) | extra
    assert {step.kind for step in SCALAR_STEPS} == {f"{kind}-scalar" for kind in BINARY}
    assert {step.operand for step in ALL_STEPS} == set(get_args(OperandKind))


def test_operand_parameters() -> None:
    found = operand_parameters((_FULL, Step("relu"), _CHANNEL), (2, 3), 7)
    assert found == (Parameter("operand0", (2, 3)), Parameter("operand1", (7,)))
    assert operand_parameters((), (2, 3), 7) == ()


_EXACT = ("relu", "abs", "negate", "clamp", "leaky-relu", "hard-sigmoid")


@pytest.mark.parametrize("kind", _EXACT)
def test_limits(library: KernelLibrary, kind: str) -> None:
    kernel = _CASES[f"step {kind} none"]
    x = np.zeros(2 * 37, np.float32)
    x[:6] = [-math.inf, math.inf, -3e38, 3e38, 1e-38, -0.0]
    found = library.run(kernel, [x]).reshape(-1)
    (step,) = kernel.steps
    with np.errstate(over="ignore", invalid="ignore"):
        exact = apply_steps(
            (step,), Bounded(torch.from_numpy(x), torch.zeros(len(x))), []
        ).exact.numpy()
    keep = ~np.isnan(exact)
    np.testing.assert_allclose(found[keep], exact[keep], rtol=2e-7, atol=1e-7)
