"""Fewer stages: producers go into their consumers where that saves memory traffic.

A stage is inlined where recomputing it costs little more than loading what it stored; an
elementwise stage after a reduction becomes the reduction's epilogue.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import tirx

from shohin.backends.tvm.generic.expressions import (
    Expr,
    analyzer_for,
    buffers,
    cost,
    dtype_of,
    linear,
    loads,
    map_loads,
    reshape_indices,
    shape_of,
    substitute,
    variables,
)
from shohin.backends.tvm.generic.stages import LoopStage, Stage, Storage

_RECOMPUTATION = 8.0
"""Operations per element worth spending again to save a store and its loads."""

_LARGEST_EXPRESSION = 2000.0
"""Operations of a value beyond which nothing more is inlined: nested copies grow exponentially."""

AnyStage = Stage | LoopStage


def fuse(stages: list[AnyStage], storage: Storage, outputs: set[str]) -> list[AnyStage]:
    """Inline and merge stages until nothing changes.

    Args:
        stages: in order of execution.
        storage: their arrays.
        outputs: arrays that must be stored.
    """
    for position in range(len(stages)):
        stages = _inline(stages, position, storage, outputs)
    stages = _drop_dead(stages, storage, outputs)
    position = 0
    while position < len(stages):
        merged = _merge_epilogue(stages, position, storage, outputs)
        position += merged is None
        stages = stages if merged is None else merged
    return stages


def _reads(stage: AnyStage, storage: Storage) -> set[str]:
    nodes = stage.expressions() if isinstance(stage, Stage) else (stage.body,)
    return {storage.root(name) for name in buffers(*nodes)}


def _inline(
    stages: list[AnyStage], position: int, storage: Storage, outputs: set[str]
) -> list[AnyStage]:
    """Inline one stage into all its consumers, if that pays."""
    stage = stages[position]
    if not isinstance(stage, Stage) or stage.reduction or not stage.writes_whole_array_in_order():
        return stages
    name = stage.target.name
    users = [other for other in stages[position + 1 :] if name in _reads(other, storage)]
    if not users or not all(isinstance(user, Stage) for user in users):
        return stages
    if not _worth_repeating(stage, users, storage, kept=name in outputs):
        return stages
    if not all(_stays_small(stage, user, storage) for user in users):
        return stages
    later = [
        _with_producer(other, stage, storage) if other in users else other
        for other in stages[position + 1 :]
    ]
    return [*stages[: position + 1], *later]


def _worth_repeating(stage: Stage, users: list[Any], storage: Storage, kept: bool) -> bool:
    elements = math.prod(axis.extent for axis in stage.axes)
    demand = sum(_demand(user, stage.target.name, storage) for user in users)
    repeats = demand / max(elements, 1) - (0 if kept else 1)
    return cost(stage.value) * repeats <= _RECOMPUTATION


def _stays_small(stage: Stage, user: Any, storage: Storage) -> bool:
    """Whether the user's expressions keep a size that compilers handle, the stage put in."""
    expressions = user.expressions()
    names = [storage.root(load.source.name) for load in loads(*expressions)]
    count = names.count(stage.target.name)
    size = sum(cost(expression) for expression in expressions)
    return count <= 1 or size + count * cost(stage.value) <= _LARGEST_EXPRESSION


def _demand(user: Stage, name: str, storage: Storage) -> int:
    """How often a user evaluates its loads of an array, loop-invariant ones moved out."""
    axes = user.all_axes()
    total = 0
    for load in loads(*user.expressions()):
        if storage.root(load.source.name) == name:
            used = set().union(*(variables(index) for index in load.indices), set())
            depth = max((i + 1 for i, axis in enumerate(axes) if axis.variable in used), default=0)
            total += math.prod(axis.extent for axis in axes[:depth])
    return total


def _with_producer(user: Any, producer: Stage, storage: Storage) -> Stage:
    """The stage with its loads of the producer's array replaced by the value."""
    shape = shape_of(producer.target)
    analyzer = analyzer_for(user.all_axes())

    def replace_load(load: Any) -> Expr:
        if storage.root(load.source.name) != producer.target.name:
            return load
        source = shape_of(load.source)
        indices = list(load.indices)
        if source != shape:
            indices = [analyzer.simplify(i) for i in reshape_indices(indices, source, shape)]
        return substitute(producer.value, _bind(producer, indices))

    return _map_values(user, lambda value: map_loads(value, replace_load))


def _bind(stage: Stage, indices: list[Expr]) -> dict[Any, Expr]:
    """Values of the axes for an element of the target; unit axes are always at 0."""
    values = {axis.variable: tirx.const(0, dtype_of(axis.variable)) for axis in stage.axes}
    for own, index in zip(stage.indices, indices, strict=True):
        if isinstance(own, tirx.Var):
            values[own] = index
    return values


def _map_values(stage: Stage, change: Callable[[Expr], Expr]) -> Stage:
    epilogue = stage.epilogue and (stage.epilogue[0], change(stage.epilogue[1]))
    return replace(stage, value=change(stage.value), epilogue=epilogue)


def _drop_dead(stages: list[AnyStage], storage: Storage, outputs: set[str]) -> list[AnyStage]:
    needed = set(outputs)
    kept: list[AnyStage] = []
    for stage in reversed(stages):
        if isinstance(stage, Stage) and stage.target.name not in needed:
            continue
        kept.append(stage)
        needed |= _reads(stage, storage)
    return kept[::-1]


def _merge_epilogue(
    stages: list[AnyStage], position: int, storage: Storage, outputs: set[str]
) -> list[AnyStage] | None:
    """Merge a reduction with the only stage that uses its result, element by element."""
    stage = stages[position]
    if not isinstance(stage, Stage) or stage.reduction is None or stage.epilogue:
        return None
    name = stage.target.name
    users = [i for i, other in enumerate(stages) if i > position and name in _reads(other, storage)]
    if name in outputs or len(users) != 1:
        return None
    user = stages[users[0]]
    between = stages[position + 1 : users[0]]
    if not isinstance(user, Stage) or not _reads_in_order(user, stage, storage):
        return None
    merged = _with_epilogue(stage, user, storage)
    return [*stages[:position], *between, merged, *stages[users[0] + 1 :]]


def _reads_in_order(user: Stage, stage: Stage, storage: Storage) -> bool:
    """Whether element i of the user's target needs element i of the reduction only."""
    if user.reduction or not user.writes_whole_array_in_order():
        return False
    if not stage.writes_whole_array_in_order():
        return False
    shape = shape_of(user.target)
    if math.prod(shape) != math.prod(shape_of(stage.target)):
        return False
    analyzer = analyzer_for(user.axes)
    place = linear(user.indices, shape)
    return all(
        analyzer.can_prove_equal(linear(load.indices, shape_of(load.source)), place)
        for load in loads(user.value)
        if storage.root(load.source.name) == stage.target.name
    )


def _with_epilogue(stage: Stage, user: Stage, storage: Storage) -> Stage:
    total = tirx.Var("total", dtype_of(stage.value))
    analyzer = analyzer_for(stage.axes)
    indices = reshape_indices(stage.indices, shape_of(stage.target), shape_of(user.target))
    places = _bind(user, [analyzer.simplify(index) for index in indices])

    def replace_load(load: Any) -> Expr:
        return total if storage.root(load.source.name) == stage.target.name else load

    value = substitute(map_loads(user.value, replace_load), places)
    return replace(
        stage,
        target=user.target,
        indices=tuple(indices),
        epilogue=(total, value),
        label=f"{stage.label}_{user.label}" if stage.label != user.label else stage.label,
    )
