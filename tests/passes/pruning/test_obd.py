"""Second derivatives by the backward recursion against Jacobians."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shohin.errors import InputError, PassError, SpecError, UnsupportedError
from shohin.ir.capture import capture
from shohin.ir.program import Program
from shohin.passes.pruning.obd import diagonal_hessian, saliencies, unsupported_weights


def _program(module: nn.Module, example: Tensor) -> Program:
    return capture(module.eval(), (example,))


def _squared_jacobians(module: nn.Module, name: str, data: Tensor) -> Tensor:
    """Mean over examples of the squared derivatives of all outputs by a weight, summed."""

    def outputs(weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {name: weight}, (data,))

    weight = module.get_parameter(name).detach()
    jacobian = torch.autograd.functional.jacobian(outputs, weight)
    return (jacobian**2).flatten(0, -weight.dim() - 1).sum(0) / len(data)


class Scaled(nn.Module):
    """An operator on an input times a parameter of its shape."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(shape) + 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.gain * x)


_IMAGE = (4, 6, 6)
_OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "tanh": torch.tanh,
    "gelu": functional.gelu,
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 0.5),
    "scaled": lambda x: 3 * x - 1,
    "square": lambda x: x * x,
    "power": lambda x: x**3,
    "max pool": lambda x: functional.max_pool2d(x, 3, 2, padding=1),
    "overlapping max pool": lambda x: functional.max_pool2d(x, 3, 1, ceil_mode=True),
    "average pool": lambda x: functional.avg_pool2d(x, 2),
    "padded average pool": lambda x: functional.avg_pool2d(x, 3, 2, padding=1),
    "average pool without padding": lambda x: functional.avg_pool2d(
        x, 3, 2, padding=1, ceil_mode=True, count_include_pad=False
    ),
    "adaptive average pool": lambda x: functional.adaptive_avg_pool2d(x, (4, 1)),
    "adaptive pool of rows": lambda x: functional.adaptive_avg_pool1d(x.flatten(2), 5),
    "mean": lambda x: x.mean((2, 3)),
    "sum": lambda x: x.sum(1),
    "cat": lambda x: torch.cat([x[:, 2:], x[:, :2]], 1),
    "split": lambda x: torch.cat([part * (i + 1) for i, part in enumerate(x.split(2, 1))], 1),
    "views": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)[:, 3:50].unsqueeze(1),
    "pad": lambda x: functional.pad(x, (1, 2, 0, 1)),
    "dropout": lambda x: functional.dropout(x, 0.5, False),
    "upsample": lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"),
    "layer norm": lambda x: functional.layer_norm(x, (6, 6), torch.arange(36.0).view(6, 6)),
    "layer norm of rows": lambda x: functional.layer_norm(x, (6,), eps=0.5),
    "broadcast": lambda x: x[:, :1] * torch.ones(4, 6, 6),
}


@pytest.mark.parametrize("name", _OPERATORS)
def test_single_operator_is_exact(name: str) -> None:
    torch.manual_seed(0)
    module = Scaled(_OPERATORS[name], _IMAGE)
    data = torch.randn(1, *_IMAGE)
    program = _program(module, torch.randn(2, *_IMAGE))
    found = diagonal_hessian(program, ["gain"], [(data,)], loss="squared-error")
    torch.testing.assert_close(found["gain"], _squared_jacobians(module, "gain", data))


_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "strided": lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "pointwise chain": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.GELU()),
    "normalised": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
}


@pytest.mark.parametrize("name", _LAYERS)
def test_single_layer_is_exact_for_the_squared_error(
    name: str, random_statistics: Callable[[nn.Module, int], nn.Module]
) -> None:
    torch.manual_seed(1)
    module = random_statistics(_LAYERS[name](), 1)
    names = [one for one, _ in module.named_parameters() if one in ("weight", "bias", "0.weight")]
    data = torch.randn(3, *_IMAGE)
    found = diagonal_hessian(_program(module, data), names, [(data,)], loss="squared-error")
    for one in names:
        torch.testing.assert_close(
            found[one], _squared_jacobians(module, one, data), rtol=1e-4, atol=1e-5
        )


