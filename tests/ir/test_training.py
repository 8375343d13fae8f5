import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shohin.ir.capture import capture
from shohin.ir.printer import format_program
from shohin.ir.program import tensor_of
from shohin.ir.training import dropout_probability, is_dropout, trainable


class Net(nn.Module):
    """Batch normalisation and dropout, and a dropout that is always on."""

    def __init__(self, always=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 36, 4)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn(self.conv(x))).flatten(1)
        y = functional.dropout(y, 0.25, training=True) if self.always else y
        return self.fc(self.drop(y))


def pair(always=False):
    torch.manual_seed(0)
    model = Net(always)
    program = capture(model, (torch.randn(4, 3, 8, 8),))
    return model, program


def texts(program):
    flags = {name: one.requires_grad for name, one in program.module.named_parameters()}
    return format_program(program), program.module.code, flags, program.module.training


def test_it_computes_what_the_model_computes_in_both_modes():
    model, program = pair()
    x = torch.randn(16, 3, 8, 8)
    with trainable(program.module):
        for training in (True, False, True):
            model.train(training)
            program.module.train(training)
            torch.manual_seed(5)
            wanted = model(x)
            torch.manual_seed(5)
            assert torch.allclose(program.module(x), wanted, atol=1e-6)
    for name in ("bn.running_mean", "bn.running_var"):
        assert torch.allclose(tensor_of(program.module, name), tensor_of(model, name), atol=1e-7)
    model.eval()
    assert torch.allclose(program.module(x), model(x), atol=1e-6)


def test_gradients_are_those_of_the_model():
    model, program = pair()
    x, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    model.train()
    torch.manual_seed(5)
    functional.cross_entropy(model(x), labels).backward()
    with trainable(program.module):
        torch.manual_seed(5)
        functional.cross_entropy(program.module(x), labels).backward()
        found = {name: one.grad for name, one in program.module.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6)
    assert all(one.grad is None for one in program.module.parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_everything_but_weights_is_restored(fails):
    _, program = pair()
    tensor_of(program.module, "fc.bias").requires_grad_(False)
    graph, nodes = program.module.graph, list(program.module.graph.nodes)
    before = texts(program)
    meta = dict(program.module.meta)
    try:
        with trainable(program.module, masks={"fc.weight": torch.rand(4, 288) < 0.5}):
            assert tensor_of(program.module, "fc.bias").requires_grad
            assert program.module.training
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        assert fails
    assert program.module.graph is graph
    assert list(graph.nodes) == nodes
    assert texts(program) == before
    assert program.module.meta == meta


def test_dropout_that_is_always_on_stays_as_it_is():
    model, program = pair(always=True)
    program.module.eval()
    x = torch.ones(4, 3, 8, 8)
    with trainable(program.module):
        program.module.eval()
        torch.manual_seed(3)
        found = program.module(x)
    model.eval()
    torch.manual_seed(3)
    assert torch.allclose(found, model(x), atol=1e-6)


def test_frozen_parameters_and_statistics_stay():
    _, program = pair()
    (norm,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    before = {name: one.clone() for name, one in program.module.state_dict().items()}
    frozen = ("conv.weight", "bn.weight", "bn.bias")
    with trainable(program.module, frozen=frozen, frozen_statistics=(norm.name,)):
        optimizer = torch.optim.SGD(program.module.parameters(), lr=0.1, weight_decay=0.1)
        program.module(torch.randn(8, 3, 8, 8)).square().sum().backward()
        optimizer.step()
    after = program.module.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_inside_of_itself_it_does_nothing():
    _, program = pair()
    with trainable(program.module, frozen=("conv.weight",)):
        graph = program.module.graph
        with trainable(program.module):
            assert program.module.graph is graph
            assert not tensor_of(program.module, "conv.weight").requires_grad
        assert program.module.graph is graph
        assert program.module.training


def test_dropout_probabilities():
    _, program = pair()
    (node,) = filter(is_dropout, program.graph.nodes)
    assert dropout_probability(node) == 0.5
    with trainable(program.module, dropout={node.name: 1.0}):
        # Everything is dropped, and the bias is left.
        found = program.module(torch.randn(2, 3, 8, 8))
        assert torch.allclose(found, tensor_of(program.module, "fc.bias").expand(2, 4))
    assert dropout_probability(node) == 0.5


def test_batch_normalisation_without_momentum_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, momentum=None))
    program = capture(model, (torch.ones(2, 1, 4, 4),))
    before = tensor_of(program.module, "1.running_mean").clone()
    with trainable(program.module):
        program.module(torch.randn(4, 1, 4, 4) + 3)
    assert not torch.equal(before, tensor_of(program.module, "1.running_mean"))


def test_the_inference_form_of_batch_normalisation_trains():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    x = torch.randn(4, 1, 4, 4)
    exported = torch.export.export(model, (x,)).run_decompositions({})
    program = capture(exported)
    targets = {node.target for node in program.graph.nodes}
    assert torch.ops.aten._native_batch_norm_legit_no_training.default in targets
    plain = program.module(x)
    with trainable(program.module):
        found = program.module(x)
        program.module.eval()
        statistics = program.module(x)
    model.train()
    assert torch.allclose(found, model(x), atol=1e-6)
    assert not torch.allclose(plain, statistics, atol=1e-3)
    assert torch.allclose(tensor_of(program.module, "1.running_mean"), model[1].running_mean)


def test_a_module_can_be_copied_while_it_trains():
    _, program = pair()
    with trainable(program.module):
        duplicate = copy.deepcopy(program.module)
    x = torch.randn(2, 3, 8, 8)
    duplicate.eval()
    assert torch.allclose(duplicate(x), program.module(x), atol=1e-6)
