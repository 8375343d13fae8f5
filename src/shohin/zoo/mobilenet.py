"""MobileNetV2, laid out as in torchvision."""

from torch import Tensor, nn
from torch.nn import functional

_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widening 1 x 1, depthwise 3 x 3 and linear narrowing 1 x 1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        widen = [_activated(in_channels, hidden, kernel=1)] if expansion != 1 else []
        self.use_shortcut = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *widen,
            _activated(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out: Tensor = self.conv(x)
        return x + out if self.use_shortcut else out


class MobileNetV2(nn.Module):
    """MobileNetV2 of width 1.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018.
    Input `[batch, 3, 224, 224]`, output `[batch, 1000]`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_activated(3, 32, kernel=3, stride=2)]
        in_channels = 32
        for expansion, channels, repeats, first_stride in _STAGES:
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                layers.append(InvertedResidual(in_channels, channels, stride, expansion))
                in_channels = channels
        layers.append(_activated(in_channels, 1280, kernel=1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        x = functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def _activated(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU6(),
    )
