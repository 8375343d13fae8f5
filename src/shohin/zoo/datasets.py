"""Data sets as tensors, raw or preprocessed as each pretrained net needs them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from shohin.zoo.archives import Folder, Labelled, read_arrays, read_jpegs
from shohin.zoo.lookup import find


class _Loader(Protocol):
    def __call__(self, split: str, folder: Folder, limit: int | None) -> Labelled: ...


@dataclass(frozen=True)
class _Recipe:
    load: _Loader
    prepare: Callable[[Tensor], Tensor]
    evaluation_split: str = "test"
    calibration_split: str = "train"


def mnist(split: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """MNIST, `train` (60,000) or `test` (10,000): uint8 `[n, 28, 28]` and int64 labels.

    Args:
        split: Part of the data set.
        folder: Data folder; found by `data_folder` if None.
        limit: Take this many images, evenly spaced, instead of all.
    """
    return read_arrays("mnist.npz", _checked(split, "train", "test"), folder, limit)


def cifar10_lossless(split: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """Original CIFAR-10 pixels, `train` (3,805) or `test` (761): uint8 `[n, 32, 32, 3]`.

    Arguments as in `mnist`.
    """
    return read_arrays("cifar10_lossless.npz", _checked(split, "train", "test"), folder, limit)


def cifar10_jpeg(split: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """CIFAR-10 after lossy JPEG, `train` (50,000) or `test` (10,000): uint8 `[n, 32, 32, 3]`.

    Sorted by class. Not comparable with published CIFAR-10 accuracies. Arguments as in `mnist`.
    """
    split = _checked(split, "train", "test")
    return read_jpegs(f"cifar10_jpeg_{split}.npz", folder, limit)


def imagenet(split: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """ImageNet samples, `calib` or `eval` (500 each): uint8 `[n, 256, 256, 3]`.

    Arguments as in `mnist`.
    """
    split = _checked(split, "calib", "eval")
    return read_jpegs(f"imagenet_{split}500.npz", folder, limit)


def evaluation_set(name: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """The test images that belong to a pretrained net, preprocessed for it, and their labels.

    Args:
        name: A name of `pretrained_names`.
        folder: Data folder; found by `data_folder` if None.
        limit: Take this many images, evenly spaced, instead of all.

    Returns:
        float32 `[n, *input_shape]` and int64 `[n]`.

    Raises:
        SpecError: No such net, or the data are absent.
    """
    recipe = find(_RECIPES, name, "evaluation set")
    images, labels = recipe.load(recipe.evaluation_split, folder, limit)
    return recipe.prepare(images), labels


def calibration_set(name: str, folder: Folder = None, limit: int | None = None) -> Labelled:
    """Images disjoint from `evaluation_set`, to calibrate or fine-tune on; otherwise like it.

    Training images for MNIST and CIFAR-10, the calibration samples for ImageNet.
    """
    recipe = find(_RECIPES, name, "calibration set")
    images, labels = recipe.load(recipe.calibration_split, folder, limit)
    return recipe.prepare(images), labels


def _checked(split: str, *known: str) -> str:
    return find({name: name for name in known}, split, "split of the data set")


def _prepare_digits(images: Tensor, shape: tuple[int, ...]) -> Tensor:
    return (images.float() / 256).reshape(-1, *shape)


def _prepare_cifar(images: Tensor) -> Tensor:
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    deviation = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / deviation


def _prepare_squeezenet(images: Tensor) -> Tensor:
    """Centre crop of 227, blue-green-red, mean removed."""
    crop = images[:, 14:241, 14:241].flip(3).permute(0, 3, 1, 2)
    return crop.float() - torch.tensor([104.0, 117.0, 123.0]).reshape(3, 1, 1)


_RECIPES = {
    "lenet-300-100": _Recipe(mnist, partial(_prepare_digits, shape=(784,))),
    "lenet-5": _Recipe(mnist, partial(_prepare_digits, shape=(1, 28, 28))),
    "resnet-20": _Recipe(cifar10_lossless, _prepare_cifar),
    "resnet-32": _Recipe(cifar10_lossless, _prepare_cifar),
    "resnet-20-cifar10jpeg": _Recipe(cifar10_jpeg, _prepare_cifar),
    "resnet-32-cifar10jpeg": _Recipe(cifar10_jpeg, _prepare_cifar),
    "vgg-9": _Recipe(cifar10_jpeg, _prepare_cifar),
    "squeezenet-1.1": _Recipe(imagenet, _prepare_squeezenet, "eval", "calib"),
}
