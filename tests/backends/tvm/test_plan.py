from textwrap import dedent
from typing import Any

import pytest
import torch
from small_nets import RandomNet, check, net, plan_of, planned
from torch import nn
from torch.nn import functional

from shohin.backends.tvm.target import CpuTarget


def _is(found: str, expected: str) -> None:
    assert found == dedent(expected).strip()


def test_images_stay_blocked_between_operations() -> None:
    module = net(
        lambda s, x: functional.max_pool2d(s.d(s.c(x).relu()), 2).tanh(),
        c=nn.Conv2d(3, 20, 3, padding=1),
        d=nn.Conv2d(20, 50, 3, padding=1),
    )
    _is(
        planned(module, (3, 8, 8)),
        """
        conv2d in0 -> t0
        conv2d t0 -> t1
        max_pool t1 -> t2
        pointwise t2 -> t3
        to_plain t3 -> out0
        """,
    )
    check(module, (3, 8, 8))


def test_many_channels_are_blocked_first() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(5, 16, 3))
    assert planned(module, (5, 4, 4)).splitlines()[0] == "to_blocked in0 -> t0"
    check(module, (5, 4, 4))


@pytest.mark.parametrize("channels", [16, 20, 50])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_flattened_image_is_read_as_it_lies(channels: int, batch: int) -> None:
    module = net(
        lambda s, x: s.l(s.c(x).relu().flatten(1)),
        c=nn.Conv2d(3, channels, 3),
        l=nn.Linear(9 * channels, 10),
    )
    _is(
        planned(module, (3, 5, 5), batch=batch),
        """
        conv2d in0 -> t0
        linear t0 -> out0
        """,
    )
    check(module, (3, 5, 5), batch=batch)


def test_a_flattened_input_is_read_plain() -> None:
    module = net(lambda s, x: s.l(x.flatten(1)), l=nn.Linear(48, 10))
    _is(planned(module, (3, 4, 4)), "linear in0 -> out0")
    check(module, (3, 4, 4))


def test_concatenation_along_whole_blocks_stays_blocked() -> None:
    def run(s: Any, x: torch.Tensor) -> torch.Tensor:
        part = s.c(x)
        joined: torch.Tensor = s.e(torch.cat([part, s.d(part)], 1))
        return joined

    module = net(run, c=nn.Conv2d(3, 32, 3), d=nn.Conv2d(32, 20, 1), e=nn.Conv2d(52, 16, 1))
    _is(
        planned(module, (3, 6, 6)),
        """
        conv2d in0 -> t0
        conv2d t0 -> t1
        concat t0 t1 -> t2
        conv2d t2 -> t3
        to_plain t3 -> out0
        """,
    )
    check(module, (3, 6, 6))


def test_concatenation_of_ragged_channels_goes_through_plain() -> None:
    module = net(
        lambda s, x: s.e(torch.cat([s.c(x), s.d(x), x[:, :, 2:, 2:]], 1)),
        c=nn.Conv2d(3, 20, 3),
        d=nn.Conv2d(3, 16, 3),
        e=nn.Conv2d(39, 16, 1),
    )
    text = planned(module, (3, 6, 6), batch=3)
    assert "concat" in text
    assert text.count("to_plain") >= 2
    check(module, (3, 6, 6), batch=3)


_GROUPED = {
    "32 32 8": "conv2d",
    "32 64 2": "conv2d",
    "32 32 32": "depthwise",
    "32 64 32": "conv2d",
    "32 48 16": "conv2d",
    "32 16 2": "conv2d",
    "32 40 4": "conv2d",
    "20 20 20": "depthwise",
    "20 40 20": "conv2d",
    "20 20 5": "conv2d",
    "50 50 50": "depthwise",
    "6 4 2": "conv2d",
    "1 3 1": "conv2d",
    "2 2 2": "depthwise",
}
"""Family of the kernel by channels, filters and groups."""


@pytest.mark.parametrize("batch", [1, 3])
def test_groups(batch: int) -> None:
    layers = nn.ModuleList()
    for sizes in _GROUPED:
        channels, filters, groups = (int(size) for size in sizes.split())
        layers.append(nn.Conv2d(channels, filters, 3, padding=1, groups=groups))
    module = net(
        lambda s, x: tuple(layer(x[:, : layer.in_channels]).sigmoid() for layer in s.layers),
        layers=layers,
    )
    families = [line.split(" ")[0] for line in planned(module, (50, 5, 6), batch=batch).split("\n")]
    found = [family for family in families if family in ("conv2d", "depthwise")]
    assert found == list(_GROUPED.values())
    check(module, (50, 5, 6), batch=batch)


def test_groups_are_joined_to_whole_blocks() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(32, 32, 3, groups=8))
    (kernel,) = [c.kernel for c in plan_of(module, (32, 6, 6)).calls if c.kernel.family == "conv2d"]
    assert kernel.groups == 2


@pytest.mark.parametrize("padding", [3, (5, 1), (1, 6)])
def test_padding_beyond_the_reach_of_the_image(padding: int | tuple[int, int]) -> None:
    layer = nn.Conv2d(4, 16, 3, padding=padding, stride=2)
    check(net(lambda s, x: s.c(x), c=layer), (4, 2, 3))


