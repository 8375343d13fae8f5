import pytest
import torch
from torch.nn import functional

from shohin.passes.factoring.energies import rank_choices
from shohin.passes.factoring.factors import (
    LayerShape,
    Ranks,
    balanced,
    horizontal_weight,
    vertical_matrix,
)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def merged(weights):
    """The weight of the one layer that computes what a chain does."""
    first, *others = weights
    for weight in others:
        if first.dim() == 2:
            first = weight @ first
            continue
        product = torch.einsum("ocab,cihw->oiahbw", weight, first)
        first = product.flatten(4, 5).flatten(2, 3)
    return first


CHAINS = {
    "channel": [random(4, 3, 3, 5), random(7, 4, 1, 1)],
    "spatial": [random(4, 3, 3, 1), random(7, 4, 1, 5)],
    "3d": [random(4, 3, 3, 1), random(6, 4, 1, 5), random(7, 6, 1, 1)],
    "bottleneck": [random(2, 3, 1, 1), random(6, 2, 3, 5), random(7, 6, 1, 1)],
}


TAKES = {
    "channel": [(1, 1), (0, 0)],
    "spatial": [(1, 0), (0, 1)],
    "3d": [(1, 0), (0, 1), (0, 0)],
    "bottleneck": [(0, 0), (1, 1), (0, 0)],
}


@pytest.mark.parametrize("scheme", CHAINS)
@pytest.mark.parametrize("place", [{}, {"padding": (1, 2)}, {"stride": (2, 3), "dilation": (1, 2)}])
def test_a_chain_is_the_convolution_with_the_merged_weight(scheme, place):
    x, found = random(2, 3, 16, 18, seed=1), random(2, 3, 16, 18, seed=1)
    weights = CHAINS[scheme]
    for weight, took in zip(weights, TAKES[scheme], strict=True):
        default = {"padding": 0, "stride": 1, "dilation": 1}
        own = {
            key: tuple(value[axis] if took[axis] else default[key] for axis in range(2))
            for key, value in place.items()
        }
        found = functional.conv2d(found, weight, **own)
    whole = merged(weights)
    assert torch.allclose(found, functional.conv2d(x, whole, **place), atol=1e-9)


def test_a_chain_of_linear_maps_is_their_product():
    weights = (random(4, 9), random(7, 4))
    assert torch.allclose(merged(weights), weights[1] @ weights[0])


@pytest.mark.parametrize("weights", CHAINS.values(), ids=CHAINS)
def test_balancing_changes_norms_and_not_what_is_computed(weights):
    rough = [weights[0] * 1e4, *weights[1:]]
    even = balanced(rough)
    assert torch.allclose(merged(even), merged(rough), rtol=1e-9)
    left = even[-2].flatten(1).norm(dim=1)
    right = even[-1].transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(left, right, rtol=1e-6)


def test_channels_of_zeros_stay_as_they_are():
    first, second = random(3, 4), random(5, 3)
    first[1] = 0
    second[:, 2] = 0
    even = balanced([first, second])
    assert all(bool(torch.isfinite(one).all()) for one in even)
    assert torch.allclose(even[1] @ even[0], second @ first)


def test_the_vertical_matrix_has_the_rank_of_the_first_filters():
    first, second = CHAINS["spatial"]
    matrix = vertical_matrix(merged((first, second)))
    assert torch.linalg.matrix_rank(matrix) == 4
    after = torch.linalg.lstsq(first.flatten(1).mT, matrix).solution
    assert torch.allclose(horizontal_weight(after, 5), second, atol=1e-9)


def test_costs_are_those_of_the_layers_of_a_chain():
    # 5 filters of 3 x 5 over 4 channels; 6 x 8 outputs, 6 x 10 after the h x 1, 7 x 10 inputs.
    shape = LayerShape(5, 4, (3, 5), 48, 60, 70)
    assert shape.weights(Ranks()) == 5 * 4 * 15
    assert shape.macs(Ranks()) == 48 * 5 * 4 * 15
    assert shape.weights(Ranks(channel=2)) == 2 * 4 * 15 + 5 * 2
    assert shape.macs(Ranks(channel=2)) == 48 * (2 * 4 * 15 + 5 * 2)
    assert shape.weights(Ranks(spatial=3)) == 3 * 4 * 3 + 5 * 3 * 5
    assert shape.macs(Ranks(spatial=3)) == 60 * 3 * 4 * 3 + 48 * 5 * 3 * 5
    narrow = Ranks(channel=2, inner=3)
    assert shape.macs(narrow) == 70 * 3 * 4 + 48 * (2 * 3 * 15 + 5 * 2)
    both = Ranks(channel=2, spatial=3)
    assert shape.macs(both) == 60 * 3 * 4 * 3 + 48 * (2 * 3 * 5 + 5 * 2)


def choices(scheme, multiple=16, kernel=(3, 3), outputs=64, inputs=64):
    shape = LayerShape(outputs, inputs, kernel, 100, 100, 100)
    return [*rank_choices(shape, scheme, multiple)]


def test_ranks_are_multiples_below_the_full_one():
    assert choices("channel") == [Ranks(), *(Ranks(r) for r in (4, 8, 16, 32, 48))]
    assert choices("channel", 1, outputs=4) == [Ranks(), Ranks(1), Ranks(2), Ranks(3)]
    wide = choices("channel", outputs=512)
    assert {one.channel % 16 for one in wide[1:]} == {0}


def test_thin_layers_have_halves_and_quarters():
    assert choices("channel", outputs=16) == [Ranks(), Ranks(4), Ranks(8)]


def test_layers_without_height_and_width_have_channels_only():
    assert choices("3d", kernel=(1, 1)) == choices("channel", kernel=(1, 1))
    assert choices("spatial", kernel=(1, 3)) == [Ranks()]


def test_no_chain_is_wider_than_what_comes_in():
    assert all(one.channel <= 3 * one.spatial for one in choices("3d")[1:])
    assert all(one.channel <= 9 * one.inner for one in choices("bottleneck")[1:])
    assert all(one.spatial < 192 for one in choices("spatial")[1:])
