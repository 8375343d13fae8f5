import pytest
import torch
from torch import Tensor, nn

from shohin.ir.capture import capture
from shohin.passes.analyses.shapes import shapes, shapes_at


class Split(nn.Module):
    """A linear map whose result is taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.fc(x).split(4, dim=1)
        return left.t().double() @ right.double()


@pytest.fixture(scope="module")
def program():
    return capture(Split(), (torch.ones(2, 6),))


def node(program, name):
    (found,) = (one for one in program.graph.nodes if one.name == name)
    return found


def test_layouts_at_batch_one(program):
    found = shapes(program)
    linear = found.of(node(program, "linear"))
    assert found.batch == 1
    assert (linear.shape, linear.dtype, linear.strides) == ((1, 8), torch.float32, (8, 1))
    assert (linear.elements, linear.bytes, linear.storage_bytes) == (8, 32, 32)


def test_layouts_at_another_batch(program):
    found = shapes_at(program, 5)
    transposed = found.of(node(program, "t"))
    assert (transposed.shape, transposed.strides) == ((4, 5), (1, 8))


def test_views_share_their_storage(program):
    found = shapes(program)
    linear, view = found.of(node(program, "linear")), found.of(node(program, "t"))
    assert linear.storage == view.storage
    assert found.of(node(program, "matmul")).storage != linear.storage


def test_a_node_of_several_tensors_has_no_single_layout(program):
    found = shapes(program)
    assert [part.shape for part in found.tensors["split"]] == [(1, 4), (1, 4)]
    with pytest.raises(KeyError, match="gives 2 tensors, not one"):
        found.of(node(program, "split"))
