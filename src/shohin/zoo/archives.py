"""Read images and labels from the archives in the data folder."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shohin.errors import SpecError
from shohin.zoo.folder import data_file

Folder = Path | str | None
Labelled = tuple[Tensor, Tensor]


def read_arrays(file: str, split: str, folder: Folder, limit: int | None) -> Labelled:
    """Images and labels of an archive of plain arrays.

    Raises:
        SpecError: The folder or file is absent.
    """
    with np.load(data_file(file, folder)) as archive:
        images, labels = archive[f"x_{split}"], archive[f"y_{split}"]
    chosen = _spread(len(labels), limit)
    return _tensors(images[chosen], labels[chosen])


def read_jpegs(file: str, folder: Folder, limit: int | None) -> Labelled:
    """Images and labels of an archive of concatenated JPEG files.

    Raises:
        SpecError: The folder or file is absent, or Pillow is not installed.
    """
    with np.load(data_file(file, folder)) as archive:
        data, offsets, labels = archive["bytes"], archive["offsets"], archive["labels"]
    chosen = _spread(len(labels), limit)
    images = [_decode(data[offsets[index] : offsets[index + 1]].tobytes()) for index in chosen]
    return _tensors(np.stack(images), labels[chosen])


def _decode(jpeg: bytes) -> NDArray[np.uint8]:
    # Pillow is needed for these data sets only, so it is an optional dependency.
    try:
        from PIL import Image
    except ImportError as error:
        hint = "pip install 'shohin[data]'"
        raise SpecError("JPEG data sets", "Pillow is not installed", hint) from error
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def _spread(count: int, limit: int | None) -> NDArray[np.int64]:
    wanted = count if limit is None else min(limit, count)
    return np.arange(wanted, dtype=np.int64) * count // wanted


def _tensors(images: NDArray[np.uint8], labels: NDArray[Any]) -> Labelled:
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
