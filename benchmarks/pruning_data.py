"""Training, validation and test images of the pruning benchmark."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shohin import zoo

VALIDATION = 5000
"""Images of the training set that nothing is trained on here; everything is chosen on them.

The pretrained CIFAR-10 nets have seen them, so their errors there are lower than on the test set.
"""

_TEMPERATURE = 3.0


@dataclass(frozen=True, eq=False)
class Augmented:
    """Batches of shuffled, shifted and perhaps mirrored images, drawn anew for every epoch.

    All is drawn from PyTorch's random state, which `shohin.Trainer` seeds.

    Attributes:
        images: float32 ``[n, channels, height, width]``.
        labels: int64 ``[n]``.
        batch: images in a batch.
        shift: furthest shift in pixels, both ways along both axes; what comes in is 0.
        mirror: mirror every second image, in the mean.
        flat: give ``[batch, channels * height * width]``.
    """

    images: Tensor
    labels: Tensor
    batch: int = 128
    shift: int = 0
    mirror: bool = False
    flat: bool = False

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, chosen, _ in self.drawn():
            yield images, self.labels[chosen]

    def drawn(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches of images, which ones they are, and which of them are mirrored."""
        for chosen in torch.randperm(len(self.labels)).split(self.batch):
            images, mirrored = self._augmented(self.images[chosen])
            yield images, chosen, mirrored

    def _augmented(self, images: Tensor) -> tuple[Tensor, Tensor]:
        count, _, height, width = images.shape
        padded = nn.functional.pad(images, [self.shift] * 4)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        down, right = torch.randint(0, 2 * self.shift + 1, (2, count))
        shifted = windows[torch.arange(count), :, down, right]
        mirrored = torch.rand(count) < 0.5 if self.mirror else torch.zeros(count).bool()
        shifted = torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted)
        if self.flat:
            return shifted.flatten(1), mirrored
        return shifted.contiguous(memory_format=torch.channels_last), mirrored


@dataclass(frozen=True, eq=False)
class Distilled:
    """Batches whose labels are joined by what a teacher says of the images, for `distillation`.

    Attributes:
        batches: images and labels.
        teacher: a network in evaluation mode.
        precision: of the teacher's arithmetic.
    """

    batches: Augmented
    teacher: nn.Module
    precision: str

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16")
        for images, labels in self.batches:
            with torch.no_grad(), mixed:
                said = self.teacher(images).float()
            yield images, (labels, said)


@dataclass(frozen=True, eq=False)
class Remembered:
    """Batches whose labels are joined by what a teacher said of the images before any shift.

    Attributes:
        batches: images and labels.
        said: what `ask` gave.
    """

    batches: Augmented
    said: Tensor

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor]]]:
        for images, chosen, mirrored in self.batches.drawn():
            yield images, (self.batches.labels[chosen], self.said[mirrored.long(), chosen])


def ask(teacher: nn.Module, images: Tensor) -> Tensor:
    """What a network says of every image as it is, and mirrored: float32 ``[2, n, classes]``."""
    with torch.inference_mode():
        said = [
            torch.cat([teacher(part) for part in one.split(250)])
            for one in (images, images.flip(3))
        ]
        return torch.stack(said)


def distillation(output: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
    """A third cross-entropy, two thirds divergence from the teacher (Hinton et al. 2015)."""
    labels, said = known
    soft = nn.functional.log_softmax(output / _TEMPERATURE, 1)
    wanted = nn.functional.softmax(said / _TEMPERATURE, 1)
    divergence = nn.functional.kl_div(soft, wanted, reduction="batchmean") * _TEMPERATURE**2
    return nn.functional.cross_entropy(output, labels) / 3 + 2 * divergence / 3


@dataclass(frozen=True, eq=False)
class Images:
    """A data set as a network needs it.

    Attributes:
        training: what to train on.
        validation: images and labels to choose on. The pretrained ResNets have seen them: their own
            error there is a third of that on test images, and grows while they forget. They tell
            networks apart that were trained as long, and nothing else.
    """

    training: Augmented
    validation: tuple[Tensor, Tensor]

    def calibration(self, count: int, seed: int) -> list[tuple[Tensor]]:
        """So many training images, neither shifted nor mirrored, in batches."""
        images = self.training.images
        images = images.flatten(1) if self.training.flat else images
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        return [(images[part],) for part in drawn.split(64) if part.numel()]


def load_images(name: str, batch: int, shift: int, mirror: bool) -> Images:
    """The training set of a pretrained net, split in two; the same split for every seed."""
    images, labels = zoo.calibration_set(name)
    shape = images.shape[1:]
    if len(shape) == 1:
        images = images.reshape(-1, 1, 28, 28)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held, used = order[:VALIDATION], order[VALIDATION:]
    training = Augmented(images[used], labels[used], batch, shift, mirror, len(shape) == 1)
    return Images(training, (images[held].reshape(-1, *shape), labels[held]))


def error(module: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of wrong predictions, %."""
    with torch.inference_mode():
        found = torch.cat([module(part).argmax(1) for part in images.split(250)])
    return 100 * float((found != labels).float().mean())
