from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shohin import zoo


def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int]:
    """Images whose label ranks first, and among the first five."""
    with torch.no_grad():
        ranked = torch.cat([model(part).topk(5).indices for part in torch.split(images, 250)])
    hits = ranked == labels[:, None]
    return int(hits[:, 0].sum()), int(hits.any(1).sum())


# Whole sets where quick, else evenly spaced images. The counts on whole sets give the published
# accuracies, such as 99.09 % for LeNet-5 and 91.72 % for ResNet-20.
@pytest.mark.parametrize(
    ("name", "limit", "first", "five"),
    [
        ("lenet-300-100", 10_000, 9772, 9998),
        ("lenet-5", 10_000, 9909, 10_000),
        ("resnet-20", 761, 698, 761),
        ("resnet-32", 761, 709, 761),
        ("resnet-20-cifar10jpeg", 2000, 1755, 1992),
        ("resnet-32-cifar10jpeg", 1000, 870, 992),
        ("vgg-9", 1000, 853, 995),
        ("squeezenet-1.1", 250, 129, 195),
    ],
)
def test_pretrained_accuracy(name: str, limit: int, first: int, five: int, data: Path) -> None:
    images, labels = zoo.evaluation_set(name, data, limit)
    assert len(labels) == limit
    measured = _correct(zoo.pretrained(name, data), images, labels)
    # Rounding may flip an image that lies on the border of two classes.
    assert measured == pytest.approx((first, five), abs=2)


def test_vgg16_head_is_the_start_of_vgg16(data: Path) -> None:
    head = zoo.vgg16_head_convs(data)
    convolutions = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 256, 256, 256]
    with torch.no_grad():
        output = head(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert output.shape == (1, 256, 8, 8)
    assert output.min() >= 0
    assert output.max() > 0
