"""The file of coded weights: jobs of the decoder, each after its length."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from shohin.backends.tvm.lowering.memory import ConstantFile, StoredArray
from shohin.backends.tvm.weights.arrays import array_jobs, lists_job, words_jobs
from shohin.ir.coding import CODERS, Coder
from shohin.ir.container.varints import encode_varint


def write_coded(
    constants: ConstantFile,
    path: Path,
    progress: Callable[[str], None],
    coders: Sequence[Coder] = CODERS,
) -> int:
    """Code all constants.

    The largest come first, so that threads end at about the same time; but lists before all others,
    since their jobs make other arrays as well, which must not be made twice.

    Args:
        constants: the packed arrays; their file is read, one array at a time.
        path: file to write.
        progress: called with a text before each array.
        coders: those to choose from; ``plain`` alone only leaves out bits that are not used.

    Returns:
        Its size in bytes.
    """
    stored = sorted(
        constants.arrays, key=lambda one: (not one.lists, -one.buffer.bytes, one.buffer.offset)
    )
    made: set[int] = set()
    with path.open("wb") as file:
        for index, one in enumerate(stored):
            progress(f"coding weights {index + 1} of {len(stored)}")
            for job in _jobs(constants, one, made, coders):
                file.write(encode_varint(len(job)) + job)
        return file.tell()


def _jobs(
    constants: ConstantFile, one: StoredArray, made: set[int], coders: Sequence[Coder]
) -> Iterator[bytes]:
    """The jobs of an array, and of the starts that belong to it.

    Args:
        constants: the packed arrays.
        one: which.
        made: offsets of the arrays that another job makes; starts are added to it.
        coders: those to choose from.
    """
    place = one.buffer.offset
    array = constants.read(one)
    if place in made:
        return
    if one.lists is not None:
        start, layout = one.lists
        of_start = start.buffer.offset
        places = (place, None if of_start in made else of_start)
        job = lists_job(places, array, constants.read(start), layout, coders)
        if job is not None:
            made.add(of_start)
            yield job
            return
    if one.index_bits:
        yield from words_jobs(place, array.view(np.uint32), one.index_bits, coders)
    else:
        yield from array_jobs(place, array, coders)
