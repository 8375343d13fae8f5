"""Seeded random weights that keep activations in the range of a trained net."""

import math

import torch
from torch import Tensor, nn

from shohin.zoo.inputs import random_images

_CALIBRATION_BATCH = 8
_CALIBRATION_SIDE = 96


def randomise(model: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Overwrite every parameter of `model` with random values, in place.

    Weights of convolutions and linear layers are normal with variance `gain / fan_in`: a gain
    of 2 preserves the scale through ReLUs (He et al., 2015), a gain of 1 suits transformers.
    """
    with torch.no_grad():
        for module in model.modules():
            _randomise_own_parameters(module, gain, generator)


def calibrate_batch_norm(
    model: nn.Module, input_shape: tuple[int, ...], generator: torch.Generator
) -> None:
    """Set the running statistics of all batch normalisations from random images, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not layers:
        return
    channels, height, width = (min(size, _CALIBRATION_SIDE) for size in input_shape)
    images = random_images((channels, height, width), _CALIBRATION_BATCH, generator)
    _record_statistics(model, layers, images)
    for layer in layers:
        _round_statistics(layer)


def _randomise_own_parameters(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    match module:
        case nn.Conv2d() | nn.Linear():
            deviation = math.sqrt(gain / module.weight[0].numel())
            module.weight.normal_(0.0, deviation, generator=generator)
            if module.bias is not None:
                module.bias.normal_(0.0, 0.1, generator=generator)
        case nn.BatchNorm2d() | nn.LayerNorm():
            module.weight.uniform_(0.6, 1.4, generator=generator)
            module.bias.normal_(0.0, 0.2, generator=generator)
        case _:
            for parameter in module.parameters(recurse=False):
                parameter.normal_(0.0, 0.5, generator=generator)


def _record_statistics(model: nn.Module, layers: list[nn.BatchNorm2d], images: Tensor) -> None:
    model.double().eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    with torch.no_grad():
        model(images.double())
    model.float().eval()
    for layer in layers:
        layer.momentum = 0.1


def _round_statistics(layer: nn.BatchNorm2d) -> None:
    # The order of summation differs between machines and thread counts. Measured in double
    # precision and rounded to eight bits, the statistics are the same on all of them.
    for statistic in (layer.running_mean, layer.running_var):
        if statistic is not None:
            statistic.copy_(statistic.to(torch.bfloat16))
