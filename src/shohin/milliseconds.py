"""How long a program takes once it is compiled, for passes that prune to a time."""

from shohin.backends.inputs import as_array
from shohin.backends.registry import parse_target
from shohin.batches import noise
from shohin.bench import interleaved
from shohin.ir.program import Program

_ROUNDS = 15
_SECONDS = 3.0


def milliseconds(program: Program, target: str) -> float:
    """Median milliseconds of a compiled program at batch 1, on noise.

    Args:
        program: what to compile.
        target: text of the target; one that this machine can run.

    Raises:
        SpecError: when the target's text is wrong.
        UnsupportedError: listing every node that cannot be compiled.
    """
    chosen = parse_target(target)
    binary = chosen.backend.compile(program, chosen.text, batch=1)
    inputs = [as_array(tensor, index) for index, tensor in enumerate(noise(program.inputs))]
    return interleaved({"program": lambda: binary.run(inputs)}, _ROUNDS, _SECONDS)["program"]
