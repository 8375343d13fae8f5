"""LeNet-300-100 and LeNet-5 for 28 x 28 digits."""

from torch import Tensor, nn
from torch.nn import functional


class LeNet300100(nn.Module):
    """Fully connected net with hidden layers of 300 and 100 units.

    LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    Input `[batch, 784]`, output `[batch, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ip1 = nn.Linear(784, 300)
        self.ip2 = nn.Linear(300, 100)
        self.ip3 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify flattened images."""
        x = functional.relu(self.ip1(x))
        x = functional.relu(self.ip2(x))
        logits: Tensor = self.ip3(x)
        return logits


class LeNet5(nn.Module):
    """LeNet-5 in the form that ships with Caffe: no ReLU after the convolutions.

    LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998.
    Input `[batch, 1, 28, 28]`, output `[batch, 10]`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, kernel_size=5)
        self.conv2 = nn.Conv2d(20, 50, kernel_size=5)
        self.ip1 = nn.Linear(800, 500)
        self.ip2 = nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Classify single-channel images."""
        x = functional.max_pool2d(self.conv1(x), 2)
        x = functional.max_pool2d(self.conv2(x), 2)
        x = functional.relu(self.ip1(x.flatten(1)))
        logits: Tensor = self.ip2(x)
        return logits
