"""Registry of the models: build one by name with seeded weights, and make inputs for it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from shohin.zoo.alexnets import AlexNet, AlexNetLRN
from shohin.zoo.encoder import LENGTH, VOCABULARY, EncoderClassifier
from shohin.zoo.initialise import calibrate_batch_norm, randomise
from shohin.zoo.inputs import random_features, random_images, random_tokens
from shohin.zoo.lenet import LeNet5, LeNet300100
from shohin.zoo.lookup import find
from shohin.zoo.mobilenet import MobileNetV2
from shohin.zoo.resnet import BasicBlock, Bottleneck, ResNet
from shohin.zoo.resnet_cifar import CifarResNet
from shohin.zoo.squeezenet import squeezenet_1_0, squeezenet_1_1
from shohin.zoo.vgg import VGG9, VGG16
from shohin.zoo.vit import VisionTransformer

Family = Literal["cnn", "mlp", "transformer"]


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Attributes:
        name: Kebab-case name.
        build: Makes the module; its parameters are PyTorch's defaults.
        input_shape: Shape of the only input, without the batch.
        input_dtype: `torch.float32`, or `torch.int64` for token ids.
        family: Kind of architecture.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    family: Family


def _cnn(name: str, build: Callable[[], nn.Module], channels: int, side: int) -> ZooEntry:
    return ZooEntry(name, build, (channels, side, side), torch.float32, "cnn")


_ENTRIES = (
    ZooEntry("lenet-300-100", LeNet300100, (784,), torch.float32, "mlp"),
    _cnn("lenet-5", LeNet5, 1, 28),
    _cnn("resnet-20", partial(CifarResNet, 3), 3, 32),
    _cnn("resnet-32", partial(CifarResNet, 5), 3, 32),
    _cnn("resnet-44", partial(CifarResNet, 7), 3, 32),
    _cnn("resnet-56", partial(CifarResNet, 9), 3, 32),
    _cnn("vgg-9", VGG9, 3, 32),
    _cnn("vgg-16", VGG16, 3, 224),
    _cnn("alexnet", AlexNet, 3, 224),
    _cnn("alexnet-lrn", AlexNetLRN, 3, 227),
    _cnn("squeezenet-1.0", squeezenet_1_0, 3, 227),
    _cnn("squeezenet-1.1", squeezenet_1_1, 3, 227),
    _cnn("resnet-18", partial(ResNet, BasicBlock, (2, 2, 2, 2)), 3, 224),
    _cnn("resnet-50", partial(ResNet, Bottleneck, (3, 4, 6, 3)), 3, 224),
    _cnn("mobilenet-v2", MobileNetV2, 3, 224),
    ZooEntry("vit-tiny", VisionTransformer, (3, 32, 32), torch.float32, "transformer"),
    ZooEntry("encoder-tiny", EncoderClassifier, (LENGTH,), torch.int64, "transformer"),
)
_BY_NAME = {item.name: item for item in _ENTRIES}


def names() -> tuple[str, ...]:
    """Names of all models."""
    return tuple(_BY_NAME)


def entry(name: str) -> ZooEntry:
    """The entry of that name.

    Raises:
        SpecError: No such model.
    """
    return find(_BY_NAME, name, "zoo model")


def build(name: str, seed: int = 0) -> nn.Module:
    """Build a model in evaluation mode with random weights that depend on the seed alone.

    Batch normalisations get statistics that match the activations, as in a trained net. The
    global random state is left untouched.

    Raises:
        SpecError: No such model.
    """
    found = entry(name)
    generator = torch.Generator().manual_seed(seed)
    # On the meta device PyTorch's own initialisation costs nothing and draws nothing.
    with torch.device("meta"):
        model = found.build()
    model.to_empty(device="cpu")
    randomise(model, 1.0 if found.family == "transformer" else 2.0, generator)
    calibrate_batch_norm(model, found.input_shape, generator)
    return model.eval()


def example_inputs(name: str, batch: int = 1, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs `[batch, *input_shape]` for the model, of unit variance if float.

    Raises:
        SpecError: No such model.
    """
    found = entry(name)
    generator = torch.Generator().manual_seed(seed)
    if found.input_dtype == torch.int64:
        return (random_tokens(found.input_shape, batch, VOCABULARY, generator),)
    if len(found.input_shape) == 1:
        return (random_features(found.input_shape, batch, generator),)
    return (random_images(found.input_shape, batch, generator),)
