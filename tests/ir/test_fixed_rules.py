import pytest
import torch
from torch import nn

import shohin
from shohin.errors import VerifyError
from shohin.ir.annotations import ActivationFormat, annotate, remove_annotation
from shohin.ir.capture import capture
from shohin.ir.fixed_ops import fixed_add, fixed_conv2d, fixed_quantize
from shohin.ir.program import tensor_of
from shohin.ir.verifier import verify


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        return self.head((x + x).flatten(1))


@pytest.fixture
def program():
    torch.manual_seed(0)
    x = torch.randn(4, 2, 4, 4)
    made = capture(Small(), (x,))
    return shohin.optimize(made, "fixed-point", calibration=[(x,)], drift=False).program


def node_of(program, target):
    return next(node for node in program.graph.nodes if node.target == target)


def conv_weight(program):
    return tensor_of(program.module, "conv.weight")


def test_a_fixed_point_program_is_valid(program):
    verify(program)


def test_the_annotation_says_what_the_arguments_say(program):
    annotate(node_of(program, fixed_conv2d), ActivationFormat(8, 0))
    text = (
        r"\[fixed-point\] expected the format <8 bits, fraction \d> of its arguments, found <8 bits"
    )
    with pytest.raises(VerifyError, match=text):
        verify(program)


def test_operands_have_formats(program):
    remove_annotation(node_of(program, torch.ops.aten.relu.default), ActivationFormat)
    assert node_of(program, fixed_add)
    text = r"node 'fixed_add'.*expected a format of 'relu', found none"
    with pytest.raises(VerifyError, match=text):
        verify(program)


def test_the_fraction_is_that_of_the_operand(program):
    quantize = node_of(program, fixed_quantize)
    quantize.update_kwarg("fraction", quantize.kwargs["fraction"] + 1)
    annotate(quantize, ActivationFormat(8, quantize.kwargs["fraction"]))
    text = r"expected the fraction \d of 'fixed_quantize', found input_fraction=\d"
    with pytest.raises(VerifyError, match=text):
        verify(program)


def test_weights_lie_on_their_grid(program):
    with torch.no_grad():
        conv_weight(program)[0, 0, 0, 0] += 1e-4
    with pytest.raises(VerifyError, match=r"expected 'conv\.weight' on its grid, found other"):
        verify(program, rules=["fixed-point"])


def test_biases_lie_on_the_grid_of_the_products(program):
    with torch.no_grad():
        tensor_of(program.module, "conv.bias")[0] += 1e-5
    text = r"expected 'conv\.bias' on the grid of the products"
    with pytest.raises(VerifyError, match=text):
        verify(program)


@pytest.mark.parametrize("fractions", [[3, 3], []])
def test_the_number_of_fractions(program, fractions):
    node_of(program, fixed_conv2d).update_arg(7, fractions)
    text = f"expected 1 weight fraction or 4, found {len(fractions)}"
    with pytest.raises(VerifyError, match=text):
        verify(program, rules=["fixed-point"])
