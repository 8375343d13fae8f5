import pytest
import torch
from torch import nn

from shohin import zoo
from shohin.errors import SpecError

REPRODUCED = ("lenet-5", "resnet-20", "vgg-9", "mobilenet-v2", "vit-tiny", "encoder-tiny")


def _states_equal(first: nn.Module, second: nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("name", REPRODUCED)
def test_same_seed_builds_the_same_bits(name: str) -> None:
    assert _states_equal(zoo.build(name, seed=3), zoo.build(name, seed=3))
    assert not _states_equal(zoo.build(name, seed=3), zoo.build(name, seed=4))


@pytest.mark.parametrize("name", ["resnet-56", "mobilenet-v2"])
def test_bits_do_not_depend_on_the_number_of_threads(name: str) -> None:
    threads = torch.get_num_threads()
    many = zoo.build(name)
    torch.set_num_threads(1)
    try:
        assert _states_equal(many, zoo.build(name))
    finally:
        torch.set_num_threads(threads)


def test_build_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    zoo.build("resnet-20")
    zoo.example_inputs("encoder-tiny")
    assert torch.equal(before, torch.random.get_rng_state())


def test_batch_norm_statistics_are_those_of_a_trained_net() -> None:
    model = zoo.build("resnet-20")
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(layers) == 19
    for layer in layers:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        assert layer.running_mean.std() > 0
        assert layer.running_var.min() > 0
        assert not layer.training


def test_entry_describes_the_example_inputs(model_name: str) -> None:
    found = zoo.entry(model_name)
    (inputs,) = zoo.example_inputs(model_name, batch=2, seed=5)
    assert found.name == model_name
    assert inputs.shape == (2, *found.input_shape)
    assert inputs.dtype == found.input_dtype
    assert torch.equal(inputs, zoo.example_inputs(model_name, batch=2, seed=5)[0])


def test_token_ids_lie_in_the_vocabulary() -> None:
    (tokens,) = zoo.example_inputs("encoder-tiny", batch=64)
    assert 0 <= tokens.min() < tokens.max() < 1000


@pytest.mark.parametrize("function", [zoo.entry, zoo.build, zoo.example_inputs, zoo.pretrained])
def test_unknown_name_suggests_a_near_one(function: object) -> None:
    assert callable(function)
    with pytest.raises(SpecError, match=r"unknown name 'resnet20'.*'resnet-20'"):
        function("resnet20")


def test_every_model_has_a_factory(model_name: str) -> None:
    # Big models are left out: their factories have the same single line.
    snake = {"lenet-300-100": "lenet_300_100", "squeezenet-1.0": "squeezenet1_0"}
    snake |= {"squeezenet-1.1": "squeezenet1_1"}
    plain = model_name.replace("-v2", "_v2").replace("-tiny", "_tiny").replace("-lrn", "_lrn")
    factory = getattr(zoo, snake.get(model_name, plain.replace("-", "")))
    assert callable(factory)
    if model_name not in {"vgg-16", "alexnet", "alexnet-lrn", "resnet-50"}:
        assert _states_equal(factory(seed=1), zoo.build(model_name, seed=1))
