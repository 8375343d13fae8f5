"""Residual networks for CIFAR-10 with parameter-free shortcuts."""

from torch import Tensor, nn
from torch.nn import functional


class OptionAShortcut(nn.Module):
    """Take every second pixel and pad with zero channels on both sides."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Map `[batch, c, h, w]` to `[batch, c + 2 * padding, h / 2, w / 2]`."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarBasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = OptionAShortcut((channels - in_channels) // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return functional.relu(out)


class CifarResNet(nn.Module):
    """ResNet of `6 * blocks + 2` layers: three stages of 16, 32 and 64 channels.

    He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2, option A.
    Parameter names as in akamaster/pytorch_resnet_cifar10.
    Input `[batch, 3, 32, 32]`, output `[batch, 10]`.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = functional.avg_pool2d(x, x.shape[3]).flatten(1)
        logits: Tensor = self.linear(x)
        return logits


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = CifarBasicBlock(in_channels, channels, stride)
    rest = [CifarBasicBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)
