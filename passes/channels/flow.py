"""What the channels of a program are: which of its tensors and weights share them, and where."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from shohin.passes.analyses.operators import WeightedOperation
from shohin.passes.channels.slots import Flags, Indices


@dataclass(frozen=True, eq=False)
class Channels:
    """The channels of one tensor.

    Attributes:
        axis: the axis they lie on, counted from the front.
        slots: slot of each, `[size of the axis]`; a slot may come more than once, as the pixels
            of a channel do after flattening.
        values: float64 `[size of the axis]`: what a channel is at every place and for every input,
            NaN where it depends on the input.
    """

    axis: int
    slots: Indices
    values: Tensor


@dataclass(frozen=True, eq=False)
class Cut:
    """An axis of a weight that goes with channels.

    Attributes:
        name: the weight.
        axis: the axis.
        slots: slot of each element along it.
        node: the node that reads the weight.
    """

    name: str
    axis: int
    slots: Indices
    node: fx.Node


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution without groups, or a linear map: it reads all its inputs for each output.

    Attributes:
        operation: its parts.
        inputs: slot of each column of its weight.
        outputs: slot of each row.
        values: float64, what each input always is, NaN where it varies.
        connected: bool `[rows, columns]`, where the weight is not zero.
        foldable: whether each input is a constant that the bias can take in exactly.
    """

    operation: WeightedOperation
    inputs: Indices
    outputs: Indices
    values: Tensor
    connected: Tensor
    foldable: Flags


@dataclass(frozen=True, eq=False)
class Pin:
    """Slots that have to stay.

    Attributes:
        slots: the slots.
        reason: why.
        detail: one sentence for people.
    """

    slots: Indices
    reason: str
    detail: str


@dataclass(frozen=True, eq=False)
class Edit:
    """Arguments of a node that say how many channels there are, or which.

    Attributes:
        node: the node.
        slots: the slots that they depend on.
        apply: changes them, given for each of all slots whether it stays.
    """

    node: fx.Node
    slots: Indices
    apply: Callable[[Flags], None]


@dataclass(frozen=True, eq=False)
class Flow:
    """The channels of a program.

    Attributes:
        channels: those of each node that gives a tensor with channels that are understood.
        layers: the layers that mix channels, in graph order.
        cuts: the axes of weights that go with channels.
        edits: the arguments that do.
        pins: the slots that have to stay.
        refusals: why a convolution or linear map was not understood.
        roots: for each slot the least one of those it stays or goes with.
    """

    channels: Mapping[fx.Node, Channels]
    layers: tuple[Layer, ...]
    cuts: tuple[Cut, ...]
    edits: tuple[Edit, ...]
    pins: tuple[Pin, ...]
    refusals: Mapping[fx.Node, tuple[str, str]]
    roots: Indices

    def sites(self) -> dict[fx.Node, list[Indices]]:
        """The slots that each node has to be changed for, when they are removed."""
        found: dict[fx.Node, list[Indices]] = {}
        changes: list[Cut | Edit] = [*self.cuts, *self.edits]
        for change in changes:
            found.setdefault(change.node, []).append(change.slots)
        return found
