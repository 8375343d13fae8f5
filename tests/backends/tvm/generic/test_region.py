"""What regions give besides numbers: refusals, sharing, aliases, edge values."""

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shohin.backends.tvm.generic import importer
from shohin.backends.tvm.generic.region import RegionError, compile_region, unsupported_nodes


def _shapes(*tensors: torch.Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


def test_an_unsupported_operator_is_named(capture_region: Callable[..., Any]) -> None:
    region = capture_region(lambda x: torch.sort(x + 1, 1)[0] * 2, torch.zeros(3, 5))
    with pytest.raises(RegionError, match="sort") as caught:
        region.compile()
    assert caught.value.__cause__ is not None
    refused = unsupported_nodes(region.module, _shapes(*region.inputs))
    assert [str(node.target) for node, _ in refused] == ["aten.sort.default"]
    assert refused[0][1]


def test_errors_of_tvm_are_not_shown(
    capture_region: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    for function in (torch.lgamma, torch.linalg.inv):
        with pytest.raises(RegionError) as caught:
            capture_region(function, torch.eye(3)).compile()
        assert caught.value.problem == "TVM has no lowering for it"
        del caught
    gc.collect()
    assert "Warning" not in capfd.readouterr().err


def test_a_wrong_type_is_refused(
    capture_region: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importer, "prepare_operands", lambda traced: None)
    region = capture_region(lambda x: x * 0.25, torch.arange(7).reshape(7, 1))
    with pytest.raises(RegionError, match=r"aten\.mul\.Tensor as int64\[7, 1\], torch as float32"):
        region.compile()


@pytest.mark.parametrize("wild", [-(1 << 40), -1, 5, 1 << 40])
def test_wild_indices_stay_inside(
    wild: int, capture_region: Callable[..., Any], make_runner: Callable[..., Any]
) -> None:
    x, index = torch.arange(15.0).reshape(3, 5), torch.zeros(3, 2, dtype=torch.int64)
    region = capture_region(lambda x, i: (x.gather(1, i), x.scatter(1, i, 2.0)), x, index)
    region.inputs[1][:] = wild
    inside = index.clamp(0, 4)
    gathered, scattered = make_runner({"wild": region.compile()}).run("wild", region, 1)
    np.testing.assert_array_equal(gathered, x.gather(1, inside).numpy())
    np.testing.assert_array_equal(scattered, x.scatter(1, inside, 2.0).numpy())


def test_many_outputs_compile_quickly(
    capture_region: Callable[..., Any], make_runner: Callable[..., Any]
) -> None:
    def many(x: Any) -> Any:
        return (
            F.rms_norm(F.silu(x), (8,)), F.glu(x), F.gelu(x, approximate="tanh"), F.mish(x),
            F.logsigmoid(x), F.normalize(x), F.hardtanh(x), F.selu(x), F.log_softmax(x, 1),
            torch.erf(x), x.abs().pow(1.7), x.std(1), x.norm(dim=1),
        )  # fmt: skip

    region = capture_region(many, torch.linspace(-2, 2, 16).reshape(2, 8))
    start = time.perf_counter()
    results = make_runner({"many": region.compile()}).run("many", region, 1)
    assert time.perf_counter() - start < 15
    for result, wanted in zip(results, region.expected, strict=True):
        np.testing.assert_allclose(result, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_shared_parts_do_not_multiply(capture_region: Callable[..., Any]) -> None:
    def recurrence(x: Any) -> Any:
        state = x[:, :1] * 0.5
        for step in range(8):
            gates = torch.cat([state + x[:, step : step + 1], state * 2, state - 1, state], 1)
            state = gates[:, :1] * gates[:, 1:2] + gates[:, 2:3] * gates[:, 3:]
        return state

    start = time.perf_counter()
    capture_region(recurrence, torch.ones(2, 8)).compile()
    assert time.perf_counter() - start < 15


def test_a_supported_region_refuses_no_node(capture_region: Callable[..., Any]) -> None:
    region = capture_region(lambda x: x.split(2, 1)[0] + 1, torch.zeros(3, 5))
    assert unsupported_nodes(region.module, _shapes(*region.inputs)) == []


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_products_in_other_types_are_refused(
    dtype: torch.dtype, capture_region: Callable[..., Any]
) -> None:
    matrix = torch.ones(4, 4, dtype=dtype)
    with pytest.raises(RegionError, match="float32"):
        capture_region(lambda x: x @ x, matrix).compile()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.bfloat16() * 2, "bfloat16"),
        (lambda x: torch.ops.aten.max_pool2d_with_indices(x, [2, 2]), "indices"),
        (lambda x: torch.grid_sampler_2d(x, x.new_zeros(1, 2, 2, 2), 0, 0, False), "differs"),
        (lambda x: x[x[..., 0] > 0].sum(), "run time|nonzero|mask|unbacked|index"),
    ],
)
def test_wrong_results_are_refused(
    function: Callable[..., Any], reason: str, capture_region: Callable[..., Any]
) -> None:
    with pytest.raises(RegionError, match=reason):
        capture_region(function, torch.ones(1, 3, 4, 4)).compile()


