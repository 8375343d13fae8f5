"""Training of a network after its layers were split."""

import warnings
from dataclasses import replace

import torch

from shohin.errors import DivergedError, ShohinWarning
from shohin.ir.encodings import Sparse
from shohin.ir.program import Program
from shohin.ir.training import trainable
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import is_plain
from shohin.passes.pruning.retraining import stored_encodings
from shohin.passes.training import check_trained, restore, snapshot, trainer_of


def train_factors(program: Program, context: Context) -> Program:
    """Train a split network in place; when that diverges, it is what it was before.

    Sparse weights train under their masks; those in other forms are not trained.

    Args:
        program: the network.
        context: gives the training function and the seed.

    Returns:
        The program with the encodings of what was trained.
    """
    plain = {name: one for name, one in program.encodings.items() if is_plain(one)}
    masks = {name: one.mask for name, one in plain.items() if isinstance(one, Sparse)}
    frozen = [name for name in program.encodings if name not in plain]
    before = snapshot(program)
    try:
        with (
            trainable(program.module, masks=masks, frozen=frozen),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(context.seed)
            trainer_of(context, "factors", 0)(program.module)
        check_trained(program, "training of factors")
    except DivergedError as error:
        restore(program, before)
        text = f"{error}; the weights are those before the training"
        context.noted("diverged", text)
        warnings.warn(f"low-rank, {text}", ShohinWarning, stacklevel=3)
    finally:
        # A training function may have moved the module to an accelerator.
        program.module.cpu()
    return replace(program, encodings=stored_encodings(program))
