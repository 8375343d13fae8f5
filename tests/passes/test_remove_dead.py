"""Removal of dead channels: what goes, what stays and why, and that results are the same."""

import copy
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shohin import zoo
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense, Sparse, same_bits
from shohin.ir.program import Fact, Stage, tensor_of
from shohin.passes.fold_bn import FoldBatchNorm
from shohin.passes.prune import Prune
from shohin.passes.remove_dead import RemoveDead


def captured(module, *shape, name="net"):
    """A module in float64 and inference mode, captured."""
    module = copy.deepcopy(module).double().eval()
    return capture(module, (torch.ones(2, *shape, dtype=torch.float64),), name=name)


def zero(module, rows=(), columns=(), bias=False):
    """Make incoming weights of some outputs zero, and weights of some inputs."""
    with torch.no_grad():
        module.weight[list(rows)] = 0.0
        module.weight[:, list(columns)] = 0.0
        if bias:
            module.bias[list(rows)] = 0.0
    return module


def shape_of(program, name):
    return tuple(tensor_of(program.module, name).shape)


def assert_same(before, after, *shape, batch=3):
    """Both give the same in float64, but for the order in which terms are added."""
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected, found = before.module(x), after.module(x)
    assert expected.shape == found.shape
    limit = 1e-12 * max(1.0, float(expected.abs().max()))
    assert float((expected - found).abs().max()) <= limit


@pytest.fixture(scope="module")
def removed(apply):
    """Apply the pass, check that results stay the same, and that a second run finds nothing."""

    def run(module, *shape, allows=None):
        program = captured(module, *shape)
        after = apply(RemoveDead(), program, allows)
        assert_same(program, after.program, *shape)
        again = apply(RemoveDead(), after.program, allows)
        assert not again.modified
        return after

    return run


def mlp(*sizes):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


# ---------------------------------------------------------------- golden texts


def test_golden_of_neurons(apply, golden):
    network = mlp(3, 4, 2)
    zero(network[0], rows=(1, 2))
    zero(network[2], columns=(3,))
    program = captured(network, 3)
    after = apply(RemoveDead(), program).program
    golden("remove_dead", program, after)
    assert_same(program, after, 3)


def test_golden_of_channels_before_a_linear_map(apply, golden):
    torch.manual_seed(0)
    network = nn.Sequential(
        zero(nn.Conv2d(2, 4, 3, bias=False), rows=(0, 2)),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * 9, 3, bias=False),
    )
    network[1].bias.data.uniform_(0.5, 1.0)
    program = captured(network, 2, 8, 8)
    after = apply(RemoveDead(), program).program
    golden("remove_dead_channels", program, after)
    assert_same(program, after, 2, 8, 8)


# ---------------------------------------------------------------- neurons


def test_a_neuron_without_inputs_goes_with_its_other_side(removed):
    network = mlp(5, 6, 4)
    zero(network[0], rows=(0, 4))
    after = removed(network, 5)
    assert shape_of(after.program, "0.weight") == (4, 5)
    assert shape_of(after.program, "0.bias") == (4,)
    assert shape_of(after.program, "2.weight") == (4, 4)
    assert after.reason("linear") == after.reason("linear_1") == "removed"
    first, second = after.remarks
    assert first.detail == "2 of 6 outputs removed"
    assert second.detail.startswith("2 of 6 inputs removed")
    assert (first.before.parameters, first.after.parameters) == (36, 24)
    assert (first.before.macs, first.after.macs) == (30, 20)
    assert (first.before.stored_bytes, first.after.stored_bytes) == (8 * 36, 8 * 24)


def test_a_constant_goes_into_the_bias_through_the_activation(removed):
    network = mlp(5, 3, 2)
    zero(network[0], rows=(0, 1))
    with torch.no_grad():
        network[0].bias[:2] = torch.tensor([0.5, -0.5])
    after = removed(network, 5)
    expected = network[2].bias.double() + 0.5 * network[2].weight[:, 0].double()
    found = tensor_of(after.program.module, "2.bias")
    assert torch.allclose(found, expected, rtol=1e-15, atol=0)
    assert after.remarks[1].detail == "2 of 3 inputs removed, 1 constant folded into the bias"


