"""Which convolutions and linear maps can compute in integers."""

from torch import fx

from shohin.ir.program import Program, encoding_of, readers, tensor_of
from shohin.passes.analyses.shapes import Shapes, shapes
from shohin.passes.base import Context
from shohin.passes.fixed.forms import Weighted, form_of
from shohin.passes.fixed.stored import can_encode
from shohin.passes.patterns import NoMatch, weight_name
from shohin.passes.pruning.candidates import Candidate, count_non_finite, matches
from shohin.passes.remarks import Reason


class Usable:
    """Says which convolutions and linear maps of a program can compute in integers.

    Args:
        program: the float network.
        candidates: its weights.
        exclude: names or patterns of those to leave as they are.
        context: says which nodes may be changed.
    """

    def __init__(
        self,
        program: Program,
        candidates: list[Candidate],
        exclude: tuple[str, ...],
        context: Context,
    ) -> None:
        layouts = context.analyses.get(shapes, program)
        self._context = context
        self._problems: dict[str, NoMatch | None] = {}
        for one in candidates:
            excluded = next((name for name in one.spellings if matches(name, exclude)), None)
            if excluded is not None:
                detail = f"{excluded} matches the option 'exclude'"
                found: NoMatch | None = NoMatch(Reason.EXCLUDED_BY_OPTION, detail)
            else:
                found = _obstacle(program, one, layouts)
            self._problems |= dict.fromkeys(one.names, found)

    def __call__(self, node: fx.Node, form: Weighted) -> NoMatch | None:
        """Why a layer cannot, None when it can."""
        name = weight_name(form.operation.weight)
        if name is None or name not in self._problems:
            return NoMatch(Reason.NOT_CONSTANT, "its weight is computed")
        if not self._context.allows(node.name):
            return NoMatch(Reason.EXCLUDED_BY_OPTION, f"{name} may not be changed")
        return self._problems[name]


def _obstacle(program: Program, candidate: Candidate, layouts: Shapes) -> NoMatch | None:
    """Why the layers of a weight cannot compute in integers; None when they can."""
    name = candidate.name
    own = {operation.node for operation in candidate.operations}
    reading = (node for alias in candidate.names for node in readers(program, alias))
    others = [node.name for node in reading if node not in own]
    if len(own) > 1:
        others += [node.name for node in own if not isinstance(form_of(node, layouts), Weighted)]
    if others:
        return NoMatch(Reason.OTHER_USERS, f"{name} is also read by {', '.join(others)}")
    stored = encoding_of(program, name)
    if not can_encode(stored):
        return NoMatch(Reason.ALREADY_ENCODED, f"{name} is stored as {stored.describe()}")
    biases = [one.bias for one in candidate.operations if one.bias is not None]
    named = {name, *(str(one.target) for one in biases if one.op == "get_attr")}
    for tensor in sorted(named):
        bad = count_non_finite(tensor_of(program.module, tensor))
        if bad:
            detail = f"{tensor} has {bad} elements that are NaN or infinite"
            return NoMatch(Reason.NOT_FINITE, detail)
    return None
