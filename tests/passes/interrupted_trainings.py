"""Small trainings that stop in the middle, and what shows that two are the same."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shohin.ir.encodings import same_bits

EPOCHS = 4


class StoppedError(Exception):
    """What stops a training in the middle."""


def problem(count=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def model(seed=0, dropout=0.5):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def batches():
    x, y = problem()
    return list(zip(x.split(16), y.split(16), strict=True))


class Failing(list):
    """Batches that stop in the middle of a pass over them, counted from 1."""

    def __init__(self, found, at):
        super().__init__(found)
        self.left = at

    def __iter__(self):
        self.left -= 1
        yield self[0]
        if self.left == 0:
            raise StoppedError
        yield from self[1:]


def stop_after(epochs):
    def progress(done, total, label):
        if done == epochs:
            raise StoppedError

    return progress


def loaders(kind):
    """Batches for a whole training, for one that is interrupted, and for one that goes on."""
    x, y = problem()
    if kind == "list":
        return [batches() for _ in range(3)]
    if kind == "drawn by PyTorch":
        return [DataLoader(TensorDataset(x, y), 16, shuffle=True) for _ in range(3)]
    return [
        DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator())
        for _ in range(3)
    ]


def state(module):
    return {name: one.detach().clone() for name, one in module.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(same_bits(one[name], two[name]) for name in one)
