"""Remarks: what a pass decided about each node it looked at, and why."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum

from shohin.errors import ArtifactError
from shohin.ir.encodings import Json


class Outcome(StrEnum):
    """What became of a node; `NOTED` for what a pass says of the program as a whole."""

    CHANGED = "changed"
    SKIPPED = "skipped"
    NOTED = "noted"


class Reason(StrEnum):
    """Why a node was left as it is. Passes may add codes of their own as plain text."""

    NOT_APPLICABLE = "not-applicable"
    UNSUPPORTED_OPERATOR = "unsupported-operator"
    OTHER_USERS = "other-users"
    NOT_CONSTANT = "not-constant"
    NOT_EXACT = "not-exact"
    EXCLUDED_BY_OPTION = "excluded-by-option"
    ALREADY_ENCODED = "already-encoded"
    TOO_SMALL = "too-small"
    NOT_FASTER = "not-faster"
    TRAINING_MODE = "training-mode"
    NOT_FINITE = "not-finite"


@dataclass(frozen=True)
class NodeCost:
    """What a node costs: number of parameters, multiply-accumulates at batch 1, stored bytes."""

    parameters: int = 0
    macs: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True)
class Remark:
    """One decision.

    Attributes:
        pass_name: the pass that decided.
        node: name of the graph node, or of the weight; empty for a note on the whole program.
        module: dotted path of the source module, empty where unknown.
        outcome: changed or skipped, or noted.
        reason: reason code; for a change a short code of what was done (``folded``, ``pruned``).
        detail: one sentence for people.
        before: cost before, where it is known.
        after: cost after, where it is known.
        extra: further figures of the pass's own, e.g. both measured times.
    """

    pass_name: str
    node: str
    module: str
    outcome: Outcome
    reason: str
    detail: str = ""
    before: NodeCost | None = None
    after: NodeCost | None = None
    extra: dict[str, Json] = field(default_factory=dict)


def remarks_to_json(remarks: Iterable[Remark]) -> list[Json]:
    """Remarks as plain values for a JSON file, one object each."""
    return [asdict(remark) for remark in remarks]


def remarks_from_json(described: Json) -> list[Remark]:
    """Rebuild remarks from what `remarks_to_json` gave.

    Raises:
        ArtifactError: when the description is malformed.
    """
    if not isinstance(described, list):
        raise ArtifactError("remarks", f"expected a list, got {type(described).__name__}")
    try:
        return [_remark_from_json(item) for item in described]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("remarks", f"cannot be rebuilt: {error}") from error


def _remark_from_json(described: Json) -> Remark:
    values = dict(described) if isinstance(described, dict) else {}
    costs = {key: _cost_from_json(values.pop(key)) for key in ("before", "after")}
    outcome, extra = Outcome(str(values.pop("outcome"))), values.pop("extra")
    if not isinstance(extra, dict):
        raise TypeError(f"expected an object 'extra', got {type(extra).__name__}")
    texts = {key: str(value) for key, value in values.items()}
    return Remark(outcome=outcome, extra=extra, **costs, **texts)  # type: ignore[arg-type]


def _cost_from_json(described: Json) -> NodeCost | None:
    if described is None:
        return None
    return NodeCost(**described)  # type: ignore[arg-type]
