"""Pretrained weights from the data folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shohin.zoo.folder import data_file
from shohin.zoo.lookup import find
from shohin.zoo.registry import build
from shohin.zoo.vgg import vgg16_features

State = dict[str, Tensor]

_HEAD_KERNELS = {
    0: "block1_conv1",
    2: "block1_conv2",
    5: "block2_conv1",
    7: "block2_conv2",
    10: "block3_conv1",
    12: "block3_conv2",
    14: "block3_conv3",
}


def pretrained_names() -> tuple[str, ...]:
    """Names that `pretrained`, `evaluation_set` and `calibration_set` know."""
    return tuple(_SOURCES)


def pretrained(name: str, folder: Path | str | None = None) -> nn.Module:
    """A model of the zoo in evaluation mode with published or fine-tuned weights.

    Args:
        name: A name of `pretrained_names`. A suffix `-cifar10jpeg` selects the weights
            fine-tuned on JPEG images; `vgg-9` was trained on these from scratch.
        folder: Data folder; found by `data_folder` if None.

    Raises:
        SpecError: No such weights, or the folder or file is absent.
    """
    architecture, file, read = find(_SOURCES, name, "pretrained weights")
    state = read(data_file(file, folder))
    model = build(architecture)
    model.load_state_dict(state)
    return model


def vgg16_head_convs(folder: Path | str | None = None) -> nn.Sequential:
    """The first seven convolutions of ImageNet VGG-16 with their ReLUs and two pools.

    Indexed as the `features` of `vgg-16`. Maps `[batch, 3, h, w]` to
    `[batch, 256, h / 4, w / 4]`.

    Raises:
        SpecError: The folder or file is absent.
    """
    arrays = _arrays(data_file("vgg16_conv1_1_to_conv3_3.npz", folder))
    head = nn.Sequential(*list(vgg16_features().children())[:16])
    head.load_state_dict(
        {
            f"{index}.{part}": tensor
            for index, layer in _HEAD_KERNELS.items()
            for part, tensor in _head_layer(arrays, layer).items()
        }
    )
    return head.eval()


def _head_layer(arrays: dict[str, NDArray[Any]], layer: str) -> State:
    kernel = torch.from_numpy(arrays[f"{layer}.kernel"])
    bias = torch.from_numpy(arrays[f"{layer}.bias"])
    return {"weight": kernel.permute(3, 2, 0, 1), "bias": bias}


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def _read_arrays(path: Path) -> State:
    return {key: torch.from_numpy(array).float() for key, array in _arrays(path).items()}


def _read_state(path: Path) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _read_checkpoint(path: Path) -> State:
    state: State = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _read_squeezenet(path: Path) -> State:
    return {_squeezenet_key(key): tensor for key, tensor in _read_arrays(path).items()}


def _squeezenet_key(key: str) -> str:
    """Translate a Caffe name, such as `fire2/squeeze1x1.weight`, to torchvision's."""
    layer, _, rest = key.partition("/")
    if rest:
        return f"features.{_FIRE_INDEX[layer]}.{rest.replace('squeeze1x1', 'squeeze')}"
    return key.replace("conv10", "classifier.1").replace("conv1.", "features.0.")


_FIRE_INDEX = {
    f"fire{number}": index for number, index in enumerate((3, 4, 6, 7, 9, 10, 11, 12), start=2)
}

_SOURCES: dict[str, tuple[str, str, Callable[[Path], State]]] = {
    "lenet-300-100": ("lenet-300-100", "lenet300100_caffe.npz", _read_arrays),
    "lenet-5": ("lenet-5", "lenet5_caffe.npz", _read_arrays),
    "resnet-20": ("resnet-20", "resnet20_cifar10.pth", _read_checkpoint),
    "resnet-32": ("resnet-32", "resnet32_cifar10.pth", _read_checkpoint),
    "resnet-20-cifar10jpeg": ("resnet-20", "resnet20_cifar10jpeg.pt", _read_state),
    "resnet-32-cifar10jpeg": ("resnet-32", "resnet32_cifar10jpeg.pt", _read_state),
    "vgg-9": ("vgg-9", "vgg9_cifar10jpeg.pt", _read_state),
    "squeezenet-1.1": ("squeezenet-1.1", "squeezenet_v1.1_fp16.npz", _read_squeezenet),
}
