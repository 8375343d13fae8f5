"""An artifact's description as JSON, for the trailer of a binary and for its C interface."""

from typing import Any

import torch

from shohin.backends.base import ArtifactInfo, StepInfo
from shohin.errors import ArtifactError
from shohin.ir.encodings import Json
from shohin.ir.program import InputSpec

FORMAT = 3


def manifest_of(info: ArtifactInfo, prefix: str) -> dict[str, Json]:
    """The description.

    Args:
        info: what the artifact is.
        prefix: prefix of its C symbols.
    """
    return {
        "format": FORMAT,
        "prefix": prefix,
        "name": info.name,
        "target": info.target,
        "pipeline": info.pipeline,
        "inputs": [_tensor(spec) for spec in info.inputs],
        "outputs": [_tensor(spec) for spec in info.outputs],
        "batch": info.batch,
        "content_hash": info.content_hash,
        "tools": dict(info.tools),
        "needs": list(info.needs),
        "steps": [vars(step) for step in info.steps],
        "weights": info.weights,
        "weight_bytes": info.weight_bytes,
    }


def info_of(manifest: dict[str, Any], where: str) -> tuple[ArtifactInfo, str]:
    """The description and symbol prefix that a manifest gives.

    Raises:
        ArtifactError: when it is of a newer format.
    """
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            where,
            f"expected a binary of format {FORMAT}, found format {manifest.get('format')}",
            "use the version of shohin that made it, or compile the model again",
        )
    info = ArtifactInfo(
        name=manifest["name"],
        target=manifest["target"],
        pipeline=manifest["pipeline"],
        inputs=tuple(_spec(item) for item in manifest["inputs"]),
        outputs=tuple(_spec(item) for item in manifest["outputs"]),
        batch=manifest["batch"],
        content_hash=manifest["content_hash"],
        tools=manifest["tools"],
        needs=tuple(manifest["needs"]),
        steps=tuple(StepInfo(**step) for step in manifest["steps"]),
        weights=manifest["weights"],
        weight_bytes=manifest["weight_bytes"],
    )
    return info, manifest["prefix"]


def _tensor(spec: InputSpec) -> Json:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "shape": list(spec.shape), "dtype": dtype}


def _spec(item: dict[str, Any]) -> InputSpec:
    return InputSpec(item["name"], tuple(item["shape"]), getattr(torch, item["dtype"]))
