import torch
from torch import fx

from shohin.ir import (
    dead_nodes,
    immediate_dominators,
    immediate_post_dominators,
    reachable_from_inputs,
    schedule_order,
    to_networkx,
    topological_generations,
)

aten = torch.ops.aten


def make_diamond() -> dict[str, fx.Node]:
    """An input that splits into two branches which meet; one constant; two dead nodes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    unused = graph.placeholder("unused")
    weight = graph.get_attr("weight")
    stem = graph.call_function(aten.relu.default, (x,), name="stem")
    left = graph.call_function(aten.neg.default, (stem,), name="left")
    right = graph.call_function(aten.mul.Tensor, (stem, weight), name="right")
    lost = graph.call_function(aten.neg.default, (left,), name="lost")
    more = graph.call_function(aten.neg.default, (lost,), name="more")
    join = graph.call_function(aten.add.Tensor, (left, right), name="join")
    output = graph.output(join)
    nodes = (x, unused, weight, stem, left, right, lost, more, join, output)
    return {node.name: node for node in nodes}


def _names(nodes) -> list[str]:
    return [node.name for node in nodes]


def test_edges_go_from_values_to_their_users():
    nodes = make_diamond()
    flow = to_networkx(nodes["x"].graph)
    assert set(flow.successors(nodes["stem"])) == {nodes["left"], nodes["right"]}
    assert len(flow) == len(nodes)


def test_constants_are_not_reachable_from_inputs():
    nodes = make_diamond()
    reached = reachable_from_inputs(nodes["x"].graph)
    assert set(nodes.values()) - reached == {nodes["weight"]}


def test_dead_nodes_come_users_first():
    graph = make_diamond()["x"].graph
    assert _names(dead_nodes(graph)) == ["more", "lost"]
    for node in dead_nodes(graph):
        graph.erase_node(node)
    assert dead_nodes(graph) == []


def test_dominators():
    nodes = make_diamond()
    above = immediate_dominators(nodes["x"].graph)
    assert above[nodes["join"]] is nodes["stem"]
    assert above[nodes["x"]] is None
    assert nodes["weight"] not in above


def test_post_dominators():
    nodes = make_diamond()
    below = immediate_post_dominators(nodes["x"].graph)
    assert below[nodes["stem"]] is nodes["join"]
    assert below[nodes["output"]] is None
    assert nodes["lost"] not in below


def test_generations_depend_on_earlier_ones_only():
    graph = make_diamond()["x"].graph
    layers = [_names(layer) for layer in topological_generations(graph)]
    assert layers[:3] == [["x", "unused", "weight"], ["stem"], ["left", "right"]]


def test_schedule_keeps_the_order_where_it_can():
    graph = make_diamond()["x"].graph
    assert schedule_order(graph) == list(graph.nodes)