def test_a_neuron_that_nothing_reads_goes(removed):
    network = mlp(5, 6, 4)
    zero(network[2], columns=(1, 2, 3))
    after = removed(network, 5)
    assert shape_of(after.program, "0.weight") == (3, 5)
    assert shape_of(after.program, "2.weight") == (4, 3)


def test_what_is_left_without_inputs_or_readers_goes_as_well(removed):
    network = mlp(4, 3, 3, 3, 2)
    with torch.no_grad():
        # Unit 0 of the second layer reads unit 0 of the first alone, and so on to the end.
        for layer in (network[2], network[4]):
            layer.weight[0] = 0.0
            layer.weight[0, 0] = 1.0
        network[0].weight[0] = 0.0
        # Unit 2 is read by unit 2 of the next layer alone, whose own is not read.
        for layer in (network[2], network[4]):
            layer.weight[:2, 2] = 0.0
        network[6].weight[:, 2] = 0.0
    after = removed(network, 4)
    assert [shape_of(after.program, f"{i}.weight") for i in (0, 2, 4, 6)] == [
        (1, 4),
        (1, 1),
        (1, 1),
        (2, 1),
    ]


def test_a_missing_bias_is_made(removed):
    torch.manual_seed(0)
    first, second = nn.Linear(4, 3), nn.Linear(3, 2, bias=False)
    zero(first, rows=(1,))
    after = removed(nn.Sequential(first, nn.Sigmoid(), second), 4)
    assert shape_of(after.program, "2.bias") == (2,)
    only = removed(nn.Sequential(zero(nn.Linear(4, 3), (1,), bias=True), nn.ReLU(), second), 4)
    assert "2.bias" not in dict(only.program.module.named_parameters())


def test_linear_maps_along_the_last_of_three_axes(removed):
    network = mlp(5, 6, 4)
    zero(network[0], rows=(0,))
    zero(network[2], columns=(3,))
    after = removed(network, 7, 5)
    assert shape_of(after.program, "0.weight") == (4, 5)


# ---------------------------------------------------------------- channels


