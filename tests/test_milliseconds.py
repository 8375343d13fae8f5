import pytest
import torch
from torch import nn

import shohin
from shohin.errors import SpecError
from shohin.milliseconds import milliseconds_by_module


def network():
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(3, 32, 3), "relu": nn.ReLU(), "second": nn.Conv2d(32, 64, 3)}
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return shohin.capture(model.eval(), torch.randn(1, 3, 24, 24), name="net")


def test_steps_are_added_up_by_module():
    found = milliseconds_by_module(network(), "cpu{threads=1}")
    layers = {"first", "second"}
    assert layers <= found.keys()
    # The ReLU is fused into the first layer; what is left changes layouts.
    assert found.keys() - layers <= {"conv2d_1"}
    assert all(found[name] > 0 for name in layers)


def test_a_target_without_steps_is_refused():
    with pytest.raises(SpecError, match=r"target 'reference'.*whose steps can be timed"):
        milliseconds_by_module(network(), "reference")
