import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from shohin import zoo
from shohin.ir.capture import capture
from shohin.passes.analyses.cost import cost
from shohin.passes.analysis import AnalysisCache
from shohin.passes.base import Context
from shohin.passes.prune import Prune

# Multiply-accumulates of convolutions and linear maps, and parameters, as published.
PUBLISHED = [
    ("lenet-300-100", 266_200, 266_610),
    ("lenet-5", 2_293_000, 431_080),
    ("resnet-20", 40_551_040, 269_722),  # the often quoted 40.8 M counts more than these
    ("alexnet", 714_188_480, 61_100_840),
    ("vgg-16", 15_470_264_320, 138_357_544),
    ("mobilenet-v2", 300_774_272, 3_504_872),
    ("resnet-18", 1_814_073_344, 11_689_512),
    ("resnet-50", 4_089_184_256, 25_557_032),
]


@pytest.mark.parametrize(("name", "macs", "parameters"), PUBLISHED)
def test_published_networks(name, macs, parameters):
    found = cost(capture(zoo.build(name), zoo.example_inputs(name)))
    assert (found.macs, found.parameters) == (macs, parameters)
    assert found.nonzero_macs == found.macs
    assert found.nonzeros == found.parameters


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def macs_of(module, *shape):
    chosen = module if isinstance(module, nn.Module) else Call(module)
    return cost(capture(chosen, (torch.ones(2, *shape),))).macs


COUNTED = {
    "grouped convolution": (nn.Conv2d(8, 12, 3, groups=4), (8, 6, 6), 12 * 16 * 2 * 9),
    "conv1d": (nn.Conv1d(3, 5, 4, stride=2), (3, 10), 5 * 4 * 3 * 4),
    "conv3d": (nn.Conv3d(2, 3, 2), (2, 4, 4, 4), 3 * 27 * 2 * 8),
    "same padding": (nn.Conv2d(2, 3, 3, padding="same"), (2, 5, 5), 3 * 25 * 2 * 9),
    "transposed": (nn.ConvTranspose2d(6, 4, 3, stride=2), (6, 5, 5), 25 * 6 * 4 * 9),
    "transposed grouped": (nn.ConvTranspose2d(6, 4, 3, groups=2), (6, 5, 5), 25 * 6 * 2 * 9),
    "linear on a sequence": (nn.Linear(8, 3), (7, 8), 7 * 8 * 3),
    "matmul": (lambda x: x @ x.transpose(1, 2), (5, 6), 5 * 5 * 6),
    "bmm": (lambda x: torch.bmm(x, x.transpose(1, 2)), (5, 6), 5 * 5 * 6),
    "attention": (
        lambda x: functional.scaled_dot_product_attention(x, x, x),
        (3, 7, 4),
        2 * 3 * 7 * 7 * 4,
    ),
    "elementwise": (lambda x: functional.relu(x * x + x), (5, 6), 0),
}


@pytest.mark.parametrize(("module", "shape", "macs"), COUNTED.values(), ids=COUNTED)
def test_multiply_accumulates(module, shape, macs):
    assert macs_of(module, *shape) == macs


def test_a_node_has_its_weights_and_results():
    program = capture(nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4)), (torch.ones(2, 10),))
    found = cost(program)
    linear, norm = found.nodes["linear"], found.nodes["batch_norm"]
    assert (linear.parameters, linear.stored_bytes, linear.activation_bytes) == (44, 176, 16)
    assert (norm.parameters, norm.stored_bytes, norm.macs) == (8, 64, 0)
    assert found.parameters == 52
    assert found.stored_bytes == 4 * (44 + 16)
    assert found.activation_bytes == 32
    assert found.peak_memory_bytes == 4 * (10 + 4)


def test_shared_weights_count_once_in_the_totals():
    layer = nn.Linear(6, 6)
    found = cost(capture(nn.Sequential(layer, nn.ReLU(), layer), (torch.ones(2, 6),)))
    assert [found.nodes[name].parameters for name in ("linear", "linear_1")] == [42, 42]
    assert found.parameters == 42
    assert found.macs == 72


def test_an_encoding_decides_what_is_stored():
    program = capture(nn.Linear(100, 20), (torch.ones(2, 100),))
    pruned = Prune(density=0.1).run(program, Context()).program
    found = cost(pruned)
    assert (found.parameters, found.nonzeros) == (2020, 220)
    assert (found.macs, found.nonzero_macs) == (2000, 200)
    assert found.stored_bytes == pruned.encodings["weight"].stored_bytes() + 80
    assert found.stored_bytes < 200 * 5 + 80
    assert found.nodes["linear"].for_remark().parameters == 220


def test_the_cache_computes_once():
    program, cache = capture(nn.Linear(3, 3), (torch.ones(2, 3),)), AnalysisCache()
    assert cache.get(cost, program) is cache.get(cost, program)