class Calls(nn.Module):
    """Modules by name, put together by a function."""

    def __init__(self, function, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def convolutions(*channels, seed=0, **options):
    torch.manual_seed(seed)
    return [nn.Conv2d(one, two, 3, **options) for one, two in pairwise(channels)]


BETWEEN = {
    "nothing": [],
    "ReLU": [nn.ReLU()],
    "sigmoid": [nn.Sigmoid()],
    "hardswish": [nn.Hardswish()],
    "GELU and dropout": [nn.GELU(), nn.Dropout()],
    "batch norm": [nn.BatchNorm2d(4), nn.ReLU()],
    "max pool": [nn.MaxPool2d(3, 2, padding=1, ceil_mode=True)],
    "average pool": [nn.AvgPool2d(2)],
    "average pool that leaves padding out": [
        nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
    ],
    "adaptive pool": [nn.AdaptiveAvgPool2d(5)],
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_constants_pass_through(removed, random_statistics, between):
    first, second = convolutions(2, 4, 3)
    network = random_statistics(nn.Sequential(zero(first, rows=(1, 3)), *between, second), 0)
    after = removed(network, 2, 12, 12)
    assert shape_of(after.program, "0.weight") == (2, 2, 3, 3)
    assert shape_of(after.program, f"{len(between) + 1}.weight") == (3, 2, 3, 3)


def test_a_batch_norm_of_scale_zero_is_a_constant(removed, random_statistics):
    first, second = convolutions(2, 4, 3)
    network = random_statistics(nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second), 0)
    network[1].weight.data[1] = 0.0
    after = removed(network, 2, 8, 8)
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert shape_of(after.program, name)[0] == 3
    assert after.reason("batch_norm") == "removed"


@pytest.mark.parametrize("bias", [0.5, -0.5])
def test_before_padding_only_zeros_go(removed, bias):
    first, second = convolutions(2, 4, 3, padding=1)
    zero(first, rows=(1,))
    first.bias.data[1] = bias
    after = removed(nn.Sequential(first, nn.ReLU(), second), 2, 6, 6)
    if bias < 0:
        assert shape_of(after.program, "2.weight") == (3, 3, 3, 3)
    else:
        assert not after.modified
        (remark,) = (one for one in after.remarks if one.node == "conv2d")
        assert remark.reason == "not-exact"
        assert remark.detail.startswith("1 of 4 outputs are constant: conv2d_1 pads with zeros")


def test_padding_that_enters_an_average_keeps_constants(removed):
    first, second = convolutions(2, 4, 3)
    pool = nn.AvgPool2d(3, 1, padding=1)
    after = removed(nn.Sequential(zero(first, rows=(1,)), pool, second), 2, 8, 8)
    assert not after.modified
    zeroed = removed(nn.Sequential(zero(first, (1,), bias=True), pool, second), 2, 8, 8)
    assert shape_of(zeroed.program, "2.weight") == (3, 3, 3, 3)


def test_a_channel_is_many_columns_after_flattening(removed):
    (first,) = convolutions(2, 5)
    torch.manual_seed(1)
    head = nn.Linear(5 * 16, 3)
    zero(head, columns=range(16, 32))
    head.weight.data[:, 65:80] = 0.0  # all but one pixel of the last channel
    zero(first, rows=(0,))
    after = removed(nn.Sequential(first, nn.ReLU(), nn.Flatten(), head), 2, 6, 6)
    assert shape_of(after.program, "0.weight") == (3, 2, 3, 3)
    assert shape_of(after.program, "3.weight") == (3, 48)


@pytest.mark.parametrize("sizes", [(-1, 80), (2, -1), (-1, 5, 16)])
def test_sizes_in_views_follow(apply, sizes):
    (first,) = convolutions(2, 5)
    torch.manual_seed(1)
    last = sizes[-1] if sizes[-1] > 0 else 80
    head = nn.Linear(last, 3)
    network = Calls(lambda self, x: self.head(self.conv(x).view(*sizes)), conv=first, head=head)
    zero(first, rows=(0,))
    program = captured(network, 2, 6, 6)
    after = apply(RemoveDead(), program)
    assert_same(program, after.program, 2, 6, 6, batch=2)
    # With the channels on an axis of their own the linear map works on pixels.
    assert after.modified == (len(sizes) == 2)


def test_depthwise_convolutions_go_along(removed):
    torch.manual_seed(0)
    network = nn.Sequential(
        zero(nn.Conv2d(3, 4, 1), rows=(2,), bias=True),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 5, 1),
    )
    zero(network[5], columns=(0, 1, 6))
    after = removed(network, 3, 6, 6)
    assert shape_of(after.program, "0.weight") == (2, 3, 1, 1)
    assert shape_of(after.program, "2.weight") == (4, 1, 3, 3)
    assert shape_of(after.program, "3.weight") == (4,)
    assert shape_of(after.program, "5.weight") == (5, 4, 1, 1)


def test_a_silent_depthwise_filter_is_a_constant(removed):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    zero(network[1], rows=(1,))
    after = removed(network, 3, 6, 6)
    assert [shape_of(after.program, f"{i}.weight")[0] for i in range(3)] == [3, 3, 2]


def test_transposed_convolutions(removed):
    torch.manual_seed(0)
    network = nn.Sequential(
        zero(nn.Conv2d(3, 4, 1), rows=(1,), bias=True),
        nn.ConvTranspose2d(4, 5, 3, stride=2),
        nn.Conv2d(5, 2, 1),
    )
    zero(network[2], columns=(0, 4))
    after = removed(network, 3, 6, 6)
    assert shape_of(after.program, "1.weight") == (3, 3, 3, 3)


# ---------------------------------------------------------------- joined channels


def block(function=None, padding=1, seed=0):
    """A stem and a residual branch of two convolutions, then a head."""
    stem, one, two, head = convolutions(2, 4, 6, 4, 3, seed=seed, padding=padding, bias=False)

    def forward(self, x):
        y = functional.relu(self.stem(x))
        return self.head(functional.relu(self.two(functional.relu(self.one(y))) + y))

    return Calls(function or forward, stem=stem, one=one, two=two, head=head)


def test_inside_a_residual_branch(removed):
    network = block()
    zero(network.one, rows=(0, 3))
    zero(network.two, columns=(5,))
    after = removed(network, 2, 6, 6)
    assert shape_of(after.program, "one.weight") == (3, 4, 3, 3)
    assert shape_of(after.program, "two.weight") == (4, 3, 3, 3)


