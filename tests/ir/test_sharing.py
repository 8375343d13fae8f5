from dataclasses import replace

import pytest
import torch
from torch import nn

from shohin.errors import SpecError
from shohin.ir.capture import capture
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Dense, Sparse
from shohin.ir.sharing import axes_of, codebook_of, shared, trained_codebook

X = torch.linspace(-1, 1, 15).reshape(3, 5)


def program():
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2)), (X,))


def book(weight, count=4):
    ranks = torch.arange(weight.numel()).reshape(weight.shape) % count
    return Codebook(torch.linspace(-1, 1, count), ranks.to(torch.uint8))


def sparse(weight):
    mask = torch.arange(weight.numel()).reshape(weight.shape) % 3 > 0
    return Sparse(mask, book(torch.zeros(int(mask.sum()))))


@pytest.mark.parametrize("make", [book, sparse])
def test_a_centroid_has_the_mean_gradient_of_its_elements(make):
    module = program().module
    weight = module.get_parameter("0.weight")
    encoding = make(weight)
    with shared(module, {"0.weight": encoding}):
        found = module(X)
        found.square().sum().backward()
        mean = weight.grad
        assert set(dict(module.named_parameters())) >= {"2.weight", "0.bias"}
    dense = encoding.materialise().requires_grad_()
    layers = dict(module.named_parameters())
    hidden = torch.relu(X @ dense.T + layers["0.bias"])
    expected = hidden @ layers["2.weight"].T + layers["2.bias"]
    assert torch.allclose(found, expected, atol=1e-6)
    (gradient,) = torch.autograd.grad(expected.square().sum(), dense)
    kept = gradient[encoding.mask] if isinstance(encoding, Sparse) else gradient
    indices = codebook_of(encoding).indices
    means = [float(kept[indices == index].mean()) for index in range(4)]
    assert torch.allclose(mean, torch.tensor(means), atol=1e-5)


def test_afterwards_the_parameter_is_the_same_and_dense():
    module = program().module
    weight = module.get_parameter("0.weight")
    encoding = book(weight)
    with shared(module, {"0.weight": encoding}), torch.no_grad():
        weight.mul_(3)
    assert module.get_parameter("0.weight") is weight
    tripled = replace(encoding, centroids=3 * encoding.centroids)
    assert torch.equal(weight, tripled.materialise())
    assert not hasattr(module.get_submodule("0"), "parametrizations")


@pytest.mark.parametrize("repeated", [1, 64, 5000])
def test_a_step_moves_a_centroid_by_the_mean_of_its_elements_steps(repeated):
    """So the learning rate that suits a weight suits its centroids, however many share one."""
    indices = torch.tensor([0, 1] * repeated, dtype=torch.uint8)
    encoding = Codebook(torch.tensor([0.1, -0.3]), indices)
    module = nn.Module()
    module.weight = nn.Parameter(encoding.materialise())
    slopes = torch.linspace(-1, 2, 2 * repeated)
    with shared(module, {"weight": encoding}):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        (module.weight * slopes).sum().backward()
        optimizer.step()
        moved = trained_codebook(module, "weight")[0] - encoding.centroids
    means = torch.stack([slopes[0::2].mean(), slopes[1::2].mean()])
    assert torch.allclose(moved, -0.1 * means, atol=1e-6)


@pytest.mark.parametrize("repeated", [1, 64, 5000])
def test_adam_moves_a_centroid_by_its_learning_rate_however_many_share_it(repeated):
    encoding = Codebook(torch.tensor([0.1, -0.3]), torch.tensor([0, 1] * repeated).byte())
    module = nn.Module()
    module.weight = nn.Parameter(encoding.materialise())
    with shared(module, {"weight": encoding}):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        (module.weight * torch.linspace(1, 2, 2 * repeated)).sum().backward()
        optimizer.step()
        moved = trained_codebook(module, "weight")[0] - encoding.centroids
    assert torch.allclose(moved, torch.full((2,), -0.01), atol=1e-6)


@pytest.mark.parametrize("make", [book, sparse])
def test_the_module_may_train_on_another_device(make):
    """The meta device computes nothing, but refuses what lies elsewhere."""
    module = program().module
    with shared(module, {"0.weight": make(module.get_parameter("0.weight"))}):
        module.to("meta")
        module(X.to("meta")).sum().backward()
        (centroids,) = (one for one in module.get_submodule("0").parameters() if one.numel() == 4)
        assert centroids.grad.device.type == "meta"
        assert {one.device.type for one in module.buffers()} == {"meta"}
        assert not any("indices" in name for name in module.state_dict())


def test_centroids_have_the_axes_of_their_weight():
    module = program().module
    books = {name: book(module.get_parameter(name)) for name in ("0.weight", "2.bias")}
    with shared(module, books):
        found = axes_of(module)
        axes = {name: found[one] for name, one in module.named_parameters()}
    assert axes == {
        "0.bias": 1,
        "0.parametrizations.weight.original": 2,
        "2.weight": 2,
        "2.parametrizations.bias.original": 1,
    }


def test_without_a_step_nothing_is_rounded():
    module = program().module
    weight = module.get_parameter("0.weight")
    values = torch.rand(4, generator=torch.Generator().manual_seed(0)).sort().values
    encoding = replace(book(weight), centroids=values)
    with shared(module, {"0.weight": encoding}):
        assert torch.equal(trained_codebook(module, "0.weight")[0], values)
    assert torch.equal(weight, encoding.materialise())


