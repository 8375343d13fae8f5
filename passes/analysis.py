"""Analyses: facts computed from a program, lazily and once.

An analysis is a function from a program to a frozen dataclass. The cache computes it at first
use and forgets it when a pass modifies the program without preserving it. Results refer to nodes
by name, never by object, so that they hold for a copy of the program as well.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from shohin.ir.program import Program

Result = TypeVar("Result")
Analysis = Callable[[Program], Result]


class AnalysisCache:
    """Results of analyses of one program, by the analysis' name.

    A result belongs to the program object it was computed from; asking for another program's
    computes anew.
    """

    def __init__(self) -> None:
        self._results: dict[str, tuple[Program, Any]] = {}

    def get(self, analysis: Analysis[Result], program: Program) -> Result:
        """The analysis' result for this program, computed at first use."""
        name = analysis.__name__
        held = self._results.get(name)
        if held is None or held[0] is not program:
            held = (program, analysis(program))
            self._results[name] = held
        result: Result = held[1]
        return result

    def carry_over(self, program: Program, preserved: frozenset[str]) -> None:
        """Make preserved results those of a rewritten program and forget the others."""
        self._results = {
            name: (program, result)
            for name, (_, result) in self._results.items()
            if name in preserved
        }

    def rebind(self, program: Program) -> None:
        """Make every result that of an equal copy of the program."""
        self.carry_over(program, self.names())

    def names(self) -> frozenset[str]:
        """Names of the analyses whose results are held."""
        return frozenset(self._results)

    def clear(self) -> None:
        """Forget everything, as after an edit of the graph that a result was computed from."""
        self._results.clear()
