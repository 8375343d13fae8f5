"""What dense and sparse kernels take, to choose between them."""

from dataclasses import dataclass

from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.lowering.plan import Planner

_SPARSE_COST = 2.4
"""How many times as long as in a dense kernel an operation takes in a sparse one, unmeasured."""

_OPERATIONS_A_MILLISECOND = 5e7
"""Of a dense kernel, to compare what was measured with what was not."""

_ELEMENTS_A_MILLISECOND = 4e6
"""Elements that a change of layout moves."""


@dataclass(frozen=True)
class Cost:
    """Time of a kernel.

    Attributes:
        milliseconds: the time.
        measured: whether it was measured, or only estimated.
    """

    milliseconds: float
    measured: bool


@dataclass(frozen=True)
class Comparison:
    """The two ways to run a layer.

    Attributes:
        dense: cost of the dense kernel.
        sparse: cost of the sparse kernel and of the change of layout that it needs.
    """

    dense: Cost
    sparse: Cost

    @property
    def pays(self) -> bool:
        """Whether the sparse kernel is the faster one."""
        return self.sparse.milliseconds < self.dense.milliseconds

    def text(self) -> str:
        """For people."""
        how = "measured" if self.dense.measured and self.sparse.measured else "estimated"
        dense, sparse = self.dense.milliseconds, self.sparse.milliseconds
        return f"{how}: dense {dense:.3f} ms, sparse {sparse:.3f} ms"


def kernel_cost(planner: Planner, kernel: Kernel, moved: int = 0) -> Cost:
    """Time of a kernel and of a change of layout.

    Args:
        planner: knows what was measured.
        kernel: a dense or a sparse kernel.
        moved: elements whose layout is changed for the kernel.
    """
    change = moved / _ELEMENTS_A_MILLISECOND
    measured = planner.tuner.milliseconds(kernel)
    if measured is not None:
        return Cost(measured + change, True)
    factor = 1.0 if isinstance(kernel, (Conv2d, MatMul)) else _SPARSE_COST
    return Cost(kernel.operations * factor / _OPERATIONS_A_MILLISECOND + change, False)
