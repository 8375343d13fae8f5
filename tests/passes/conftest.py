"""What the tests of passes share: golden texts, running one pass, random networks."""

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shohin.ir.printer import format_program
from shohin.ir.program import Program
from shohin.ir.verifier import verify
from shohin.passes.base import Context, Pass
from shohin.passes.remarks import Remark

sys.path.insert(0, str(Path(__file__).parent))

_GOLDENS = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Applied:
    """One pass applied to one program."""

    program: Program
    modified: bool
    remarks: list[Remark]

    def reason(self, node: str) -> str:
        """The reason of the only remark on a node."""
        (remark,) = (remark for remark in self.remarks if remark.node == node)
        return remark.reason

    def reasons(self) -> set[str]:
        """The reasons of all remarks."""
        return {remark.reason for remark in self.remarks}


@pytest.fixture(scope="session")
def apply() -> Callable[..., Applied]:
    """Apply a pass to a copy of a program and verify the result."""

    def run(chosen: Pass, program: Program, allows: Callable[[str], bool] | None = None) -> Applied:
        context = Context(pass_name=chosen.name, site_filter=allows)
        chosen.validate()
        result = chosen.run(program.copy(), context)
        verify(result.program, after=chosen.name)
        return Applied(result.program, result.modified, context.remarks)

    return run


@pytest.fixture(scope="session")
def golden() -> Callable[[str, Program, Program], None]:
    """Compare a program before and after a pass with a stored text.

    Set SHOHIN_UPDATE_GOLDENS=1 to write the texts anew.
    """

    def compare(name: str, before: Program, after: Program) -> None:
        path = _GOLDENS / f"{name}.txt"
        texts = [format_program(program).rstrip() for program in (before, after)]
        found = f"{texts[0]}\n\n==== after ====\n\n{texts[1]}\n"
        if os.environ.get("SHOHIN_UPDATE_GOLDENS"):
            path.write_text(found)
        assert found == path.read_text()

    return compare


class RandomNetwork(nn.Module):
    """A few random layers on `[batch, 4, 6, 6]`, some of them with a shortcut, then a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        makers = [_convolution, _normalised, _separable, _transposed, _dropped, _scaled, _pooled]
        self.blocks = nn.ModuleList(choose.choice(makers)() for _ in range(choose.randint(1, 4)))
        self.shortcuts = [choose.random() < 0.4 for _ in self.blocks]
        self.register_buffer("gain", torch.rand(4, 1, 1))
        self.use_gain = choose.random() < 0.5
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = block(x) + x if shortcut else block(x)
        scaled = x * self.gain.exp().mul(0.5) if self.use_gain else x
        head: Tensor = self.head(scaled)
        return head


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


def _normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def _separable() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
    )


def _transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4))


def _dropped() -> nn.Module:
    return nn.Sequential(nn.Dropout(), nn.Identity(), nn.MaxPool2d(1))


def _scaled() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))


def _pooled() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(3, stride=1, padding=1), nn.AdaptiveAvgPool2d(6))


@pytest.fixture(scope="session")
def random_statistics() -> Callable[[nn.Module, int], nn.Module]:
    """Give every batch normalisation of a module random statistics and switch to inference."""

    def fill(module: nn.Module, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        for norm in (one for one in module.modules() if isinstance(one, kinds)):
            if norm.running_mean is not None and norm.running_var is not None:
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, -2.0, 2.0)
                nn.init.normal_(norm.bias)
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def random_network(
    random_statistics: Callable[[nn.Module, int], nn.Module],
) -> Callable[[int], nn.Module]:
    """A small random network in inference mode that takes `[batch, 4, 6, 6]`, from a seed."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return random_statistics(RandomNetwork(seed), seed)

    return make
