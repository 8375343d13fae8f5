from dataclasses import dataclass

from torch import fx, nn

from shohin.ir.program import Program
from shohin.passes.analysis import AnalysisCache


@dataclass(frozen=True)
class Count:
    """Number of nodes."""

    nodes: int


def count(program: Program) -> Count:
    return Count(len(program.graph.nodes))


def other(program: Program) -> Count:
    return Count(0)


def make() -> Program:
    return Program(fx.symbolic_trace(nn.Sequential(nn.ReLU())), ())


def test_a_result_is_computed_once() -> None:
    cache, program = AnalysisCache(), make()
    first = cache.get(count, program)
    assert first == Count(3)
    assert cache.get(count, program) is first


def test_another_program_computes_anew() -> None:
    cache, program = AnalysisCache(), make()
    first = cache.get(count, program)
    assert cache.get(count, program.copy()) is not first


def test_only_preserved_results_are_carried_over() -> None:
    cache, program = AnalysisCache(), make()
    kept, dropped = cache.get(count, program), cache.get(other, program)
    rewritten = program.copy()
    cache.carry_over(rewritten, frozenset({"count"}))
    assert cache.names() == {"count"}
    assert cache.get(count, rewritten) is kept
    assert cache.get(other, rewritten) is not dropped


def test_rebinding_carries_everything_over() -> None:
    cache, program = AnalysisCache(), make()
    first, copy = cache.get(count, program), program.copy()
    cache.rebind(copy)
    assert cache.get(count, copy) is first


def test_clearing_forgets_everything() -> None:
    cache, program = AnalysisCache(), make()
    first = cache.get(count, program)
    cache.clear()
    assert cache.names() == frozenset()
    assert cache.get(count, program) is not first
