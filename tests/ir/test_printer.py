import operator
from dataclasses import replace

import torch
from torch import fx, nn

from shohin.ir import (
    ActivationFormat,
    InputSpec,
    Origin,
    Program,
    Sparse,
    annotate,
    format_node,
    format_program,
    tensor_of,
)

aten = torch.ops.aten


def test_golden_captured(program, golden):
    golden(format_program(program))


def test_golden_without_shapes(program, golden):
    golden(format_program(program, shapes=False))


def test_golden_annotated(program, golden):
    weight = tensor_of(program.module, "conv1.weight")
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 4 == 0
    node = program.graph.find_nodes(op="call_function", target=aten.conv2d.default)[0]
    annotate(node, ActivationFormat(8, 5))
    annotate(node, Origin("conv1", "Conv2d", "fold-bn", ("conv2d", "batch_norm")))
    golden(
        format_program(
            replace(program, encodings={"conv1.weight": Sparse.from_dense(weight, mask)})
        )
    )


def test_a_graph_that_cannot_run_is_printed_without_shapes(program):
    linear = next(node for node in program.graph.nodes if node.name == "linear")
    linear.args = (program.graph.find_nodes(op="placeholder")[0], *linear.args[1:])
    assert "\n  %linear = aten.linear(%image, @fc.weight, @fc.bias)" in format_program(program)


def test_arguments_of_every_sort():
    graph = fx.Graph()
    x = graph.placeholder("x")
    cat = graph.call_function(aten.cat.default, ([x, x], 1))
    parts = graph.call_function(aten.split.Tensor, (cat, 3, -1))
    part = graph.call_function(operator.getitem, (parts, 1))
    typed = graph.call_function(aten.to.dtype, (part, torch.int64), {"copy": True})
    filled = graph.call_function(
        aten.full.default, ([2], float("inf")), {"device": torch.device("cpu")}
    )
    graph.output((typed, filled))
    program = Program(
        fx.GraphModule(nn.Module(), graph), (InputSpec("x", ("N", 3), torch.float32),)
    )
    assert [format_node(node) for node in program.graph.nodes][1:] == [
        "%cat_default = aten.cat([%x, %x], dim=1)",
        "%split_tensor = aten.split.Tensor(%cat_default, split_size=3, dim=-1)",
        "%getitem = %split_tensor[1]",
        "%to_dtype = aten.to.dtype(%getitem, dtype=int64, copy=True)",
        "%full_default = aten.full(size=[2], fill_value=inf, device=cpu)",
        "return %to_dtype, %full_default",
    ]
