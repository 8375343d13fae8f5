"""Replace operators that write to their arguments."""

from dataclasses import dataclass
from typing import ClassVar

from shohin.ir import functional
from shohin.ir.program import Fact, Program
from shohin.passes.base import Context, Pass, PassResult


@dataclass(frozen=True, kw_only=True)
class MakeFunctional(Pass):
    """Replace operators that write to their arguments by ones that give a new tensor.

    Readers of what was written, views included, read the new tensor instead. Before::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
        %relu_ = aten.relu_(%linear)
        %add = aten.add.Tensor(%linear, 1)

    After::

        %linear = aten.linear(%x, @fc.weight, @fc.bias)
        %relu = aten.relu(%linear)
        %add = aten.add.Tensor(%relu, 1)
    """

    name: ClassVar[str] = "make-functional"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL})

    def run(self, program: Program, context: Context) -> PassResult:
        """Make every operator of the graph functional."""
        replaced = functional.make_functional(program.module, program.inputs)
        for node in replaced:
            context.changed(node, "made-functional", "gives a new tensor instead of writing")
        return PassResult(program, modified=bool(replaced))
