"""Networks that the tests of fixed point round, and how."""

import warnings
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import ShohinWarning
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense
from shohin.ir.program import Stage
from shohin.ir.ternary import Ternary


class Residual(nn.Module):
    """Every operator that has an integer form."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.left(x) + x)
        z = functional.avg_pool2d(y * torch.relu(self.right(y)), 2)
        joined = torch.cat([functional.max_pool2d(y, 2), z], 1)
        return self.head(joined.mean((2, 3)))


def images(count=8, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(module=None, example=None):
    torch.manual_seed(0)
    made = module() if module is not None else Residual()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        return capture(made.eval(), (images(2) if example is None else example,), name="net")


def fixed(program, text="fixed-point", batches=None, **options):
    batches = [(images(),)] if batches is None else batches
    return shohin.optimize(program, text, calibration=batches, drift=False, **options)


def nodes_of(program, target):
    return [node for node in program.graph.nodes if node.target == target]


class Chain(nn.Module):
    """Two convolutions whose channels have very different ranges."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            scale = torch.logspace(-2, 1, 8)
            self.one.weight.mul_(scale.reshape(-1, 1, 1, 1))
            self.one.bias.mul_(scale)
            self.two.weight.div_(scale.reshape(1, -1, 1, 1))

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def mean_error(program, found, x):
    with torch.no_grad():
        return float((found.module(x) - program.module(x)).abs().mean())


class Small(nn.Module):
    """A convolution and a linear map behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def codes_like(weight, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, weight.shape, generator=generator).to(torch.int8)


def ternary_network(pairs=None, rows=None, module=Small):
    """A network all of whose weights are ternary.

    Args:
        pairs: gives the scales of a weight of so many rows; 0.3 and 0.2 by default.
        rows: gives multipliers of so many rows, or None.
        module: makes the network.
    """
    program = network(module)
    encodings = {}
    for name, tensor in program.module.named_parameters():
        if name.endswith("weight"):
            scales = torch.tensor([0.3, 0.2]) if pairs is None else pairs(len(tensor))
            factors = None if rows is None else rows(len(tensor))
            encodings[name] = Ternary(codes_like(tensor), Dense(scales), factors)
            with torch.no_grad():
                tensor.copy_(encodings[name].materialise())
    return replace(program, encodings=encodings, stage=Stage.ANNOTATED)


def various(count):
    return torch.linspace(-0.9, 1.1, count)
