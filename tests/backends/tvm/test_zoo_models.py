from importlib.util import find_spec

import pytest
import torch
from small_nets import compare
from torch import Tensor, nn

from shohin import zoo
from shohin.backends.tvm.binary import Binary
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.target import CpuTarget
from shohin.ir.capture import capture
from shohin.ir.program import Program
from shohin.passes.base import Context
from shohin.passes.fold_bn import FoldBatchNorm

_CNNS = (
    "lenet-5",
    "lenet-300-100",
    "resnet-20",
    "vgg-9",
    "squeezenet-1.1",
    "mobilenet-v2",
)
_TRANSFORMERS = ("vit-tiny", "encoder-tiny")
_NEEDS_REGIONS = pytest.mark.skipif(
    find_spec("shohin.backends.tvm.generic") is None, reason="needs TVM's own kernels"
)
_NAMES = [*_CNNS, *(pytest.param(name, marks=_NEEDS_REGIONS) for name in _TRANSFORMERS)]


def _program(model: nn.Module, name: str) -> Program:
    """The captured model with batch normalisations folded."""
    program = capture(model, zoo.example_inputs(name, 2), name=name)
    folded = FoldBatchNorm()
    return folded.run(program.copy(), Context(pass_name=folded.name)).program


# Sums of up to 4608 products through up to 53 layers: float32's own noise is near 1e-6 a layer.
@pytest.mark.parametrize("name", _NAMES)
def test_random_weights(name: str) -> None:
    model = zoo.build(name)
    program = _program(model, name)
    for batch, threads in ((1, 1), (4, 2)):
        binary = compile_program(program, CpuTarget(threads=threads), batch)
        inputs = zoo.example_inputs(name, batch, seed=3)
        with torch.no_grad():
            expected = model(*inputs)
        compare(binary(*inputs), expected, tolerance=1e-4)


def _classes(binary: Binary, images: Tensor) -> Tensor:
    """The class of each image; the last batch is filled up with zeros."""
    missing = -len(images) % binary.info.batch
    filled = torch.cat([images, torch.zeros(missing, *images.shape[1:])])
    (scores,) = binary.run_batches([filled.numpy()])
    return torch.from_numpy(scores)[: len(images)].argmax(1)


@pytest.mark.parametrize(
    ("name", "count"),
    [("lenet-300-100", 10_000), ("lenet-5", 10_000), ("resnet-20", 761), ("resnet-32", 761)],
)
def test_pretrained_nets_see_what_pytorch_sees(name: str, count: int) -> None:
    folder = zoo.data_folder()
    if folder is None:
        pytest.skip("no data folder: set SHOHIN_DATA to the folder with data sets and weights")
    model = zoo.pretrained(name, folder)
    images, labels = zoo.evaluation_set(name, folder)
    assert len(images) == count
    binary = compile_program(_program(model, name), CpuTarget(threads=2), 32)
    with torch.no_grad():
        expected = torch.cat([model(part).argmax(1) for part in torch.split(images, 500)])
    found = _classes(binary, images)
    assert torch.equal(found, expected)
    assert (found == labels).float().mean() > 0.9