def test_as_many_centroids_as_elements():
    module = program().module
    indices = torch.tensor([1, 0], dtype=torch.uint8)
    encoding = Codebook(torch.tensor([5.0, 7.0]), indices)
    with shared(module, {"2.bias": encoding}):
        found = module(torch.zeros(1, 5))
    assert torch.equal(module.get_parameter("2.bias"), torch.tensor([7.0, 5.0]))
    assert torch.equal(module(torch.zeros(1, 5)), found)


def test_an_optimiser_moves_centroids_and_keeps_assignments():
    module = program().module
    encoding = book(module.get_parameter("0.weight"))
    with shared(module, {"0.weight": encoding}):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = (module(X) - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    weight = module.get_parameter("0.weight").detach()
    for index in range(4):
        assert weight[encoding.indices == index].unique().numel() == 1


def test_tied_weights_share_one_codebook():
    layers = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    module = capture(layers, (X,)).module
    module.get_submodule("1").weight = module.get_submodule("0").weight
    encoding = book(module.get_parameter("0.weight"))
    with shared(module, dict.fromkeys(("0.weight", "1.weight"), encoding)) as centroids:
        assert centroids["0.weight"] is centroids["1.weight"]
        found = module(X)
    dense = encoding.materialise()
    assert torch.allclose(found, X @ dense.T @ dense.T, atol=1e-6)
    assert module.get_submodule("1").weight is module.get_submodule("0").weight
    assert torch.equal(module.get_parameter("0.weight"), dense)


def test_a_weight_without_a_codebook_is_refused():
    module = program().module
    text = r"shared weight '0\.weight': expected a codebook, got dense"
    with pytest.raises(SpecError, match=text), shared(module, {"0.weight": Dense(X)}):
        pass


def moving_weight(make):
    """A weight that may move between centroids, and slopes that its loss has."""
    module = program().module
    weight = module.get_parameter("0.weight")
    encoding = make(weight)
    with torch.no_grad():
        weight.copy_(encoding.materialise())
    slopes = torch.linspace(-1, 2, weight.numel()).reshape(weight.shape)
    return module, encoding, slopes


@pytest.mark.parametrize("make", [book, sparse])
def test_a_weight_that_may_move_has_the_gradient_of_what_stands_for_it(make):
    module, encoding, slopes = moving_weight(make)
    weight = module.get_parameter("0.weight")
    with shared(module, {"0.weight": encoding}, moving=True):
        found = module.get_submodule("0").weight
        assert torch.equal(found, encoding.materialise())
        (found * slopes).sum().backward()
        kept = encoding.mask if isinstance(encoding, Sparse) else torch.ones_like(weight).bool()
        assert torch.equal(weight.grad, slopes.where(kept, 0.0))


@pytest.mark.parametrize("make", [book, sparse])
def test_centroids_are_the_means_of_what_is_nearest_to_them(make):
    module, encoding, _ = moving_weight(make)
    weight = module.get_parameter("0.weight")
    noise = 0.4 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    mask = encoding.mask if isinstance(encoding, Sparse) else torch.ones_like(weight).bool()
    with shared(module, {"0.weight": encoding}, moving=True):
        with torch.no_grad():
            weight.add_(noise)
        free = weight.detach()[mask].double()
        centroids, indices = trained_codebook(module, "0.weight")
    nearest = (free.unsqueeze(1) - codebook_of(encoding).centroids.double()).abs().argmin(1)
    means = torch.stack([free[nearest == one].mean() for one in nearest.unique()])
    assert torch.allclose(centroids.double(), means, atol=1e-6)
    again = (free.unsqueeze(1) - centroids.double()).abs().argmin(1)
    assert torch.equal(indices.long(), again)
    assert torch.equal(weight.detach()[mask], centroids[again])
    assert not weight.detach()[~mask].any()


def test_a_small_step_moves_a_centroid_as_it_does_where_assignments_are_fixed():
    moved = []
    for moving in (False, True):
        module, encoding, slopes = moving_weight(book)
        with shared(module, {"0.weight": encoding}, moving=moving):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
            (module.get_submodule("0").weight * slopes).sum().backward()
            optimizer.step()
            moved.append(trained_codebook(module, "0.weight")[0])
    assert torch.allclose(moved[0], moved[1], atol=1e-6)


def test_an_element_that_goes_its_own_way_changes_its_centroid():
    module = nn.Module()
    encoding = Codebook(torch.tensor([-1.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 1]).byte())
    module.weight = nn.Parameter(encoding.materialise())
    wanted = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    with shared(module, {"weight": encoding}, moving=True):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(50):
            optimizer.zero_grad()
            (module.weight - wanted).square().sum().backward()
            optimizer.step()
        centroids, indices = trained_codebook(module, "weight")
    assert indices.tolist() == [0, 0, 1, 1, 1, 1]
    assert torch.allclose(centroids, torch.tensor([-1.0, 1.0]), atol=1e-3)


def test_centroids_that_nothing_is_nearest_to_are_dropped():
    module = nn.Module()
    encoding = Codebook(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0, 1, 2]).byte())
    module.weight = nn.Parameter(encoding.materialise())
    with shared(module, {"weight": encoding}, moving=True):
        with torch.no_grad():
            module.parametrizations.weight.original[1] = 1.0
        centroids, indices = trained_codebook(module, "weight")
        assert torch.equal(trained_codebook(module, "weight")[0], centroids)
    assert (centroids.tolist(), indices.tolist()) == ([-1.0, 1.0], [0, 1, 1])


def test_while_a_module_is_evaluated_centroids_stay():
    module, encoding, _ = moving_weight(book)
    weight = module.get_parameter("0.weight")
    with shared(module, {"0.weight": encoding}, moving=True):
        module.eval()
        with torch.no_grad():
            weight.add_(0.05)
        assert torch.equal(module.get_submodule("0").weight, encoding.materialise())
