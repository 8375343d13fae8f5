import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.sharing import axes_of
from shohin.ir.ternarising import (
    Sparsity,
    Start,
    Ternarised,
    Threshold,
    frozen,
    ternarised,
    ternary_codes,
)
from shohin.ir.training import trainable

X = torch.linspace(-1, 1, 15).reshape(3, 5)
NAME = "0.weight"


def program():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)), (X,))


def holder_of(latent, scales, threshold=0.05, unit=1.0):
    """What makes a weight, its scales no longer at 1."""
    holder = Ternarised(Start(Threshold(threshold), unit), latent)
    with torch.no_grad():
        holder.scales.copy_(torch.tensor(scales))
    return holder


def test_codes():
    latent = torch.tensor([-2.0, -0.2, -0.1, 0.0, 0.1, 0.2, 1.0])
    found = ternary_codes(latent, Threshold(0.1))
    # 0.1 * 2 is the threshold, and what lies at it is zero.
    assert found.tolist() == [-1, 0, 0, 0, 0, 0, 1]
    assert found.dtype == torch.int8
    assert ternary_codes(latent, Threshold(0.0)).tolist() == [-1, -1, -1, 0, 1, 1, 1]
    assert ternary_codes(latent, Threshold(0.99)).tolist() == [-1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_sparsity_makes_as_many_zeros(share, dtype):
    latent = torch.arange(1, 101).reshape(10, 10).to(dtype)
    latent[::2] *= -1
    codes = ternary_codes(latent.requires_grad_(), Sparsity(share))
    assert torch.equal(codes, (latent.sign() * (latent.abs() > 100 * share)).to(torch.int8))
    assert int((codes == 0).sum()) == int(100 * share)


def test_a_sparsity_rounds_down_and_takes_ties_together():
    latent = torch.tensor([1.0, -1.0, 1.0, 2.0])
    assert ternary_codes(latent, Sparsity(0.2)).tolist() == [1, -1, 1, 1]
    assert ternary_codes(latent, Sparsity(0.25)).tolist() == [0, 0, 0, 1]


def test_a_sparsity_holds_while_latent_weights_move():
    """The limit follows the elements: those that are zero change, not how many are."""
    latent = torch.tensor([0.1, 0.2, -0.3, 0.4])
    holder = Ternarised(Start(Sparsity(0.5), 1.0), latent)
    assert holder(latent).tolist() == [0.0, 0.0, -1.0, 1.0]
    assert holder(latent - 0.35).tolist() == [-1.0, 0.0, -1.0, 0.0]


@pytest.mark.parametrize("shape", [(0, 3), (), (1,)])
def test_codes_of_unusual_shapes(shape):
    latent = torch.full(shape, -1.0, requires_grad=True)
    assert torch.equal(
        ternary_codes(latent, Threshold(0.05)), torch.full(shape, -1, dtype=torch.int8)
    )
    made = holder_of(latent, [2.0, 3.0])(latent)
    assert torch.equal(made, torch.full(shape, -3.0))
    made.sum().backward()
    assert torch.equal(latent.grad, torch.full(shape, 3.0))


def test_the_gradients_are_the_published_ones():
    """By hand, with Wp = 2, Wn = 3 and a threshold of 0.1."""
    latent = torch.tensor([1.0, 0.5, 0.1, -0.05, -0.4, 0.0], requires_grad=True)
    holder = holder_of(latent, [2.0, 3.0], 0.1)
    made = holder(latent)
    assert made.tolist() == [2.0, 2.0, 0.0, 0.0, -3.0, 0.0]
    (made * torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0, 100000.0])).sum().backward()
    # dL/dWp = g1 + g2, dL/dWn = -g5; the latent ones times Wp, 1 and Wn.
    assert holder.scales.grad.tolist() == [11.0, -10000.0]
    assert latent.grad.tolist() == [2.0, 20.0, 100.0, 1000.0, 30000.0, 100000.0]


