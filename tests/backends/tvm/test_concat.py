import random

import numpy as np
import pytest
from harness import KernelLibrary

from shohin.backends.tvm.kernels.window import Concat


def _draw(seed: int) -> Concat:
    choose = random.Random(seed)
    lengths = tuple(choose.randint(1, 60) for _ in range(choose.randint(1, 5)))
    return Concat(choose.randint(1, 5), lengths)


_CASES = [
    Concat(1, (1,)),
    Concat(1, (16, 32)),
    Concat(3, (16, 5)),
    Concat(4, (1, 1, 1)),
    Concat(2, (33, 64, 7)),
    Concat(2, (5, 8), "int64"),
    Concat(2, (5, 40), "int8"),
    Concat(2, (5, 40), "uint8"),
    Concat(3, (19, 2), "int32"),
    Concat(3, (19, 2), "float16"),
    Concat(2, (3, 20), "bool"),
    *(_draw(seed) for seed in range(10)),
]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    return KernelLibrary(_CASES)


@pytest.mark.parametrize("kernel", _CASES)
def test_against_numpy(library: KernelLibrary, kernel: Concat) -> None:
    generator = np.random.default_rng(9)
    high = 2 if kernel.dtype == "bool" else 100
    parts = [
        generator.integers(0, high, (kernel.outer, length)).astype(kernel.dtype)
        for length in kernel.lengths
    ]
    np.testing.assert_array_equal(library.run(kernel, parts), np.concatenate(parts, axis=1))
