"""Remarks on layers that were split, and on those that were not."""

from collections.abc import Mapping, Sequence

from shohin.ir.encodings import Json
from shohin.ir.program import Program
from shohin.passes.analyses.cost import Cost, cost
from shohin.passes.base import Context
from shohin.passes.factoring.chains import MOST_ALTERNATING, Made
from shohin.passes.factoring.factors import Ranks
from shohin.passes.factoring.layers import Layer
from shohin.passes.factoring.planning import Planner
from shohin.passes.remarks import NodeCost, Reason


def remark_layers(
    layers: Sequence[Layer],
    planner: Planner,
    chosen: Mapping[str, Ranks],
    made: Mapping[str, Made],
    before: Cost,
    program: Program,
    context: Context,
) -> None:
    """Remark on every layer that could have been split.

    Args:
        layers: the layers.
        planner: chose their ranks.
        chosen: the ranks.
        made: what became of those that were split.
        before: costs of the program as it was.
        program: the program as it is.
        context: where remarks go.
    """
    after = cost(program) if made else before
    for layer in layers:
        if layer.name in made:
            _remark_split(
                layer, planner, chosen[layer.name], made[layer.name], before, after, context
            )
        elif layer.name in planner.refused:
            _remark_refused(layer, planner, context)
        else:
            detail = f"{layer.name} stays: the budget is met by layers that lose less"
            context.skipped(layer.node, "within-budget", detail)


def _remark_split(
    layer: Layer,
    planner: Planner,
    ranks: Ranks,
    made: Made,
    before: Cost,
    after: Cost,
    context: Context,
) -> None:
    kept = planner.energies[layer.name].kept(ranks)
    figures: dict[str, Json] = {"energy": round(kept, 6)}
    parts = [
        f"{layer.name}: {layer.shape.text(ranks)}",
        f"{100 * kept:.2f} % of the energy",
    ]
    if ranks.channel is not None:
        figures["rank"] = ranks.channel
    if ranks.spatial is not None:
        figures["spatial_rank"] = ranks.spatial
    if ranks.inner is not None:
        figures["inner_rank"] = ranks.inner
    if made.error is not None:
        figures["error"] = made.error
        after_what = " after the ReLU" if made.rectified else ""
        parts.append(f"error {100 * made.error:.2f} %{after_what}")
        if layer.rectified and layer.shape.outputs > MOST_ALTERNATING:
            parts.append(f"fitted without the ReLU: more than {MOST_ALTERNATING:,} outputs")
        if layer.follows:
            parts.append(f"reproduced as it is, without a ReLU: {layer.follows} reads it")
    if planner.table is not None:
        times = [planner.table.milliseconds(layer, one) for one in (Ranks(), ranks)]
        figures |= {"ms_before": times[0], "ms_after": times[1]}
        parts.append(f"{times[0]:.3g} ms, now {times[1]:.3g}")
    spent = [after.nodes[node.name].for_remark() for node in made.nodes]
    total = NodeCost(
        sum(one.parameters for one in spent),
        sum(one.macs for one in spent),
        sum(one.stored_bytes for one in spent),
    )
    context.changed(
        layer.node,
        "split",
        "; ".join(parts),
        before=before.nodes[layer.node.name].for_remark(),
        after=total,
        figures=figures,
    )


def _remark_refused(layer: Layer, planner: Planner, context: Context) -> None:
    ranks = planner.refused[layer.name]
    if planner.table is None:
        return
    times = [planner.table.milliseconds(layer, one) for one in (Ranks(), ranks)]
    detail = (
        f"{layer.name} takes {times[0]:.3g} ms, and {times[1]:.3g} at {layer.shape.text(ranks)}"
    )
    context.skipped(layer.node, Reason.NOT_FASTER, detail)
