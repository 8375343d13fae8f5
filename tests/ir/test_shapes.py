import pytest
import torch
from torch import Tensor, nn

from shohin.errors import VerifyError
from shohin.ir import TensorType, capture, infer_shapes, symbolic_shapes, tensor_types


class Sizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        joined = torch.cat([x, x, x[:1]])
        first, second = x.chunk(2, 1)
        return joined, first * x.shape[0], second.reshape(-1), x.int()


@pytest.fixture(scope="module")
def sizes():
    return capture(Sizes(), torch.ones(2, 4))


def test_concrete_sizes_numbers_and_lists(sizes):
    types = infer_shapes(sizes, 6)
    half = TensorType((6, 2), torch.float32)
    assert types["x"] == TensorType((6, 4), torch.float32)
    assert types["chunk"] == (half, half)
    assert types["sym_size_int_1"] == 6
    assert types["output"] == (
        TensorType((13, 4), torch.float32),
        half,
        TensorType((12,), torch.float32),
        TensorType((6, 4), torch.int32),
    )


def test_symbolic_sizes(sizes):
    types = symbolic_shapes(sizes)
    assert types["sym_size_int_1"] == "N"
    assert types["cat"] == TensorType(("2N+1", 4), torch.float32)
    assert types["reshape"] == TensorType(("2N",), torch.float32)
    assert types["output"][3].describe() == "int32[N,4]"


def test_only_tensors(sizes):
    types = tensor_types(infer_shapes(sizes, 2))
    assert "chunk" not in types
    assert types["mul"].sizes() == (2, 2)


def test_nothing_is_allocated(program):
    huge = infer_shapes(program, 10**9)
    assert huge["output"] == TensorType((10**9, 2), torch.float32)


def test_a_node_that_cannot_run_is_named(program):
    linear = next(node for node in program.graph.nodes if node.name == "linear")
    linear.args = (program.graph.find_nodes(op="placeholder")[0], *linear.args[1:])
    with pytest.raises(VerifyError, match=r"^node 'linear': aten\.linear\.default refuses"):
        infer_shapes(program, 2)