def test_linear_map_under_cross_entropy_has_the_gauss_newton_diagonal() -> None:
    torch.manual_seed(2)
    module, data = nn.Linear(5, 4), torch.randn(7, 5)
    p = module(data).softmax(1).detach()
    # The matrix is J^T (diag(p) - p p^T) J; a weight moves one logit only.
    expected = torch.einsum("ni,nj->ij", p * (1 - p), data**2) / 7
    found = diagonal_hessian(_program(module, data), ["weight", "bias"], [(data[:3],), (data[3:],)])
    torch.testing.assert_close(found["weight"], expected)
    torch.testing.assert_close(found["bias"], (p * (1 - p)).mean(0))


def test_two_layers_are_exact_for_the_squared_error() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    data = torch.randn(4, 5)
    names = ["0.weight", "0.bias", "2.weight"]
    found = diagonal_hessian(_program(module, data), names, [(data,)], loss="squared-error")
    for name in names:
        torch.testing.assert_close(found[name], _squared_jacobians(module, name, data))


def test_by_hand() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, 0.5]]))
        module[2].weight.copy_(torch.tensor([[3.0, -1.0]]))
    data = torch.tensor([[2.0, 1.0]])  # a = (4, -1.5), x' = (4, 0)
    program = _program(module, torch.randn(2, 2))
    names = ["0.weight", "2.weight"]
    found = diagonal_hessian(program, names, [(data,)], loss="squared-error")
    assert found["2.weight"].tolist() == [[16.0, 0.0]]
    assert found["0.weight"].tolist() == [[36.0, 9.0], [0.0, 0.0]]
    ranked = saliencies(program, names, [(data,)], loss="squared-error")
    assert ranked["0.weight"].tolist() == [[18.0, 18.0], [0.0, 0.0]]


