"""What dense, sparse, codebook and packed kernels take, to choose between them."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from shohin.backends.tvm.kernels.byte_codebook_linear import ByteCodebookLinear
from shohin.backends.tvm.kernels.codebook_linear import CodebookLinear
from shohin.backends.tvm.kernels.conv2d import Conv2d
from shohin.backends.tvm.kernels.emit import Kernel
from shohin.backends.tvm.kernels.matmul import MatMul
from shohin.backends.tvm.kernels.packed_matmul import PackedMatMul
from shohin.backends.tvm.kernels.ternary_linear import TernaryLinear
from shohin.backends.tvm.kernels.tiled_linear import TiledLinear
from shohin.backends.tvm.lowering.plan import Planner

_SPARSE_COST = 2.4
"""How many times as long as in a dense kernel an operation takes in a sparse one, unmeasured."""

_LOOK_UP_COST = 0.4
"""How much of the time of a dense operation on a streamed weight looking it up takes, unmeasured.

Measured on Zen 4 with 4096 x 4096 weights: from 0.27 for one look-up to 0.5 for two.
"""

_BYTE_LOOK_UP_COST = 0.6
"""The same where bytes are looked up, from 18 instructions for 16 weights; not measured."""

_PACKED_COST = 0.6
"""How much of the time of a dense operation on a streamed weight a packed one takes, unmeasured.

On few rows or with cached weights they are about as fast as each other: measured on Zen 3.
"""

_SUBSET_COST = 0.25
"""The same for sums of subsets of inputs, which take 2.4 times as long in a layer of many rows."""

_PACKED_SLOWER = 1.05
"""How many times as long as the fastest kernel a packed one may take and still be chosen.

Its weights take a sixteenth of the memory, and other layers find more of theirs in the caches.
"""

_CACHED_BYTES = 1 << 20
"""Dense weights that a cache keeps: only larger ones are streamed, for longer than a look-up."""

_OPERATIONS_A_MILLISECOND = 5e7
"""Of a dense kernel, to compare what was measured with what was not."""

_ELEMENTS_A_MILLISECOND = 1.75e6
"""Elements that a change of layout moves: measured on Zen 4, an image of 3.2 million."""


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
class Candidate:
    """A way to run a layer other than by the dense kernel.

    Attributes:
        cost: what it takes, with the change of layout that it needs.
        place: appends its calls to the plan.
    """

    cost: Cost
    place: Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """The ways to run a layer.

    Attributes:
        dense: cost of the dense kernel.
        sparse: cost of the sparse kernel and of the change of layout that it needs, if it has one.
        codebook: cost of the kernel that looks weights up, if it has one.
        packed: cost of the kernel whose weights are two bits, if it has one.
    """

    dense: Cost
    sparse: Cost | None = None
    codebook: Cost | None = None
    packed: Cost | None = None

    @property
    def costs(self) -> dict[str, Cost]:
        """What there is, by name, the dense kernel first."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: cost for name, cost in every.items() if cost is not None}

    @property
    def best(self) -> str:
        """Name of the kernel to use: the packed one if it is hardly slower, else the fastest.

        The dense kernel if none is faster.
        """
        costs = self.costs
        fastest = min(costs, key=lambda name: costs[name].milliseconds)
        most = costs[fastest].milliseconds * _PACKED_SLOWER
        return "packed" if self.packed and self.packed.milliseconds <= most else fastest

    @property
    def pays(self) -> bool:
        """Whether another kernel than the dense one is to be used."""
        return self.best != "dense"

    def text(self) -> str:
        """For people."""
        costs = self.costs
        how = "measured" if all(cost.measured for cost in costs.values()) else "estimated"
        times = ", ".join(f"{name} {cost.milliseconds:.3f} ms" for name, cost in costs.items())
        return f"{how}: {times}"


def kernel_cost(planner: Planner, kernel: Kernel, moved: int = 0) -> Cost:
    """Time of a kernel and of a change of layout.

    Args:
        planner: knows what was measured.
        kernel: any of them.
        moved: elements whose layout is changed for the kernel.
    """
    change = moved / _ELEMENTS_A_MILLISECOND
    measured = planner.tuner.milliseconds(kernel)
    if measured is not None:
        return Cost(measured + change, True)
    estimate = kernel.operations * _factor(kernel) / _OPERATIONS_A_MILLISECOND
    return Cost(estimate + change, False)


def _factor(kernel: Kernel) -> float:
    """How many times as long as in a dense kernel an operation takes."""
    if isinstance(kernel, CodebookLinear):
        look_ups = kernel.form.look_ups + 0.5 * kernel.form.zero_bit
        return look_ups * _LOOK_UP_COST + (0.0 if _is_streamed(kernel) else 1.0)
    if isinstance(kernel, ByteCodebookLinear):
        return _BYTE_LOOK_UP_COST * kernel.form.tables + (0.0 if _is_streamed(kernel) else 1.0)
    if isinstance(kernel, (PackedMatMul, TernaryLinear)):
        return _packed_factor(kernel)
    return 1.0 if isinstance(kernel, (Conv2d, MatMul)) else _SPARSE_COST


def _packed_factor(kernel: PackedMatMul | TernaryLinear) -> float:
    streamed = _is_streamed(kernel)
    if isinstance(kernel, TernaryLinear):
        return _SUBSET_COST if streamed else 2.4 * _SUBSET_COST
    return _PACKED_COST if streamed else 1.0


def _is_streamed(kernel: TiledLinear | PackedMatMul) -> bool:
    """Whether a dense kernel would stream the weights for a single row."""
    return kernel.rows == 1 and 4 * kernel.depth * kernel.columns > _CACHED_BYTES
