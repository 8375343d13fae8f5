import pytest
import torch
from torch import nn

import shohin
from shohin.errors import PassError
from shohin.ir.program import BATCH, InputSpec
from shohin.passes.analyses.shapes import shapes
from shohin.passes.base import Context
from shohin.passes.factoring.layers import Wanted, find_layers
from shohin.passes.factoring.responses import (
    FirstImages,
    Sampling,
    observe,
    read_features,
    respond,
    sample_inputs,
)
from shohin.passes.prefixes import Prefixes
from shohin.passes.pruning.candidates import find_candidates

PLACES = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1)},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "valid": {"padding": "valid"},
}


def layers_of(program):
    candidates = find_candidates(program)
    wanted = Wanted(named=[name for one in candidates for name in one.spellings])
    return find_layers(program, candidates, shapes(program), wanted, Context())


def captured(model, x):
    return shohin.capture(model.eval(), x, name="net")


def silent(done, total, label):
    pass


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_all_positions_give_what_the_convolution_does(place):
    torch.manual_seed(0)
    model = nn.Conv2d(3, 5, (3, 2), **place)
    x = torch.randn(4, 3, 9, 8)
    (layer,) = layers_of(captured(model, x))
    taps = sample_inputs(layer, x, torch.Generator(), Sampling(4, 10_000, 0))
    expected = (model(x) - model.bias.view(1, -1, 1, 1)).detach()
    found = respond(layer, taps).view(5, 4, *expected.shape[2:]).transpose(0, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_sampled_positions_are_different_ones_of_each_image():
    model = nn.Conv2d(1, 1, 1, bias=False)
    x = torch.arange(2 * 25.0).view(2, 1, 5, 5)
    (layer,) = layers_of(captured(model, x))
    taps = sample_inputs(layer, x, torch.Generator().manual_seed(0), Sampling(2, 7, 0))
    first, second = taps.flatten().view(2, 7)
    assert len(set(first.tolist())) == len(set(second.tolist())) == 7
    assert first.max() < 25 <= second.min()


@pytest.mark.parametrize("shape", [(6, 4), (6, 5, 4), (4,)])
def test_rows_of_linear_maps(shape):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    x = torch.randn(shape)
    (layer,) = layers_of(captured(model, x))
    taps = sample_inputs(layer, x, torch.Generator(), Sampling(6, 100, 0))
    expected = (model(x) - model.bias).detach().reshape(-1, 3).mT
    assert torch.allclose(respond(layer, taps), expected, atol=1e-6)


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten()]
    return captured(nn.Sequential(*layers, nn.Linear(80, 3)), torch.randn(2, 2, 8, 8))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 2, 8, 8, generator=generator),) for n in (3, 3, 2)]


def test_features_lie_at_the_positions_that_were_observed():
    program, sampling = network(), Sampling(8, 5, 3)
    layers, given = layers_of(program), FirstImages(batches(), 8, network().inputs)
    observed = observe(program, layers, given, sampling, silent, with_moments=True)
    places = {node: at for at, node in enumerate(program.graph.nodes)}
    prefixes = Prefixes(program.module, 1 << 20)
    for number, (layer, seen) in enumerate(zip(layers, observed, strict=True)):

        def values(index, batch, layer=layer):
            return prefixes.arrive(index, batch, places[layer.node]).env[layer.operation.data]

        def features(taps, layer=layer):
            return respond(layer, taps)

        found = read_features(layer, number, values, given, sampling, features)
        bias = layer.operation.bias
        numbers = program.module.get_parameter(str(bias.target)).detach().unsqueeze(1)
        assert torch.allclose(found + numbers, seen.responses, atol=1e-6)


def test_moments_are_those_of_the_columns_of_taps():
    program, sampling = network(), Sampling(8, 1000, 0)
    layers = layers_of(program)
    given = FirstImages(batches(), 8, program.inputs)
    seen = observe(program, layers, given, sampling, silent, with_moments=True)
    x = torch.cat([one for (one,) in batches()])
    columns = x.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 5, 1, 4).reshape(-1, 6).double()
    assert torch.allclose(seen[0].moments, columns.mT @ columns, rtol=1e-5)
    assert seen[2].moments is None


def test_no_more_examples_are_read_than_asked_for():
    assert [len(x) for (x,) in FirstImages(batches(), 5, network().inputs)] == [3, 2]
    assert [len(x) for (x,) in FirstImages(batches(), 6, network().inputs)] == [3, 3]
    assert FirstImages(batches(), 100, network().inputs).count() == 8


def test_responses_that_are_not_finite_are_refused():
    program = network()
    given = FirstImages([(torch.full((1, 2, 8, 8), float("nan")),)], 1, program.inputs)
    layers = layers_of(program)
    with pytest.raises(PassError, match=r"layer '0\.weight': its responses .* are not finite"):
        observe(program, layers, given, Sampling(1, 5, 0), silent, with_moments=False)


def test_batches_of_fixed_size_are_taken_whole():
    fixed = [InputSpec("x", (4, 2, 8, 8), torch.float32)]
    given = [(torch.zeros(4, 2, 8, 8),)] * 3
    assert [len(x) for (x,) in FirstImages(given, 6, fixed)] == [4, 4]
    lone = [InputSpec("x", (3, 8, 8), torch.float32)]
    assert FirstImages([(torch.zeros(3, 8, 8),)] * 5, 4, lone).count() == 4


def test_only_axes_of_the_batch_are_cut():
    inputs = [InputSpec("x", (BATCH, 8), torch.float32), InputSpec("t", (6, 6), torch.float32)]
    (found,) = FirstImages([(torch.zeros(6, 8), torch.zeros(6, 6))], 4, inputs)
    assert [tuple(one.shape) for one in found] == [(4, 8), (6, 6)]
