import torch
from torch import nn

from shohin.ir.capture import capture
from shohin.passes.patterns import Rewriter
from shohin.passes.prefixes import Prefixes

_CONVOLUTION = torch.ops.aten.conv2d.default


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3)]
    return capture(nn.Sequential(*layers).eval(), torch.randn(2, 2, 9, 9), name="net")


def place(program, number):
    nodes = list(program.graph.nodes)
    return nodes.index([node for node in nodes if node.target is _CONVOLUTION][number])


def split(program, number):
    """Put two convolutions in the place of one: the first moves channels around."""
    node = list(program.graph.nodes)[place(program, number)]
    rewriter = Rewriter(program, "test")
    data, weight, bias = node.args
    channels = program.module.get_parameter(str(weight.target)).shape[1]
    turn = torch.eye(channels).roll(1, 0)
    first = rewriter.add_weight("turn", turn.view(channels, channels, 1, 1), replaces=node)
    turned = program.module.get_parameter(str(weight.target)).detach().roll(1, 1)
    second = rewriter.add_weight("turned", turned, replaces=node)
    one = rewriter.call(_CONVOLUTION, data, first, replaces=node)
    two = rewriter.call(_CONVOLUTION, one, second, bias, replaces=node)
    rewriter.replace_uses(node, two)
    rewriter.erase(node)
    rewriter.erase(weight)
    program.module.recompile()
    return two


def test_it_goes_on_over_nodes_that_were_replaced():
    program = network()
    batches = [torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    with torch.no_grad():
        wanted = [program.module(batch) for batch in batches]
    prefixes = Prefixes(program.module, 1 << 20)
    for number in (0, 2, 4):
        for index, batch in enumerate(batches):
            prefixes.arrive(index, (batch,), place(program, number))
        split(program, number)
        prefixes.refresh()
        for index, batch in enumerate(batches):
            (found,) = prefixes.outputs(index, (batch,))
            assert torch.allclose(found, wanted[index], atol=1e-5)


def test_what_was_held_is_used_after_a_replacement():
    program = network()
    batch = torch.randn(4, 2, 9, 9)
    prefixes = Prefixes(program.module, 1 << 20)
    prefixes.arrive(0, (batch,), place(program, 1))
    split(program, 1)
    prefixes.refresh()
    with torch.no_grad():
        wanted = program.module(batch)
        # The first layer has run: what becomes of its weight now is of no consequence.
        program.module.get_parameter("0.weight").zero_()
    (found,) = prefixes.outputs(0, (batch,))
    assert torch.allclose(found, wanted, atol=1e-5)
