"""Training of weights that share few values."""

from dataclasses import replace

import torch
from torch import Tensor

from shohin.errors import DivergedError
from shohin.ir.encodings import Encoding, Sparse
from shohin.ir.program import Program
from shohin.ir.sharing import codebook_of, shared, trained_codebook
from shohin.ir.training import trainable
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import is_plain
from shohin.passes.pruning.retraining import stored_encodings
from shohin.passes.training import check_trained, restore, snapshot, trainer_of


def tune_centroids(program: Program, context: Context, *, moving: bool) -> Program:
    """Train a program through the user's `train`, its shared weights as such.

    Weights that are sparse and not shared train under their masks, others as they are.

    Args:
        program: with codebooks among its encodings; its weights are changed in place.
        context: gives the training function and the seed.
        moving: whether a weight may move to another centroid.

    Returns:
        The program with the new centroids in its encodings.

    Raises:
        DivergedError: when the loss or a weight is NaN or infinite; the weights are then those
            from before.
    """
    books = {name: e for name, e in program.encodings.items() if codebook_of(e) is not None}
    plain = {name: e for name, e in program.encodings.items() if is_plain(e)}
    fixed = program.encodings.keys() - books.keys() - plain.keys()
    masks = {name: e.mask for name, e in plain.items() if isinstance(e, Sparse)}
    before = snapshot(program)
    try:
        with (
            trainable(program.module, masks=masks, frozen=[*fixed]),
            shared(program.module, books, moving=moving),
            torch.random.fork_rng(devices=[]),
        ):
            torch.manual_seed(context.seed)
            trainer_of(context, "centroids", 0)(program.module)
            found = {name: trained_codebook(program.module, name) for name in books}
        check_trained(program, "training of centroids")
    except DivergedError:
        restore(program, before)
        raise
    finally:
        # A training function may have moved the module to an accelerator.
        program.module.cpu()
    encodings = stored_encodings(program)
    encodings |= {name: _with_codebook(books[name], *found[name]) for name in books}
    return replace(program, encodings=encodings)


def _with_codebook(encoding: Encoding, centroids: Tensor, indices: Tensor) -> Encoding:
    book = codebook_of(encoding)
    if book is None:
        raise AssertionError("only encodings with codebooks are tuned")
    tuned = replace(book, centroids=centroids, indices=indices.reshape(book.indices.shape))
    return replace(encoding, values=tuned) if isinstance(encoding, Sparse) else tuned
