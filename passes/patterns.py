"""Pattern rewriting: rules, the rewriter that carries them out, and the driver.

A rule says at which operators it looks, matches by target and structure and never by name, gives
the reason when it does not match, and rewrites through the `Rewriter`, the only thing here that
changes a graph::

    class DropDoubleRelu(Rule):
        roots = frozenset({torch.ops.aten.relu.default})

        def match(self, node: fx.Node) -> Match | NoMatch:
            inner = producer(node, "self", self.roots)
            if inner is None:
                return NoMatch(Reason.NOT_APPLICABLE, "its input is no ReLU")
            return Match(node, {"inner": inner})

        def rewrite(self, match: Match, rewriter: Rewriter) -> None:
            rewriter.replace_uses(match.root, match.nodes["inner"])
            rewriter.erase(match.root)
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload

from shohin.errors import PassError
from shohin.ir.annotations import Origin, annotate, annotation
from shohin.ir.program import Program, is_tensor_name, readers, set_tensor, tensor_of
from shohin.passes.base import Context
from shohin.passes.remarks import NodeCost, Reason


@dataclass(frozen=True)
class Match:
    """A place where a rule applies.

    Attributes:
        root: the node that the rule was asked about.
        nodes: further nodes of the pattern, by the rule's names for them.
        values: what else the rewrite needs to know.
    """

    root: fx.Node
    nodes: Mapping[str, fx.Node] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoMatch:
    """Why a rule does not apply at a node that has one of its root operators.

    Attributes:
        reason: a `Reason` or a code of the rule's own.
        detail: one sentence for people.
    """

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Change:
    """What a rewrite did, for the remark.

    Attributes:
        code: short code, e.g. ``folded``.
        detail: one sentence for people.
        before: cost before, where it is known.
        after: cost after, where it is known.
    """

    code: str = "rewritten"
    detail: str = ""
    before: NodeCost | None = None
    after: NodeCost | None = None


class Rule(ABC):
    """One rewriting: where it looks, when it applies, what it does.

    Attributes:
        roots: the operators at which it is asked to match.
    """

    roots: frozenset[OpOverload]

    @property
    def name(self) -> str:
        """What the rule is called in errors; the class' name."""
        return type(self).__name__

    @abstractmethod
    def match(self, node: fx.Node) -> Match | NoMatch:
        """Decide whether the rule applies at a node; must not change anything."""

    @abstractmethod
    def rewrite(self, match: Match, rewriter: "Rewriter") -> Change | None:
        """Carry out the rewriting, through the rewriter only.

        Returns:
            What was done, or None for a plain ``rewritten``.
        """