def test_added_channels_stay_unless_all_are_dead(removed):
    network = block()
    zero(network.two, rows=(1,))
    after = removed(network, 2, 6, 6)
    assert not after.modified
    (remark,) = (one for one in after.remarks if one.node == "conv2d_2")
    assert remark.reason == "other-users"
    assert remark.detail == "1 of 4 outputs are constant: but others that go with them are needed"


def test_added_channels_that_are_dead_everywhere_go(removed):
    network = block()
    zero(network.two, rows=(1,))
    zero(network.stem, rows=(1,))
    after = removed(network, 2, 6, 6)
    assert shape_of(after.program, "stem.weight")[0] == 3
    assert shape_of(after.program, "one.weight") == (6, 3, 3, 3)
    assert shape_of(after.program, "two.weight") == (3, 6, 3, 3)
    assert shape_of(after.program, "head.weight") == (3, 3, 3, 3)


def test_added_channels_that_one_reader_needs_stay(removed):
    network = block()
    zero(network.head, columns=(2,))
    after = removed(network, 2, 6, 6)
    assert not after.modified
    (remark,) = (one for one in after.remarks if one.node == "conv2d_3")
    assert remark.detail.startswith("1 of 4 inputs are not read")
    zero(network.one, columns=(2,))
    assert shape_of(removed(network, 2, 6, 6).program, "stem.weight")[0] == 3


def test_constants_are_added_up(removed):
    network = block(padding=0)

    def forward(self, x):
        y = torch.sigmoid(self.stem(x))
        return self.head(self.two(self.one(y)) + y[:, :, 2:-2, 2:-2])

    network.function = forward
    zero(network.two, rows=(1,))
    zero(network.stem, rows=(1,))
    after = removed(network, 2, 12, 12)
    assert shape_of(after.program, "head.weight") == (3, 3, 3, 3)


def test_concatenated_channels_go_one_by_one(removed):
    left, right = convolutions(2, 4, bias=False)[0], convolutions(2, 3, seed=1, bias=False)[0]
    head = nn.Conv2d(7, 2, 1)
    zero(left, rows=(0,))
    zero(head, columns=(5,))
    network = Calls(
        lambda self, x: self.head(functional.relu(torch.cat([self.left(x), self.right(x)], 1))),
        left=left,
        right=right,
        head=head,
    )
    after = removed(network, 2, 6, 6)
    assert shape_of(after.program, "left.weight")[0] == 3
    assert shape_of(after.program, "right.weight")[0] == 2
    assert shape_of(after.program, "head.weight") == (2, 5, 1, 1)


def test_an_input_among_concatenated_parts_keeps_its_channels(removed):
    (conv,) = convolutions(2, 4, padding=1, bias=False)
    head = nn.Conv2d(6, 3, 1)
    zero(conv, rows=(3,))
    zero(head, columns=(0, 2))
    network = Calls(lambda s, x: s.head(torch.cat([x, s.conv(x)], 1)), conv=conv, head=head)
    after = removed(network, 2, 6, 6)
    assert shape_of(after.program, "conv.weight")[0] == 2
    assert shape_of(after.program, "head.weight") == (3, 4, 1, 1)


def test_parts_stacked_along_another_axis_go_together(removed):
    left, right, head = *convolutions(2, 4), *convolutions(2, 4, seed=1), nn.Conv2d(4, 2, 1)
    zero(left, rows=(0, 1))
    zero(right, rows=(0,))
    left.bias.data[0] = right.bias.data[0]
    network = Calls(
        lambda s, x: s.head(torch.cat([s.left(x), s.right(x)], 3)),
        left=left,
        right=right,
        head=head,
    )
    after = removed(network, 2, 6, 6)
    assert shape_of(after.program, "left.weight")[0] == 3


def shortcut(first, last):
    """A shortcut that pads with channels, as in ResNets of option A, then a slice of channels."""

    def forward(self, x):
        y = functional.relu(self.stem(x))
        z = self.one(y) + functional.pad(y, (0, 0, 0, 0, 1, 2))
        return self.head(functional.relu(z)[:, first:last])

    stem, one = convolutions(2, 4, 7, padding=1, bias=False)
    torch.manual_seed(3)
    head = nn.Conv2d(len(range(7)[first:last]), 2, 1)
    return Calls(forward, stem=stem, one=one, head=head)