@pytest.mark.parametrize("unit", [1.0, 0.25, 3.0])
def test_the_gradients_of_the_scales_are_those_of_the_function(unit):
    torch.manual_seed(0)
    latent = torch.randn(4, 6, dtype=torch.float64)
    wanted = torch.randn(4, 6, dtype=torch.float64)
    holder = holder_of(latent, [0.7, 1.3], 0.3, unit)

    def smooth(scales):
        positive, negative = scales * unit
        codes = ternary_codes(latent, Threshold(0.3))
        made = torch.where(codes > 0, positive, torch.where(codes < 0, -negative, 0.0))
        return (made - wanted).exp().sum()

    loss = (holder(latent) - wanted).exp().sum()
    assert torch.equal(loss, smooth(holder.scales))
    loss.backward()
    step = 1e-6
    for index in range(2):
        moved = torch.eye(2, dtype=torch.float64)[index] * step
        found = holder.scales.detach()
        difference = (smooth(found + moved) - smooth(found - moved)) / (2 * step)
        # Central differences: an error of step**2, and rounding of 2**-53 / step.
        assert float(difference) == pytest.approx(float(holder.scales.grad[index]), rel=1e-8)


@pytest.mark.parametrize("unit", [1.0, 0.25, 3.0])
def test_latent_weights_have_the_gradient_times_what_stands_for_their_region(unit):
    torch.manual_seed(0)
    latent = torch.randn(50, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(50, dtype=torch.float64)
    holder = holder_of(latent, [0.7, 1.3], 0.3, unit)
    (holder(latent) * gradient).sum().backward()
    limit = 0.3 * latent.detach().abs().max()
    above, below = latent.detach() > limit, latent.detach() < -limit
    assert all(0 < int(part.sum()) < 50 for part in (above, below, ~(above | below)))
    # The scales without their unit: the published gradients of w / u, times u.
    factors = torch.where(above, 0.7, torch.where(below, 1.3, 1.0).double()).double()
    assert torch.allclose(latent.grad, gradient * factors, rtol=1e-7, atol=0)
    assert float(holder.scales.grad[0]) == pytest.approx(unit * float(gradient[above].sum()))
    assert float(holder.scales.grad[1]) == pytest.approx(-unit * float(gradient[below].sum()))


def test_the_threshold_follows_the_largest_weight_and_has_no_gradient():
    latent = torch.tensor([1.0, 0.3, -0.3], requires_grad=True)
    holder = holder_of(latent, [1.0, 1.0], 0.2)
    assert holder(latent).tolist() == [1.0, 1.0, -1.0]
    with torch.no_grad():
        latent[0] = 2.0
    made = holder(latent)
    assert made.tolist() == [1.0, 0.0, 0.0]
    (made * torch.tensor([0.0, 5.0, 7.0])).sum().backward()
    assert latent.grad.tolist() == [0.0, 5.0, 7.0]


def test_sums_of_many_gradients_do_not_lose_them():
    """In single precision, 2**24 plus many ones would stay 2**24."""
    latent = torch.ones(4097, requires_grad=True)
    holder = holder_of(latent, [1.0, 1.0])
    gradient = torch.ones(4097)
    gradient[0] = 2.0**24
    (holder(latent) * gradient).sum().backward()
    assert float(holder.scales.grad[0]) == 2.0**24 + 4096


def test_in_a_network_the_gradients_are_those_of_autograd():
    module = program().module
    weight = module.get_parameter(NAME)
    latent = weight.detach().clone()
    with ternarised(module, {NAME: Start(Threshold(0.3), 0.2)}) as holders:
        with torch.no_grad():
            holders[NAME].scales.copy_(torch.tensor([0.8, 1.6]))
        found = module(X)
        found.square().sum().backward()
        assert set(dict(module.named_parameters())) == {
            *("0.bias", "2.weight", "2.bias"),
            *("0.parametrizations.weight.original", "0.parametrizations.weight.0.scales"),
        }
        gradients = weight.grad, holders[NAME].scales.grad
    codes = ternary_codes(latent, Threshold(0.3)).float()
    scales = torch.tensor([0.8, 1.6], requires_grad=True)
    dense = 0.2 * (codes.clamp_min(0) * scales[0] + codes.clamp_max(0) * scales[1])
    dense.retain_grad()
    layers = dict(module.named_parameters())
    hidden = torch.relu(X @ dense.T + layers["0.bias"])
    expected = hidden @ layers["2.weight"].T + layers["2.bias"]
    assert torch.allclose(found, expected, atol=1e-6)
    expected.square().sum().backward()
    assert torch.allclose(gradients[1], scales.grad, atol=1e-6)
    factors = torch.where(codes > 0, 0.8, torch.where(codes < 0, 1.6, 1.0))
    assert torch.allclose(gradients[0], dense.grad * factors, atol=1e-6)


class Normalised(nn.Module):
    """Batch normalisation without its epsilon, which is of no size of its own."""

    def forward(self, x):
        return (x - x.mean(0)) / x.var(0, correction=0).sqrt()


def test_a_power_of_two_as_unit_changes_no_bit_of_a_normalised_network():
    """A normalisation divides the unit out, and gradients with it.

    With the unit u, what is normalised is u times as large, and the gradient of the made weight
    is 1 / u of what it is. So with a learning rate of u for the latent weights, which get it as it
    is, and of 1 for the scales, whose gradient is u times it, both trajectories are the same, and
    where u is a power of 2, without a rounding between them.
    """
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8, bias=False), Normalised(), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(32, 5)
    y = (x[:, 0] > 0).long()
    trajectories = []
    for unit in (1.0, 0.25, 4.0):
        module = copy.deepcopy(network)
        with ternarised(module, {NAME: Start(Threshold(0.2), unit)}) as holders:
            latent = module[0].parametrizations.weight.original
            others = [one for one in module.parameters() if one is not latent]
            rate = 0.05
            optimizer = torch.optim.SGD(
                [{"params": [latent], "lr": rate * unit}, {"params": others}], lr=rate, momentum=0.9
            )
            losses = []
            for _ in range(20):
                optimizer.zero_grad()
                loss = functional.cross_entropy(module(x), y)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            codes = frozen(module, holders)[NAME].codes
            trajectories.append((losses, latent.detach().clone(), holders[NAME].scales.tolist()))
        assert float(module[0].weight.detach().max()) == trajectories[-1][2][0] * unit
        assert set(codes.unique().tolist()) == {-1, 0, 1}
    for losses, latent, scales in trajectories[1:]:
        assert losses == trajectories[0][0]
        assert torch.equal(latent, trajectories[0][1])
        assert scales == trajectories[0][2]
    assert trajectories[0][0][-1] < 0.8 * trajectories[0][0][0]
    assert trajectories[0][2] != [1.0, 1.0]


