"""Binaries of fixed-point programs give every integer that the reference gives."""

import random

import avx_vnni
import numpy as np
import pytest
import torch
from emulated import EMULATED, run_emulated
from small_nets import captured, net
from torch import nn
from torch.nn import functional

import shohin
from shohin.backends.tvm.compile import compile_program
from shohin.backends.tvm.lowering.lower import select
from shohin.backends.tvm.lowering.operations import Elementwise, FixedConvolution, FixedLinear
from shohin.backends.tvm.processor import host_flags
from shohin.backends.tvm.target import CpuTarget

ARCHS = ["x86-64-v2", "x86-64-v3", "x86-64-v3-vnni", "x86-64-v4", "x86-64-v4-vnni"]


def conv(channels, filters, size=3, **options):
    options.setdefault("padding", size // 2)
    return nn.Conv2d(channels, filters, size, **options)


def residual(self, x):
    x = torch.relu(self.stem(x))
    y = torch.relu(self.left(x) + self.right(x))
    y = y * torch.relu(self.gate(y))
    z = torch.cat([functional.avg_pool2d(y, 2), functional.max_pool2d(self.wide(y), 2)], 1)
    return self.head(z.mean((2, 3)))


def residual_net():
    return net(
        residual,
        stem=conv(3, 32),
        left=conv(32, 32),
        right=conv(32, 32, 1),
        gate=conv(32, 32),
        wide=conv(32, 16, 5),
        head=nn.Linear(48, 10),
    )


def separable(self, x):
    x = functional.pad(torch.relu(self.stem(x)), (0, 1, 1, 0))
    x = torch.relu(self.deep(x))
    x = self.point(x)[:, :, ::2, 1:]
    return self.head(torch.relu(self.grouped(x)).flatten(1))


def separable_net():
    return net(
        separable,
        stem=conv(3, 24, stride=2),
        deep=conv(24, 24, groups=24),
        point=conv(24, 40, 1),
        grouped=conv(40, 20, groups=4),
        head=nn.Linear(20 * 4 * 6, 9),
    )


def mixed(self, x):
    x = torch.relu(self.one(x))
    y = torch.sigmoid(x)
    # Integers go on into a float operator, axes that move, and another layer.
    moved = x.permute(0, 2, 1, 3).permute(0, 2, 1, 3)
    return self.two(moved + x) * 2, y.mean((2, 3)), self.three(x.flatten(1))


def mixed_net():
    return net(mixed, one=conv(3, 20), two=conv(20, 4, 1), three=nn.Linear(20 * 12 * 12, 6))


def averages(self, x):
    x = torch.relu(self.one(x))
    a = functional.avg_pool2d(x, 3, 2, 1)
    b = functional.adaptive_avg_pool2d(x, 3)
    return self.two(a), self.three(b.flatten(1))


def averages_net():
    return net(averages, one=conv(3, 19), two=conv(19, 5), three=nn.Linear(19 * 9, 7))


def perceptron(self, x):
    x = torch.relu(self.one(x.flatten(1)))
    return self.three(torch.relu(self.two(x) + x))


def perceptron_net():
    return net(
        perceptron,
        one=nn.Linear(3 * 12 * 12, 50),
        two=nn.Linear(50, 50, bias=False),
        three=nn.Linear(50, 3),
    )


NETS = {
    "residual": residual_net,
    "separable": separable_net,
    "mixed": mixed_net,
    "averages": averages_net,
    "perceptron": perceptron_net,
}
WIDTHS = ["", "weights=5 fc_weights=3", "weights=16 data=16", "weights=8 data=16", "weights=12"]
EXTRAS = ["by_channel=true", "rounding=truncate", "weights=4 fc_weights=4", "data=4"]


def images(batch, seed):
    return torch.randn(batch, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def fixed(module, options="", before="fold-bn"):
    program = captured(module, (3, 12, 12))
    text = f"{before}, fixed-point{{{options}}}" if options else f"{before}, fixed-point"
    return shohin.optimize(program, text, calibration=[(images(8, 1),)], drift=False).program


def check(program, target, batch=1, weights="plain", real=()):
    """Compare every bit of the outputs on a few batches, but of those that are `real`."""
    binary = compile_program(program, target, batch, weights=weights)
    for seed in range(3):
        x = images(batch, 10 + seed) * (1 + 2 * seed)
        with torch.no_grad():
            wanted = program.module(x)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        for index, one in enumerate(binary.run([x.numpy()])):
            if index in real:
                # A float operator computed it from equal integers.
                assert np.allclose(one, wanted[index], rtol=1e-6)
            else:
                assert np.array_equal(one, wanted[index].numpy())


def usable(arch, monkeypatch):
    if problem := avx_vnni.allow(monkeypatch, arch):
        pytest.skip(problem)
    return CpuTarget(arch, threads=2, tune="off")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NETS)
def test_every_bit_is_that_of_the_reference(name, arch, monkeypatch):
    target = usable(arch, monkeypatch)
    check(fixed(NETS[name]()), target, real=(1,) if name == "mixed" else ())


def test_code_for_vnni_has_its_instruction(monkeypatch):
    """Where it is emulated, what is emulated can be counted."""
    target = usable(avx_vnni.ARCH, monkeypatch)
    if "avx_vnni" in host_flags():
        pytest.skip("this processor has it")
    before = avx_vnni.carried_out()
    check(fixed(NETS["perceptron"]()), target)
    layers = [(3 * 12 * 12, 56), (50, 56), (50, 8)]
    least = 3 * sum(-(-depth // 4) * (columns // 8) for depth, columns in layers)
    assert least <= avx_vnni.carried_out() - before <= 1.3 * least


@pytest.mark.parametrize("options", [*WIDTHS[1:], *EXTRAS])
@pytest.mark.parametrize("name", ["residual", "perceptron"])
def test_widths_and_roundings(name, options):
    check(fixed(NETS[name](), options), CpuTarget(tune="off"), batch=2)


@pytest.mark.parametrize("name", ["separable", "averages"])
def test_words(name):
    check(fixed(NETS[name](), "weights=16 data=16"), CpuTarget(tune="off"), batch=2)


def test_numbers_beyond_all_limits():
    """Infinities and NaN become limits and zeros, as in the reference."""
    program = fixed(NETS["residual"]())
    binary = compile_program(program, CpuTarget(tune="off"), 1)
    x = images(1, 5)
    x[0, 0, 0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e30])
    with torch.no_grad():
        assert np.array_equal(binary.run([x.numpy()])[0], program.module(x).numpy())


def check_lines(module, calibration, options, x):
    """Compare every bit of the outputs of a network of linear maps."""
    program = captured(module, calibration.shape[1:])
    text = f"fixed-point{{{options}}}"
    program = shohin.optimize(program, text, calibration=[(calibration,)], drift=False).program
    binary = compile_program(program, CpuTarget(tune="off"), len(x))
    with torch.no_grad():
        assert np.array_equal(binary.run([x.numpy()])[0], program.module(x).numpy())


@pytest.mark.parametrize("options", ["weights=4 data=4", "weights=8", "data=16"])
def test_outputs_of_scales_far_apart(options):
    module = net(lambda s, x: s.a(x), a=nn.Linear(4, 3))
    with torch.no_grad():
        module.a.weight[0] *= 1e-7
        module.a.bias[0] *= 1e-7
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    check_lines(module, x, f"by_channel=true {options}", x)


def test_sums_far_beyond_their_result():
    """Weights of inputs that calibration never saw make sums overflow when they are moved left."""
    module = net(lambda s, x: s.b(torch.relu(s.a(x))), a=nn.Linear(64, 16), b=nn.Linear(16, 3))
    with torch.no_grad():
        module.a.weight[:, 32:] *= 3e5
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    calibration = x.clone()
    calibration[:, 32:] = 0
    check_lines(module, calibration, "by_channel=true", x)
    check_lines(module, calibration, "by_channel=false", x)


def test_sums_over_examples_are_left_to_floats():
    def forward(self, x):
        y = self.a(x)
        return self.b(y * y[:1] + self.a(self.q))

    module = net(forward, a=nn.Linear(6, 4), b=nn.Linear(4, 3))
    module.q = nn.Parameter(torch.randn(1, 6, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    check_lines(module, x, "weights=8", x)


class RandomNet(nn.Module):
    """Random convolutions, shortcuts, pooling and a head."""

    def __init__(self, seed):
        super().__init__()
        choose = random.Random(seed)
        channels, parts = 3, []
        for _ in range(choose.randint(2, 4)):
            groups = choose.choice([1, 1, 1, 2])
            filters = choose.choice([8, 12, 16, 20, 32])
            if channels % groups:
                groups = 1
            parts.append(
                conv(
                    channels,
                    filters,
                    choose.choice([1, 3, 3, 5]),
                    stride=choose.choice([1, 1, 2]),
                    dilation=choose.choice([1, 1, 2]),
                    groups=groups,
                    bias=choose.random() < 0.7,
                )
            )
            channels = filters
        self.parts = nn.ModuleList(parts)
        self.kinds = [choose.choice(["relu", "none", "twice", "pool"]) for _ in parts]
        self.head = nn.LazyLinear(choose.randint(1, 20))

    def forward(self, x):
        for part, kind in zip(self.parts, self.kinds, strict=True):
            x = part(x)
            x = torch.relu(x) if kind in ("relu", "pool") else x
            x = x + torch.relu(x) if kind == "twice" else x
            x = functional.max_pool2d(x, 2, 1) if kind == "pool" and x.shape[2] > 2 else x
        return self.head(x.flatten(1))


@pytest.mark.parametrize("seed", range(10))
def test_random_networks(seed):
    torch.manual_seed(seed)
    module = RandomNet(seed)
    module(images(2, 0))
    choose = random.Random(seed)
    widths = {"weights": choose.choice([3, 6, 8, 8, 16]), "data": choose.choice([6, 8, 8, 16])}
    options = " ".join(f"{key}={value}" for key, value in widths.items())
    check(fixed(module.eval(), options), CpuTarget(tune="off"), batch=choose.randint(1, 2))


@pytest.mark.parametrize("weights", ["plain", "compressed"])
@pytest.mark.parametrize("before", ["fold-bn, prune{density=0.3}", "share-weights{bits=3}"])
def test_pruned_and_shared_weights(before, weights):
    check(fixed(NETS["residual"](), before=before), CpuTarget(tune="off"), weights=weights)


def test_rescaling_sums_and_relu_stay_in_registers():
    operations = select(fixed(NETS["residual"]()), 1).operations
    layers = [op for op in operations if isinstance(op, (FixedConvolution, FixedLinear))]
    kinds = [[step.step.kind for step in op.steps] for op in layers]
    assert kinds == [
        ["fixed-rescale", "fixed-relu"],
        ["fixed-rescale"],
        ["fixed-rescale", "fixed-add", "fixed-relu"],
        ["fixed-rescale", "fixed-relu", "fixed-multiply"],
        ["fixed-rescale"],
        ["fixed-rescale", "fixed-real"],
    ]
    loose = [op for op in operations if isinstance(op, Elementwise)]
    assert loose[0].steps[0].step.kind == "fixed-round"
    assert layers[1].x.nonnegative
    assert not layers[0].x.nonnegative


def test_weights_of_few_bits_take_few_bytes():
    module = net(lambda self, x: self.one(x.flatten(1)), one=nn.Linear(432, 256))
    sizes = {}
    for bits in (2, 3, 4, 5, 6, 7, 8):
        binary = compile_program(fixed(module, f"weights={bits}"), CpuTarget(tune="off"), 1)
        sizes[bits] = binary.info.weight_bytes
    for bits, size in sizes.items():
        assert size <= 432 * 256 * bits / 8 + 256 * 4 + 1200, bits


def test_sums_beyond_32_bits():
    """Weights and data at their limits, whose sums need 35 bits."""
    module = net(lambda self, x: self.one(torch.relu(x.flatten(1))), one=nn.Linear(432, 16))
    with torch.no_grad():
        module.one.weight.copy_(module.one.weight.sign() * (1 + module.one.weight.abs() / 100))
        module.one.weight.abs_()
    program = fixed(module, "weights=16 data=16")
    (layer,) = [op for op in select(program, 1).operations if isinstance(op, FixedLinear)]
    assert layer.weights.wide
    check(program, CpuTarget(tune="off"))


@EMULATED
@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("arm", ""),
        ("arm", "weights=16 data=16"),
        ("arm{cpu=neoverse-n1}", "weights=4 fc_weights=4"),
        ("arm{dotprod=on}", ""),
        ("armv7", ""),
        ("armv7", "weights=16 data=16"),
        ("armv7", "weights=4 fc_weights=4"),
    ],
)
def test_every_bit_on_emulated_arm(target, options, tmp_path):
    program = fixed(NETS["residual"](), options)
    x = images(1, 20)
    with torch.no_grad():
        assert torch.equal(run_emulated(program, target, [x], tmp_path), program.module(x))
