"""What the handlers of operators read and record while channels are traced through a graph."""

import torch
from torch import Tensor, fx

from shohin.ir.encodings import Dense, Sparse
from shohin.ir.program import Program, is_tensor_name, readers, tensor_of, weight_names
from shohin.passes.analyses.shapes import Shapes, shapes_at
from shohin.passes.channels.flow import Channels, Cut, Edit, Flow, Layer, Pin
from shohin.passes.channels.slots import Indices, Slots
from shohin.passes.patterns import NoMatch, weight_name
from shohin.passes.remarks import Reason

# A batch size that no other axis is likely to have, so that shapes tell the batch axis.
_BATCH = 13


class Tracer:
    """Collects the flow of channels of one program.

    Args:
        program: the program; it is not changed.

    Attributes:
        slots: the slots given out so far.
        channels: the channels of each node visited so far, where they are understood.
        refusals: why a convolution or linear map was not understood.
    """

    def __init__(self, program: Program) -> None:
        self.slots = Slots()
        self.channels: dict[fx.Node, Channels] = {}
        self.refusals: dict[fx.Node, tuple[str, str]] = {}
        self._program = program
        self._layouts: Shapes = shapes_at(program, _BATCH)
        self._layers: list[Layer] = []
        self._cuts: list[Cut] = []
        self._edits: list[Edit] = []
        self._pins: list[Pin] = []
        self._canonical = _canonical_names(program)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Sizes of a node's only tensor; empty where it gives none or several."""
        found = self._layouts.tensors.get(node.name, ())
        return found[0].shape if len(found) == 1 else ()

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """Element type of a node's only tensor."""
        found = self._layouts.tensors.get(node.name, ())
        return found[0].dtype if len(found) == 1 else None

    def tracked(self, node: fx.Node) -> list[fx.Node]:
        """The arguments of a node whose channels are understood."""
        return [source for source in node.all_input_nodes if source in self.channels]

    def weight(self, reader: fx.Node) -> Tensor:
        """The weight that a ``get_attr`` node reads, in its own type."""
        return tensor_of(self._program.module, str(reader.target)).detach()

    def obstacle(self, reader: fx.Node | None, *, sparse: bool = False) -> NoMatch | None:
        """Why a weight cannot be cut, or None.

        Args:
            reader: the node that gives the weight; None for no weight.
            sparse: whether a sparse weight of plain values can be cut as well.
        """
        if reader is None:
            return None
        name = weight_name(reader)
        if name is None:
            return NoMatch(Reason.NOT_CONSTANT, f"{reader.name} is no weight of the program")
        held = self._program.encodings.get(name, None)
        values = held.values if sparse and isinstance(held, Sparse) else held
        if values is not None and not isinstance(values, Dense):
            return NoMatch(Reason.ALREADY_ENCODED, f"{name} is stored as {values.describe()}")
        if not bool(torch.isfinite(self.weight(reader)).all()):
            return NoMatch(Reason.NOT_FINITE, f"{name} has elements that are NaN or infinite")
        return None

    def cut(self, reader: fx.Node, axis: int, slots: Indices, node: fx.Node) -> None:
        """Record that an axis of a weight goes with channels; a shared one with those of all."""
        name = self._canonical[str(reader.target)]
        known = next((cut for cut in self._cuts if (cut.name, cut.axis) == (name, axis)), None)
        if known is not None:
            self.slots.join(known.slots, slots)
        self._cuts.append(Cut(name, axis, slots, node))

    def pin(self, slots: Indices, reason: str, detail: str) -> None:
        """Record that slots have to stay."""
        self._pins.append(Pin(slots, str(reason), detail))

    def edit(self, edit: Edit) -> None:
        """Record that arguments of a node depend on slots."""
        self._edits.append(edit)

    def add_layer(self, layer: Layer) -> None:
        """Record a layer that mixes channels."""
        self._layers.append(layer)

    def flow(self) -> Flow:
        """What was collected."""
        self._pin_foreign_weights()
        return Flow(
            self.channels,
            tuple(self._layers),
            tuple(self._cuts),
            tuple(self._edits),
            tuple(self._pins),
            self.refusals,
            self.slots.roots(),
        )

    def _pin_foreign_weights(self) -> None:
        """Keep weights whole that also nodes read for which no cut is known."""
        known: dict[str, set[fx.Node]] = {}
        for cut in self._cuts:
            known.setdefault(cut.name, set()).add(cut.node)
        foreign: dict[str, fx.Node] = {}
        for alias, name in self._canonical.items():
            for node in readers(self._program, alias):
                if name in known and node not in known[name]:
                    foreign.setdefault(name, node)
        for cut in self._cuts:
            if cut.name in foreign:
                detail = f"{cut.name} is also read by {foreign[cut.name].name}"
                self.pin(cut.slots, Reason.OTHER_USERS, detail)


def _canonical_names(program: Program) -> dict[str, str]:
    """For each weight the first name of the same tensor."""
    first: dict[int, str] = {}
    names = [name for name in weight_names(program) if is_tensor_name(program.module, name)]
    return {name: first.setdefault(id(tensor_of(program.module, name)), name) for name in names}
