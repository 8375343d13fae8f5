"""Equal ranges, corrected biases and training through the rounding."""

import pytest
import torch
from fixed_networks import Chain, fixed, images, mean_error, network
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import ShohinWarning
from shohin.ir.encodings import same_bits
from shohin.ir.fixed_ops import fixed_conv2d
from shohin.ir.fixed_point import FixedPoint, quantize
from shohin.ir.program import tensor_of
from shohin.ir.verifier import verify
from shohin.passes.fixed.equalise import equalise
from shohin.passes.patterns import argument


def test_equal_ranges_change_nothing_but_what_rounding_costs():
    program, x = network(Chain), images(8, seed=4)
    plain = fixed(program).program
    result = fixed(program, "fixed-point{equalise=true}")
    assert mean_error(program, result.program, x) < 0.2 * mean_error(program, plain, x)
    assert [r.detail for r in result.report.notes() if r.reason == "equalised"] == [
        "conv2d and conv2d_1 have ranges alike"
    ]
    moved = program.copy()
    assert len(equalise(moved)) == 1
    with torch.no_grad():
        assert torch.equal(moved.module(x), program.module(x))
    ranges = tensor_of(moved.module, "one.weight").detach().abs().amax((1, 2, 3))
    inputs = tensor_of(moved.module, "two.weight").detach().abs().amax((0, 2, 3))
    assert (ranges / inputs).log2().abs().max() <= 1.0
    assert not equalise(moved)


@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.AvgPool2d(2), nn.BatchNorm2d(8)])
def test_ranges_that_cannot_be_made_alike(between):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 3))
    assert not equalise(network(lambda: module))


def test_biases_make_up_for_mean_errors():
    program, x = network(Chain), images(64, seed=4)
    batches = [(part,) for part in images(64).split(16)]
    text = "fixed-point{weights=4 data=16 correct_bias=%s}"
    lacks = []
    for correct in ("false", "true"):
        found = fixed(program, text % correct, batches).program
        with torch.no_grad():
            lack = found.module(x) - program.module(x)
        lacks.append(float(lack.mean((0, 2, 3)).abs().mean()))
    assert lacks[1] < 0.3 * lacks[0]


def test_what_a_relu_hides_moves_no_bias():
    """The correction is the mean of what is missing where either network lets anything through."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        module[0].bias.sub_(0.6)  # Most results are negative.
    program, x = network(lambda: module), images(16)
    text = "fixed-point{weights=3 data=12 correct_bias=%s}"
    plain, corrected = (fixed(program, text % value, [(x,)]).program for value in ("false", "true"))
    first = next(node for node in plain.graph.nodes if node.target is fixed_conv2d)
    name = str(argument(first, "bias").target)
    with torch.no_grad():
        weight = tensor_of(plain.module, str(argument(first, "weight").target))
        rounded = quantize(x.double(), 12, argument(first, "input_fraction"))
        raw = functional.conv2d(rounded, weight.double(), tensor_of(plain.module, name).double())
        wanted = module[0](x).double()
    seen = (wanted > 0) | (raw > 0)
    lack = ((wanted - raw) * seen).sum((0, 2, 3)) / seen.sum((0, 2, 3))
    moved = tensor_of(corrected.module, name) - tensor_of(plain.module, name)
    radix = argument(first, "weight_fractions")[0] + argument(first, "input_fraction")
    assert seen.float().mean() < 0.5
    assert float(lack.abs().max()) > 4 * 2.0**-radix
    # Two roundings of the bias to its radix, and float32 in the pass.
    assert torch.allclose(moved.double(), lack, rtol=0, atol=1.1 * 2.0**-radix + 1e-5)


def labels_of(program, x):
    with torch.no_grad():
        return program.module(x).argmax(1)


def test_training_through_the_rounding():
    program, x = network(), images(64)
    y = labels_of(program, x)
    train = shohin.Trainer([(x, y)], epochs=30, learning_rate=0.02)
    text = "fixed-point{weights=3 retrain=%s}"
    losses = {}
    for retrain in ("none", "auto"):
        found = fixed(program, text % retrain, [(x,)], train=train).program
        with torch.no_grad():
            losses[retrain] = float(functional.cross_entropy(found.module(x), y))
        for name, encoding in found.encodings.items():
            assert isinstance(encoding, FixedPoint)
            assert encoding.bits == 3
            assert same_bits(encoding.materialise(), tensor_of(found.module, name).detach())
        verify(found)
    assert losses["auto"] < 0.5 * losses["none"]


def test_pruned_weights_stay_zero_in_training():
    program, x = shohin.optimize(network(), "prune{density=0.4}", drift=False).program, images(32)
    train = shohin.Trainer([(x, labels_of(program, x))], epochs=3, learning_rate=0.05)
    found = fixed(program, "fixed-point{retrain=all}", [(x,)], train=train).program
    for name, encoding in found.encodings.items():
        assert torch.equal(encoding.mask, program.encodings[name].mask)


def test_training_that_diverges_is_undone():
    program = network()

    def train(module):
        with torch.no_grad():
            module.get_submodule("left").parametrizations.weight.original[0] = float("nan")

    plain = fixed(program).program
    with pytest.warns(ShohinWarning, match="the weights are those before the training"):
        result = fixed(program, "fixed-point{retrain=all}", train=train)
    for name in plain.encodings:
        one, two = (tensor_of(p.module, name).detach() for p in (plain, result.program))
        assert same_bits(one, two)
    assert any(one.reason == "diverged" for one in result.report.remarks)
