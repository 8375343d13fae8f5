"""Frames of planes: as wide as those who read them need, and filled where they do."""

import random
from typing import Any

import pytest
import torch
from small_nets import net
from sparse_nets import check_pruned, kernel_names
from torch import Tensor, nn


def _unpadded_reader(s: Any, x: Tensor) -> Tensor:
    first = s.a(x)
    result: Tensor = s.d(s.c(s.b(first)) + first)
    return result


_READERS = {
    "no padding": nn.Conv2d(6, 5, 3),
    "dilation without padding": nn.Conv2d(6, 5, 2, dilation=2),
    "padding above only": nn.Conv2d(6, 5, 3, padding=(1, 0)),
}
"""Each reads two pixels beyond a tile, and cuts an image of 12 x 12 in the tiles of a residual."""


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("reader", _READERS)
def test_frames_that_only_a_residual_asked_for(reader: str) -> None:
    module = net(
        _unpadded_reader,
        a=nn.Conv2d(3, 6, 3, padding=1),
        b=nn.Conv2d(6, 6, 5, padding=2),
        c=nn.Conv2d(6, 6, 1),
        d=_READERS[reader],
    )
    program = check_pruned(module, (3, 12, 12), batch=2)
    names = kernel_names(program, 2)
    assert names.count("sparse_conv2d") == 4
    assert names.count("to_planes") == 1


@pytest.mark.usefixtures("always_sparse")
def test_frames_that_nobody_reads_are_not_filled() -> None:
    module = net(
        _unpadded_reader,
        a=nn.Conv2d(3, 6, 3, padding=1),
        b=nn.Conv2d(6, 6, 5, padding=2),
        c=nn.Conv2d(6, 6, 1),
        d=nn.Conv2d(6, 5, 1),
    )
    assert kernel_names(check_pruned(module, (3, 12, 12), batch=1), 1) == [
        "to_planes",
        "sparse_conv2d",
        "exchange",
        "sparse_conv2d",
        "sparse_conv2d",
        "sparse_conv2d",
        "from_planes",
    ]


@pytest.mark.usefixtures("always_sparse")
def test_readers_of_the_same_step_share_planes() -> None:
    module = net(
        lambda s, x: s.a(x) + s.b(x),
        a=nn.Conv2d(6, 7, 1, stride=2),
        b=nn.Conv2d(6, 7, 3, stride=2, padding=1),
    )
    names = kernel_names(check_pruned(module, (6, 12, 12), batch=2), 2)
    assert names.count("sparse_conv2d") == 2
    assert names.count("to_planes") == 1


class _Graph(nn.Module):
    """Convolutions of earlier images, added to or joined with others of their size."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        sizes = [choose.choice([(12, 12), (20, 20), (28, 28), (19, 12)])]
        self.size, self.channels = sizes[0], [4]
        self.layers = nn.ModuleList()
        self.ways: list[tuple[int, str, int]] = []
        while len(self.layers) < 7:
            source = max(0, len(sizes) - choose.choice([1, 1, 2, 3]))
            layer = _convolution(choose, self.channels[source])
            size = _output_size(layer, sizes[source])
            if min(size) < 3:
                continue
            filters = layer.out_channels
            alike = [i for i, other in enumerate(sizes) if other == size and self.channels[i] == 6]
            way = choose.choice(["add", "add", "add", "join", "alone"]) if alike else "alone"
            way = "alone" if filters != 6 else way
            alike += [source] * (source in alike) * 3
            other = choose.choice(alike) if way != "alone" else -1
            self.layers.append(layer)
            self.ways.append((source, way, other))
            sizes.append(size)
            self.channels.append(12 if way == "join" else filters)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        images = [x]
        for layer, (source, way, other) in zip(self.layers, self.ways, strict=True):
            y = layer(images[source])
            if way == "add":
                y = torch.relu(y + images[other])
            elif way == "join":
                y = torch.cat([y, images[other]], 1)
            images.append(y)
        read = {index for source, _, other in self.ways for index in (source, other)}
        return tuple(image for i, image in enumerate(images) if i not in read)


def _convolution(choose: random.Random, channels: int) -> nn.Conv2d:
    kernel = choose.choice([(1, 1), (3, 3), (3, 3), (5, 5), (2, 2), (3, 1), (2, 5)])
    dilation = choose.choice([1, 1, 1, 2])
    same = tuple(dilation * (size // 2) for size in kernel)
    padding = choose.choice([same, same, same, (0, 0), (0, 0), (1, 0), (0, 2)])
    filters = choose.choice([6, 6, 6, 6, 9])
    groups = 2 if channels % 2 + filters % 2 == 0 and choose.random() < 0.1 else 1
    stride = choose.choice([(1, 1)] * 6 + [(2, 2), (1, 2)])
    return nn.Conv2d(channels, filters, kernel, stride, padding, dilation, groups)


def _output_size(layer: nn.Conv2d, size: tuple[int, ...]) -> tuple[int, ...]:
    reach = [
        length + 2 * int(padding) - dilation * (kernel - 1) - 1
        for length, padding, dilation, kernel in zip(
            size, layer.padding, layer.dilation, layer.kernel_size, strict=True
        )
    ]
    return tuple(r // s + 1 if r >= 0 else 0 for r, s in zip(reach, layer.stride, strict=True))


@pytest.mark.usefixtures("always_sparse")
@pytest.mark.parametrize("seed", range(28, 44))
def test_random_graphs(seed: int) -> None:
    # In 39 an image has its frame from a residual alone, and is read by what needs it.
    graph = _Graph(seed)
    module = net(lambda s, x: s.images(x), images=graph)
    check_pruned(module, (4, *graph.size), batch=1 + seed % 2, density=0.15)
