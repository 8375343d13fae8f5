"""Float graphs rewritten to fixed-point operators, formats still to be chosen."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from shohin.ir.fixed_ops import (
    FIXED_OPERATORS,
    fixed_add,
    fixed_average_pool2d,
    fixed_conv2d,
    fixed_linear,
    fixed_multiply,
    fixed_quantize,
)
from shohin.ir.fixed_point import Rounding
from shohin.ir.program import Program, readers, tensor_of, tied_names
from shohin.passes.analyses.shapes import shapes_at
from shohin.passes.base import Context
from shohin.passes.fixed.forms import (
    RELU,
    Average,
    Binary,
    Carry,
    Form,
    Join,
    Weighted,
    form_of,
)
from shohin.passes.patterns import (
    NoMatch,
    Rewriter,
    argument,
    is_call,
    single_user,
    weight_name,
)
from shohin.passes.remarks import Reason

_aten = torch.ops.aten
_UNDECIDED = {"bits": 32, "fraction": 0}
_BATCH = 13
"""A batch size that no other axis is likely to have: axes must not agree by chance."""


@dataclass(frozen=True, eq=False)
class Site:
    """A feature map whose format is to be chosen.

    Attributes:
        node: the operator that rounds, or the concatenation whose parts are rounded.
        source: name of the node of the float graph that computes the same.
        form: of the float operator; None for numbers that come from float operators or inputs.
    """

    node: fx.Node
    source: str
    form: Form | None

    @property
    def rounding_nodes(self) -> list[fx.Node]:
        """The operators that round to the site's format."""
        return _parts(self.node) if isinstance(self.form, Join) else [self.node]

    @property
    def rectifier(self) -> fx.Node | None:
        """The ReLU that alone reads the map, whose numbers then count; None where there is none."""
        user = single_user(self.node)
        return user if user is not None and is_call(user, {RELU}) else None


@dataclass
class FixedGraph:
    """A program whose graph has fixed-point operators.

    Attributes:
        program: the program; its graph was rewritten.
        sites: in graph order.
        carried: nodes that give the numbers of a feature map in its format.
    """

    program: Program
    sites: list[Site] = field(default_factory=list)
    carried: set[fx.Node] = field(default_factory=set)

    def feeds_integers(self, site: Site) -> bool:
        """Whether a fixed-point operator reads the feature map."""
        return any(_computes(user) for user in self._readers(site.node))

    def carriers(self, site: Site) -> list[fx.Node]:
        """The nodes that give numbers of the site, itself included."""
        found, waiting = [site.node], [site.node]
        while waiting:
            for user in waiting.pop().users:
                if user in self.carried and user not in found:
                    found.append(user)
                    waiting.append(user)
        return found

    def _readers(self, node: fx.Node) -> Iterator[fx.Node]:
        for user in node.users:
            yield user
            if user in self.carried:
                yield from self._readers(user)


def rewrite(
    program: Program,
    usable: Callable[[fx.Node, Weighted], NoMatch | None],
    rounding: Rounding,
    context: Context,
) -> FixedGraph:
    """Give operators their fixed-point forms.

    Every operator that has one gets it where its operands are, or can be made, fixed point: all
    convolutions and linear maps, and what lies between them. Others stay as they are; numbers that
    flow from them to the former are rounded on the way, and their own operands are the numbers
    that integers stand for.

    Args:
        program: edited in place.
        usable: says why a convolution or linear map is to stay as it is.
        rounding: of all operators.
        context: where remarks go.
    """
    return _Lowering(program, usable, rounding, context).run()


