"""Seeded random inputs."""

import torch
from torch import Tensor
from torch.nn import functional


def random_features(shape: tuple[int, ...], batch: int, generator: torch.Generator) -> Tensor:
    """Standard normal features, float32 `[batch, *shape]`."""
    return torch.randn(batch, *shape, generator=generator)


def random_images(shape: tuple[int, ...], batch: int, generator: torch.Generator) -> Tensor:
    """Images of unit variance, float32 `[batch, channels, height, width]`.

    Coarse patches under fine noise: most energy of a photograph lies at low frequencies, and
    white noise alone would leave all images alike after global average pooling.
    """
    channels, height, width = shape
    fine = torch.randn(batch, channels, height, width, generator=generator)
    coarse = torch.randn(batch, channels, 8, 8, generator=generator)
    return 0.6 * fine + 0.8 * functional.interpolate(coarse, size=(height, width), mode="nearest")


def random_tokens(
    shape: tuple[int, ...], batch: int, vocabulary: int, generator: torch.Generator
) -> Tensor:
    """Token ids, int64 `[batch, *shape]`, each below `vocabulary`."""
    return torch.randint(0, vocabulary, (batch, *shape), generator=generator)
