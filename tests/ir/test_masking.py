import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shohin.errors import SpecError
from shohin.ir.capture import capture
from shohin.ir.masking import masked
from shohin.ir.program import is_tensor_name, tensor_of


class Net(nn.Module):
    """A weight at the top and one below."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.linear(x, self.weight))


def net():
    torch.manual_seed(0)
    return capture(Net(), (torch.ones(2, 6),))


def half(program, *names):
    generator = torch.Generator().manual_seed(1)
    shapes = {name: tensor_of(program.module, name).shape for name in names}
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda weights: torch.optim.Adam(weights, lr=0.1, weight_decay=0.1),
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_masks_hold_whatever_the_optimiser_does(make):
    program = net()
    module = program.module
    masks = half(program, "weight", "head.weight")
    with masked(module, masks):
        optimizer = make(module.parameters())
        for _ in range(5):
            optimizer.zero_grad()
            module(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
        original = module.head.parametrizations.weight.original.detach().clone()
    for name, mask in masks.items():
        weight = tensor_of(module, name).detach()
        assert torch.equal(weight.view(torch.int32)[~mask], torch.zeros_like(weight[~mask]).int())
        assert weight[mask].all()
    mask = masks["head.weight"]
    assert torch.equal(tensor_of(module, "head.weight").detach()[mask], original[mask])


def test_parameters_are_the_same_objects_afterwards():
    program = net()
    module, before = program.module, dict(program.module.named_parameters())
    kind = type(module)
    with masked(module, half(program, "weight", "head.weight")):
        assert set(module.state_dict()) != set(before)
    after = dict(module.named_parameters())
    assert list(after) != []
    assert {name: id(one) for name, one in after.items()} == {
        name: id(one) for name, one in before.items()
    }
    assert type(module) is kind
    assert not list(module.buffers())


def test_masks_are_applied_and_removed_on_an_error():
    program = net()
    masks = half(program, "head.weight")
    with pytest.raises(RuntimeError, match="stop"), masked(program.module, masks):
        raise RuntimeError("stop")
    weight = tensor_of(program.module, "head.weight").detach()
    assert not weight[~masks["head.weight"]].any()
    assert is_tensor_name(program.module, "head.weight")
    assert not hasattr(program.module.head, "parametrizations")


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    module = Tied()
    mask = torch.eye(4) > 0
    with masked(module, {"a.weight": mask}):
        seen = module.b.weight.detach()
    assert not seen[~mask].any()
    assert module.a.weight is module.b.weight
    assert not module.a.weight.detach()[~mask].any()


@pytest.mark.parametrize(
    ("mask", "found"),
    [(torch.ones(2, 2, dtype=torch.bool), "bool[2, 2]"), (torch.ones(3, 6), "float32[3, 6]")],
)
def test_masks_that_do_not_fit_are_refused(mask, found):
    with pytest.raises(SpecError) as caught, masked(net().module, {"head.weight": mask}):
        pass
    assert str(caught.value) == f"mask of 'head.weight': expected bool[3, 6], got {found}"
