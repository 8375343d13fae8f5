"""Layer-wise optimal brain surgeon: pruning by calibration activations alone, without training.

Frantar and Alistarh, "Optimal Brain Compression", NeurIPS 2022 (exact, greedy, row by row), against
the responses of the original network as Zhang et al. (arXiv 1505.06798) take them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from shohin.errors import SpecError
from shohin.ir.program import Program
from shohin.passes.base import Batch, Progress
from shohin.passes.pruning.moments import Sampling
from shohin.passes.pruning.reconstruction import Layer, Surgeon, find_layers

Scope: TypeAlias = Literal["layer", "global"]


def _silent(done: int, total: int, label: str) -> None:
    """Progress callback for callers that want none."""


def prune_layers(
    program: Program,
    densities: Mapping[str, float],
    batches: Iterable[Batch],
    *,
    scope: Scope = "layer",
    damping: float = 0.01,
    floor: float = 0.05,
    positions: int | None = 1024,
    coherence: float = 4.0,
    memory: int = 1 << 30,
    refits: int = 2,
    seed: int = 0,
    progress: Progress = _silent,
) -> dict[str, Tensor]:
    """Prune convolutions and linear maps, and correct what is left of them.

    Layers are taken in data-flow order. With `x` the inputs that a layer has once all before it
    are pruned, and `y` its responses in the original network, pruning minimises::

        sum_p ||e_p||^2 + c ||sum_p e_p||^2 / n + lambda ||W - W0||^2,    e = y - W x - b

    over the `n` output positions, summed over calibration examples, where `W0` are the original
    weights. Starting from the best dense weights, each row loses one weight after the other, always
    the one that raises the error least, the others being at their best; of all rows of a layer the
    cheapest steps are taken. A bias that nothing else reads is corrected together with the weights.
    Groups of a grouped convolution have inputs of their own. Inputs that are zero in every example
    lose their weights first. A weight that several operators share is pruned once, for all their
    inputs as they are when the first is reached.

    Weights that a `Sparse` encoding holds at zero stay zero. A layer of density 1 is left alone.

    Args:
        program: changed in place: weights and biases.
        densities: by weight name, the share of its elements to keep, 0 to 1.
        batches: calibration batches, read once for each layer, in order.
        scope: ``layer`` keeps the density of each weight; ``global`` keeps as many elements over
            all of them, those included that are zero already, and drops those that move the
            network's outputs least: each layer is pruned alone, to three densities, for all
            examples but the first 50, and the divergence of the outputs measured on these, as of
            logits along axis 1. Those of layers are taken to add up.
        damping: lambda over the mean diagonal of the inputs' second moments, 1e-5 at least. More
            holds weights nearer to the original ones, for few examples.
        floor: with the scope ``global``, the least share to keep of what is left of any weight;
            of each at least one element is kept.
        positions: most output positions of an image to use, drawn at random; None for all.
        coherence: c, 0 or more. Errors that the positions of an image have in common do not cancel
            where later layers sum over them.
        memory: most bytes of activations to keep between layers; what is more is computed again.
        refits: how often the kept weights are fitted again where nothing but a ReLU reads the
            responses, to what it lets through.
        seed: seed of the draw.
        progress: called before each layer, and after the last.

    Returns:
        By name, bool masks of the weights' shapes, true where an element is kept:
        ``round(density * n)`` of `n`, unless fewer than that were held.

    Raises:
        SpecError: when a density or option is out of range, or a name is none of a layer.
        InputError: when there are no batches.
        UnsupportedError: naming a layer that is neither conv2d nor linear, or too wide: the memory
            for one row grows with the square of its inputs, and the time with the cube.
        PassError: naming a layer whose inputs are not finite.
    """
    _check_options(densities, scope, damping, coherence)
    batches, sampling = _reread(batches), Sampling(positions, seed, coherence)
    layers = find_layers(program, list(densities))
    kept = {layer.name: round(densities[layer.name] * layer.size) for layer in layers}
    if scope == "global":
        scout = Surgeon(program, batches, damping, sampling, memory)
        kept = _balance(scout, layers, _total(layers, densities), floor, progress)
        del scout  # and the activations that it holds
    surgeon = Surgeon(program, batches, damping, sampling, memory, refits)
    masks = {}
    for done, layer in enumerate(layers):
        progress(done, len(layers), layer.name)
        masks[layer.name] = surgeon.prune(layer, kept[layer.name])
    progress(len(layers), len(layers), "pruned")
    return masks


def balance_densities(
    program: Program,
    densities: Mapping[str, float],
    batches: Iterable[Batch],
    *,
    damping: float = 0.01,
    floor: float = 0.05,
    positions: int | None = 1024,
    coherence: float = 4.0,
    memory: int = 1 << 30,
    seed: int = 0,
    progress: Progress = _silent,
) -> dict[str, float]:
    """The densities that ``prune_layers(..., scope="global")`` gives each weight.

    For callers that prune these weights together with others, in one call of `prune_layers`, so
    that every layer sees the inputs that those before it leave. Arguments and errors are those of
    `prune_layers`; nothing is changed.
    """
    _check_options(densities, "global", damping, coherence)
    layers = find_layers(program, list(densities))
    surgeon = Surgeon(
        program, _reread(batches), damping, Sampling(positions, seed, coherence), memory
    )
    kept = _balance(surgeon, layers, _total(layers, densities), floor, progress)
    return {layer.name: kept[layer.name] / layer.size for layer in layers}


def _reread(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Batches that can be read any number of times."""
    return list(batches) if isinstance(batches, Iterator) else batches


