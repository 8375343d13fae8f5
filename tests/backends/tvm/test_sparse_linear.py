"""Fully connected layers with few weights."""

import random

import numpy as np
import pytest
import torch
from harness import ALL_STEPS, Array, KernelLibrary, apply_steps, random_array, sum_of_products

from shohin.backends.tvm.kernels.block_linear import BlockSparseLinear
from shohin.backends.tvm.kernels.epilogue import Step
from shohin.backends.tvm.kernels.groups import Lists, even_groups, filled_entries
from shohin.backends.tvm.kernels.list_linear import ListLinear
from shohin.backends.tvm.kernels.sparse_linear import SparseLinear
from shohin.backends.tvm.target import CpuTarget

Case = tuple[ListLinear, Array]


def _weight(columns: int, depth: int, density: float, blocked: bool, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    weight = random_array(generator, columns, depth) + 0.01
    if blocked:
        mask = generator.random((-(-columns // 16), depth)) < density
        mask = np.repeat(mask, 16, axis=0)[:columns]
    else:
        mask = generator.random((columns, depth)) < density
    return (weight * mask).astype(np.float32)


def _lists(
    rows: int = 1,
    columns: int = 37,
    depth: int = 50,
    density: float = 0.3,
    groups: int = 1,
    sums: int = 4,
    steps: tuple[Step, ...] = (),
    blocked: bool = False,
) -> Case:
    weight = _weight(columns, depth, density, blocked)
    family = BlockSparseLinear if blocked else SparseLinear
    entries = filled_entries(family.counts(weight), sums)
    return family(rows, depth, columns, entries, groups, sums, steps), weight


def _draw(seed: int) -> Case:
    choose = random.Random(seed)
    return _lists(
        rows=choose.randint(1, 4),
        columns=choose.randint(1, 70),
        depth=choose.randint(1, 90),
        density=choose.choice([0.0, 0.05, 0.4, 1.0]),
        groups=choose.randint(1, 4),
        sums=choose.choice([1, 2, 4, 8]),
        steps=tuple(choose.sample(ALL_STEPS, choose.randint(0, 2))),
        blocked=choose.random() < 0.5,
    )


_CASES: dict[str, Case] = {
    "one row": _lists(),
    "three rows": _lists(rows=3),
    "groups": _lists(groups=5),
    "more groups than outputs": _lists(columns=3, groups=5),
    "no weights": _lists(density=0.0),
    "all weights": _lists(density=1.0),
    "many inputs": _lists(depth=70_000, columns=4, density=0.001),
    "blocks": _lists(blocked=True),
    "whole blocks": _lists(columns=48, blocked=True),
    "less than a block": _lists(columns=5, blocked=True),
    "groups of blocks": _lists(columns=100, groups=3, blocked=True),
    "blocks, many inputs": _lists(depth=70_000, columns=20, density=0.001, blocked=True),
    **{f"step {s.kind} {s.operand}": _lists(rows=2, steps=(s,)) for s in ALL_STEPS},
    **{f"blocks, step {s.kind} {s.operand}": _lists(steps=(s,), blocked=True) for s in ALL_STEPS},
    **{f"random {seed}": _draw(seed) for seed in range(30)},
}


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary([kernel for kernel, _ in _CASES.values()])


def _check(library: KernelLibrary, case: Case) -> None:
    kernel, weight = case
    generator = np.random.default_rng(5)
    x = random_array(generator, kernel.rows, kernel.depth)
    bias = random_array(generator, kernel.columns)
    shapes = {"full": (kernel.rows, kernel.columns), "channel": (kernel.columns,)}
    operands = [
        random_array(generator, *shapes[step.operand])
        for step in kernel.steps
        if step.operand != "none"
    ]
    rows, taps, shift = (torch.from_numpy(array).double() for array in (x, weight, bias))
    sums = sum_of_products(
        rows @ taps.T + shift, rows.abs() @ taps.abs().T + shift.abs(), terms=kernel.depth + 1
    )
    wide = [torch.from_numpy(operand).double() for operand in operands]
    expected = apply_steps(kernel.steps, sums, wide)
    lists = kernel.pack(weight)
    missing = (0, kernel.width - kernel.columns)
    bias = np.pad(bias, missing)
    operands = [np.pad(o, missing) if o.ndim == 1 else o for o in operands]
    names = ("value", "index", "start", "group")
    expected.check(library.run(kernel, [x, *(lists[n] for n in names), bias, *operands]))


@pytest.mark.parametrize("name", _CASES)
def test_against_torch(library: KernelLibrary, name: str) -> None:
    _check(library, _CASES[name])


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_narrower_vectors(arch: str) -> None:
    cases = [_lists(), _lists(blocked=True)]
    library = KernelLibrary([kernel for kernel, _ in cases], CpuTarget(arch))
    for case in cases:
        _check(library, case)


def test_samples_have_the_kernels_shapes() -> None:
    for kernel, _ in _CASES.values():
        sample = kernel.sample()
        for parameter in kernel.parameters():
            if parameter.name in sample:
                assert sample[parameter.name].shape == parameter.shape
                assert str(sample[parameter.name].dtype) == parameter.dtype


def test_lists_lie_one_behind_the_other() -> None:
    lists = Lists(np.array([3, 0, 5, 4]), 4)
    assert lists.start.tolist() == [0, 4, 4, 12, 16]
    assert lists.places(np.array([0, 0, 0, 2, 2, 2, 2, 2])).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert lists.places(np.array([3, 3, 3, 3])).tolist() == [12, 13, 14, 15]
    assert lists.places(np.zeros(0, np.int64)).size == 0
    assert filled_entries(np.array([[3, 0], [5, 4]]), 8) == 24


def test_groups_cover_all_outputs_in_order() -> None:
    for seed in range(20):
        generator = np.random.default_rng(seed)
        weights = generator.integers(0, 100, generator.integers(1, 40))
        bounds = even_groups(weights, int(generator.integers(1, 9))).astype(int)
        assert bounds[0] == 0
        assert bounds[-1] == len(weights)
        assert (np.diff(bounds) >= 0).all()