def test_a_value_used_twice_adds_up() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor([1.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            y = self.gain * x
            return y + 3 * y

    data = torch.tensor([[1.0, 1.0]])
    found = diagonal_hessian(
        _program(Residual(), torch.randn(2, 2)), ["gain"], [(data,)], loss="squared-error"
    )
    # Exactly it would be (1 + 3)^2: the recursion drops the mixed term.
    assert found["gain"].tolist() == [10.0, 10.0]


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_logits_are_found_before_a_softmax(last: nn.Module) -> None:
    torch.manual_seed(4)
    layer, data = nn.Linear(5, 4), torch.randn(7, 5)
    plain = diagonal_hessian(_program(layer, data), ["weight"], [(data,)])["weight"]
    ended = nn.Sequential(layer, last)
    found = diagonal_hessian(_program(ended, data), ["0.weight"], [(data,)])["0.weight"]
    torch.testing.assert_close(found, plain)


def test_a_lone_logit_is_a_sigmoid() -> None:
    torch.manual_seed(5)
    layer, data = nn.Linear(5, 1), torch.randn(7, 5)
    p = layer(data).sigmoid().detach()
    found = diagonal_hessian(_program(layer, data), ["bias"], [(data,)])["bias"]
    torch.testing.assert_close(found, (p * (1 - p)).mean(0))


def test_convolutional_network_runs_through(random_network: Callable[[int], nn.Module]) -> None:
    for seed in range(6):
        module, data = random_network(seed), torch.randn(2, 4, 6, 6)
        names = [name for name, one in module.named_parameters() if one.dim() > 1]
        found = diagonal_hessian(_program(module, data), names, [(data,)])
        assert all(bool((found[name] >= 0).all()) for name in names)
        assert all(bool((found[name] > 0).any()) for name in names)


def test_ranks_better_than_magnitude_where_inputs_differ_in_scale() -> None:
    torch.manual_seed(6)
    scales = torch.logspace(-2, 2, 20)
    data = torch.randn(500, 20) * scales
    layer = nn.Linear(20, 5, bias=False)
    program = _program(layer, data[:2])
    saliency = saliencies(program, ["weight"], [(data,)])["weight"]
    before = layer(data).log_softmax(1).detach()

    def divergence(ranks: Tensor) -> float:
        kept = ranks >= ranks.flatten().kthvalue(51).values
        after = functional.linear(data, layer.weight.detach() * kept).log_softmax(1)
        return float((before.exp() * (before - after)).sum(1).mean())

    assert divergence(saliency) < 0.2 * divergence(layer.weight.detach().abs())


def test_progress_counts_batches() -> None:
    calls: list[tuple[int, int, str]] = []
    batches = [(torch.randn(2, 5),)] * 3
    program = _program(nn.Linear(5, 4), torch.randn(2, 5))
    diagonal_hessian(program, ["weight"], batches, lambda *call: calls.append(call))
    assert [(done, total) for done, total, _ in calls] == [(1, 3), (2, 3), (3, 3)]


def test_operator_without_a_rule_is_named() -> None:
    module = nn.Sequential(nn.Linear(5, 4), nn.GroupNorm(2, 4))
    program = _program(module, torch.randn(2, 5))
    with pytest.raises(UnsupportedError, match=r"node 'group_norm'.*no rule for aten.group_norm"):
        diagonal_hessian(program, ["0.weight"], [(torch.randn(2, 5),)])


class Mixed(nn.Module):
    """Layers before and behind a softmax in the middle, and one on a branch beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.beside = nn.Linear(5, 4), nn.Linear(5, 4)
        self.behind = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.before(x).relu().split(2, 1)
        middle = torch.cat([parts[1], parts[0]], 1).softmax(1)
        return self.behind(middle + self.beside(x)).log_softmax(1)


def test_weights_before_an_operator_without_a_rule() -> None:
    torch.manual_seed(0)
    data = torch.randn(6, 5)
    program = _program(Mixed(), data[:2])
    names = ["before.weight", "beside.weight", "behind.weight"]
    errors = unsupported_weights(program, names, [(data,)])
    assert list(errors) == ["before.weight"]
    assert errors["before.weight"].where == "node 'softmax'"
    found = diagonal_hessian(program, names[1:], [(data,)])
    assert all(bool((one > 0).all()) for one in found.values())


def test_scaled_products_are_refused() -> None:
    class Product(nn.Module):
        def __init__(self, alpha: float) -> None:
            super().__init__()
            self.layer, self.alpha = nn.Linear(5, 4), alpha
            self.matrix, self.shift = nn.Parameter(torch.rand(4, 3)), nn.Parameter(torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.shift, self.layer(x), self.matrix, alpha=self.alpha)

    data = torch.randn(6, 5)
    module = Product(1)
    plain = _program(module, data[:2])
    found = diagonal_hessian(plain, ["layer.weight"], [(data,)], loss="squared-error")
    expected = _squared_jacobians(module, "layer.weight", data)
    torch.testing.assert_close(found["layer.weight"], expected)
    errors = unsupported_weights(_program(Product(2), data[:2]), ["layer.weight"], [(data,)])
    assert "it scales its operands" in errors["layer.weight"].problem


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.LayerNorm(4)])
def test_parameters_of_a_normalisation_are_refused(norm: nn.Module) -> None:
    module = nn.Sequential(nn.Linear(5, 4), norm)
    program = _program(module, torch.randn(2, 5))
    with pytest.raises(UnsupportedError, match="its parameters are asked for"):
        diagonal_hessian(program, ["1.weight"], [(torch.randn(2, 5),)])


def test_bad_input_is_refused() -> None:
    program = _program(nn.Linear(5, 4), torch.randn(2, 5))
    with pytest.raises(SpecError, match="weight 'missing'"):
        diagonal_hessian(program, ["missing"], [(torch.randn(2, 5),)])
    with pytest.raises(InputError, match="at least one batch"):
        diagonal_hessian(program, ["weight"], [])
    with pytest.raises(PassError, match=r"weight 'weight'.*not finite"):
        diagonal_hessian(program, ["weight"], [(torch.full((2, 5), torch.nan),)])
