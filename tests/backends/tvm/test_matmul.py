import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    ALL_STEPS,
    Array,
    KernelLibrary,
    apply_steps,
    random_array,
    sum_of_products,
)
from torch import Tensor

from shohin.backends.tvm.kernels.emit import LANES
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.matmul import MatMul, MatrixTile, choose_matrix_tile


def _linear(rows: int, depth: int, columns: int, **options: Any) -> MatMul:
    registers = options.pop("registers", 30)
    tile = options.pop("tile", None) or choose_matrix_tile(rows, columns, registers)
    return MatMul(1, rows, depth, columns, packed=True, tile=tile, **{"bias": True, **options})


def _product(batch: int, rows: int, depth: int, columns: int, **options: Any) -> MatMul:
    tile = replace(choose_matrix_tile(rows, columns, 28), splits=1)
    return MatMul(batch, rows, depth, columns, packed=False, bias=False, tile=tile, **options)


_CHOSEN = {
    "one number": _linear(1, 1, 1),
    "one row": _linear(1, 64, 64),
    "one row, ragged": _linear(1, 33, 10),
    "one row, odd depth": _linear(1, 77, 100),
    "one row, wide": _linear(1, 24, 200),
    "two rows": _linear(2, 30, 47),
    "seven rows": _linear(7, 31, 65),
    "forty rows": _linear(40, 19, 48),
    "forty rows, ragged": _linear(40, 16, 199, registers=7),
    "rows in ragged tiles": _linear(13, 12, 20, tile=MatrixTile(4, 1)),
    "columns in ragged tiles": _linear(5, 12, 75, tile=MatrixTile(5, 2)),
    "both in ragged tiles": _linear(11, 12, 41, tile=MatrixTile(4, 2)),
    "fewer columns than a tile": _linear(3, 12, 5, tile=MatrixTile(2, 2)),
    "two splits": _linear(2, 34, 32, tile=MatrixTile(2, 2, 2)),
    "three splits": _linear(1, 33, 17, tile=MatrixTile(1, 2, 3)),
    "four splits": _linear(1, 40, 17, tile=MatrixTile(1, 1, 4)),
    "splits that do not divide": _linear(1, 39, 17, tile=MatrixTile(1, 1, 4)),
    "7 registers": _linear(9, 20, 70, registers=7),
    "3 registers": _linear(9, 20, 70, registers=3),
    "without bias": _linear(4, 20, 35, bias=False),
    "scale": _linear(4, 20, 35, scale=0.125),
    "deep": _linear(1, 4096, 16),
    "product": _product(1, 16, 16, 16),
    "products": _product(3, 17, 9, 33),
    "products of rows": _product(4, 1, 13, 7),
    "products with few columns": _product(2, 9, 40, 3),
    "scaled products": _product(2, 10, 32, 20, scale=0.17),
    "products with one column": _product(2, 5, 6, 1),
    "product steps": _product(
        2, 6, 8, 21, steps=(Step("add", operand="full"), Step("multiply", operand="channel"))
    ),
}
_STEPS = {
    f"step {step.kind} {step.operand}": _linear(1, 3, 21, steps=(step,), tile=MatrixTile(1, 2))
    for step in ALL_STEPS
}


def _draw(seed: int) -> MatMul:
    choose = random.Random(seed)
    rows, columns = choose.randint(1, 40), choose.randint(1, 200)
    depth = choose.randint(1, 50)
    steps = tuple(choose.sample(ALL_STEPS, choose.randint(0, 2)))
    if choose.random() < 0.3:
        return _product(choose.randint(1, 4), min(rows, 20), depth, columns, steps=steps)
    registers = choose.choice([30, 7, 3])
    bias = choose.random() < 0.7
    return _linear(rows, depth, columns, registers=registers, bias=bias, steps=steps)


_CASES = {**_CHOSEN, **_STEPS, **{f"random {seed}": _draw(seed) for seed in range(16)}}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES.values())


def _pad(vector: Array, kernel: MatMul) -> Array:
    return np.pad(vector, (0, kernel.padded_columns - vector.size))


def _pack(weight: Array, kernel: MatMul) -> Array:
    """``[1, K, N]`` to ``[N/NR, K, NR]``, zeros where ragged."""
    nr = LANES * kernel.tile.column_blocks
    full = np.pad(weight[0], ((0, 0), (0, kernel.padded_columns - kernel.columns)))
    return np.stack([full[:, start : start + nr] for start in range(0, full.shape[1], nr)])


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    kernel = _CASES[name]
    generator = np.random.default_rng(3)
    a = random_array(generator, kernel.batch, kernel.rows, kernel.depth)
    weight = random_array(generator, kernel.batch, kernel.depth, kernel.columns)
    bias = random_array(generator, kernel.columns)
    shapes = {
        "full": (kernel.batch, kernel.rows, kernel.columns),
        "channel": (kernel.columns,),
    }
    operands = [
        random_array(generator, *shapes[step.operand])
        for step in kernel.steps
        if step.operand != "none"
    ]

    def multiply(left: Tensor, right: Tensor, shift: Tensor) -> Tensor:
        product: Tensor = left @ right * kernel.scale
        return product + shift if kernel.bias else product

    tensors = [torch.from_numpy(array).double() for array in (a, weight, bias)]
    sums = sum_of_products(
        multiply(*tensors), multiply(*(tensor.abs() for tensor in tensors)), kernel.depth
    )
    expected = apply_steps(
        kernel.steps, sums, [torch.from_numpy(operand).double() for operand in operands]
    )
    given = [a, _pack(weight, kernel) if kernel.packed else weight]
    given += [_pad(bias, kernel)] if kernel.bias else []
    given += [_pad(o, kernel) if o.ndim == 1 else o for o in operands]
    expected.check(library.run(kernel, given))


@pytest.mark.parametrize("registers", [30, 7, 3])
def test_chosen_tiles_fit(registers: int) -> None:
    for rows in range(1, 70):
        for columns in (*range(1, 140), 1000, 4096):
            tile = choose_matrix_tile(rows, columns, registers)
            assert 1 <= tile.rows <= rows
            assert tile.column_blocks >= 1
            assert tile.rows * tile.column_blocks * tile.splits <= max(registers, 8)