def test_equal_structure_shares_code(capture_region: Callable[..., Any]) -> None:
    def first(x: Any) -> Any:
        return (x + 1) * x

    def second(y: Any) -> Any:
        return (y + 1) * y

    x = torch.zeros(3, 5)
    assert capture_region(first, x).compile() is capture_region(second, x).compile()
    assert capture_region(first, x).compile() is not capture_region(first, x[:2]).compile()


def test_reshapes_cost_nothing(capture_region: Callable[..., Any]) -> None:
    code = capture_region(
        lambda x: (x.reshape(6, 4).unsqueeze(1), (x + 1).flatten()), torch.zeros(2, 3, 4)
    ).compile()
    assert code.outputs == ("in0", "out1")
    assert [call.arguments for call in code.calls] == [("in0", "out1")]


def test_repeated_outputs_share_an_array(capture_region: Callable[..., Any]) -> None:
    def twice(x: Any) -> Any:
        y = x + 1
        return y, y.reshape(-1)

    assert capture_region(twice, torch.zeros(2, 3)).compile().outputs == ("out0", "out0")


def test_elementwise_chains_become_one_call(capture_region: Callable[..., Any]) -> None:
    code = capture_region(
        lambda x, y: ((x.transpose(1, 2) + y) * 2).relu().sum(1) / 3,
        torch.zeros(2, 5, 7),
        torch.zeros(7, 5),
    ).compile()
    assert len(code.calls) == 1
    assert not code.temporaries


def test_big_work_has_items_for_every_thread(capture_region: Callable[..., Any]) -> None:
    code = capture_region(lambda x: x * 2, torch.zeros(1, 1 << 20)).compile()
    assert code.calls[0].extent >= 8
    assert code.calls[0].operations >= 1 << 20


def test_special_values(capture_region: Any, make_runner: Any) -> None:
    values = [np.inf, -np.inf, np.nan, 0.0, -0.0, 90.0, -90.0, 1e-40, 3e38, -1.0, 88.0, 1.0] * 2
    x = torch.tensor(values)
    region = capture_region(lambda x: (x.exp(), x.log(), x.tanh(), x.sigmoid(), x.erf()), x)
    runner = make_runner({"special": region.compile()})
    for result, expected in zip(runner.run("special", region, 1), region.expected, strict=True):
        np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1.3e-38)


def test_missing_input_gives_the_error_of_the_region(capture_region: Callable[..., Any]) -> None:
    region = capture_region(lambda x, y: x + y, torch.zeros(3), torch.zeros(3))
    with pytest.raises(RegionError):
        compile_region(region.module, _shapes(region.inputs[0]))


_EXTENTS = st.integers(1, 21)


@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shape=st.tuples(_EXTENTS, _EXTENTS, _EXTENTS), order=st.permutations(range(3)), data=st.data()
)
def test_random_shapes(
    shape: tuple[int, ...],
    order: list[int],
    data: st.DataObject,
    capture_region: Any,
    make_runner: Any,
) -> None:
    axis = data.draw(st.integers(0, 2))
    start = data.draw(st.integers(0, shape[axis] - 1))

    def function(x: Any) -> Any:
        cut = x.narrow(axis, start, shape[axis] - start)
        joined = torch.cat([cut, x, cut + 1], axis).permute(*order)
        return joined.reshape(-1), joined.sum(axis), torch.softmax(joined, axis)

    region = capture_region(function, torch.randn(*shape))
    runner = make_runner({"random": region.compile()})
    for pieces in (1, 3):
        for result, expected in zip(
            runner.run("random", region, pieces), region.expected, strict=True
        ):
            np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5, atol=1e-5)
