"""Convolutions and linear maps alike, as one matrix times columns of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from shohin.errors import UnsupportedError
from shohin.passes.analyses.operators import WeightedOperation
from shohin.passes.patterns import argument

_aten = torch.ops.aten
_CONVOLUTIONS = frozenset({_aten.conv2d.default, _aten.conv2d.padding})


@dataclass(frozen=True)
class Unfolding:
    """How a layer's input becomes columns, each the inputs of one output position.

    The layer is ``weight.flatten(1) @ columns`` for each group of channels.

    Attributes:
        groups: number of groups.
        kernel: height and width; None for a linear map.
        stride: along height and width.
        dilation: along height and width.
        margins: zeros around the image: left, right, top, bottom.
    """

    groups: int = 1
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)

    def images(self, data: Tensor) -> Tensor:
        """Inputs with the examples along the first axis; for a linear map `[rows, inputs]`.

        A convolution's lone image without such an axis is the only example.
        """
        if self.kernel is None:
            return data.reshape(-1, data.shape[-1])
        return _batched(data)

    def columns(self, images: Tensor) -> Tensor:
        """Inputs as columns.

        Args:
            images: `[examples, channels, height, width]`, for a linear map `[rows, inputs]`.

        Returns:
            `[examples, channels * kernel height * kernel width, positions]`, for a linear map
            `[rows, inputs, 1]`.
        """
        if self.kernel is None:
            return images.unsqueeze(2)
        padded = functional.pad(images, self.margins) if any(self.margins) else images
        if self.kernel == (1, 1):
            return padded[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        return functional.unfold(padded, self.kernel, dilation=self.dilation, stride=self.stride)

    def responses(self, output: Tensor) -> Tensor:
        """Outputs as columns: `[examples, outputs, positions]`, for a linear map one position."""
        if self.kernel is None:
            return output.reshape(-1, output.shape[-1], 1)
        return _batched(output).flatten(2)

    def by_group(self, columns: Tensor, positions: Tensor | None) -> Tensor:
        """Columns of all examples side by side, one matrix for each group.

        Args:
            columns: `[examples, groups * rows, positions]`.
            positions: which positions to take; None for all.

        Returns:
            `[groups, rows, examples * positions]`.
        """
        chosen = columns if positions is None else columns[..., positions]
        examples, rows, count = chosen.shape
        grouped = chosen.reshape(examples, self.groups, rows // self.groups, count)
        return grouped.permute(1, 2, 0, 3).reshape(self.groups, rows // self.groups, -1)


def can_unfold(operation: WeightedOperation) -> bool:
    """Whether a layer is a two-dimensional convolution or a linear map."""
    return operation.linear or operation.node.target in _CONVOLUTIONS


def unfolding_of(operation: WeightedOperation, weight: Tensor) -> Unfolding:
    """How the input of a layer is unfolded.

    Raises:
        UnsupportedError: when it is neither a two-dimensional convolution nor a linear map.
    """
    node = operation.node
    if operation.linear:
        return Unfolding()
    if not can_unfold(operation):
        problem = f"expected conv2d or linear, got {node.target}"
        raise UnsupportedError(f"node '{node.name}'", problem, "exclude its weight")
    kernel, dilation = _pair(list(weight.shape[2:])), _pair(argument(node, "dilation"))
    margins = _margins(argument(node, "padding"), kernel, dilation)
    return Unfolding(operation.groups, kernel, _pair(argument(node, "stride")), dilation, margins)


def _batched(images: Tensor) -> Tensor:
    return images.unsqueeze(0) if images.dim() == 3 else images


def _pair(sizes: int | list[int]) -> tuple[int, int]:
    both = [sizes] if isinstance(sizes, int) else list(sizes)
    return (both[0], both[-1])


def _margins(
    padding: str | int | list[int], kernel: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    if padding == "valid":
        return (0, 0, 0, 0)
    if isinstance(padding, str):
        # "same": where the zeros cannot be split evenly the last side gets one more.
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return (width // 2, width - width // 2, height // 2, height - height // 2)
    height, width = _pair(padding)
    return (width, width, height, height)
