"""How long each intermediate tensor must be kept, and the memory that takes."""

from dataclasses import dataclass

from torch import fx

from shohin.ir.program import Program
from shohin.passes.analyses.shapes import Shapes, shapes


@dataclass(frozen=True)
class LiveRange:
    """A block of memory and the steps during which it is needed.

    Attributes:
        members: names of the nodes whose tensors lie in the block, the base first, then its views.
        first: step that writes the block.
        last: last step that reads it; the last step of all for what the program gives back.
        bytes: size of the block.
    """

    members: tuple[str, ...]
    first: int
    last: int
    bytes: int


@dataclass(frozen=True)
class Liveness:
    """Live ranges of the intermediate tensors at batch 1, weights left out.

    A step is a position in the graph's order. Inputs are live from their placeholder on.

    Attributes:
        schedule: the node name of each step.
        ranges: one per block of memory, in the order in which they are written.
        bytes_at: bytes live during each step, arguments and results of the step included.
    """

    schedule: tuple[str, ...]
    ranges: tuple[LiveRange, ...]
    bytes_at: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are live at once."""
        return max(self.bytes_at, default=0)

    @property
    def peak_node(self) -> str:
        """The first node during which the peak is reached; empty for an empty program."""
        return self.schedule[self.bytes_at.index(self.peak_bytes)] if self.schedule else ""

    def range_of(self, name: str) -> LiveRange:
        """The first live range with a tensor of the node.

        Raises:
            KeyError: when the node gives no intermediate tensor.
        """
        for live in self.ranges:
            if name in live.members:
                return live
        raise KeyError(f"node '{name}' gives no intermediate tensor")


def liveness(program: Program) -> Liveness:
    """Live ranges in the graph's order at batch 1."""
    layouts = shapes(program)
    nodes = list(program.graph.nodes)
    steps = {node: step for step, node in enumerate(nodes)}
    blocks = _blocks(nodes, layouts)
    ranges = [_live_range(members, size, steps) for members, size in blocks.values()]
    return Liveness(
        tuple(node.name for node in nodes),
        tuple(ranges),
        _bytes_at(ranges, len(nodes)),
    )


def _blocks(nodes: list[fx.Node], layouts: Shapes) -> dict[int, tuple[list[fx.Node], int]]:
    """The nodes in each block of memory with its size, blocks of weights left out."""
    blocks: dict[int, tuple[list[fx.Node], int]] = {}
    weights: set[int] = set()
    for node in nodes:
        if node.op == "output":
            continue
        for layout in layouts.tensors[node.name]:
            members, _ = blocks.setdefault(layout.storage, ([], layout.storage_bytes))
            members.append(node)
            if node.op == "get_attr":
                weights.add(layout.storage)
    return {storage: block for storage, block in blocks.items() if storage not in weights}


def _live_range(members: list[fx.Node], size: int, steps: dict[fx.Node, int]) -> LiveRange:
    names = tuple(dict.fromkeys(node.name for node in members))
    uses = [steps[user] for node in members for user in node.users]
    return LiveRange(names, steps[members[0]], max(uses, default=steps[members[-1]]), size)


def _bytes_at(ranges: list[LiveRange], steps: int) -> tuple[int, ...]:
    changes = [0] * (steps + 1)
    for live in ranges:
        changes[live.first] += live.bytes
        changes[live.last + 1] -= live.bytes
    total, sums = 0, []
    for change in changes[:steps]:
        total += change
        sums.append(total)
    return tuple(sums)
