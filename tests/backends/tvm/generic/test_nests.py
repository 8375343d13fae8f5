"""Axes: splitting, merging, cutting; indices of reshapes; plans."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import tirx

from shohin.backends.tvm.generic.expressions import (
    Axis,
    analyzer_for,
    constant,
    new_axis,
    reshape_indices,
    substitute,
)
from shohin.backends.tvm.generic.nests import Nest, canonical, segments
from shohin.backends.tvm.generic.schedule import make_plan


def _nest(axes: list[Axis], place: Any, load: Any, guard: Any = None) -> Nest:
    source, target = (tirx.decl_buffer((4096,), "float32", name=name) for name in "xy")
    value = tirx.BufferLoad(source, [load])
    if guard is not None:
        value = tirx.if_then_else(guard, value, tirx.const(0.0, "float32"))
    return Nest(tuple(axes), (), target, place, value, None, None, None, "test")


def _extents(nest: Nest) -> list[int]:
    return [axis.extent for axis in nest.axes]


def test_axes_in_one_stride_merge() -> None:
    a, b, c = (new_axis(name, extent) for name, extent in [("a", 3), ("b", 5), ("c", 7)])
    place = (a.variable * 5 + b.variable) * 7 + c.variable
    assert _extents(canonical(_nest([a, b, c], place, place))) == [105]


def test_transposed_axes_do_not_merge() -> None:
    a, b = new_axis("a", 3), new_axis("b", 5)
    place, load = a.variable * 5 + b.variable, b.variable * 3 + a.variable
    assert _extents(canonical(_nest([a, b], place, load))) == [3, 5]


def test_an_axis_used_in_halves_is_split() -> None:
    a = new_axis("a", 12)
    load = tirx.floormod(a.variable, constant(4)) * 3 + tirx.floordiv(a.variable, constant(4))
    assert _extents(canonical(_nest([a], a.variable, load))) == [3, 4]


def test_unit_axes_go() -> None:
    a, b = new_axis("a", 1), new_axis("b", 5)
    place = a.variable * 5 + b.variable
    assert _extents(canonical(_nest([a, b], place, place))) == [5]


@pytest.mark.parametrize("cut", [1, 7, 39])
def test_conditions_on_the_innermost_axis_cut_it(cut: int) -> None:
    a = new_axis("a", 40)
    nest = _nest([a], a.variable, a.variable, constant(cut) <= a.variable)
    assert [_extents(part) for part in segments(nest)] == [[cut], [40 - cut]]


def test_a_condition_that_never_changes_cuts_nothing() -> None:
    a = new_axis("a", 40)
    nest = _nest([a], a.variable, a.variable, a.variable < constant(40))
    assert len(list(segments(nest))) == 1


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_reshape_indices_are_those_of_numpy(source: list[int], data: st.DataObject) -> None:
    size = math.prod(source)
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    first = data.draw(st.sampled_from(divisors))
    target = [first, size // first]
    axes = [new_axis(f"v{position}", extent) for position, extent in enumerate(source)]
    indices = reshape_indices([axis.variable for axis in axes], source, target)
    analyzer = analyzer_for([])
    positions = np.arange(size).reshape(source)
    for place in itertools.islice(np.ndindex(*source), 12):
        values = {a.variable: constant(int(i)) for a, i in zip(axes, place, strict=True)}
        found = [int(analyzer.simplify(substitute(index, values)).value) for index in indices]
        assert np.ravel_multi_index(found, target) == positions[place]


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.floats(0.5, 5000.0),
    st.sampled_from([1, 4, 8, 16]),
)
def test_plans_cover_every_step(extents: list[int], work: float, lanes: int) -> None:
    axes = [new_axis(f"v{position}", extent) for position, extent in enumerate(extents)]
    plan = make_plan(axes, work, lanes)
    covered = [*plan.outer, *([plan.chunked] if plan.chunked else []), *plan.inner]
    assert covered == axes
    assert plan.chunked is None or plan.chunks * plan.chunk >= plan.chunked.extent
    total = work * math.prod(extents)
    if total >= 1 << 14 and work * lanes <= 1 << 10:
        assert plan.extent >= 8
