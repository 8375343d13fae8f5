"""A layer as a chain of smaller ones: what shapes there are, what they cost, what they compute.

A convolution `W` of `d` filters over `c` channels and ``h x w`` taps becomes

- ``channel``: ``h x w`` with `r` filters, then ``1 x 1`` with `d` (Zhang et al., arXiv 1505.06798,
  section 2.1);
- ``spatial``: ``h x 1`` with `s` filters, then ``1 x w`` with `d` (Jaderberg et al., arXiv
  1405.3866, scheme 2);
- ``3d``: ``h x 1`` with `s`, ``1 x w`` with `r`, ``1 x 1`` with `d` (Zhang et al., section 2.5);
- ``bottleneck``: ``1 x 1`` with `a` filters, ``h x w`` with `r`, ``1 x 1`` with `d` (a Tucker
  decomposition of the channels: Kim et al., arXiv 1511.06530).

A linear map becomes two linear maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Scheme: TypeAlias = Literal["channel", "spatial", "3d", "bottleneck"]

_SWEEPS = 3


@dataclass(frozen=True)
class Ranks:
    """How wide a chain is.

    Attributes:
        channel: filters before the last ``1 x 1``; None for no such step.
        spatial: filters of the ``h x 1``; None for no such step.
        inner: filters of the first ``1 x 1``; None for no such step.
    """

    channel: int | None = None
    spatial: int | None = None
    inner: int | None = None

    @property
    def split(self) -> bool:
        """Whether this is a chain at all, rather than the layer itself."""
        return self != Ranks()


@dataclass(frozen=True)
class Step:
    """One convolution, or linear map, of a chain.

    Attributes:
        outputs: its filters.
        inputs: its channels.
        rows: whether its filters have the height of the layer's; they have a height of 1 otherwise.
        columns: the same of the width.
    """

    outputs: int
    inputs: int
    rows: bool
    columns: bool

    def kernel(self, own: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its filters, those of the layer being `own`."""
        return (own[0] if self.rows else 1, own[1] if self.columns else 1)


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a layer, of which its costs follow.

    Attributes:
        outputs: filters, or outputs of a linear map.
        inputs: channels, or inputs of a linear map.
        kernel: height and width of a filter; (1, 1) for a linear map.
        positions: output positions at batch 1.
        columns_before: positions of the ``h x 1`` convolution, which has the output's rows and the
            input's columns.
        input_positions: positions of the input.
    """

    outputs: int
    inputs: int
    kernel: tuple[int, int]
    positions: int
    columns_before: int
    input_positions: int

    @property
    def is_spatial(self) -> bool:
        """Whether it can be split in height and width."""
        return min(self.kernel) > 1

    def steps(self, ranks: Ranks) -> list[Step]:
        """What a chain consists of, in the order in which it runs."""
        widths = [ranks.inner, ranks.spatial, ranks.channel]
        takes = [(False, False), (True, False), (ranks.spatial is None, True)]
        found, inputs = [], self.inputs
        for width, (rows, columns) in zip(widths, takes, strict=True):
            if width is not None:
                found.append(Step(width, inputs, rows, columns))
                inputs = width
        rows, columns = (False, False) if ranks.channel is not None else takes[2]
        return [*found, Step(self.outputs, inputs, rows, columns)]

    def full(self, ranks: Ranks) -> Ranks:
        """The most that each of the ranks can be, beside the others."""
        height, width = self.kernel
        inputs, taps = self.inputs, height * width
        spatial = inner = None
        if ranks.inner is not None:
            inner = min(inputs, self.outputs * taps)
            inputs = ranks.inner
        if ranks.spatial is not None:
            spatial = min(inputs * height, self.outputs * width)
            inputs, taps = ranks.spatial, width
        channel = None if ranks.channel is None else min(self.outputs, inputs * taps)
        return Ranks(channel, spatial, inner)

    def text(self, ranks: Ranks) -> str:
        """Ranks beside the most that they can be, e.g. ``spatial rank 24 of 96, rank 48 of 64``."""
        full = self.full(ranks)
        parts = []
        if ranks.inner is not None:
            parts.append(f"inner rank {ranks.inner} of {full.inner}")
        if ranks.spatial is not None:
            parts.append(f"spatial rank {ranks.spatial} of {full.spatial}")
        if ranks.channel is not None:
            parts.append(f"rank {ranks.channel} of {full.channel}")
        return ", ".join(parts) or "as it was"

    def weights(self, ranks: Ranks) -> int:
        """Elements of the weights of a chain, biases left out."""
        return sum(self._weights(step) for step in self.steps(ranks))

    def macs(self, ranks: Ranks) -> int:
        """Multiply-accumulates of a chain."""
        total, rows, columns = 0, False, False
        for step in self.steps(ranks):
            rows, columns = rows or step.rows, columns or step.columns
            before = self.columns_before if rows else self.input_positions
            total += self._weights(step) * (self.positions if columns else before)
        return total

    def _weights(self, step: Step) -> int:
        return step.outputs * step.inputs * math.prod(step.kernel(self.kernel))


@dataclass(frozen=True, eq=False)
class Chain:
    """The weights of a chain, in the order in which they run.

    Attributes:
        weights: each `[outputs, inputs, height, width]`, or `[outputs, inputs]` of a linear map.
        bias: of the last, `[outputs]`; None where there is none.
        steps: what each weight is of.
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    steps: tuple[Step, ...]


def balanced(weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same chain with channels between two layers scaled, so that both sides have equal norms.

    Chains of very different norms compute the same but cannot be trained at one learning rate.

    Args:
        weights: of the chain, each `[outputs, inputs, ...]`.
    """
    chain = [*weights]
    # A middle layer has two sides: what balances one of them moves the other.
    for place in [*range(len(chain) - 1)] * _SWEEPS:
        before, after = chain[place], chain[place + 1]
        left, right = before.flatten(1).norm(dim=1), after.transpose(0, 1).flatten(1).norm(dim=1)
        usable = (left > 0) & (right > 0)
        scale = torch.where(usable, right / torch.where(usable, left, 1.0), 1.0).sqrt()
        chain[place] = before * scale.view(-1, *[1] * (before.dim() - 1))
        chain[place + 1] = after / scale.view(1, -1, *[1] * (after.dim() - 2))
    return tuple(chain)


def vertical_matrix(weight: Tensor) -> Tensor:
    """A weight `[n, c, h, w]` as the matrix `[c * h, w * n]` whose rank is that of ``h x 1``."""
    outputs, inputs, height, width = weight.shape
    return weight.permute(1, 2, 3, 0).reshape(inputs * height, width * outputs)


def inner_matrix(weight: Tensor) -> Tensor:
    """A weight `[n, c, h, w]` as the matrix `[c, h * w * n]`, of the rank of a first ``1 x 1``."""
    return weight.permute(1, 2, 3, 0).flatten(1)


def horizontal_weight(matrix: Tensor, width: int) -> Tensor:
    """A matrix `[s, w * n]` as the weight `[n, s, 1, w]` of a ``1 x w`` convolution."""
    rank = matrix.shape[0]
    return matrix.reshape(rank, width, -1).permute(2, 0, 1).unsqueeze(2)


def windowed_weight(matrix: Tensor, kernel: tuple[int, int]) -> Tensor:
    """A matrix `[a, h * w * n]` as the weight `[n, a, h, w]` of a convolution."""
    return matrix.reshape(len(matrix), *kernel, -1).permute(3, 0, 1, 2)