def test_the_size_of_latent_weights_does_not_matter():
    """Twice the latent weights, trained at twice the learning rate, are twice them ever after."""
    torch.manual_seed(0)
    weight, wanted = torch.randn(6, 5), torch.randn(3, 6)
    found = []
    for size in (1.0, 2.0):
        module = nn.Linear(5, 6, bias=False)
        with torch.no_grad():
            module.weight.copy_(size * weight)
        with ternarised(module, {"weight": Start(Threshold(0.2), 1.0)}) as holders:
            latent = module.parametrizations.weight.original
            optimizer = torch.optim.SGD(
                [{"params": [latent], "lr": 0.05 * size}, {"params": [holders["weight"].scales]}],
                lr=0.05,
            )
            for _ in range(10):
                optimizer.zero_grad()
                (module(X) - wanted).square().sum().backward()
                optimizer.step()
            found.append((latent.detach() / size, holders["weight"].scales.detach()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_afterwards_the_parameter_is_the_same_and_ternary():
    module = program().module
    weight, before = module.get_parameter(NAME), dict(module.named_parameters())
    with ternarised(module, {NAME: Start(Threshold(0.3), 0.5)}) as holders:
        with torch.no_grad():
            weight.mul_(-3)
            holders[NAME].scales.copy_(torch.tensor([2.0, 3.0]))
        stored = frozen(module, holders)[NAME]
        made = module.get_submodule("0").weight
        assert same_bits(made.detach(), stored.materialise())
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
    assert same_bits(weight.detach(), stored.materialise())
    assert set(weight.unique().tolist()) == {1.0, 0.0, -1.5}
    assert not hasattr(module.get_submodule("0"), "parametrizations")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_stored_bits_are_those_of_other_types_too(dtype):
    torch.manual_seed(0)
    module = nn.Linear(5, 7).to(dtype)
    with ternarised(module, {"weight": Start(Threshold(0.05), 0.3)}) as holders:
        with torch.no_grad():
            holders["weight"].scales.copy_(torch.tensor([1.1, -0.7]))
        assert module.weight.dtype == holders["weight"].scales.dtype == dtype
        stored = frozen(module, holders)["weight"]
        module(X.to(dtype)).sum().backward()
        assert holders["weight"].scales.grad.dtype == dtype
    assert stored.dtype == dtype
    assert same_bits(module.weight.detach(), stored.materialise())


def test_after_an_error_nothing_stands_for_weights():
    module = program().module
    weight = module.get_parameter(NAME)
    with pytest.raises(ZeroDivisionError), ternarised(module, {NAME: Start(Threshold(0.3), 0.5)}):
        raise ZeroDivisionError
    assert module.get_parameter(NAME) is weight
    assert set(weight.abs().unique().tolist()) == {0.0, 0.5}
    assert not hasattr(module.get_submodule("0"), "parametrizations")
    module(X)


def test_a_name_that_is_none_leaves_the_others_plain():
    module = program().module
    weight = module.get_parameter(NAME)
    starts = {NAME: Start(Threshold(0.3), 0.5), "1.weight": Start(Threshold(0.3), 0.5)}
    with pytest.raises(AttributeError), ternarised(module, starts):
        pass
    assert module.get_parameter(NAME) is weight
    assert not hasattr(module.get_submodule("0"), "parametrizations")


def tied():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    module = capture(layers, (X,)).module
    module.get_submodule("1").weight = module.get_submodule("0").weight
    return module


def test_tied_weights_share_one_pair_of_scales():
    module = tied()
    starts = dict.fromkeys((NAME, "1.weight"), Start(Threshold(0.2), 1.0))
    with ternarised(module, starts) as holders:
        assert holders[NAME] is holders["1.weight"]
        assert sum(one.numel() for one in module.parameters()) == 25 + 2
        with torch.no_grad():
            # The first is below the threshold of weights of these values.
            holders[NAME].scales.copy_(torch.tensor([0.05, 0.4]))
        stored = frozen(module, holders)
        found = module(X)
        found.sum().backward()
        gradient = holders[NAME].scales.grad.clone()
    dense = stored[NAME].materialise()
    assert torch.equal(stored["1.weight"].materialise(), dense)
    assert torch.allclose(found, X @ dense.T @ dense.T, atol=1e-6)
    assert module.get_submodule("1").weight is module.get_submodule("0").weight
    assert same_bits(module.get_parameter(NAME).detach(), dense)
    # Both uses count.
    step = 1e-3
    for index in range(2):
        values = []
        for sign in (1, -1):
            pair = torch.tensor([0.05, 0.4], dtype=torch.float64)
            pair[index] += sign * step
            codes = stored[NAME].codes.double()
            weight = codes.clamp_min(0) * pair[0] + codes.clamp_max(0) * pair[1]
            values.append(float((X.double() @ weight.T @ weight.T).sum()))
        # A polynomial of degree two has no error but rounding.
        difference = (values[0] - values[1]) / (2 * step)
        assert difference == pytest.approx(float(gradient[index]), abs=1e-4)


def test_scales_count_as_the_weights_that_they_stand_for():
    module = program().module
    starts = dict.fromkeys((NAME, "2.bias"), Start(Threshold(0.2), 1.0))
    with ternarised(module, starts):
        found = axes_of(module)
        axes = {name: found[one] for name, one in module.named_parameters()}
    assert axes == {
        "0.bias": 1,
        "0.parametrizations.weight.original": 2,
        "0.parametrizations.weight.0.scales": 2,
        "2.weight": 2,
        "2.parametrizations.bias.original": 1,
        "2.parametrizations.bias.0.scales": 1,
    }


def test_the_module_may_train_on_another_device():
    """The meta device computes nothing, but refuses what lies elsewhere."""
    module = program().module
    with ternarised(module, {NAME: Start(Threshold(0.2), 1.0)}) as holders:
        module.to("meta")
        module(X.to("meta")).sum().backward()
        assert holders[NAME].scales.grad.device.type == "meta"


def test_what_tells_parametrisations_apart():
    assert (
        repr(Ternarised(Start(Threshold(0.05), 0.3), X)) == "Ternarised(threshold=0.05, unit=0.3)"
    )
    assert repr(Ternarised(Start(Sparsity(0.4), 0.3), X)) == "Ternarised(sparsity=0.4, unit=0.3)"


def test_it_goes_with_the_training_form():
    module = program().module
    weight = module.get_parameter(NAME)
    with trainable(module), ternarised(module, {NAME: Start(Threshold(0.2), 1.0)}) as holders:
        module(X).sum().backward()
        assert holders[NAME].scales.grad is not None
        assert weight.grad is not None
    assert weight.grad is None