def test_what_fills_missing_channels_does_not_matter() -> None:
    # Lanes behind the 20 channels are no longer zero after these steps.
    module = net(
        lambda s, x: (s.l(((s.c(x) + 5).sigmoid() * 7).flatten(1)), s.d((s.c(x) - 9).tanh())),
        c=nn.Conv2d(3, 20, 3),
        d=nn.Conv2d(20, 20, 1, groups=20),
        l=nn.Linear(20 * 9, 4),
    )
    check(module, (3, 5, 5))


def test_the_last_kernel_writes_the_output() -> None:
    _is(planned(net(lambda s, x: s.l(x), l=nn.Linear(4, 5)), (4,)), "linear in0 -> out0")


def test_an_output_that_is_read_is_written_once() -> None:
    def both(s: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = s.l(x)
        return y, y.softmax(1)

    module = net(both, l=nn.Linear(4, 5))
    _is(
        planned(module, (4,)),
        """
        linear in0 -> out0
        softmax out0 -> out1
        """,
    )
    check(module, (4,))


def test_outputs_that_no_kernel_makes_are_copied() -> None:
    module = net(lambda s, x: (x, x.flatten(1), s.w), w=nn.Parameter(torch.zeros(5)))
    _is(
        planned(module, (3, 4)),
        """
        copy in0 -> out0
        copy in0 -> out1
        copy  -> out2
        """,
    )
    check(module, (3, 4))


def test_an_output_returned_twice() -> None:
    def twice(s: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = s.l(x)
        return y, y, y.unsqueeze(0), y[:1]

    module = net(twice, l=nn.Linear(4, 16))
    _is(
        planned(module, (4,)),
        """
        linear in0 -> out0
        copy out0 -> out1
        copy out0 -> out2
        copy out0 -> out3
        """,
    )
    check(module, (4,))


def test_an_output_of_part_of_a_value() -> None:
    def part(s: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = s.l(x)
        return y[:, 3:7], y[:, 16:].relu()

    module = net(part, l=nn.Linear(4, 40))
    _is(
        planned(module, (4,), batch=1),
        """
        linear in0 -> t0
        pointwise t0+64 -> out1
        copy t0 -> out0
        """,
    )
    check(module, (4,), batch=1)


def test_an_image_of_one_pixel_is_plain_and_blocked_at_once() -> None:
    module = net(lambda s, x: s.l(s.c(x).mean((2, 3))), c=nn.Conv2d(3, 32, 3), l=nn.Linear(32, 5))
    _is(
        planned(module, (3, 6, 6), batch=3),
        """
        conv2d in0 -> t0
        global_average t0 -> t1
        linear t1 -> out0
        """,
    )
    check(module, (3, 6, 6), batch=3)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_output_of_one_ragged_pixel(batch: int) -> None:
    module = net(lambda s, x: s.c(x).mean((2, 3), keepdim=True), c=nn.Conv2d(3, 20, 3))
    check(module, (3, 6, 6), batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_element_wise_steps_in_every_layout(batch: int) -> None:
    module = net(
        lambda s, x, y: (s.b(x.tanh()), s.b(s.c(x)) * y, s.n(y.flatten(2).mean(2)), y + x.relu()),
        b=nn.BatchNorm2d(20),
        c=nn.Conv2d(20, 20, 1),
        n=nn.BatchNorm1d(20),
    )
    check(module, (20, 3, 5), (20, 3, 5), batch=batch)


def test_equal_layers_share_their_kernel_and_weights() -> None:
    layer = nn.Conv2d(16, 16, 3, padding=1)
    plan = plan_of(net(lambda s, x: s.c(s.c(s.c(x))), c=layer), (16, 8, 8))
    kernels = [call.kernel for call in plan.calls if call.kernel.family == "conv2d"]
    assert len(kernels) == 3
    assert len(set(kernels)) == 1
    assert plan.constants.size < 2 * layer.weight.nbytes


def test_small_work_is_not_split() -> None:
    plan = plan_of(net(lambda s, x: s.l(x), l=nn.Linear(4, 40)), (4,))
    assert [call.max_parts for call in plan.calls] == [1]
    plan = plan_of(net(lambda s, x: s.l(x), l=nn.Linear(400, 400)), (400,))
    assert plan.calls[0].max_parts == plan.calls[0].extent > 1


@pytest.mark.parametrize("arch", ["x86-64-v2", "x86-64-v3", "native"])
def test_architectures(arch: str) -> None:
    module = net(
        lambda s, x: s.l(functional.silu(s.d(s.c(x).relu())).flatten(1)).softmax(1),
        c=nn.Conv2d(3, 32, 3, padding=1),
        d=nn.Conv2d(32, 32, 3, groups=32),
        l=nn.Linear(32 * 36, 10),
    )
    assert CpuTarget(arch).registers() in (3, 7, 30)
    check(module, (3, 8, 8), arch=arch)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed: int) -> None:
    module = RandomNet(seed)
    # A layer adds at most about 1e-6 of its largest result (up to 800 products); there are 8.
    check(
        net(lambda s, x: s.net(x), net=module),
        (module.channels, 12, 12),
        batch=1 + seed % 3,
        threads=1 + seed % 2,
        tolerance=1e-5,
    )
