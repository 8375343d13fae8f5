"""Published architectures with seeded random or pretrained weights, and their data sets."""

from shohin.zoo.datasets import calibration_set, evaluation_set
from shohin.zoo.factories import (
    alexnet,
    alexnet_lrn,
    encoder_tiny,
    lenet5,
    lenet_300_100,
    mobilenet_v2,
    resnet18,
    resnet20,
    resnet32,
    resnet44,
    resnet50,
    resnet56,
    squeezenet1_0,
    squeezenet1_1,
    vgg9,
    vgg16,
    vit_tiny,
)
from shohin.zoo.folder import data_folder
from shohin.zoo.registry import ZooEntry, build, entry, example_inputs, names
from shohin.zoo.weights import pretrained, pretrained_names, vgg16_head_convs

__all__ = [
    "ZooEntry",
    "alexnet",
    "alexnet_lrn",
    "build",
    "calibration_set",
    "data_folder",
    "encoder_tiny",
    "entry",
    "evaluation_set",
    "example_inputs",
    "lenet5",
    "lenet_300_100",
    "mobilenet_v2",
    "names",
    "pretrained",
    "pretrained_names",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet50",
    "resnet56",
    "squeezenet1_0",
    "squeezenet1_1",
    "vgg9",
    "vgg16",
    "vgg16_head_convs",
    "vit_tiny",
]
