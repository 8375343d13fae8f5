"""What passes that train share: the user's training function, and what to do when it diverges."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from shohin.errors import DivergedError
from shohin.ir.program import Program, tensor_of, weight_names
from shohin.passes.base import Context, Train
from shohin.passes.pruning.candidates import count_non_finite
from shohin.passes.trainer import Trainer


def trainer_of(context: Context, label: str, index: int) -> Train:
    """The context's training function, which reports where it is a `Trainer`.

    Args:
        context: with a training function.
        label: what is being done, for people.
        index: added to the seed of a `Trainer`, so that trainings of one pass differ.
    """
    train = context.train
    if train is None:
        raise AssertionError("checked before the passes ran")
    if not isinstance(train, Trainer):
        return train

    def progress(done: int, total: int, epoch: str) -> None:
        context.progress(done, total, f"{label}: {epoch}")

    chosen = replace(train, seed=train.seed + index)
    if chosen.workdir is None and context.site_filter is None:
        chosen = replace(chosen, workdir=context.workdir, resume=context.resume)
    return chosen if chosen.progress else replace(chosen, progress=progress)


def check_trained(program: Program, where: str) -> None:
    """Refuse weights and statistics that training has made NaN or infinite.

    Raises:
        DivergedError: naming the first.
    """
    for name in weight_names(program):
        tensor = tensor_of(program.module, name)
        bad = count_non_finite(tensor) if tensor.is_floating_point() else 0
        if bad:
            problem = f"{bad} elements of {name} are NaN or infinite"
            raise DivergedError(where, problem, "try a lower learning rate")


def snapshot(program: Program) -> dict[str, Tensor]:
    """Copies of the weights and statistics of a program, by name."""
    return {
        name: tensor_of(program.module, name).detach().clone() for name in weight_names(program)
    }


def restore(program: Program, weights: Mapping[str, Tensor]) -> None:
    """Bring a program back to a snapshot."""
    with torch.no_grad():
        for name, weight in weights.items():
            tensor_of(program.module, name).copy_(weight)
