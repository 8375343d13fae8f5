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
from shohin.backends.tvm.cuda.kernels.layers import MatMul
from shohin.backends.tvm.cuda.kernels.tiles import _THREAD_TILES
from shohin.errors import UnsupportedError

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


def test_empty_arrays_need_no_kernels(tmp_path):
    """Whose results others may read: a mean of nothing is not a number, a sum zero."""
    module = net(
        lambda s, x: (
            functional.layer_norm(x[:, :0], (30,)),
            x[:, :0].softmax(-1),
            x[:, :0].relu(),
            torch.cat([x[:, :0], x], 1),
        )
    )
    check(captured(module, (3, 30)), NONE, [torch.randn(2, 3, 30)], tmp_path)


def test_infinity_passes_through_tensor_cores(tmp_path):
    program = captured(net(lambda s, x: s.a(x), a=nn.Linear(24, 3)), (24,))
    with torch.no_grad():
        for parameter in program.module.parameters():
            parameter.fill_(0.5)
    x = torch.zeros(17, 24)
    x[2, 5], x[3, 7], x[4, 1], x[5, 2] = torch.inf, -torch.inf, torch.nan, 3.4027e38
    (found,) = run_emulated(shohin.compile(program, TENSOR_CORES, batch=17), [x], tmp_path)
    expected = program.module(x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.allclose(found, expected, rtol=1e-6, equal_nan=True)


def test_many_products_are_one_grid():
    kernel = MatMul(unit="fma", tile=_THREAD_TILES[-1], batch=70000, rows=2, columns=2, depth=3)
    assert kernel.grid == (70000, 1)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda s, x: x.half().float(), "these nodes have half precision"),
        (lambda s, x: x.expand(2, 1 << 15, 1 << 16).softmax(-1), "at most 2**31 - 1 can be"),
    ],
)
def test_what_there_is_no_kernel_for(function, text):
    program = captured(net(function), (1, 1 << 16))
    with pytest.raises(UnsupportedError) as caught:
        shohin.compile(program, NONE, batch=2)
    assert text in str(caught.value)
