"""A small convolutional network of digits, how it becomes ternary, and what tests look at."""

from functools import cache

import torch
from sklearn.datasets import load_digits
from torch import nn

import shohin
from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.program import tensor_of
from shohin.ir.ternary import Ternary
from shohin.ir.verifier import verify
from shohin.passes.trainer import Trainer

NAMES = ["0.weight", "4.weight", "7.weight", "9.weight"]


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(108, 24), nn.ReLU(), nn.Linear(24, 10))


@cache
def _captured():
    return capture(network().eval(), (torch.ones(2, 1, 8, 8),), name="digits")


def small():
    return _captured().copy()


@cache
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def batches(start=0, end=1024, size=64):
    x, y = digits()
    return list(zip(x[start:end].split(size), y[start:end].split(size), strict=True))


def accuracy(module):
    x, y = digits()
    with torch.no_grad():
        return float((module(x[1200:]).argmax(1) == y[1200:]).float().mean())


def trainer(**options):
    return Trainer(**{"loader": batches(end=128), "epochs": 2, "learning_rate": 0.02, **options})


def make(text="ternary", program=None, **options):
    options = {"train": trainer(), **options}
    return shohin.optimize(program or small(), text, drift=False, **options)


def notes(result, reason):
    return [one.detail for one in result.report.notes() if one.reason == reason]


def encoded(program):
    return {name for name, one in program.encodings.items() if isinstance(one, Ternary)}


def remarks(result, node):
    return [(one.reason, one.detail) for one in result.report.remarks if one.node == node]


def assert_stored_exactly(program):
    verify(program)
    for name, encoding in program.encodings.items():
        assert same_bits(encoding.materialise(), tensor_of(program.module, name).detach())


def fixed_steps(module):
    """A training function that moves every parameter by the same whatever it computes.

    Goldens and comparisons bit for bit then do not depend on how convolutions are summed.
    """
    with torch.no_grad():
        for number, (_, one) in enumerate(sorted(module.named_parameters())):
            one.add_(0.01 * torch.linspace(-1, 1, one.numel()).reshape(one.shape) * (number % 3))


def still(module):
    """A training function that trains nothing."""


def calibration():
    return [(x,) for x, _ in batches(end=256)]


@cache
def dense():
    model = network()
    Trainer(batches(), epochs=8, learning_rate=0.05)(model)
    return model.eval()


def rows_of(codes, pairs):
    codes = codes.double()
    return codes.clamp_min(0) * pairs[:, :1] + codes.clamp_max(0) * pairs[:, 1:]
