import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shohin.ir import Program, capture

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compare a text with the golden file of the test; SHOHIN_UPDATE_GOLDENS=1 rewrites it."""

    def compare(text: str) -> None:
        path = GOLDENS / f"{request.node.name}.txt"
        if os.environ.get("SHOHIN_UPDATE_GOLDENS") == "1":
            path.write_text(text + "\n")
        assert path.exists(), f"{path.name} is missing: run with SHOHIN_UPDATE_GOLDENS=1"
        assert text + "\n" == path.read_text()

    return compare


class Residual(nn.Module):
    """Convolutions, batch norms, an in-place sum, dropout and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(image)))
        y = self.bn2(self.conv2(x))
        y += x
        y = self.relu(y).mean((2, 3)).view(y.shape[0], -1)
        return self.fc(self.dropout(y))


def make_residual() -> Residual:
    torch.manual_seed(0)
    model = Residual()
    for norm in (model.bn1, model.bn2):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


@pytest.fixture
def residual() -> Residual:
    return make_residual()


@pytest.fixture(scope="session")
def captured() -> Program:
    return capture(make_residual(), torch.ones(2, 3, 8, 8))


@pytest.fixture
def program(captured: Program) -> Program:
    """A captured program that a test may change."""
    return captured.copy()
