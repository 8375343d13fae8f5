"""Converters for resizing images, by tables of source pixels made at compile time."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from shohin.backends.tvm.generic.relax_values import Importer, Value, value_shape


def _resize_sizes(node: fx.Node, importer: Importer) -> tuple[Value, tuple[int, ...], list[float]]:
    """Data, output height and width, and input pixels per output pixel along both."""
    data = importer.env[node.args[0]]
    size = [int(extent) for extent in node.meta["val"].shape[2:]]
    factors = _scale_factors(node)
    steps = [
        1.0 / factor if factor else extent / out
        for factor, extent, out in zip(factors, value_shape(data)[2:], size, strict=True)
    ]
    return data, tuple(size), steps


def _scale_factors(node: fx.Node) -> Sequence[float | None]:
    """The scale factors that the node was given, None where only a size was."""
    if str(node.target).endswith(".vec"):
        last: Any = node.args[-1]
        return list(last) if last else [None, None]
    given = [a for a in node.args[2:] if isinstance(a, float) or a is None]
    return [*given, None, None][:2]


def resize_nearest(node: fx.Node, importer: Importer) -> Value:
    """``upsample_nearest2d``: rows, then columns, each picked by a table of indices."""
    data, size, steps = _resize_sizes(node, importer)
    for axis, (out, step) in enumerate(zip(size, steps, strict=True), start=2):
        extent = value_shape(data)[axis]
        picked = np.floor(np.arange(out, dtype=np.float32) * np.float32(step))
        table = relax.const(np.minimum(picked, extent - 1).astype(np.int32))
        data = importer.block_builder.emit_te(_pick(axis), data, table)
    return data


def resize_bilinear(node: fx.Node, importer: Importer) -> Value:
    """``upsample_bilinear2d``: columns first, so that rows are blended in whole vectors."""
    data, size, steps = _resize_sizes(node, importer)
    aligned = bool(node.args[2])
    for axis in (3, 2):
        extent, out = value_shape(data)[axis], size[axis - 2]
        places = _source_places(extent, out, steps[axis - 2], aligned)
        low = np.minimum(places.astype(np.int32), extent - 1)
        share = (places - low).astype(np.float32)
        tables = [low, np.minimum(low + 1, extent - 1).astype(np.int32), share]
        constants = [relax.const(table) for table in tables]
        data = importer.block_builder.emit_te(_blend(axis), data, *constants)
    return data


def _source_places(extent: int, out: int, step: float, aligned: bool) -> Any:
    """Where output pixels lie among input pixels."""
    steps = np.arange(out, dtype=np.float32)
    if aligned:
        return steps * np.float32((extent - 1) / (out - 1) if out > 1 else 0.0)
    return np.maximum((steps + np.float32(0.5)) * np.float32(step) - np.float32(0.5), 0.0)


def _pick(axis: int) -> Callable[..., Any]:
    """``x[table]`` along an axis."""

    def compute(data: Any, table: Any) -> Any:
        shape = list(data.shape)
        shape[axis] = table.shape[0]
        return te.compute(shape, lambda *i: data(*i[:axis], table(i[axis]), *i[axis + 1 :]))

    return compute


def _blend(axis: int) -> Callable[..., Any]:
    """``x[low] * (1 - share) + x[high] * share`` along an axis, by tables."""

    def compute(data: Any, low: Any, high: Any, share: Any) -> Any:
        shape = list(data.shape)
        shape[axis] = low.shape[0]

        def blended(*indices: Any) -> Any:
            place = indices[axis]

            def pick(table: Any) -> Any:
                return data(*indices[:axis], table(place), *indices[axis + 1 :])

            weight = share(place)
            return pick(low) * (tirx.const(1.0, "float32") - weight) + pick(high) * weight

        return te.compute(shape, blended, name="blend")

    return compute