class Rewriter:
    """The only mutator of a graph: keeps metadata and origins, refuses what would break it.

    Args:
        program: the program to edit in place.
        made_by: name of the pass on whose behalf nodes are made.
    """

    def __init__(self, program: Program, made_by: str) -> None:
        self.program = program
        self._made_by = made_by
        self._erased: set[fx.Node] = set()

    def call(
        self,
        target: OpOverload,
        *arguments: Any,
        replaces: fx.Node | Sequence[fx.Node],
        before: fx.Node | None = None,
        **options: Any,
    ) -> fx.Node:
        """Make a node that calls an operator.

        Args:
            target: the operator.
            *arguments: its positional arguments, nodes or constants.
            replaces: the nodes that the new one stands for. It takes over the metadata and
                annotations of the first, whose value it computes.
            before: the node before which it is put; the first replaced one by default.
            **options: its keyword arguments.
        """
        replaced = _as_nodes(replaces)
        name = target._schema.name.rpartition("::")[2]
        with self.program.graph.inserting_before(before or replaced[0]):
            made = self.program.graph.create_node("call_function", target, arguments, options, name)
        made.meta = dict(replaced[0].meta)
        self._mark(made, replaced)
        return made

    def add_weight(
        self,
        stem: str,
        value: Tensor,
        *,
        replaces: fx.Node | Sequence[fx.Node],
        before: fx.Node | None = None,
    ) -> fx.Node:
        """Add a parameter or buffer and make a node that reads it.

        Args:
            stem: its dotted name; a number is appended where that is taken.
            value: its value.
            replaces: the nodes that the new one stands for.
            before: the node before which it is put; the first replaced one by default.
        """
        replaced, name = _as_nodes(replaces), self._free_name(stem)
        set_tensor(self.program.module, name, value)
        with self.program.graph.inserting_before(before or replaced[0]):
            made = self.program.graph.get_attr(name)
        self._mark(made, replaced)
        return made

    def set_weight(self, reader: fx.Node, value: Tensor, users: Collection[fx.Node]) -> None:
        """Replace the value of the weight that a node reads.

        Args:
            reader: the ``get_attr`` node.
            value: the new value.
            users: the nodes that are meant to see the new value.

        Raises:
            PassError: when other nodes use the same weight.
        """
        name = str(reader.target)
        seen = dict.fromkeys(readers(self.program, name))
        outside = [user for user in seen if user not in users]
        if outside:
            raise self._refusal(reader, f"weight '{name}' cannot be replaced", outside)
        set_tensor(self.program.module, name, value)

    def replace_uses(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of one node use another instead; the new node itself is left as is."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def erase(self, *nodes: fx.Node) -> None:
        """Erase nodes, in any order.

        Raises:
            PassError: when a node outside the given ones uses one of them, or when one of them is
                an input or the output. Nothing is erased then.
        """
        for node in nodes:
            self._check_erasable(node, nodes)
        position = {node: index for index, node in enumerate(self.program.graph.nodes)}
        for node in sorted(set(nodes), key=position.__getitem__, reverse=True):
            self.program.graph.erase_node(node)
            self._erased.add(node)

    def is_erased(self, node: fx.Node) -> bool:
        """Whether this rewriter has erased the node."""
        return node in self._erased

    def _check_erasable(self, node: fx.Node, erased: Collection[fx.Node]) -> None:
        if node.op in ("placeholder", "output"):
            raise self._refusal(node, f"cannot be erased: it is the graph's {node.op}", ())
        outside = [user for user in node.users if user not in erased]
        if outside:
            raise self._refusal(node, "cannot be erased", outside)

    def _refusal(self, node: fx.Node, problem: str, users: Collection[fx.Node]) -> PassError:
        names = " and ".join(f"'{user.name}'" for user in users)
        problem = f"{problem}: outside of the pattern it is used by {names}" if names else problem
        return PassError(f"pass '{self._made_by}', node '{node.name}'", problem)

    def _mark(self, made: fx.Node, replaced: Sequence[fx.Node]) -> None:
        origins = [annotation(node, Origin) or Origin("") for node in replaced]
        names = [
            name
            for node, origin in zip(replaced, origins, strict=True)
            for name in (origin.replaced if origin.made_by else (node.name,))
        ]
        source = next((origin for origin in origins if origin.module), origins[0])
        annotate(
            made,
            Origin(source.module, source.module_type, self._made_by, tuple(dict.fromkeys(names))),
        )

    def _free_name(self, stem: str) -> str:
        name, number = stem, 0
        while _is_taken(self.program, name):
            number += 1
            name = f"{stem}_{number}"
        return name


def apply_rules(program: Program, rules: Sequence[Rule], context: Context) -> int:
    """Apply rules in graph order, again and again, until none applies any more.

    The program's module is edited in place and recompiled. Every rewriting and, once nothing
    applies any more, every node at which a rule did not match is remarked.

    Args:
        program: the program to rewrite.
        rules: the rules; at one node they are tried in this order.
        context: where remarks go, and which sites may be changed.

    Returns:
        Number of rewritings.

    Raises:
        PassError: when rewriting does not end, naming the rule.
    """
    driver = _Driver(program, rules, context)
    while driver.sweep():
        pass
    driver.remark_misses()
    if driver.rewritings:
        context.analyses.clear()
        program.graph.lint()
        program.module.recompile()
    return driver.rewritings


class _Driver:
    def __init__(self, program: Program, rules: Sequence[Rule], context: Context) -> None:
        self._program = program
        self._rules = rules
        self._context = context
        self._rewriter = Rewriter(program, context.pass_name)
        self._misses: dict[tuple[fx.Node, int], NoMatch] = {}
        self._counts: Counter[int] = Counter()
        # Enough for every rule to rewrite every node, and what it makes of it, several times.
        self._limit = 10 * len(program.graph.nodes) + 100

    @property
    def rewritings(self) -> int:
        return self._counts.total()

    def sweep(self) -> bool:
        """Visit every node once; tell whether anything was rewritten."""
        before = self.rewritings
        self._misses.clear()
        for node in list(self._program.graph.nodes):
            self._visit(node)
        return self.rewritings > before

    def _visit(self, node: fx.Node) -> None:
        for index, rule in enumerate(self._rules):
            if self._rewriter.is_erased(node):
                return
            if node.op == "call_function" and node.target in rule.roots:
                self._try(index, rule, node)

    def _try(self, index: int, rule: Rule, node: fx.Node) -> None:
        found = rule.match(node)
        if isinstance(found, Match) and not self._context.allows(node.name):
            found = NoMatch(Reason.EXCLUDED_BY_OPTION)
        if isinstance(found, NoMatch):
            self._misses[node, index] = found
        else:
            self._rewrite(index, rule, found)

    def _rewrite(self, index: int, rule: Rule, match: Match) -> None:
        self._counts[index] += 1
        if self._counts[index] > self._limit:
            raise PassError(
                f"pass '{self._context.pass_name}', rule '{rule.name}'",
                f"rewrote {self._limit} times, last at node '{match.root.name}', without an end",
                "a rule must not match what it, or another rule, has made",
            )
        change = rule.rewrite(match, self._rewriter) or Change()
        self._context.changed(
            match.root, change.code, change.detail, before=change.before, after=change.after
        )

    def remark_misses(self) -> None:
        """Remark what the last sweep did not match, in graph order."""
        for (node, _), miss in self._misses.items():
            self._context.skipped(node, miss.reason, miss.detail)


def is_call(node: object, targets: Collection[Any]) -> bool:
    """Whether a node, or a node's argument, calls one of the operators."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """An operator's argument by its schema name, however it was passed.

    Args:
        node: the call.
        name: the argument's name in the operator's schema.
        default: what to give when the operator has no such argument, or when it was not passed
            and the schema has no default.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    schema = getattr(node.target, "_schema", None)
    for position, declared in enumerate(schema.arguments if schema else ()):
        if declared.name == name and not declared.kwarg_only and position < len(node.args):
            return node.args[position]
        if declared.name == name:
            return declared.default_value if declared.has_default_value() else default
    return default


def producer(node: fx.Node, name: str, targets: Collection[Any]) -> fx.Node | None:
    """The node that gives an argument, when it calls one of the operators; None otherwise."""
    found = argument(node, name)
    return found if isinstance(found, fx.Node) and is_call(found, targets) else None


def single_user(node: fx.Node) -> fx.Node | None:
    """The only node that uses a node; None when there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def weight_name(node: object) -> str | None:
    """The dotted name of the weight that a ``get_attr`` node reads; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    module, name = node.graph.owning_module, str(node.target)
    return name if module is not None and is_tensor_name(module, name) else None


def constant_weight(node: object) -> Tensor | None:
    """The value of the weight that a ``get_attr`` node reads, detached; None for anything else."""
    name = weight_name(node)
    if name is None or not isinstance(node, fx.Node) or node.graph.owning_module is None:
        return None
    return tensor_of(node.graph.owning_module, name).detach()


def _as_nodes(nodes: fx.Node | Sequence[fx.Node]) -> Sequence[fx.Node]:
    return (nodes,) if isinstance(nodes, fx.Node) else nodes


def _is_taken(program: Program, name: str) -> bool:
    owner: object = program.module
    for part in name.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return True
