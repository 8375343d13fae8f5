"""Which channels have to stay: marked from the outputs of a program back to its inputs."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from shohin.passes.channels.flow import Flow, Layer, Pin
from shohin.passes.channels.slots import Flags, Indices
from shohin.passes.remarks import Reason

LIVE = ("live", "")
"""Cause of a channel that a layer reads and whose value is not the same for every input."""


@dataclass(frozen=True, eq=False)
class Marks:
    """What became of each slot.

    Attributes:
        kept: whether it stays.
        causes: position in `reasons` of why it does; -1 for one that goes.
        reasons: reason codes and details.
    """

    kept: Flags
    causes: Indices
    reasons: tuple[tuple[str, str], ...]

    def reason(self, slot: int) -> tuple[str, str]:
        """Why a slot stays."""
        return self.reasons[int(self.causes[slot])]


def mark(flow: Flow, further: tuple[Pin, ...] = ()) -> Marks:
    """Mark what stays, least first: pinned channels, and then all that they are computed from.

    A layer needs an input when it has a weight for it in a row that stays, unless the input is a
    constant that its bias can take in. Of every tensor and weight at least one channel stays.

    Args:
        flow: the channels of a program.
        further: slots that have to stay as well.
    """
    marker = _Marker(flow)
    for pin in (*further, *flow.pins):
        marker.keep(pin.slots, (pin.reason, pin.detail))
    marker.propagate()
    while marker.keep_a_last():
        marker.propagate()
    return marker.marks()


class _Marker:
    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._causes = np.full(len(flow.roots), -1, dtype=np.int64)
        self._reasons: dict[tuple[str, str], int] = {}
        self._seen = [np.zeros(len(layer.outputs), dtype=np.bool_) for layer in flow.layers]

    def keep(self, slots: Indices, reason: tuple[str, str]) -> None:
        """Keep slots, and those joined with them; the first reason counts."""
        index = self._reasons.setdefault(reason, len(self._reasons))
        roots = self._flow.roots[slots]
        self._causes[roots[self._causes[roots] < 0]] = index

    def propagate(self) -> None:
        """Keep what the rows that stay read, until nothing more has to stay."""
        order = range(len(self._flow.layers))
        # A list, for every layer is visited each time.
        while any(list(map(self._visit, reversed(order)))):
            pass

    def keep_a_last(self) -> bool:
        """Keep the first channel of a tensor or weight that would lose all of them, if any."""
        for slots in self._axes():
            if len(slots) and not self._kept(slots).any():
                self.keep(slots[:1], (str(Reason.TOO_SMALL), "the last channel stays"))
                return True
        return False

    def marks(self) -> Marks:
        """What was found."""
        causes = self._causes[self._flow.roots]
        return Marks(causes >= 0, causes, tuple(self._reasons))

    def _kept(self, slots: Indices) -> Flags:
        kept: Flags = self._causes[self._flow.roots[slots]] >= 0
        return kept

    def _axes(self) -> Iterator[Indices]:
        yield from (channels.slots for channels in self._flow.channels.values())
        yield from (cut.slots for cut in self._flow.cuts)

    def _visit(self, index: int) -> bool:
        """Keep what the newly kept rows of a layer read; whether there were any."""
        layer = self._flow.layers[index]
        rows = self._kept(layer.outputs) & ~self._seen[index]
        if not rows.any():
            return False
        self._seen[index] |= rows
        read = layer.connected[torch.from_numpy(rows)].any(0).numpy() & ~layer.foldable
        constant = read & ~layer.values.isnan().numpy()
        self.keep(layer.inputs[read & ~constant], LIVE)
        self.keep(layer.inputs[constant], _inexact(layer))
        return True


def _inexact(layer: Layer) -> tuple[str, str]:
    name = layer.operation.node.name
    detail = f"{name} pads with zeros beside channels of another constant value"
    return str(Reason.NOT_EXACT), detail