def test_padded_and_sliced_channels(removed):
    network = shortcut(1, 6)
    zero(network.head, columns=(2, 4))  # channels 3 and 5: one of the stem's, one of the padding
    zero(network.one, columns=(2,))
    after = removed(network, 2, 6, 6)
    # Channel 6 is sliced away and padding; channel 0 as well; channel 5 is read by nothing.
    assert shape_of(after.program, "stem.weight")[0] == 3
    assert shape_of(after.program, "one.weight") == (3, 3, 3, 3)
    assert shape_of(after.program, "head.weight") == (2, 3, 1, 1)
    assert after.reason("pad") == "removed"


def test_a_gate_goes_with_its_channels(removed):
    stem, head = convolutions(2, 4, 3)
    torch.manual_seed(2)
    squeeze, excite = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x):
        y = functional.relu(self.stem(x))
        gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(y.mean((2, 3), True)))))
        return self.head(y * gate * self.gain)

    network = Calls(forward, stem=stem, squeeze=squeeze, excite=excite, head=head)
    network.gain = nn.Parameter(torch.rand(4, 1, 1))
    zero(head, columns=(1,))
    assert not removed(network, 2, 8, 8).modified
    zero(squeeze, columns=(1,))
    after = removed(network, 2, 8, 8)
    for name in ("stem.weight", "excite.weight", "gain"):
        assert shape_of(after.program, name)[0] == 3
    assert shape_of(after.program, "squeeze.weight") == (2, 3, 1, 1)


def test_permuted_axes(removed):
    (conv,) = convolutions(2, 5)
    torch.manual_seed(1)
    network = Calls(
        lambda s, x: s.fc(s.conv(x).permute(0, 2, 3, 1)).transpose(1, 3),
        conv=zero(conv, rows=(1,)),
        fc=zero(nn.Linear(5, 3), columns=(0,)),
    )
    assert shape_of(removed(network, 2, 6, 6).program, "fc.weight") == (3, 3)


# ---------------------------------------------------------------- shared weights


