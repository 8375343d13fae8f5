import json

import pytest
import torch

from shohin.backends.base import ArtifactInfo
from shohin.backends.tvm.manifest import FORMAT, info_of, manifest_of
from shohin.errors import ArtifactError
from shohin.ir.program import InputSpec

_INFO = ArtifactInfo(
    name="net",
    target="cpu{threads=2}",
    pipeline="fold-bn",
    inputs=(InputSpec("x", (2, 3), torch.float32), InputSpec("ids", (), torch.int64)),
    outputs=(InputSpec("y", (2,), torch.bool),),
    batch=2,
    content_hash="abc",
    tools={"tvm": "0.27"},
)


def test_round_trip_through_json() -> None:
    text = json.dumps(manifest_of(_INFO, "net_c"))
    assert info_of(json.loads(text), "file") == (_INFO, "net_c")


def test_text() -> None:
    manifest = manifest_of(_INFO, "net_c")
    assert manifest["inputs"] == [
        {"name": "x", "shape": [2, 3], "dtype": "float32"},
        {"name": "ids", "shape": [], "dtype": "int64"},
    ]
    assert manifest["format"] == FORMAT


@pytest.mark.parametrize("version", [FORMAT + 1, None])
def test_another_format(version: int | None) -> None:
    manifest = {**manifest_of(_INFO, "net_c"), "format": version}
    with pytest.raises(ArtifactError) as caught:
        info_of(manifest, "net.so")
    assert str(caught.value) == (
        f"net.so: expected a binary of format {FORMAT}, found format {version}; "
        "use the version of shohin that made it, or compile the model again"
    )
