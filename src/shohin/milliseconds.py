"""How long a program takes once it is compiled, for passes that work towards a time."""

from collections import Counter
from collections.abc import Mapping

from shohin.backends.base import Artifact
from shohin.backends.inputs import Array, as_array
from shohin.backends.registry import parse_target
from shohin.batches import noise
from shohin.bench import interleaved
from shohin.errors import SpecError
from shohin.ir.program import Program

_ROUNDS = 15
_SECONDS = 3.0
_RUNS = 30


def milliseconds(program: Program, target: str) -> float:
    """Median milliseconds of a compiled program at batch 1, on noise.

    Args:
        program: what to compile.
        target: text of the target; one that this machine can run.

    Raises:
        SpecError: when the target's text is wrong.
        UnsupportedError: listing every node that cannot be compiled.
    """
    binary, inputs = _compiled(program, target)
    return interleaved({"program": lambda: binary.run(inputs)}, _ROUNDS, _SECONDS)["program"]


def milliseconds_by_module(program: Program, target: str) -> Mapping[str, float]:
    """Median milliseconds of the steps of a compiled program, added up by the module they are from.

    Steps that change the layout of a value go by the value's name. Arguments and errors are those
    of `milliseconds`.

    Raises:
        SpecError: when the target has no profile of steps, too.
    """
    binary, inputs = _compiled(program, target)
    profile = getattr(binary, "profile", None)
    if profile is None:
        problem = "expected a target whose steps can be timed"
        raise SpecError(f"target '{target}'", problem, "choose cpu")
    found: Counter[str] = Counter()
    for label, time in profile(inputs, _RUNS):
        found[label.partition(":")[0]] += time
    return found


def _compiled(program: Program, target: str) -> tuple[Artifact, list[Array]]:
    chosen = parse_target(target)
    binary = chosen.backend.compile(program, chosen.text, batch=1)
    inputs = [as_array(tensor, index) for index, tensor in enumerate(noise(program.inputs))]
    return binary, inputs
