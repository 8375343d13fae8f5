"""AlexNet in torchvision's form and in the original form with groups and normalisation."""

from torch import Tensor, nn
from torch.nn import functional


class AlexNet(nn.Module):
    """AlexNet without groups or response normalisation, laid out as in torchvision.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.
    Input `[batch, 3, 224, 224]`, output `[batch, 1000]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, 1000),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        x = self.avgpool(self.features(x))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


class AlexNetLRN(nn.Module):
    """The original AlexNet: two groups in conv2, conv4 and conv5, local response normalisation.

    Krizhevsky et al., "ImageNet Classification with Deep Convolutional Neural Networks", 2012.
    Layer names as in Caffe. Input `[batch, 3, 227, 227]`, output `[batch, 1000]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        # The paper's alpha of 1e-4 multiplies the sum over the window; PyTorch's the mean.
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Classify RGB images."""
        x = self.pool(self.norm(functional.relu(self.conv1(x))))
        x = self.pool(self.norm(functional.relu(self.conv2(x))))
        x = functional.relu(self.conv4(functional.relu(self.conv3(x))))
        x = self.pool(functional.relu(self.conv5(x))).flatten(1)
        x = self.dropout(functional.relu(self.fc6(x)))
        x = self.dropout(functional.relu(self.fc7(x)))
        logits: Tensor = self.fc8(x)
        return logits
