"""SqueezeNet 1.0 and 1.1, laid out as in torchvision."""

import torch
from torch import Tensor, nn


class Fire(nn.Module):
    """A 1 x 1 squeeze followed by concatenated 1 x 1 and 3 x 3 expansions."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.squeeze_activation = nn.ReLU()
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand1x1_activation = nn.ReLU()
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)
        self.expand3x3_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, in_channels, h, w]` to `[batch, 2 * expand, h, w]`."""
        x = self.squeeze_activation(self.squeeze(x))
        narrow = self.expand1x1_activation(self.expand1x1(x))
        wide = self.expand3x3_activation(self.expand3x3(x))
        return torch.cat([narrow, wide], 1)


class SqueezeNet(nn.Module):
    """Fire modules between ceil-mode pools, a 1 x 1 classifier and global averaging.

    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", 2016.
    Input `[batch, 3, 227, 227]`, output `[batch, 1000]` (non-negative, as a ReLU precedes
    the average).
    """

    def __init__(self, features: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.classifier = nn.Sequential(
            nn.Dropout(0.5), nn.Conv2d(512, 1000, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify images."""
        x = self.classifier(self.features(x))
        return x.flatten(1)


def squeezenet_1_0() -> SqueezeNet:
    """Version 1.0: a 7 x 7 first convolution with 96 channels, and later pools."""
    return SqueezeNet(
        nn.Sequential(
            nn.Conv2d(3, 96, 7, stride=2),
            nn.ReLU(),
            _pool(),
            Fire(96, 16, 64),
            Fire(128, 16, 64),
            Fire(128, 32, 128),
            _pool(),
            Fire(256, 32, 128),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            _pool(),
            Fire(512, 64, 256),
        )
    )


def squeezenet_1_1() -> SqueezeNet:
    """Version 1.1: a 3 x 3 first convolution with 64 channels, and earlier pools."""
    return SqueezeNet(
        nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            _pool(),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            _pool(),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            _pool(),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
    )


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(3, stride=2, ceil_mode=True)
