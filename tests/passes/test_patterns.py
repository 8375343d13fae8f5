from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from shohin.errors import PassError
from shohin.ir.annotations import ActivationFormat, Origin, annotate, annotation
from shohin.ir.capture import capture
from shohin.ir.program import Program, tensor_of
from shohin.passes.base import Context
from shohin.passes.patterns import (
    Change,
    Match,
    NoMatch,
    Rewriter,
    Rule,
    apply_rules,
    argument,
    constant_weight,
    is_call,
    producer,
    single_user,
    weight_name,
)
from shohin.passes.remarks import NodeCost, Outcome, Reason

aten = torch.ops.aten
RELU = frozenset({aten.relu.default})


class Network(nn.Module):
    """Three ReLUs in a row, and a weight that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.conv = nn.Conv1d(1, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(torch.relu(torch.relu(self.first(x))))
        z: Tensor = self.conv(self.first(y).unsqueeze(1))
        return torch.relu(z)


@cache
def _captured() -> Program:
    return capture(Network().eval(), (torch.ones(2, 4),))


@pytest.fixture
def program() -> Program:
    return _captured().copy()


def node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(one for one in program.graph.nodes if one.name == name)
    return found


def run(program: Program) -> Tensor:
    output: Tensor = program.module(torch.linspace(-1, 1, 8).reshape(2, 4))
    return output.detach()


class DropDoubleRelu(Rule):
    roots = RELU

    def match(self, node: fx.Node) -> Match | NoMatch:
        inner = producer(node, "self", RELU)
        if inner is None:
            return NoMatch(Reason.NOT_APPLICABLE, "its input is no ReLU")
        return Match(node, {"inner": inner})

    def rewrite(self, match: Match, rewriter: Rewriter) -> Change | None:
        rewriter.replace_uses(match.root, match.nodes["inner"])
        rewriter.erase(match.root)
        return Change("dropped", "twice is once", NodeCost(1), NodeCost(0))


class Pinned(DropDoubleRelu):
    """Makes of every ReLU another ReLU."""

    def match(self, node: fx.Node) -> Match | NoMatch:
        return Match(node)

    def rewrite(self, match: Match, rewriter: Rewriter) -> Change | None:
        made = rewriter.call(aten.relu.default, match.root.args[0], replaces=match.root)
        rewriter.replace_uses(match.root, made)
        rewriter.erase(match.root)
        return None


def test_rules_apply_until_none_does_and_remark_every_decision(program: Program) -> None:
    before, context = run(program), Context(pass_name="toy")
    assert apply_rules(program, [DropDoubleRelu()], context) == 2
    assert torch.equal(run(program), before)
    assert [(r.node, r.outcome, r.reason, r.detail) for r in context.remarks] == [
        ("relu_1", Outcome.CHANGED, "dropped", "twice is once"),
        ("relu_2", Outcome.CHANGED, "dropped", "twice is once"),
        ("relu", Outcome.SKIPPED, "not-applicable", "its input is no ReLU"),
        ("relu_3", Outcome.SKIPPED, "not-applicable", "its input is no ReLU"),
    ]
    assert {remark.pass_name for remark in context.remarks} == {"toy"}
    assert (context.remarks[0].before, context.remarks[0].after) == (NodeCost(1), NodeCost(0))
    assert apply_rules(program, [DropDoubleRelu()], Context(pass_name="toy")) == 0


def test_sites_that_are_not_allowed_are_left_and_remarked(program: Program) -> None:
    context = Context(pass_name="toy", site_filter=lambda name: name != "relu_1")
    assert apply_rules(program, [DropDoubleRelu()], context) == 1
    skipped = {r.node: r.reason for r in context.remarks if r.outcome is Outcome.SKIPPED}
    assert skipped["relu_1"] == Reason.EXCLUDED_BY_OPTION


def test_analyses_are_forgotten_only_when_something_was_rewritten(program: Program) -> None:
    calls: list[Program] = []

    def count_nodes(program: Program) -> int:
        calls.append(program)
        return len(program.graph.nodes)

    context = Context(pass_name="toy")
    before = context.analyses.get(count_nodes, program)
    apply_rules(program, [], context)
    assert context.analyses.get(count_nodes, program) == before
    assert len(calls) == 1
    apply_rules(program, [DropDoubleRelu()], context)
    assert context.analyses.get(count_nodes, program) == before - 2


def test_endless_rewriting_names_the_rule(program: Program) -> None:
    limit = 10 * len(program.graph.nodes) + 100
    message = (
        rf"pass 'toy', rule 'Pinned': rewrote {limit} times, last at node 'relu_\d+', "
        r"without an end; a rule must not match what it, or another rule, has made"
    )
    with pytest.raises(PassError, match=message):
        apply_rules(program, [DropDoubleRelu(), Pinned()], Context(pass_name="toy"))


def test_a_made_node_keeps_metadata_and_says_where_it_comes_from(program: Program) -> None:
    rewriter, linear = Rewriter(program, "toy"), node(program, "linear")
    annotate(linear, ActivationFormat(8, 4))
    parts = (linear.args[0], linear.args[1], linear.args[2])
    made = rewriter.call(aten.linear.default, *parts, replaces=[linear, node(program, "relu")])
    assert annotation(made, Origin) == Origin("first", "Linear", "toy", ("linear", "relu"))
    assert annotation(made, ActivationFormat) == ActivationFormat(8, 4)
    assert made.meta["stack_trace"] == linear.meta["stack_trace"]
    assert annotation(linear, Origin) == Origin("first", "Linear")
    again = Rewriter(program, "later").call(aten.relu.default, made, replaces=made, before=linear)
    assert annotation(again, Origin) == Origin("first", "Linear", "later", ("linear", "relu"))


def test_replacing_uses_leaves_the_new_node_itself_alone(program: Program) -> None:
    rewriter, linear = Rewriter(program, "toy"), node(program, "linear")
    made = rewriter.call(aten.relu.default, linear, replaces=linear, before=node(program, "relu"))
    rewriter.replace_uses(linear, made)
    assert list(linear.users) == [made]
    program.graph.lint()


def test_erasing_refuses_nodes_with_outside_users(program: Program) -> None:
    rewriter, relu, relu_1 = (
        Rewriter(program, "toy"),
        node(program, "relu"),
        node(program, "relu_1"),
    )
    before = str(program.graph)
    with pytest.raises(PassError) as caught:
        rewriter.erase(relu, relu_1)
    assert str(caught.value) == (
        "pass 'toy', node 'relu_1': cannot be erased: outside of the pattern it is used by 'relu_2'"
    )
    assert str(program.graph) == before
    rewriter.replace_uses(relu_1, node(program, "linear"))
    rewriter.erase(relu_1, relu)
    assert rewriter.is_erased(relu)
    program.graph.lint()


@pytest.mark.parametrize("kind", ["placeholder", "output"])
def test_erasing_refuses_the_ends_of_the_graph(program: Program, kind: str) -> None:
    end = next(one for one in program.graph.nodes if one.op == kind)
    with pytest.raises(PassError) as caught:
        Rewriter(program, "toy").erase(end)
    expected = f"pass 'toy', node '{end.name}': cannot be erased: it is the graph's {kind}"
    assert str(caught.value) == expected


def test_added_weights_get_free_names(program: Program) -> None:
    rewriter, linear = Rewriter(program, "toy"), node(program, "linear")
    names = ("first.weight", "first.scale", "other.part.scale")
    made = [rewriter.add_weight(name, torch.ones(4), replaces=linear) for name in names]
    targets = ["first.weight_1", "first.scale", "other.part.scale"]
    assert [one.target for one in made] == targets
    assert all(torch.equal(tensor_of(program.module, name), torch.ones(4)) for name in targets)
    assert annotation(made[1], Origin) == Origin("first", "Linear", "toy", ("linear",))


def test_a_shared_weight_is_replaced_for_all_its_users_or_not_at_all(program: Program) -> None:
    rewriter, linear = Rewriter(program, "toy"), node(program, "linear")
    reader = argument(linear, "weight")
    old = tensor_of(program.module, "first.weight")
    with pytest.raises(PassError) as caught:
        rewriter.set_weight(reader, torch.zeros(4, 4), [linear])
    assert str(caught.value) == (
        f"pass 'toy', node '{reader.name}': weight 'first.weight' cannot be replaced: "
        "outside of the pattern it is used by 'linear_1'"
    )
    assert tensor_of(program.module, "first.weight") is old
    rewriter.set_weight(reader, torch.zeros(4, 4), [linear, node(program, "linear_1")])
    assert not tensor_of(program.module, "first.weight").any()


def test_arguments_are_found_however_they_were_passed(program: Program) -> None:
    conv = node(program, "conv1d")
    assert argument(conv, "stride") == [2]
    assert argument(conv, "groups") == 1
    assert argument(conv, "no_such", "given") == "given"
    conv.args, conv.kwargs = conv.args[:3], {"stride": [3]}
    assert argument(conv, "stride") == [3]
    assert argument(node(program, "output"), "stride", 7) == 7
    assert argument(node(program, "relu"), "self") is node(program, "linear")


@pytest.mark.parametrize(
    ("helper", "name", "expected"),
    [
        (lambda one: is_call(one, RELU), "relu", True),
        (lambda one: is_call(one, RELU), "linear", False),
        (lambda one: producer(one, "self", RELU), "relu", None),
        (lambda one: single_user(one), "conv1d", "relu_3"),
        (lambda one: weight_name(one), "linear", None),
        (lambda one: weight_name(one.args[1]), "linear", "first.weight"),
        (lambda one: constant_weight(one), "linear", None),
        (lambda one: single_user(one.args[1]), "linear", None),
    ],
)
def test_matching_helpers(
    program: Program, helper: Callable[[fx.Node], object], name: str, expected: object
) -> None:
    found = helper(node(program, name))
    assert (found.name if isinstance(found, fx.Node) else found) == expected


def test_constant_weights_are_detached(program: Program) -> None:
    found = constant_weight(argument(node(program, "linear"), "weight"))
    assert found is not None
    assert not found.requires_grad
    assert torch.equal(found, tensor_of(program.module, "first.weight"))
