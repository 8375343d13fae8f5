"""Which operators get an integer form, and why others stay."""

import warnings

import pytest
import torch
from fixed_networks import fixed, images, network, nodes_of
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import PassError, ShohinWarning
from shohin.ir.capture import capture
from shohin.ir.fixed_ops import fixed_conv2d, fixed_linear
from shohin.ir.program import tensor_of
from shohin.passes.remarks import Outcome, Reason


class Mixed(nn.Module):
    """Operators without an integer form between convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.two(torch.sigmoid(self.one(x)) * 2).exp()


def test_operators_without_an_integer_form_stay_between_conversions():
    result = fixed(network(Mixed))
    kinds = [
        str(node.target).removeprefix("shohin.").removeprefix("aten.").partition(".")[0]
        for node in result.program.graph.nodes
        if node.op == "call_function"
    ]
    expected = ["fixed_quantize", "fixed_conv2d", "sigmoid", "mul"]
    assert kinds == [*expected, "fixed_quantize", "fixed_conv2d", "exp"]
    skipped = {r.node: r for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert skipped["sigmoid"].reason == Reason.UNSUPPORTED_OPERATOR
    assert skipped["sigmoid"].detail == "aten.sigmoid.default has no integer form"
    assert skipped["mul"].detail == "one operand is a number"


class Alone(nn.Module):
    """Operators with an integer form that are given none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.layer((x + x.exp()).relu())


def test_operators_that_are_given_real_numbers_stay():
    result = fixed(network(Alone))
    reasons = {r.node: (r.reason, r.detail) for r in result.report.remarks if r.node}
    expected = (Reason.NOT_APPLICABLE, "it is given numbers that no fixed-point operator computes")
    assert reasons["add"] == reasons["relu"] == expected


class Odd(nn.Module):
    """Averages, sums and weights that integers do not have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 4, 3)
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        a = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        b = functional.adaptive_avg_pool2d(x, 3)
        c = torch.add(x, x, alpha=2) + self.shift
        d = self.line(x.flatten(2))
        return a.mean() + b.mean() + c.mean() + d.mean() + x.mean(1).mean()


def test_reasons_of_what_stays():
    result = fixed(network(Odd))
    details = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert details["avg_pool2d"] == "windows at the border have other sizes"
    assert details["adaptive_avg_pool2d"] == "its windows have different sizes"
    assert details["add"] == "its second operand has a factor"
    assert details["add_1"] == "its operands have shapes [N, 4, 8, 8] and [1, 4, 1, 1]"
    assert details["conv1d"] == "aten.conv1d.default has no integer form"
    assert "it is no mean over the pixels of images" in details.values()


def test_layers_that_are_left_out():
    program = network()
    with torch.no_grad():
        tensor_of(program.module, "right.weight")[0, 0] = float("inf")
    for encoding in ({"exclude": '["left.*"]'},):
        ((option, value),) = encoding.items()
        result = shohin.optimize(
            network(), f"fixed-point{{{option}={value}}}", calibration=[(images(),)], drift=False
        )
    skipped = {r.node: (r.reason, r.detail) for r in result.report.remarks if r.node}
    expected = (Reason.EXCLUDED_BY_OPTION, "left.weight matches the option 'exclude'")
    assert skipped["conv2d_1"] == expected
    assert "left.weight" not in result.program.encodings
    with pytest.raises(PassError, match="NaN or infinite on the calibration data"):
        fixed(program)


class Positions(nn.Module):
    """Constants among the operands, one with an axis of 1 where examples are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.place = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        y = self.a(x.flatten(2)[:, 0, :6])
        y = y + self.place
        y = y * y[:1]
        return self.b(torch.cat([y, self.place.expand(2, 4)], 0))


def test_sums_and_products_over_examples_stay():
    result = fixed(network(Positions, images(2)))
    reasons = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert "operands have shapes" in reasons["add"]
    assert len(nodes_of(result.program, fixed_linear)) == 2
    assert {"mul", "cat"} <= set(reasons)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.table = nn.Parameter(torch.randn(2, 4, 8, 8))

    def forward(self, x):
        return self.b(torch.cat([self.a(x), self.table], 1))


def test_constants_among_feature_maps_are_rounded_where_a_layer_reads_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        program = capture(Table().eval(), (images(2),), name="net", dynamic_batch=False)
    result = fixed(program, batches=[(images(2),)])
    reasons = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert reasons["cat"] == "it is given numbers that no fixed-point operator computes"
    assert len(nodes_of(result.program, fixed_conv2d)) == 2


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda y: functional.avg_pool2d(y[:, 0], 2), "its input is no batch of images"),
        (lambda y: functional.adaptive_avg_pool2d(y[:, 0], 4), "its input is no batch of images"),
        (lambda y: functional.avg_pool2d(y, 2, divisor_override=-3), "it divides by -3"),
    ],
)
def test_averages_without_an_integer_form(make, detail):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(make(self.a(x)))

    result = fixed(network(Pooled))
    details = {r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert detail in details


class Heads(nn.Module):
    """Two results joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return torch.cat([self.b(y), self.c(y)], 1)


def test_joined_results_are_not_rounded():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    result = fixed(network(Heads, x), batches=[(x,)])
    last = nodes_of(result.program, fixed_linear)[1:]
    assert [node.kwargs["bits"] for node in last] == [32, 32]
