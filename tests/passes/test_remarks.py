import json

import pytest

from shohin.errors import ArtifactError
from shohin.ir.encodings import Json
from shohin.passes.remarks import (
    NodeCost,
    Outcome,
    Reason,
    Remark,
    remarks_from_json,
    remarks_to_json,
)

REMARKS = [
    Remark(
        "prune", "conv1", "layer1.conv", Outcome.CHANGED, "pruned", "to 10 %", NodeCost(9, 8, 7)
    ),
    Remark("prune", "fc", "", Outcome.SKIPPED, Reason.TOO_SMALL, extra={"ms": [1.5, None]}),
    Remark("prune", "", "", Outcome.NOTED, "round", "round 1 of 2", extra={"evaluation": 0.5}),
]


def test_remarks_survive_a_json_file() -> None:
    text = json.dumps(remarks_to_json(REMARKS))
    assert remarks_from_json(json.loads(text)) == REMARKS


@pytest.mark.parametrize(
    ("described", "problem"),
    [
        ({}, "expected a list, got dict"),
        ([1], "cannot be rebuilt: 'before'"),
        ([{}], "cannot be rebuilt: 'before'"),
        ([{"before": None, "after": None, "outcome": "odd", "extra": {}}], "'odd' is not a valid"),
        (
            [{"before": None, "after": None, "outcome": "changed", "extra": 1}],
            "expected an object 'extra', got int",
        ),
        ([{"before": {"x": 1}, "after": None}], "unexpected keyword argument 'x'"),
        (
            [{"before": None, "after": None, "outcome": "changed", "extra": {}}],
            "missing 4 required positional arguments",
        ),
    ],
)
def test_malformed_remarks_are_refused(described: Json, problem: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        remarks_from_json(described)
    assert problem in str(caught.value)
