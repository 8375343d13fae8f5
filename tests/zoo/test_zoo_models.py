import torch
from torch import nn

from shohin import zoo

# resnet-32 to resnet-56 by He et al.'s formula; vgg-9, vit-tiny and encoder-tiny by hand.
PARAMETERS = {
    "lenet-300-100": 266_610,
    "lenet-5": 431_080,
    "resnet-20": 269_722,
    "resnet-32": 464_154,
    "resnet-44": 658_586,
    "resnet-56": 853_018,
    "vgg-9": 3_249_098,
    "vgg-16": 138_357_544,
    "alexnet": 61_100_840,
    "alexnet-lrn": 60_965_224,
    "squeezenet-1.0": 1_248_424,
    "squeezenet-1.1": 1_235_496,
    "resnet-18": 11_689_512,
    "resnet-50": 25_557_032,
    "mobilenet-v2": 3_504_872,
    "vit-tiny": 2_693_578,
    "encoder-tiny": 930_826,
}


def test_parameter_count_is_the_published_one(model_name: str, model: nn.Module) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[model_name]


def test_output_has_one_finite_row_of_sane_scale_per_input(
    model_name: str, model: nn.Module
) -> None:
    with torch.no_grad():
        output = model(*zoo.example_inputs(model_name, batch=2))
    assert output.shape in {(2, 10), (2, 1000)}
    assert output.isfinite().all()
    assert 0.3 < output.std() < 10
    assert (output[0] - output[1]).std() > 0.01


def test_model_exports_with_dynamic_batch(model_name: str, model: nn.Module) -> None:
    inputs = zoo.example_inputs(model_name, batch=2)
    batch = ({0: torch.export.Dim("batch", min=1)},)
    exported = torch.export.export(model, inputs, dynamic_shapes=batch).module()
    single = zoo.example_inputs(model_name, batch=1, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(exported(*single), model(*single))


def test_cifar_resnet_keys_are_those_of_the_reference_implementation() -> None:
    keys = set(zoo.build("resnet-20").state_dict())
    assert {"conv1.weight", "layer2.0.bn2.running_var", "linear.bias"} <= keys
    assert not any("shortcut" in key for key in keys)


def test_imagenet_keys_are_those_of_torchvision() -> None:
    assert "layer4.0.downsample.1.running_mean" in zoo.build("resnet-18").state_dict()
    assert "features.1.conv.0.0.weight" in zoo.build("mobilenet-v2").state_dict()
    assert "features.12.expand3x3.bias" in zoo.build("squeezenet-1.1").state_dict()
