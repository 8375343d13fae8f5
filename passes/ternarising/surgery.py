"""Layers as least-squares problems, posed as the passes for ternary weights want them."""

from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.pruning.moments import Sampling
from shohin.passes.pruning.reconstruction import Surgeon

_DAMPING = 0.01
_POSITIONS = 1024
_COHERENCE = 4.0
_MEMORY = 1 << 30  # bytes of activations that are kept between layers


def surgeon_of(program: Program, context: Context) -> Surgeon:
    """What poses the problems of a program's layers, and writes their solutions to it."""
    sampling = Sampling(_POSITIONS, context.seed, _COHERENCE)
    return Surgeon(program, list(context.calibration), _DAMPING, sampling, _MEMORY)
