"""What layers are given and respond at sampled positions, read off while a network runs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from shohin.errors import PassError
from shohin.ir.program import BATCH, InputSpec, Program
from shohin.passes.base import Batch, Progress
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.regression import second_moments
from shohin.passes.patterns import constant_weight

_LARGE_PRIME = 1_000_003
_ROUNDING = 1e-12  # of single precision, squared, and room


@dataclass(frozen=True)
class Sampling:
    """Which responses are looked at.

    Attributes:
        images: most examples to read.
        positions: positions of each example's feature map, or rows of its matrix.
        seed: seed of the draw; the same positions are drawn for a layer at every reading.
    """

    images: int
    positions: int
    seed: int

    def generator(self, layer: int, batch: int) -> torch.Generator:
        """Of the draw for a layer, by its number, and a batch."""
        seed = (self.seed * _LARGE_PRIME + layer) * _LARGE_PRIME + batch
        return torch.Generator().manual_seed(seed % (1 << 63))


@dataclass(frozen=True, eq=False)
class Observed:
    """What a layer of the original network responds.

    Attributes:
        responses: float32 `[outputs, samples]`, before the non-linearity.
        moments: second moments of the inputs in one column of taps, float64
            `[channels * height, channels * height]`; None where they were not asked for.
    """

    responses: Tensor
    moments: Tensor | None

    def principal_energies(self) -> Tensor:
        """Variances along the principal axes of the responses, descending, float64.

        All are 0 where the responses vary by no more than their rounding.
        """
        centred = self.responses - self.responses.mean(1, keepdim=True)
        energies: Tensor = torch.linalg.eigvalsh(second_moments(centred)).flip(0).clamp_min(0)
        total = sum(float(part.double().square().sum()) for part in self.responses)
        return energies if float(energies.sum()) > _ROUNDING * total else energies * 0


class FirstImages(Iterable[Batch]):
    """The first examples of batches, which are read anew at every use.

    Args:
        batches: the batches.
        limit: most examples. A batch is cut along the axes that are the batch's; one of a program
            with a fixed batch size is taken whole or not at all.
        inputs: what the program takes.
    """

    def __init__(self, batches: Iterable[Batch], limit: int, inputs: Sequence[InputSpec]) -> None:
        self._batches, self._limit = batches, limit
        self._batched = [spec.shape[:1] == (BATCH,) for spec in inputs]

    def __iter__(self) -> Iterator[Batch]:
        left = self._limit
        for batch in self._batches:
            count = self.examples(batch)
            yield self._cut(batch, left) if count > left and any(self._batched) else batch
            left -= count
            if left <= 0:
                return

    def count(self) -> int:
        """Number of examples."""
        return sum(self.examples(batch) for batch in self)

    def examples(self, batch: Batch) -> int:
        """Number of examples of a batch."""
        along = [tensor for tensor, has in zip(batch, self._batched, strict=True) if has]
        if along:
            return len(along[0])
        # Images have three axes and rows one: what has one more is a batch of fixed size.
        return len(batch[0]) if batch and batch[0].dim() in (2, 4) else 1

    def _cut(self, batch: Batch, limit: int) -> Batch:
        pairs = zip(batch, self._batched, strict=True)
        return tuple(tensor[:limit] if has else tensor for tensor, has in pairs)


def observe(
    program: Program,
    layers: Sequence[Layer],
    batches: FirstImages,
    sampling: Sampling,
    progress: Progress,
    *,
    with_moments: bool,
) -> list[Observed]:
    """Run the original network once and read the responses of all layers.

    Args:
        program: the network.
        layers: its layers.
        batches: calibration batches.
        sampling: which responses to look at.
        progress: called after every batch.
        with_moments: whether moments of inputs are wanted for layers with height and width.

    Raises:
        PassError: naming a layer whose responses are NaN or infinite.
    """
    observer = _Observer(program, layers, sampling, with_moments)
    done = 0
    for index, batch in enumerate(batches):
        progress(done, sampling.images, "responses of the original network")
        observer.read(index, batch)
        done += batches.examples(batch)
    return observer.observed()


class _Observer(fx.Interpreter):
    """Runs a network and samples the responses of layers on the way."""

    def __init__(
        self, program: Program, layers: Sequence[Layer], sampling: Sampling, with_moments: bool
    ) -> None:
        super().__init__(program.module)
        self._layers = layers
        self._by_node = {layer.node: number for number, layer in enumerate(layers)}
        self._sampling = sampling
        self._batch = 0
        self._pieces: list[list[Tensor]] = [[] for _ in layers]
        self._moments = [
            torch.zeros(size, size, dtype=torch.float64)
            if (size := _column_size(layer)) and with_moments
            else None
            for layer in layers
        ]

    def read(self, index: int, batch: Batch) -> None:
        self._batch = index
        with torch.no_grad():
            self.run(*batch)

    def run_node(self, n: fx.Node) -> Any:
        number = self._by_node.get(n)
        if number is not None:
            self._sample(number, self.env[self._layers[number].operation.data])
        return super().run_node(n)

    def _sample(self, number: int, data: Tensor) -> None:
        layer = self._layers[number]
        taps = sample_inputs(
            layer, data, self._sampling.generator(number, self._batch), self._sampling
        )
        self._pieces[number].append(respond(layer, taps) + bias_of(layer))
        moments = self._moments[number]
        if moments is not None:
            moments += second_moments(taps.permute(1, 2, 0, 3).flatten(0, 1).flatten(1))

    def observed(self) -> list[Observed]:
        found = []
        for layer, pieces, moments in zip(self._layers, self._pieces, self._moments, strict=True):
            responses = torch.cat(pieces, 1)
            pieces.clear()
            check_finite(layer, responses)
            found.append(Observed(responses, moments))
        return found


def check_finite(layer: Layer, responses: Tensor) -> None:
    """Refuse responses that are NaN or infinite.

    Raises:
        PassError: naming the layer.
    """
    if not bool(torch.isfinite(responses.sum())):
        raise PassError(
            f"layer '{layer.name}'",
            "its responses on the calibration batches are not finite",
            "look for NaN or infinite values in the batches and in the weights before it",
        )


def read_features(
    layer: Layer,
    number: int,
    values: Callable[[int, Batch], Tensor],
    batches: Iterable[Batch],
    sampling: Sampling,
    features: Callable[[Tensor], Tensor],
) -> Tensor:
    """What a layer is given inside a network, at the positions that `observe` looked at.

    Args:
        layer: the layer.
        number: its number among the layers that were observed.
        values: gives the layer's input for a batch, by its number.
        batches: those of `observe`.
        sampling: that of `observe`.
        features: makes float32 `[features, samples]` of inputs as `sample_inputs` gives them.

    Raises:
        PassError: naming a layer whose inputs are NaN or infinite.
    """
    found = []
    for index, batch in enumerate(batches):
        data, generator = values(index, batch), sampling.generator(number, index)
        with torch.no_grad():
            found.append(features(sample_inputs(layer, data, generator, sampling)))
    joined = torch.cat(found, 1)
    check_finite(layer, joined)
    return joined


def sample_inputs(
    layer: Layer, data: Tensor, generator: torch.Generator, sampling: Sampling
) -> Tensor:
    """The inputs of some output positions, float32 at least.

    Args:
        layer: the layer.
        data: its input, of a batch.
        generator: draws the positions.
        sampling: how many.

    Returns:
        `[samples, channels, height, width]` of a convolution, `[samples, inputs, 1, 1]` of a linear
        map.
    """
    data = data.float()
    if layer.linear:
        return _sample_rows(data, generator, sampling.positions)
    return _sample_windows(layer, data, generator, sampling.positions)


def respond(layer: Layer, taps: Tensor) -> Tensor:
    """Responses without the bias, `[outputs, samples]`, to inputs as `sample_inputs` gives them."""
    return layer.candidate.weight.detach().float().flatten(1) @ taps.flatten(1).mT


def bias_of(layer: Layer) -> Tensor:
    """The bias, float32 `[outputs, 1]`; zeros where there is none."""
    bias = constant_weight(layer.operation.bias)
    if bias is None:
        return torch.zeros(layer.shape.outputs, 1)
    return bias.float().unsqueeze(1)


def _sample_rows(data: Tensor, generator: torch.Generator, count: int) -> Tensor:
    """Rows of each example; the axes between the first and the last are positions."""
    if data.dim() == 1:
        examples = data.view(1, 1, -1)
    else:
        examples = data.reshape(len(data), -1, data.shape[-1])
    chosen = _draw(len(examples), examples.shape[1], count, generator)
    rows = examples[torch.arange(len(examples)).unsqueeze(1), chosen]
    return rows.flatten(0, 1).unsqueeze(2).unsqueeze(3)


def _sample_windows(layer: Layer, data: Tensor, generator: torch.Generator, count: int) -> Tensor:
    unfolding = layer.unfolding
    images = unfolding.images(data)
    padded = functional.pad(images, unfolding.margins) if any(unfolding.margins) else images
    kernel = unfolding.kernel or (1, 1)
    steps = zip(padded.shape[2:], kernel, unfolding.stride, unfolding.dilation, strict=True)
    height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in steps)
    chosen = _draw(len(images), height * width, count, generator)
    tops, lefts = chosen // width * unfolding.stride[0], chosen % width * unfolding.stride[1]
    rows = tops.unsqueeze(2) + torch.arange(kernel[0]) * unfolding.dilation[0]
    columns = lefts.unsqueeze(2) + torch.arange(kernel[1]) * unfolding.dilation[1]
    image = torch.arange(len(images)).view(-1, 1, 1, 1)
    # Indices on both sides of a slice put their axes first: `[image, position, row, column, c]`.
    windows = padded[image, :, rows.unsqueeze(3), columns.unsqueeze(2)]
    return windows.permute(0, 1, 4, 2, 3).flatten(0, 1)


def _draw(examples: int, positions: int, count: int, generator: torch.Generator) -> Tensor:
    """Positions of each example, int64 `[examples, count]`, different where there are enough."""
    if positions <= count:
        return torch.arange(positions).expand(examples, positions)
    return torch.rand(examples, positions, generator=generator).topk(count, dim=1).indices


def _column_size(layer: Layer) -> int:
    """Inputs in one column of taps; 0 for layers without height and width."""
    if not layer.shape.is_spatial:
        return 0
    return layer.shape.inputs * layer.shape.kernel[0]
