"""Training of ternary weights."""

import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from shohin.errors import DivergedError, ShohinWarning
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program
from shohin.ir.ternarising import Start, Ternarised, frozen, latent_weights, ternarised
from shohin.ir.training import trainable
from shohin.passes.base import Context, Train
from shohin.passes.pruning.candidates import count_non_finite, is_plain
from shohin.passes.pruning.retraining import stored_encodings
from shohin.passes.ternarising.history import History
from shohin.passes.trainer import Trainer
from shohin.passes.training import check_trained, restore, snapshot, trainer_of


def train_ternary(
    program: Program,
    starts: Mapping[str, Start],
    latent: Mapping[str, Tensor],
    history: History,
    context: Context,
) -> Program:
    """Train a program through the user's `train`, some of its weights as ternary ones.

    Weights that are sparse train under their masks, others as they are, those in other encodings
    not at all. When the training diverges, the state after its last good epoch is kept, where it
    says that there is one, as a `Trainer` does.

    Args:
        program: its weights are changed in place.
        starts: by weight name, all names of a tied weight included.
        latent: by weight name, latent weights that are other than the weights.
        history: gets a point before and after every epoch of a `Trainer`.
        context: gives the training function and the seed.

    Returns:
        The program with the encodings of its ternary weights.

    Raises:
        DivergedError: when the training diverges before anything good came of it; the weights are
            then those from before.
    """
    plain = {
        name: one for name, one in program.encodings.items() if is_plain(one) and name not in starts
    }
    masks = {name: one.mask for name, one in plain.items() if isinstance(one, Sparse)}
    fixed = program.encodings.keys() - plain.keys() - starts.keys()
    before = snapshot(program)
    restore(program, latent)
    try:
        with (
            trainable(program.module, masks=masks, frozen=[*fixed]),
            ternarised(program.module, starts) as holders,
            torch.random.fork_rng(devices=[]),
        ):
            history.begin(program.module, holders, resume=context.resume)
            torch.manual_seed(context.seed)
            train = _recorded(trainer_of(context, "ternary", 0), program, holders, history)
            _train(train, program, context)
            _check_latent(program, holders)
            found = frozen(program.module, holders)
        check_trained(program, "training of ternary weights")
    except DivergedError:
        restore(program, before)
        raise
    finally:
        # A training function may have moved the module to an accelerator.
        program.module.cpu()
    encodings: dict[str, Encoding] = {**stored_encodings(program), **found}
    return replace(program, encodings=encodings)


def _train(train: Train, program: Program, context: Context) -> None:
    try:
        train(program.module)
    except DivergedError as error:
        if not error.epochs:
            raise
        text = f"{error}; the weights are those after epoch {error.epochs}"
        context.noted("diverged", text)
        warnings.warn(f"ternary, {text}", ShohinWarning, stacklevel=4)


def _recorded(
    train: Train, program: Program, holders: Mapping[str, Ternarised], history: History
) -> Train:
    """The training function, which adds to the history where it is a `Trainer`."""
    if not isinstance(train, Trainer):
        return train
    shown = train.progress

    def progress(done: int, total: int, label: str) -> None:
        history.record(program.module, holders, done)
        if shown is not None:
            shown(done, total, label)

    return replace(train, progress=progress, loss=history.observed(train.loss))


def _check_latent(program: Program, holders: Mapping[str, Ternarised]) -> None:
    """Refuse latent weights that are not finite: all of their elements would become zero."""
    for name, latent in latent_weights(program.module, holders):
        bad = count_non_finite(latent)
        if bad:
            problem = f"{bad} latent elements of {name} are NaN or infinite"
            raise DivergedError("training of ternary weights", problem, "try a lower learning rate")
