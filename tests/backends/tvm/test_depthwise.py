import random

import pytest
from convolutions import check_convolution, draw_geometry
from harness import ALL_STEPS, KernelLibrary

from shohin.backends.tvm.kernels.depthwise import DepthwiseConv2d
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.geometry import Geometry


def _conv(
    *,
    batch: int = 1,
    channels: int = 32,
    size: tuple[int, int] = (6, 20),
    kernel: tuple[int, int] = (3, 3),
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (1, 1, 1, 1),
    dilation: tuple[int, int] = (1, 1),
    width: int = 7,
    steps: tuple[Step, ...] = (),
) -> DepthwiseConv2d:
    geometry = Geometry(size, kernel, stride, padding, dilation)
    return DepthwiseConv2d(batch, channels, geometry, width, steps)


_CHOSEN = {
    "3x3": _conv(),
    "batch 3": _conv(batch=3),
    "one block": _conv(channels=16),
    "5x5 stride 2": _conv(kernel=(5, 5), stride=(2, 2), padding=(2, 2, 2, 2)),
    "7x1": _conv(kernel=(7, 1), padding=(3, 3, 0, 0)),
    "1x1": _conv(kernel=(1, 1), padding=(0, 0, 0, 0)),
    "dilated": _conv(dilation=(2, 3), padding=(2, 2, 3, 3)),
    "asymmetric": _conv(padding=(0, 2, 1, 0), stride=(2, 1)),
    "padding beyond the kernel": _conv(padding=(4, 4, 5, 5), size=(2, 3)),
    "narrower than the tile": _conv(size=(3, 4), width=12),
    "row of one tile": _conv(size=(3, 12), width=12),
    "ragged tail": _conv(size=(3, 25), width=12),
    "tail behind the interior": _conv(size=(3, 45), width=7),
    "tiles of one pixel": _conv(size=(3, 5), width=1),
    "one pixel": _conv(size=(1, 1)),
    "residual": _conv(steps=(Step("relu"), Step("add", operand="full"))),
}
_STEPS = {
    f"step {step.kind} {step.operand}": _conv(size=(2, 8), steps=(step,)) for step in ALL_STEPS
}


def _draw(seed: int) -> DepthwiseConv2d:
    choose = random.Random(seed)
    return DepthwiseConv2d(
        choose.randint(1, 3),
        16 * choose.randint(1, 3),
        draw_geometry(choose),
        choose.randint(1, 12),
        tuple(choose.sample(ALL_STEPS, choose.randint(0, 3))),
    )


_CASES = {**_CHOSEN, **_STEPS, **{f"random {seed}": _draw(seed) for seed in range(30)}}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    check_convolution(library, _CASES[name])
