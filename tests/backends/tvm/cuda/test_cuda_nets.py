"""Whole networks compiled for GPUs: their numbers on an emulated one."""

import pytest
import torch
from arm_nets import IMAGES, ROWS
from emulated_gpu import run_emulated
from small_nets import captured, compare, net
from test_ternary_fixed_nets import fixed_program, images, small_net, ternary_program
from torch import nn
from torch.nn import functional

import shohin

TENSOR_CORES, NONE = "cuda{arch=sm_80}", "cuda{arch=sm_75}"


class Joined(nn.Module):
    """Several networks of the same input as one with as many outputs."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return tuple(part(x) for part in self.parts)


def check(program, target, inputs, folder, tolerance=1e-5, **how):
    """Compare all outputs with those of the program's module."""
    binary = shohin.compile(program, target, batch=len(inputs[0]), **how)
    found = run_emulated(binary, inputs, folder)
    with torch.no_grad():
        expected = program.module(*inputs)
    compare(tuple(found), expected if isinstance(expected, tuple) else (expected,), tolerance)
    return binary


def kernels(binary):
    return {step.kernel.partition(" ")[0] for step in binary.info.steps}


@pytest.mark.parametrize("target", [TENSOR_CORES, NONE])
@pytest.mark.parametrize(("parts", "shape"), [(IMAGES, (5, 13, 11)), (ROWS, (7, 50))])
def test_networks(parts, shape, target, tmp_path):
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    check(captured(Joined(parts.values()), shape), target, [x], tmp_path)


def test_what_is_not_a_number_stays_so(tmp_path):
    """In maxima of windows, and in what is cut off."""
    module = net(
        lambda s, x: (
            x.relu(),
            functional.max_pool2d(x, 3, 1, 1),
            x.clamp(-1, 1),
        )
    )
    x = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(1))
    x[0, 0, 1, 2], x[0, 1, 3, 3] = torch.nan, torch.inf
    program = captured(module, (2, 5, 6))
    found = run_emulated(shohin.compile(program, NONE), [x], tmp_path)
    for one, wanted in zip(found, module(x), strict=True):
        assert torch.equal(one.nan_to_num(7.5), wanted.nan_to_num(7.5))


@pytest.mark.parametrize("target", [TENSOR_CORES, NONE])
@pytest.mark.parametrize("options", ["", "ternary=ratio", "weights=12 by_channel=true"])
def test_every_bit_of_fixed_point(options, target, tmp_path):
    program, x = fixed_program(options), images(20)
    binary = shohin.compile(program, target)
    with torch.no_grad():
        assert torch.equal(run_emulated(binary, [x], tmp_path)[0], program.module(x))
    assert (
        kernels(binary)
        >= {
            "": {"conv2d_bytes", "conv2d_ternary_bytes", "vector_ternary_bytes"},
            "ternary=ratio": {"conv2d_ternary_bytes", "vector_ternary_bytes"},
            "weights=12 by_channel=true": {"direct_conv2d"},
        }[options]
    )


def test_ternary_weights_stay_packed(tmp_path):
    program = ternary_program(small_net(), (3, 10, 10))
    binary = check(program, TENSOR_CORES, [images(3, 5)], tmp_path)
    assert kernels(binary) >= {"conv2d_ternary_float", "linear_ternary_float"}
    one = shohin.compile(program, TENSOR_CORES)
    assert "vector_ternary_float" in kernels(one)
    assert one.constant_bytes < 0.2 * shohin.compile(captured(small_net(), (3, 10, 10)),
                                                     TENSOR_CORES).constant_bytes  # fmt: skip


@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        ("prune{density=0.08}, share-weights{bits=5}", {"sparse_conv2d", "vector_sparse"}),
        ("share-weights{bits=4}", {"vector_codebook_4"}),
        ("fold-bn, low-rank{speedup=2}", {"conv2d_float"}),
    ],
)
@pytest.mark.parametrize("weights", ["plain", "compressed"])
def test_compressed_networks(passes, expected, weights, tmp_path):
    torch.manual_seed(3)
    program = captured(small_net(), (3, 10, 10))
    data = [(images(1, 8),)]
    program = shohin.optimize(program, passes, calibration=data, drift=False).program
    binary = check(program, TENSOR_CORES, [images(20)], tmp_path, weights=weights)
    assert kernels(binary) >= expected


def test_the_same_program_is_the_same_binary():
    program = captured(small_net(), (3, 10, 10))
    binaries = [shohin.compile(program, "cuda{arch=sm_90}") for _ in range(2)]
    one, two = (binary.path.read_bytes() for binary in binaries)
    assert one == two


def test_layers_of_low_rank_are_one_kernel_where_that_pays(tmp_path, monkeypatch):
    program = captured(small_net(), (3, 10, 10))
    data = [(images(1, 8),)]
    passes = "fold-bn, low-rank{speedup=2}"
    program = shohin.optimize(program, passes, calibration=data, drift=False).program
    notes = [step.note for step in shohin.compile(program, NONE).info.steps]
    assert "estimated: one by one, for more blocks at a time" in notes
    monkeypatch.setattr("shohin.backends.tvm.cuda.kernels.pairs.MULTIPROCESSORS", 1)
    binary = check(program, NONE, [images(20)], tmp_path)
    assert "conv_pair" in kernels(binary)