class _Lowering:
    def __init__(
        self,
        program: Program,
        usable: Callable[[fx.Node, Weighted], NoMatch | None],
        rounding: Rounding,
        context: Context,
    ) -> None:
        self._program = program
        self._usable = usable
        self._rounding = rounding
        self._context = context
        # Before anything is rewritten: shapes are those of the float graph.
        layouts = shapes_at(program, _BATCH)
        calls = [node for node in program.graph.nodes if node.op == "call_function"]
        self._forms = {node: form_of(node, layouts) for node in calls}
        self._rewriter = Rewriter(program, context.pass_name)
        self._result = FixedGraph(program)
        self._fixed: set[fx.Node] = set()
        self._quantized: dict[fx.Node, fx.Node] = {}

    def run(self) -> FixedGraph:
        for node in self._forms:
            self._visit(node)
        self._program.graph.lint()
        self._program.module.recompile()
        return self._result

    def _visit(self, node: fx.Node) -> None:
        form = self._form(node)
        if isinstance(form, NoMatch):
            self._context.skipped(node, form.reason, form.detail)
        elif isinstance(form, Weighted):
            self._place_weighted(node, form)
        elif isinstance(form, Carry):
            self._result.carried.add(node)
            self._fixed.add(node)
        elif isinstance(form, Join):
            self._place_join(node, form)
        elif isinstance(form, Binary):
            target = fixed_multiply if form.product else fixed_add
            operands = [argument(node, name) for name in ("self", "other")]
            self._replace(node, form, target, *operands)
        else:
            self._place_average(node, form)

    def _form(self, node: fx.Node) -> Form | NoMatch:
        found = self._forms[node]
        if isinstance(found, Weighted):
            problem = self._usable(node, found)
            return problem if problem is not None else found
        if isinstance(found, NoMatch):
            return found
        if not all(one in self._fixed for one in node.all_input_nodes):
            detail = "it is given numbers that no fixed-point operator computes"
            return NoMatch(Reason.NOT_APPLICABLE, detail)
        if isinstance(found, Join) and not self._feeds_integers(node):
            return NoMatch(Reason.NOT_APPLICABLE, "only floating-point operators read it")
        return found

    def _feeds_integers(self, node: fx.Node) -> bool:
        """Whether an operator with an integer form reads what a node gives, or passes on."""
        for user in node.users:
            form = self._forms.get(user)
            if isinstance(form, (Weighted, Binary, Average)):
                return True
            if isinstance(form, (Carry, Join)) and self._feeds_integers(user):
                return True
        return False

    def _place_weighted(self, node: fx.Node, form: Weighted) -> None:
        operation = form.operation
        target = fixed_linear if operation.linear else fixed_conv2d
        data = self._as_fixed(argument(node, "input"), node)
        bias = self._own_bias(operation.bias, node)
        operands = (data, operation.weight, bias, *form.options, [0], 0)
        self._replace(node, form, target, *operands)

    def _own_bias(self, bias: fx.Node | None, node: fx.Node) -> fx.Node | None:
        """A bias that nothing else reads: each has the radix of its own layer's sums."""
        name = weight_name(bias)
        if bias is None or name is None:
            return bias
        tied = next(names for names in tied_names(self._program) if name in names)
        reading = [reader for one in tied for reader in readers(self._program, one)]
        if len(reading) == 1:
            return bias
        value = tensor_of(self._program.module, name).detach().clone()
        return self._rewriter.add_weight(name, value, replaces=bias, before=node)

    def _place_join(self, node: fx.Node, form: Join) -> None:
        parts = [self._rounded(part, node) for part in _parts(node)]
        node.update_arg(0, parts)
        self._fixed.add(node)
        self._result.sites.append(Site(node, node.name, form))

    def _place_average(self, node: fx.Node, form: Average) -> None:
        data = argument(node, "self", argument(node, "input"))
        sizes = ([*form.kernel], [*form.stride], [*form.padding], 1, 0)
        if not form.flat:
            self._replace(node, form, fixed_average_pool2d, data, *sizes)
            return
        pooled = self._call(node, fixed_average_pool2d, data, *sizes)
        flat = self._rewriter.call(_aten.flatten.using_ints, pooled, 1, replaces=node)
        self._result.carried.add(flat)
        self._settle(node, form, pooled, flat)

    def _replace(self, node: fx.Node, form: Form, target: object, *operands: object) -> None:
        made = self._call(node, target, *operands)
        self._settle(node, form, made, made)

    def _call(self, node: fx.Node, target: object, *operands: object) -> fx.Node:
        options = {**_UNDECIDED, "rounding": self._rounding}
        return self._rewriter.call(target, *operands, replaces=node, **options)  # type: ignore[arg-type]

    def _settle(self, node: fx.Node, form: Form, made: fx.Node, result: fx.Node) -> None:
        self._result.sites.append(Site(made, node.name, form))
        self._fixed |= {made, result}
        self._rewriter.replace_uses(node, result)
        self._rewriter.erase(node)

    def _as_fixed(self, data: fx.Node, reader: fx.Node) -> fx.Node:
        """The numbers in fixed point: rounded, once for all who read them, where they are not."""
        if data in self._fixed:
            return data
        if data not in self._quantized:
            made = self._rounded(data, reader)
            self._quantized[data] = made
            self._result.sites.append(Site(made, data.name, None))
            self._fixed.add(made)
        return self._quantized[data]

    def _rounded(self, data: fx.Node, reader: fx.Node) -> fx.Node:
        options = {**_UNDECIDED, "rounding": self._rounding}
        return self._rewriter.call(fixed_quantize, data, replaces=data, before=reader, **options)


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in FIXED_OPERATORS


def _parts(node: fx.Node) -> list[fx.Node]:
    """What a concatenation joins."""
    parts: Any = node.args[0]
    return list(parts)