def _total(layers: Sequence[Layer], densities: Mapping[str, float]) -> int:
    """Number of elements to keep of all layers together."""
    return round(sum(densities[layer.name] * layer.size for layer in layers))


def _balance(
    surgeon: Surgeon,
    layers: Sequence[Layer],
    kept: int,
    floor: float,
    progress: Progress,
) -> dict[str, int]:
    """Number of elements to keep of each layer, so many in all."""
    left = sum(layer.left for layer in layers)
    if kept >= left:
        return {layer.name: layer.left for layer in layers}
    share = kept / left
    # Measured around the density asked for, where most layers will end.
    shares = (share * 0.6, share, (1 + share) / 2)
    costs = {}
    for done, layer in enumerate(layers):
        progress(done, len(layers), f"{layer.name}: cost")
        costs[layer.name] = surgeon.costs(layer.name, shares)
    return allocate(costs, kept, floor)


def allocate(costs: Mapping[str, Tensor], kept: int, floor: float) -> dict[str, int]:
    """Share out the elements to keep, so that those dropped cost least in all.

    Args:
        costs: by weight name, what dropping each of the elements that are left of it costs,
            ascending.
        kept: number of elements to keep of all weights together; at least one of each is.
        floor: least share to keep of any weight, so far as `kept` allows it.

    Returns:
        By name, number of elements to keep.
    """
    total = sum(len(one) for one in costs.values())
    share = min(floor, kept / max(1, total))
    # What the floor protects is dropped last, in the rare case that rounding leaves no other.
    last = [torch.arange(len(one)) >= len(one) - int(share * len(one)) for one in costs.values()]
    ranked = [
        one.masked_fill(mask, torch.inf)[:-1]  # The last one of each weight is not up for it.
        for one, mask in zip(costs.values(), last, strict=True)
    ]
    spare = torch.cat(ranked)
    dropped = torch.zeros(len(spare), dtype=torch.bool)
    dropped[torch.sort(spare, stable=True).indices[: max(0, total - kept)]] = True
    parts = torch.split(dropped, [len(one) for one in ranked])
    counts = zip(costs.items(), parts, strict=True)
    return {name: len(one) - int(part.sum()) for (name, one), part in counts}


def _check_options(
    densities: Mapping[str, float], scope: Scope, damping: float, coherence: float
) -> None:
    for name, density in densities.items():
        if not 0 <= density <= 1:
            raise SpecError(f"density of '{name}'", f"expected 0 to 1, got {density}")
    if scope not in ("layer", "global"):
        raise SpecError("obs scope", f"expected 'layer' or 'global', got '{scope}'")
    if not damping >= 0:
        raise SpecError("obs damping", f"expected 0 or more, got {damping}")
    if not coherence >= 0:
        raise SpecError("obs coherence", f"expected 0 or more, got {coherence}")
