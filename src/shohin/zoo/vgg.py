"""VGG networks: VGG-9 with batch normalisation for CIFAR-10, VGG-16 for ImageNet."""

from torch import Tensor, nn

_VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG9(nn.Module):
    """Six 3 x 3 convolutions without bias, each with batch normalisation, and two linear layers.

    After Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2015. Input `[batch, 3, 32, 32]`, output `[batch, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in (64, 128, 256):
            layers += [*_normalised(channels, width), *_normalised(width, width), nn.MaxPool2d(2)]
            channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(4096, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        logits: Tensor = self.classifier(self.features(x))
        return logits


class VGG16(nn.Module):
    """VGG-16 (configuration D), laid out as in torchvision.

    Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", 2015. Input `[batch, 3, 224, 224]`, output `[batch, 1000]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg16_features()
        self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, 1000),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def vgg16_features() -> nn.Sequential:
    """The thirteen convolutions of VGG-16 with their ReLUs and pools, indexed as in torchvision."""
    layers: list[nn.Module] = []
    channels = 3
    for widths in _VGG16_WIDTHS:
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _normalised(in_channels: int, channels: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