def test_layers_that_share_weights_are_cut_together(removed):
    torch.manual_seed(0)
    shared, first = nn.Linear(4, 4), nn.Linear(3, 4)
    zero(first, rows=(1,), bias=True)
    zero(shared, rows=(1,), columns=(1,), bias=True)
    network = nn.Sequential(first, nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    after = removed(network, 3)
    assert shape_of(after.program, "2.weight") == (3, 3)
    assert shape_of(after.program, "6.weight") == (2, 3)


def test_a_shared_layer_folds_constants_into_a_bias_of_its_own(removed):
    torch.manual_seed(0)
    shared = nn.Linear(4, 3)
    network = Calls(
        lambda s, x: s.shared(torch.sigmoid(s.one(x))) - s.shared(torch.sigmoid(s.two(x))),
        one=zero(nn.Linear(3, 4), rows=(2,)),
        two=zero(nn.Linear(3, 4), rows=(2,)),
        shared=shared,
    )
    after = removed(network, 3)
    assert shape_of(after.program, "shared.weight") == (3, 3)
    biases = [name for name, _ in after.program.module.named_parameters() if "shared.bias" in name]
    assert len(biases) == 2


def test_a_weight_that_something_else_reads_stays(removed):
    torch.manual_seed(0)
    network = Calls(
        lambda s, x: s.two(s.one(x)) + s.one.weight.sum(),
        one=zero(nn.Linear(3, 4), rows=(2,)),
        two=nn.Linear(4, 2),
    )
    after = removed(network, 3)
    assert not after.modified
    assert after.reason("linear") == "other-users"


# ---------------------------------------------------------------- near misses


NEAR_MISSES = {
    "mixed by a softmax": (lambda s, x: s.two(torch.softmax(s.one(x), 1)), "unsupported-operator"),
    "normalised together": (
        lambda s, x: s.two(functional.layer_norm(s.one(x), (4,))),
        "unsupported-operator",
    ),
    "given out": (lambda s, x: s.one(x), "not-applicable"),
    "cut into heads": (
        lambda s, x: s.two(s.one(x).view(-1, 2, 2).transpose(1, 2).flatten(1)),
        "unsupported-operator",
    ),
    "every second": (lambda s, x: s.one(x)[:, ::2], "unsupported-operator"),
    "added to an input": (lambda s, x: s.two(s.one(x) + x), "unsupported-operator"),
}


@pytest.mark.parametrize(("function", "reason"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_stay(removed, function, reason):
    torch.manual_seed(0)
    network = Calls(function, one=zero(nn.Linear(4, 4), rows=(2,)), two=nn.Linear(4, 3))
    after = removed(network, 4)
    assert not after.modified
    assert after.reason("linear") == reason


def test_grouped_convolutions_stay(removed):
    torch.manual_seed(0)
    network = nn.Sequential(
        zero(nn.Conv2d(2, 4, 1), rows=(1,), bias=True),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(6, 2, 1),
    )
    after = removed(network, 2, 6, 6)
    assert not after.modified
    assert after.reason("conv2d_1") == "unsupported-operator"
    (remark,) = (one for one in after.remarks if one.node == "conv2d")
    assert "conv2d_1: it has 2 groups of channels" in remark.detail


def test_one_channel_stays(removed):
    network = mlp(3, 4, 2)
    zero(network[0], rows=range(4))
    after = removed(network, 3)
    assert shape_of(after.program, "0.weight") == (1, 3)
    assert shape_of(after.program, "2.weight") == (2, 1)
    reasons = {(one.node, one.reason) for one in after.remarks}
    assert ("linear", "too-small") in reasons


def test_inputs_and_outputs_keep_their_shapes(removed):
    network = mlp(4, 5, 3)
    zero(network[0], columns=(0, 1))
    zero(network[2], rows=(2,))
    after = removed(network, 4)
    assert not after.modified
    details = {one.node: one.detail for one in after.remarks}
    assert details["linear"].startswith("2 of 4 inputs are not read: ")
    assert details["linear_1"].startswith("1 of 3 outputs are constant: ")


def test_weights_that_are_not_finite_stay(removed):
    network = mlp(3, 4, 2)
    zero(network[0], rows=(1,))
    program = captured(network, 3)
    program.module.get_submodule("0").weight.data[0, 0] = torch.nan
    from shohin.passes.base import Context

    context = Context(pass_name="remove-dead")
    assert not RemoveDead().run(program, context).modified
    assert {one.reason for one in context.remarks} >= {"not-finite"}


def test_sites_that_are_not_allowed_stay(removed):
    network = mlp(3, 4, 4, 2)
    zero(network[0], rows=(1,))
    zero(network[4], columns=(2,))
    after = removed(network, 3, allows=lambda site: site != "linear")
    assert shape_of(after.program, "0.weight") == (4, 3)
    assert shape_of(after.program, "2.weight") == (3, 4)
    assert after.reason("linear") == "excluded-by-option"
    assert not removed(network, 3, allows=lambda _: False).modified


def test_a_program_without_dead_channels_is_given_back(apply):
    program = captured(mlp(3, 4, 2), 3)
    after = apply(RemoveDead(), program)
    assert not after.modified
    assert after.reasons() == {"not-applicable"}


def test_facts():
    assert RemoveDead.requires == {Fact.FUNCTIONAL}
    assert RemoveDead.option_names() == ()


# ---------------------------------------------------------------- encodings


def test_sparse_weights_keep_what_is_left_of_their_masks(apply):
    network = mlp(8, 12, 5)
    program = apply(Prune(density=0.3), captured(network, 8)).program
    module = program.module.get_submodule("0")
    dead = module.weight.detach().clone()
    dead[3:5] = 0.0
    encoding = program.encodings["0.weight"]
    mask = encoding.mask.clone()
    mask[3:5] = False
    module.weight.data.copy_(dead)
    program = replace(
        program, encodings={**program.encodings, "0.weight": Sparse.from_dense(dead, mask)}
    )
    after = apply(RemoveDead(), program)
    assert_same(program, after.program, 8)
    assert after.program.stage is Stage.ANNOTATED
    held = after.program.encodings["0.weight"]
    rows = shape_of(after.program, "0.weight")[0]
    assert rows <= 10
    assert held.shape == (rows, 8)
    assert same_bits(held.materialise(), tensor_of(after.program.module, "0.weight"))
    (remark,) = (one for one in after.remarks if one.node == "linear")
    assert remark.after.parameters == int(held.mask.sum()) + rows


def test_the_width_of_gaps_stays_unless_it_was_the_best(apply):
    network = mlp(8, 12, 5)
    zero(network[0], rows=range(6))
    program = captured(network, 8)
    weight = tensor_of(program.module, "0.weight").detach()
    wide = Sparse.from_dense(weight, weight != 0, 9)
    best = Sparse.from_dense(weight, weight != 0)
    for held, expected in ((wide, 9), (best, None)):
        encoded = replace(program, encodings={"0.weight": held}, stage=Stage.ANNOTATED)
        found = apply(RemoveDead(), encoded).program.encodings["0.weight"]
        wanted = Sparse.from_dense(found.materialise(), found.mask, expected)
        assert found.gap_bits == wanted.gap_bits


def test_other_encodings_stay(apply):
    network = mlp(3, 4, 2)
    zero(network[0], rows=(1,))
    program = captured(network, 3)
    weight = tensor_of(program.module, "2.weight").detach()
    held = Sparse(
        torch.ones(2, 4, dtype=torch.bool), Sparse(torch.ones(8) > 0, Dense(weight.flatten()))
    )
    encoded = replace(program, encodings={"2.weight": held}, stage=Stage.ANNOTATED)
    after = apply(RemoveDead(), encoded)
    assert not after.modified
    assert after.reason("linear_1") == "already-encoded"
    assert "linear_1: 2.weight is stored as sparse" in after.remarks[0].detail


def test_a_dense_encoding_is_replaced(apply):
    network = mlp(3, 4, 2)
    zero(network[0], rows=(1,))
    program = captured(network, 3)
    names = ("0.weight", "2.weight", "2.bias")
    held = {name: Dense(tensor_of(program.module, name).detach()) for name in names}
    after = apply(RemoveDead(), replace(program, encodings=held)).program
    assert after.encodings["0.weight"].shape == (3, 3)
    assert same_bits(after.encodings["2.bias"].values, tensor_of(after.module, "2.bias"))


# ---------------------------------------------------------------- whole networks


@pytest.mark.parametrize(("name", "shape"), [("lenet-300-100", (784,)), ("lenet-5", (1, 28, 28))])
def test_lenets_under_random_masks(removed, name, shape):
    torch.manual_seed(0)
    network = zoo.build(name)
    for part in network.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.weight.data *= torch.rand_like(part.weight) < 0.02
    after = removed(network, *shape)
    before = sum(p.numel() for p in network.parameters())
    left = sum(p.numel() for p in after.program.module.parameters())
    assert left < 0.9 * before


def resnet20():
    torch.manual_seed(0)
    network = zoo.build("resnet-20")
    generator = random.Random(0)
    for norm in (one for one in network.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.bias.data.normal_()
    for stage in (network.layer1, network.layer2, network.layer3):
        for part in stage:
            width = part.conv1.out_channels
            pruned = generator.sample(range(width), width // 2)
            zero(part.conv2, columns=pruned)
    return network


def test_resnet20_with_pruned_blocks(removed):
    after = removed(resnet20(), 3, 32, 32)
    for stage, width in (("layer1", 16), ("layer2", 32), ("layer3", 64)):
        for index in range(3):
            assert shape_of(after.program, f"{stage}.{index}.conv1.weight")[0] == width // 2
            assert shape_of(after.program, f"{stage}.{index}.conv2.weight")[:2] == (
                width,
                width // 2,
            )


def test_resnet20_with_a_channel_of_a_whole_stage_dead(apply):
    network = resnet20()
    # Channel 5 of the first stage is channel 13 of the second and 29 of the third.
    readers = [part.conv1 for part in network.layer1] + [network.layer2[0].conv1]
    for conv in readers:
        zero(conv, columns=(5,))
    for conv in [part.conv1 for part in (*network.layer2[1:], network.layer3[0])]:
        zero(conv, columns=(13,))
    for conv in [part.conv1 for part in network.layer3[1:]]:
        zero(conv, columns=(29,))
    zero(network.linear, columns=(29,))
    program = captured(network, 3, 32, 32)
    after = apply(RemoveDead(), program)
    assert_same(program, after.program, 3, 32, 32, batch=2)
    assert shape_of(after.program, "conv1.weight")[0] == 15
    assert shape_of(after.program, "layer2.0.conv2.weight")[0] == 31
    assert shape_of(after.program, "linear.weight") == (10, 63)


def test_after_folding_batch_norm(apply):
    program = apply(FoldBatchNorm(), captured(resnet20(), 3, 32, 32)).program
    after = apply(RemoveDead(), program)
    assert_same(program, after.program, 3, 32, 32, batch=2)
    assert shape_of(after.program, "layer3.1.conv1.weight")[0] == 32


class RandomNet(nn.Module):
    """Random layers of random widths on `[batch, 3, 10, 10]`, with branches, then a head."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.choose = random.Random(seed)
        self.steps = nn.ModuleList()
        self.kinds = []
        width = 3
        for _ in range(self.choose.randint(2, 4)):
            width = self._add(width)
        self.head = nn.Linear(width * 4, 3)

    def _add(self, width):
        kind = self.choose.choice(["plain", "norm", "residual", "cat", "depthwise", "gate"])
        wide = self.choose.randint(2, 6)
        padding = 1
        conv = nn.Conv2d(width, wide, 3, padding=self.choose.choice([0, 1]))
        parts = {
            "plain": lambda: [conv],
            "norm": lambda: [conv, nn.BatchNorm2d(wide)],
            "residual": lambda: [
                nn.Conv2d(width, wide, 1),
                nn.Conv2d(wide, 5, 3, padding=padding, bias=False),
                nn.Conv2d(5, wide, 3, padding=padding),
            ],
            "cat": lambda: [nn.Conv2d(width, wide, 3, padding=1), nn.Conv2d(width, 2, 1)],
            "depthwise": lambda: [
                nn.Conv2d(width, wide, 1),
                nn.Conv2d(wide, 2 * wide, 3, padding=1, groups=wide),
            ],
            "gate": lambda: [nn.Conv2d(width, wide, 1), nn.Linear(wide, wide)],
        }[kind]()
        self.kinds.append((kind, self.choose.choice([torch.relu, torch.sigmoid, torch.tanh])))
        self.steps.append(nn.ModuleList(parts))
        return {"cat": wide + 2, "depthwise": 2 * wide}.get(kind, wide)

    def forward(self, x: Tensor) -> Tensor:
        for (kind, activation), parts in zip(self.kinds, self.steps, strict=True):
            if kind == "residual":
                x = parts[0](x)
                x = activation(parts[2](activation(parts[1](x))) + x)
            elif kind == "cat":
                x = activation(torch.cat([part(x) for part in parts], 1))
            elif kind == "gate":
                x = parts[0](x)
                gate = torch.sigmoid(parts[1](x.mean((2, 3))))
                x = activation(x * gate[:, :, None, None])
            else:
                for part in parts:
                    x = part(x)
                x = functional.max_pool2d(activation(x), 3, 1, 1)
        return self.head(functional.adaptive_avg_pool2d(x, 2).flatten(1))


def kill(network, seed):
    """Make random rows, columns, biases and scales of a network zero."""
    torch.manual_seed(seed + 1)
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.weight.data *= torch.rand_like(part.weight) < 0.7
            part.weight.data[torch.rand(part.weight.shape[0]) < 0.3] = 0.0
            part.weight.data[:, torch.rand(part.weight.shape[1]) < 0.3] = 0.0
            if part.bias is not None:
                part.bias.data *= torch.rand_like(part.bias) < 0.5
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data *= torch.rand_like(part.weight) < 0.7
    return network


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_random_networks_give_the_same(removed, random_statistics, seed):
    network = kill(random_statistics(RandomNet(seed), seed), seed)
    removed(network, 3, 10, 10)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 100_000))
def test_networks_of_other_passes_give_the_same(removed, random_network, seed):
    removed(kill(random_network(seed), seed), 4, 6, 6)
