"""Taking channels out of a program: weights, their encodings, and the arguments of operators."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, fx

from shohin.ir.encodings import Dense, Encoding, Sparse
from shohin.ir.gaps import best_gap_bits
from shohin.ir.program import Program, make_owner, readers, set_tensor, tensor_of, weight_names
from shohin.passes.channels.arguments import set_argument
from shohin.passes.channels.flow import Cut, Flow, Layer
from shohin.passes.channels.layers import as_matrix
from shohin.passes.channels.slots import Flags
from shohin.passes.patterns import Rewriter

_STALE = ("val", "tensor_meta")


def remove_channels(
    program: Program, flow: Flow, kept: Flags, made_by: str
) -> tuple[dict[str, Encoding], dict[fx.Node, int]]:
    """Take channels out of a program, in place; constants go on into biases.

    Args:
        program: the program.
        flow: its channels.
        kept: for each slot whether it stays.
        made_by: the pass on whose behalf biases are added.

    Returns:
        The encodings of what is left, and how many constants the bias of a node took in.
    """
    surgeon = _Surgeon(program, made_by)
    folded = {layer.operation.node: surgeon.fold(layer, kept) for layer in flow.layers}
    surgeon.cut(flow.cuts, kept)
    for edit in flow.edits:
        if not kept[edit.slots].all():
            edit.apply(kept)
    for node, channels in flow.channels.items():
        if not kept[channels.slots].all():
            # What export noted about the tensor holds no longer.
            node.meta = {key: value for key, value in node.meta.items() if key not in _STALE}
    program.graph.lint()
    program.module.recompile()
    return surgeon.encodings, {node: count for node, count in folded.items() if count}


class _Surgeon:
    def __init__(self, program: Program, made_by: str) -> None:
        self.encodings: dict[str, Encoding] = dict(program.encodings)
        self._program = program
        self._rewriter = Rewriter(program, made_by)
        self._added: list[Cut] = []
        self._aliases = _aliases(program)

    def fold(self, layer: Layer, kept: Flags) -> int:
        """Add to a bias what removed constants give; the number of such constants."""
        values = layer.values.nan_to_num()
        gone = torch.from_numpy(~kept[layer.inputs]) & (values != 0)
        if not bool(gone.any()):
            return 0
        rows = torch.from_numpy(kept[layer.outputs])
        matrix = as_matrix(layer.operation, self._tensor(layer.operation.weight))
        read = matrix[:, gone][rows].double().sum(2)
        reached = (matrix[:, gone][rows] != 0).any(2)
        if not bool(reached.any()):
            return 0
        added = torch.zeros(len(rows), dtype=torch.float64)
        added[rows] = read @ values[gone]
        self._add_to_bias(layer, added)
        return int(reached.any(0).sum())

    def cut(self, cuts: Iterable[Cut], kept: Flags) -> None:
        """Take the elements of removed channels out of weights."""
        by_name: dict[str, dict[int, Flags]] = {}
        for cut in (*cuts, *self._added):
            by_name.setdefault(cut.name, {})[cut.axis] = kept[cut.slots]
        for name, axes in by_name.items():
            if not all(flags.all() for flags in axes.values()):
                self._shrink(name, axes)

    def _tensor(self, reader: fx.Node) -> Tensor:
        return tensor_of(self._program.module, str(reader.target)).detach()

    def _add_to_bias(self, layer: Layer, added: Tensor) -> None:
        operation = layer.operation
        node, weight = operation.node, self._tensor(operation.weight)
        old = operation.bias
        start = torch.zeros_like(added) if old is None else self._tensor(old).double()
        value = (start + added).to(weight.dtype)
        if old is not None and set(self._readers_of(old)) == {node}:
            self._store(str(old.target), value)
            return
        owner, _, leaf = str(operation.weight.target).rpartition(".")
        stem = str(old.target) if old is not None else f"{owner}.bias" if owner else f"{leaf}_bias"
        bias = self._rewriter.add_weight(stem, value, replaces=node)
        set_argument(node, "bias", bias)
        self._added.append(Cut(str(bias.target), 0, layer.outputs, node))
        if old is not None and not old.users:
            self._rewriter.erase(old)

    def _readers_of(self, reader: fx.Node) -> list[fx.Node]:
        names = self._aliases[str(reader.target)]
        return [node for name in names for node in readers(self._program, name)]

    def _shrink(self, name: str, axes: dict[int, Flags]) -> None:
        tensor = tensor_of(self._program.module, name).detach()
        self._store(name, _select(tensor, axes), axes)

    def _store(self, name: str, value: Tensor, axes: dict[int, Flags] | None = None) -> None:
        """Give a weight, under all of its names, another value, and its encoding with it."""
        module, names = self._program.module, self._aliases.get(name, [name])
        trained = tensor_of(module, name).requires_grad
        set_tensor(module, name, value)
        shared = tensor_of(module, name).requires_grad_(trained)
        for alias in names:
            owner, leaf = make_owner(module, alias)
            setattr(owner, leaf, shared)
            if alias in self.encodings:
                self.encodings[alias] = _encode(self.encodings[alias], shared.detach(), axes or {})


def _aliases(program: Program) -> dict[str, list[str]]:
    """For each weight every name of its tensor that the graph reads, its own included."""
    same: dict[int, list[str]] = {}
    names = weight_names(program)
    for name in names:
        same.setdefault(id(tensor_of(program.module, name)), []).append(name)
    return {name: same[id(tensor_of(program.module, name))] for name in names}


def _select(tensor: Tensor, axes: dict[int, Flags]) -> Tensor:
    """The part of a tensor under flags for some of its axes."""
    for axis, flags in axes.items():
        tensor = tensor.index_select(axis, torch.from_numpy(np.flatnonzero(flags)))
    return tensor.contiguous()


def _encode(held: Encoding, value: Tensor, axes: dict[int, Flags]) -> Encoding:
    """The encoding of what is left of a weight.

    The width of a sparse weight's gaps stays, unless it was the one that needs the fewest bits;
    then it is that again.
    """
    if not isinstance(held, Sparse):
        return Dense(value)
    mask = _select(held.mask, axes)
    was_best = held.gap_bits == best_gap_bits(held.mask)
    return Sparse.from_dense(value, mask, None if was_best else held.gap_bits)
