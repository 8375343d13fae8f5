"""What a program computes, in the backend's own terms: few operations, every size a number.

Selection turns ATen nodes into these, fusion merges element-wise operations into their producers,
planning gives every value a layout and every operation a kernel.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from shohin.backends.tvm.kernels.epilogue import Step

Array = NDArray[np.generic]


@dataclass(eq=False)
class Value:
    """A tensor that flows between operations.

    Attributes:
        name: name of the graph node that computes it.
        shape: logical sizes.
        dtype: element type.
        constant: the numbers, for a weight; None for what is computed.
        fixed: whether these are integers that stand for numbers on a grid.
        nonnegative: whether none of them is negative.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    constant: torch.Tensor | None = None
    fixed: bool = False
    nonnegative: bool = False

    @property
    def elements(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bytes(self) -> int:
        """Size of the plain array."""
        return self.elements * self.dtype.itemsize


@dataclass
class FusedStep:
    """An element-wise step and its second operand, if it has one."""

    step: Step
    operand: Value | None = None


@dataclass(eq=False)
class Operation:
    """Base of all operations.

    Attributes:
        output: what it computes.
        label: for profiles: source module and what it is.
        steps: element-wise steps fused onto the result.
    """

    output: Value
    label: str
    steps: list[FusedStep] = field(default_factory=list, kw_only=True)

    @property
    def inputs(self) -> list[Value]:
        """The values read, fused operands left out."""
        return []

    @property
    def outputs(self) -> list[Value]:
        """The values written."""
        return [self.output]

    @property
    def reads(self) -> list[Value]:
        """Every value read."""
        return [*self.inputs, *(s.operand for s in self.steps if s.operand is not None)]


@dataclass(eq=False)
class TernaryWeight:
    """A weight whose elements are one of two values of their output, or zero.

    Attributes:
        codes: int8 of the weight's shape: 1, 0 and -1.
        values: float32 `[outputs, 2]`: what 1 and -1 stand for.
    """

    codes: torch.Tensor
    values: torch.Tensor


@dataclass(eq=False)
class Convolution(Operation):
    """2-d convolution; padding is (top, bottom, left, right).

    By the encoding of the weight, `sparse` says that most of it is zero, and `ternary` holds what
    it is made of if it is ternary.
    """

    x: Value
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    sparse: bool = False
    ternary: TernaryWeight | None = None

    @property
    def may_be_sparse(self) -> bool:
        """Whether a sparse kernel can compute it; none has groups."""
        return self.sparse and self.groups == 1

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class ConvolutionPair(Operation):
    """A convolution and the 1 x 1 convolution that alone reads it. Steps are those of the second.

    Attributes:
        first: without steps.
        second: its steps are the pair's.
    """

    first: Convolution
    second: Convolution

    @property
    def inputs(self) -> list[Value]:
        """The image that the first reads."""
        return [self.first.x]


@dataclass(eq=False)
class Linear(Operation):
    """Fully connected layer on the last axis.

    By the encoding of the weight, `sparse` says that most of it is zero, `values` holds the few
    values that its elements have, None where they may be anything, and `ternary` holds what it is
    made of if it is ternary.
    """

    x: Value
    weight: torch.Tensor
    bias: torch.Tensor | None
    sparse: bool = False
    values: torch.Tensor | None = None
    ternary: TernaryWeight | None = None

    @property
    def is_compressed(self) -> bool:
        """Whether there may be another kernel than the dense one."""
        return self.sparse or self.values is not None or self.ternary is not None

    @property
    def inputs(self) -> list[Value]:
        """The rows."""
        return [self.x]


@dataclass(eq=False)
class FixedWeights:
    """Weights and biases of a fixed-point layer, as integers.

    Attributes:
        codes: `[outputs, ...]`, int8 or int16.
        bits: width of the integers.
        biases: int64 `[outputs]`, at the radix of the products.
        wide: whether sums need more than 32 bits.
    """

    codes: torch.Tensor
    bits: int
    biases: torch.Tensor
    wide: bool


@dataclass(eq=False)
class FixedConvolution(Operation):
    """2-d convolution of integers; padding is (top, bottom, left, right). A step rescales."""

    x: Value
    weights: FixedWeights
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class FixedLinear(Operation):
    """Fully connected layer of integers on the last axis. A step rescales."""

    x: Value
    weights: FixedWeights

    @property
    def inputs(self) -> list[Value]:
        """The rows."""
        return [self.x]


@dataclass(eq=False)
class FixedAverage(Operation):
    """Sums over windows times a whole number; padding is (top, bottom, left, right)."""

    x: Value
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    multiplier: int

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class BatchedMatMul(Operation):
    """``scale * a @ b``, b transposed on its last two axes if so said."""

    a: Value
    b: Value
    transpose_b: bool = False
    scale: float = 1.0

    @property
    def inputs(self) -> list[Value]:
        """Both operands."""
        return [self.a, self.b]


@dataclass(eq=False)
class Pooling(Operation):
    """Maximum or average over windows."""

    x: Value
    mode: Literal["max", "average"]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    count_padding: bool = True
    divisor: int = 0

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class GlobalAveragePooling(Operation):
    """Average over all pixels."""

    x: Value

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class Elementwise(Operation):
    """A chain of element-wise steps that no producer took."""

    x: Value

    @property
    def inputs(self) -> list[Value]:
        """The value the chain starts from."""
        return [self.x]


@dataclass(eq=False)
class Concatenation(Operation):
    """Joins values along an axis."""

    parts: list[Value]
    axis: int

    @property
    def inputs(self) -> list[Value]:
        """The parts in order."""
        return list(self.parts)


@dataclass(eq=False)
class WindowCopy(Operation):
    """Slice and pad of an image: see `kernels.window.Window`."""

    x: Value
    start: tuple[int, int, int]
    step: tuple[int, int]
    value: float = 0.0

    @property
    def inputs(self) -> list[Value]:
        """The image."""
        return [self.x]


@dataclass(eq=False)
class View(Operation):
    """The same elements under another shape, from an offset in elements."""

    x: Value
    offset: int = 0

    @property
    def inputs(self) -> list[Value]:
        """What is viewed."""
        return [self.x]


@dataclass(eq=False)
class SoftmaxRows(Operation):
    """Softmax over the last axis."""

    x: Value
    logarithm: bool = False

    @property
    def inputs(self) -> list[Value]:
        """The rows."""
        return [self.x]


@dataclass(eq=False)
class LayerNormalisation(Operation):
    """Layer norm over the last axes, seen as one."""

    x: Value
    columns: int
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    epsilon: float

    @property
    def inputs(self) -> list[Value]:
        """The rows."""
        return [self.x]


@dataclass(eq=False)
class Region(Operation):
    """Nodes without a template of ours, compiled together by TVM.

    Attributes:
        module: the nodes as a module of their own, inputs as placeholders.
        values: what the placeholders stand for.
        results: what the module returns, in order; `output` is the first.
        nodes: the program's nodes, for errors.
    """

    module: fx.GraphModule
    values: list[Value]
    results: list[Value]
    nodes: list[fx.Node]

    @property
    def inputs(self) -> list[Value]:
        """Values of the placeholders."""
        return list(self.values)

    @property
    def outputs(self) -> list[Value]:
        """The results."""
        return list(self.results)


@dataclass
class Operations:
    """A program in the backend's terms.

    Attributes:
        inputs: the program's inputs in order.
        outputs: the program's outputs in order.
        operations: in an order in which they can run.
    """

    inputs: list[Value]
    outputs: list[Value]
    operations: list[Operation]
