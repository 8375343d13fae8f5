import random

import avx_vnni
import numpy as np
import pytest
from fixed_points import apply_fixed, random_integers
from harness import KernelLibrary
from test_fixed_conv2d import UNITS

from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.fixed_linear import FixedLinear
from shohin.backends.tvm.kernels.matmul import MatrixTile
from shohin.backends.tvm.target import CpuTarget

_RESCALE = Step("fixed-rescale", (9, -128, 127, 1))
_WORDS = Step("fixed-rescale", (20, -32768, 32767, 1))
_RELU = Step("fixed-relu")
_ADD = Step("fixed-add", (0, 3, 4, -128, 127, 0), "full", "int8")
_EACH = Step("fixed-rescale", (-128, 127, 0), "channel", "int32")
_REAL = Step("fixed-real", (9,))


def linear(unit, *, rows=1, depth=64, columns=32, steps=(_RESCALE,), **options):
    return FixedLinear(
        rows,
        depth,
        columns,
        unit,
        options.pop("signed", True),
        options.pop("result", "int8"),
        options.pop("tile", MatrixTile(min(rows, 2), 1, 2)),
        source=options.pop("source", unit.input_type),
        weight_type=options.pop("weight_type", unit.input_type),
        steps=steps,
        **options,
    )


def cases(unit):
    found = [
        linear(unit),
        linear(unit, signed=False),
        linear(unit, rows=5, depth=35, columns=50, tile=MatrixTile(2, 2)),
        linear(unit, depth=3, columns=10),
        linear(unit, rows=3, depth=129, columns=17, steps=(_RESCALE, _ADD, _RELU)),
        linear(unit, depth=800, columns=40, tile=MatrixTile(1, 2, 4), steps=(_EACH,)),
        linear(unit, depth=100, columns=10, steps=(_REAL,), result="float32"),
    ]
    if unit.chains:
        found.append(linear(unit, depth=77, signed=False, chain=4))
        found.append(linear(unit, depth=77, rows=2, chain=2))
    if unit.input_type == "int16":
        found.append(linear(unit, depth=77, wide=True, result="int16", steps=(_WORDS,)))
        found.append(linear(unit, depth=77, weight_type="int8"))
        found.append(linear(unit, depth=77, source="int8"))
    elif unit.group == 4:
        for depth in (1, 4, 6, 8, 12, 13, 64, 100):
            found.append(linear(unit, depth=depth, half_bytes=True))
        found.append(linear(unit, rows=3, depth=50, columns=70, half_bytes=True, signed=False))
    return found


def drawn(unit, seed):
    choose = random.Random(seed)
    rows = choose.randint(1, 5)
    return linear(
        unit,
        rows=rows,
        depth=choose.randint(1, 150),
        columns=choose.randint(1, 70),
        signed=choose.random() < 0.5,
        tile=MatrixTile(choose.randint(1, rows), choose.randint(1, 3), choose.choice([1, 2, 4])),
        steps=(_RESCALE, *choose.choice([(), (_RELU,), (_ADD,)])),
        half_bytes=unit.group == 4 and choose.random() < 0.5,
    )


def check(library, kernel):
    generator = np.random.default_rng(4)
    unit = kernel.unit
    x = random_integers(generator, (kernel.rows, kernel.depth), kernel.source)
    x = x if kernel.signed else np.maximum(x, 0)
    shape = (kernel.columns, kernel.depth)
    weight = random_integers(generator, shape, kernel.weight_type, symmetric=True)
    if kernel.half_bytes:
        weight = generator.integers(-8, 8, shape, dtype=np.int8)
    if unit.input_type == "int16" and not kernel.wide:
        weight = weight >> (8 if kernel.weight_type == "int16" else 0)
        x = x >> (6 if kernel.source == "int16" else 0)
    weight = weight // 16 if kernel.chain > 1 else weight
    bias = generator.integers(-5000, 5000, kernel.columns)
    expected = x.astype(np.int64) @ weight.astype(np.int64).T + bias
    operands, stored = [], []
    for step in kernel.steps:
        if step.operand == "full":
            operands.append(random_integers(generator, expected.shape, step.operand_type))
            stored.append(operands[-1])
        elif step.operand == "channel":
            shifts = generator.integers(-3, 12, kernel.padded_columns, dtype=np.int32)
            operands.append(shifts[: kernel.columns])
            stored.append(shifts)
    expected = apply_fixed(kernel.steps, expected, operands)
    arrays = [x, kernel.pack(weight), kernel.biases(weight, bias), *stored]
    assert np.array_equal(library.run(kernel, arrays), expected), kernel


@pytest.mark.parametrize("name", UNITS)
def test_sums_are_exact(name):
    unit, arch = UNITS[name]
    if problem := avx_vnni.why_not(arch):
        pytest.skip(problem)
    kernels = [*cases(unit), *(drawn(unit, seed) for seed in range(15))]
    library = KernelLibrary(kernels, CpuTarget(arch))
    for kernel in dict.fromkeys(kernels):
        check(library, kernel)


def test_two_weights_share_a_byte():
    unit, _ = UNITS["avx2"]
    kernel = linear(unit, depth=8, columns=1, half_bytes=True)
    weight = np.array([[-8, 7, 0, 1, 2, 3, 4, -1]])
    packed = kernel.pack(weight).view(np.uint8)
    assert packed.shape == (1, 1, LANES * 4)
    # Of the first output: inputs 0 to 3 in the low halves, 4 to 7 in the high ones.
    assert packed[0, 0, :4].tolist() == [0xA0, 0xBF, 0xC8, 0x79]
    assert set(packed[0, 0, 4:].tolist()) == {0x88}
