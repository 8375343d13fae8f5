"""Regions of many operators against torch, whole and split into ranges."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from shohin.backends.tvm.target import CpuTarget


def _floats(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


def _ints(*shape: int, low: int = -20, high: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(low, high, shape, generator=generator)


def _attention_inputs(x: Any, token: Any, position: Any) -> Any:
    joined = torch.cat([token.expand(2, -1, -1), x.transpose(1, 2)], 1)
    y = joined + position
    q, k, v = y.reshape(2, 5, 3, 4).permute(2, 0, 1, 3).unbind(0)
    return y.mean(1), q, torch.softmax(v * k, -1), x.abs().pow(0.75), torch.erf(x)


X = _floats(2, 3, 7, 9)
WIDE = _floats(3, 37)
INTS = _ints(3, 37)

CASES: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]] = {
    "chain": (_attention_inputs, (_floats(2, 12, 4), _floats(1, 1, 12), _floats(1, 5, 12))),
    "local_response_norm": (lambda x: F.local_response_norm(x, 5), (_floats(1, 11, 5, 7),)),
    "embedding": (F.embedding, (_ints(4, 5, low=0, high=30), _floats(30, 19))),
    **{f"mean_{axis}": (lambda x, a=axis: x.mean(a), (X,)) for axis in range(4)},
    "mean_all": (lambda x: x.mean(), (X,)),
    "mean_two": (lambda x: x.mean((2, 3), keepdim=True), (X,)),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2), (X,)),
    "nearest_odd": (lambda x: F.interpolate(x, size=(10, 4)), (X,)),
    "bilinear": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (X,)),
    "bilinear_odd": (lambda x: F.interpolate(x, size=(5, 20), mode="bilinear"), (X,)),
    "bilinear_aligned": (
        lambda x: F.interpolate(x, size=(13, 5), mode="bilinear", align_corners=True),
        (X,),
    ),
    "group_norm": (lambda x: F.group_norm(x, 3), (_floats(2, 6, 5, 5),)),
    "group_norm_affine": (
        lambda x, w, b: F.group_norm(x, 2, w, b),
        (_floats(2, 6, 5, 5), _floats(6), _floats(6)),
    ),
    "layer_norm": (lambda x: F.layer_norm(x, (9,)), (X,)),
    "instance_norm": (lambda x: F.instance_norm(x), (X,)),
    "softmax_1": (lambda x: torch.softmax(x, 1), (X,)),
    "softmax_last": (lambda x: torch.softmax(x, -1), (WIDE,)),
    "log_softmax": (lambda x: torch.log_softmax(x, -1), (WIDE,)),
    "where": (lambda x: torch.where(x > 0.1, x, x * 2), (WIDE,)),
    "compare": (lambda x: (x > 0, x <= 0.5, (x > 0) & (x < 1), ~(x > 0)), (WIDE,)),
    "bool_any": (lambda x: ((x > 1.5).any(1), (x > -1.5).all(1)), (WIDE,)),
    "masked_fill": (lambda x, m: x.masked_fill(m, -3.0), (WIDE, WIDE > 0)),
    "cumsum_0": (lambda x: torch.cumsum(x, 0), (WIDE,)),
    "cumsum_1": (lambda x: torch.cumsum(x, 1), (WIDE,)),
    "argmax": (lambda x: (x.argmax(1), x.argmin(-1), x.argmax()), (X,)),
    "max_dim": (lambda x: x.max(1), (X,)),
    "amax": (lambda x: (x.amax((1, 2)), x.amin(-1)), (X,)),
    "split": (lambda x: x.split(2, 2), (X,)),
    "chunk": (lambda x: x.chunk(2, -1), (X,)),
    "unbind": (lambda x: x.unbind(1), (X,)),
    "select_slice": (lambda x: (x[:, 1], x[..., 1:8:3], x[:, :, -2:]), (X,)),
    "integers": (lambda i: (i * 3 - 1, i + i, i // 3, i % 7, -i, i.abs()), (INTS,)),
    "integer_truncation": (lambda i: torch.div(i, 3, rounding_mode="trunc"), (INTS,)),
    "integer_division": (lambda i: i / 4, (INTS,)),
    "integer_sum": (lambda i: (i.sum(), i.sum(0), i.sum(1), i.amax(1), i**2, i**3), (INTS,)),
    "casts": (lambda i: (i.float() * 0.5, i.to(torch.int32), (i > 0).float()), (INTS,)),
    "scalar": (lambda x: x.sum(), (WIDE,)),
    "scalar_in": (lambda x: x * 2 + 1, (torch.tensor(1.5),)),
    "empty": (lambda x: x + 1, (torch.zeros(0, 5),)),
    "empty_sum": (lambda x: x.sum(0), (torch.zeros(0, 5),)),
    "permute": (lambda x: x.permute(2, 0, 3, 1), (X,)),
    "permute_reshape": (lambda x: x.permute(0, 2, 3, 1).reshape(2, 63, 3), (X,)),
    "expand": (lambda x: x.expand(4, 3, 37) + 0.5, (WIDE,)),
    "cat_last": (lambda x, y: torch.cat([x, y, x], 1), (WIDE, _floats(3, 5))),
    "stack": (lambda x: torch.stack([x, x * 2], 1), (WIDE,)),
    "pad": (lambda x: F.pad(x, (2, 3, 1, 0), value=1.5), (X,)),
    "pad_reflect": (lambda x: F.pad(x, (2, 3, 1, 1), mode="reflect"), (X,)),
    "power": (lambda x: (x**2, x**3, x**0.5, x**-1.5, x**1.7), (WIDE.abs() + 0.1,)),
    "unary": (
        lambda x: (x.exp(), x.tanh(), x.sigmoid(), x.erf(), x.abs().log(), x.floor(), x.round()),
        (WIDE,),
    ),
    "trigonometry": (lambda x: (x.sin(), x.cos(), x.abs().sqrt(), x.abs().rsqrt()), (WIDE,)),
    "activations": (
        lambda x: (F.silu(x), F.gelu(x), F.hardswish(x), F.softplus(x), F.elu(x), F.mish(x)),
        (WIDE,),
    ),
    "exponential_units": (lambda x: (F.celu(x), F.selu(x), F.elu(x, 0.5)), (WIDE,)),
    "library": (
        lambda x: (x.tan(), x.atan(), x.sinh(), x.cosh(), x.asinh(), torch.atan2(x, x + 1)),
        (WIDE,),
    ),
    "exponents": (lambda x: (x.exp2(), x.expm1(), x.abs().log1p(), x.abs().log2()), (WIDE,)),
    "trilinear": (
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
        (_floats(1, 2, 3, 4, 5),),
    ),
    "linear_resize": (
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        (_floats(2, 3, 9),),
    ),
    "max_pool1d": (lambda x: F.max_pool1d(x, 2), (_floats(2, 3, 9),)),
    "divide": (lambda x, y: (x / y, x // 0.5, torch.remainder(x, 0.75)), (WIDE, WIDE + 5)),
    "broadcast": (lambda x, y: x + y, (_floats(1, 13, 19), _floats(4, 13, 19))),
    "outer_broadcast": (lambda x, y: x * y, (_floats(5, 1, 21), _floats(1, 6, 1))),
    "variance": (lambda x: (x.var(1), x.std(-1, unbiased=False)), (X,)),
    "norm": (lambda x: x / x.norm(dim=1, keepdim=True), (WIDE,)),
    "cosine": (lambda x, y: F.cosine_similarity(x, y, 1), (WIDE, WIDE * 2 + 1)),
    "avg_pool3d": (lambda x: F.avg_pool3d(x, (3, 2, 2), 1, 1), (_floats(1, 2, 4, 5, 6),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1), (X,)),
    "adaptive_pool": (lambda x: F.adaptive_avg_pool2d(x, (3, 4)), (X,)),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), (X,)),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), (_floats(2, 12, 5, 6),)),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 3), (_floats(2, 4, 9, 6),)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 3), (_floats(2, 12, 5, 6),)),
    "roll_flip": (lambda x: (x.roll(3, 1), x.flip(1)), (WIDE,)),
    "gather": (lambda x, i: x.gather(1, i), (WIDE, _ints(3, 11, low=0, high=37))),
    "index_select": (lambda x, i: x.index_select(1, i), (WIDE, _ints(9, low=0, high=37))),
    "index": (lambda x, i: (x[i], x[:, i % 3], x[i, :, i]), (X[:2], _ints(4, low=-2, high=2))),
    "index_pairs": (
        lambda x, i, j: x[:, i, j],
        (X, _ints(2, 1, low=0, high=3), _ints(4, low=-7, high=7)),
    ),
    "mean_of_one": (lambda x: (x[:, :1].mean(1), x[..., :1].amax(-1) + 1), (X,)),
    "scatter": (
        lambda x, i: x.scatter(1, i, 2.0),
        (WIDE, torch.arange(15).reshape(3, 5) * 2),
    ),
    "tril": (lambda x: (x.tril(), x.triu(2)), (WIDE,)),
    "arange": (lambda x: x + torch.arange(37), (WIDE,)),
    "one_hot": (lambda i: F.one_hot(i, 12).float(), (_ints(7, low=0, high=12),)),
    "matmul": (lambda x, y: x @ y, (_floats(2, 5, 17), _floats(2, 17, 9))),
    "einsum": (
        lambda x, y: torch.einsum("bij,bkj->bik", x, y),
        (_floats(2, 5, 7), _floats(2, 9, 7)),
    ),
    "linear": (F.linear, (WIDE, _floats(11, 37), _floats(11))),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), (_floats(2, 3, 20), _floats(4, 3, 3))),
    "conv3d": (F.conv3d, (_floats(1, 2, 5, 6, 7), _floats(3, 2, 2, 3, 3))),
    "batch_norm": (
        lambda x, m, v: F.batch_norm(x, m, v),
        (X, _floats(3), _floats(3).abs() + 0.5),
    ),
    "clamp": (lambda x: (x.clamp(-0.5, 0.5), x.clamp(min=0.0), torch.maximum(x, -x)), (WIDE,)),
    "logic": (lambda x, y: (x & y, x | y, x ^ y, torch.logical_not(x)), (WIDE > 0, WIDE > 0.5)),
    "prod": (lambda x: x.prod(1), (WIDE,)),
    "doubles": (lambda x: (x.double() * 0.1).sum(1), (WIDE,)),
    "repeat": (lambda x: x.repeat(2, 3), (WIDE,)),
    "integer_and_float": (
        lambda i: (i * 0.5, i + 0.5, i.float() + torch.arange(37) * 0.5, torch.rsub(i, 1.5)),
        (INTS,),
    ),
    "bool_arithmetic": (
        lambda b, x: (b + x, b * 0.5, b + 1, b + b, b * b, b.sum(1), b.cumsum(1)),
        (WIDE > 0, WIDE),
    ),
    "integer_clamp": (lambda i: (i.clamp(-1.5, 7.5), i.clamp(min=2), i.clamp(max=3.5)), (INTS,)),
    "where_of_types": (
        lambda i, x: (
            torch.where(i > 3.5, i, x),
            torch.where(i > 3, i, 0.5),
            torch.where(x > 0, 1, i),
        ),
        (INTS, WIDE),
    ),
    "integer_true_division": (lambda i: (i / 2, i / (i.abs() + 1), i % 2.5), (INTS,)),
    "integer_power": (lambda i: (i**-0.5, i**2.5, i**2), (INTS.abs() + 1,)),
    "integer_unary": (lambda i: (i.sqrt(), i.sigmoid(), torch.logical_not(i)), (INTS.abs(),)),
    "mixed_comparisons": (
        lambda i, x: (i == i.float(), i > 0.5, torch.maximum(i, x)),
        (INTS, WIDE),
    ),
    "mixed_cat": (lambda i: torch.cat([i, i * 0.5], 1), (INTS,)),
    "same_output": (lambda x: (x.reshape(37, 3), x.t(), (x + 1).reshape(-1)), (WIDE,)),
    "long_row": (lambda x: (x.sum(-1), x.amax(-1), x * 2), (_floats(3, 5003),)),
    "large": (
        lambda x, y: (torch.softmax(x, 1) * y).sum((0, 2)),
        (_floats(9, 50, 61), _floats(50, 1)),
    ),
}


@pytest.fixture(scope="module")
def built(capture_region: Any, make_runner: Any) -> Any:
    regions = {
        name: capture_region(function, *inputs) for name, (function, inputs) in CASES.items()
    }
    return regions, make_runner({name: region.compile() for name, region in regions.items()})


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_equals_torch(name: str, pieces: int, built: Any) -> None:
    regions, runner = built
    _check(runner.run(name, regions[name], pieces), regions[name].expected)


def test_object_needs_no_runtime(built: Any) -> None:
    _, runner = built
    assert not re.search(rb"TVM(Backend|FFI|API)", runner.object_bytes)


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3"])
def test_older_processors(arch: str, built: Any, make_runner: Any) -> None:
    regions, runner = built
    names = ["chain", "large", "unary", "pad", "long_row", "bilinear", "integers", "compare"]
    older = make_runner({name: runner.codes[name] for name in names}, CpuTarget(arch))
    for name in names:
        _check(older.run(name, regions[name], 3), regions[name].expected)


def _check(results: list[Any], expected: tuple[torch.Tensor, ...]) -> None:
    for result, wanted in zip(results, (tensor.numpy() for tensor in expected), strict=True):
        assert result.dtype == wanted.dtype
        if wanted.dtype.kind == "f":
            np.testing.assert_allclose(result, wanted, rtol=3e-6, atol=3e-6)
        else:
            np.testing.assert_array_equal(result, wanted)
