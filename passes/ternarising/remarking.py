"""What the report says of weights that became ternary."""

from collections.abc import Mapping
from dataclasses import replace

from shohin.ir.encodings import Json
from shohin.ir.ternary import Ternary
from shohin.passes.analyses.cost import Cost
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import Candidate


def remark_ternary(
    candidate: Candidate,
    stored: Ternary,
    detail: str,
    figures: Mapping[str, Json],
    before: Cost,
    context: Context,
) -> None:
    """Remark that a weight has become ternary, and note it for the report.

    Args:
        candidate: the weight.
        stored: how it is stored.
        detail: what the pass has to say of it beside its zeros and bits.
        figures: the same in figures.
        before: costs of the program before.
        context: where remarks go.
    """
    spent, taken = before.nodes[candidate.node.name], stored.stored_bytes()
    spared = taken - before.weights[candidate.name].stored_bytes
    zeros, bits = 1 - stored.density, 8 * taken / stored.parameters()
    text = f"{candidate.name}: {100 * zeros:.1f}% zeros, {detail}; {bits:.2f} bits a weight"
    context.changed(
        candidate.node,
        "ternary",
        text,
        before=spent.for_remark(),
        after=replace(spent.for_remark(), stored_bytes=spent.stored_bytes + spared),
        figures={"zeros": zeros, "bits": bits, **figures},
    )
    # Reports show notes one by one; of changes they give the number.
    context.noted("ternary", text)
