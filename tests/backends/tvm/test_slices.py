"""Concatenations whose parts are computed in place."""

import random
from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from small_nets import check, net, planned
from torch import Tensor, nn
from torch.nn import functional


def _is(found: str, expected: str) -> None:
    assert found == dedent(expected).strip()


def _joined() -> nn.Module:
    return net(
        lambda s, x: s.e(torch.cat([s.c(x), s.d(x)], 1)),
        c=nn.Conv2d(3, 32, 3),
        d=nn.Conv2d(3, 20, 3),
        e=nn.Conv2d(52, 16, 1),
    )


@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_write_into_the_concatenation(batch: int) -> None:
    _is(
        planned(_joined(), (3, 6, 6), batch=batch),
        """
        conv2d in0 -> t0
        conv2d in0 -> t0+2048
        conv2d t0 -> t1
        to_plain t1 -> out0
        """,
    )
    check(_joined(), (3, 6, 6), batch=batch)


@pytest.mark.parametrize("batch", [1, 3])
def test_pooled_and_depthwise_parts(batch: int) -> None:
    module = net(
        lambda s, x: s.e(torch.cat([functional.max_pool2d(x, 2), s.d(x), s.c(x)], 1)),
        c=nn.Conv2d(32, 5, 2, stride=2),
        d=nn.Conv2d(32, 32, 2, stride=2, groups=32),
        e=nn.Conv2d(69, 16, 1),
    )
    text = planned(module, (32, 8, 8), batch=batch)
    assert "concat" not in text
    assert "depthwise t0 -> t1+2048" in text
    check(module, (32, 8, 8), batch=batch)


def _read_twice() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        part = s.c(x)
        return s.e(torch.cat([part, s.d(part)], 1))

    return net(
        run,
        c=nn.Conv2d(3, 16, 3),
        d=nn.Conv2d(16, 16, 3, padding=1),
        e=nn.Conv2d(32, 16, 1),
    )


def test_a_part_that_something_else_reads() -> None:
    _is(
        planned(_read_twice(), (3, 6, 6), batch=1),
        """
        conv2d in0 -> t0
        conv2d t0 -> t0+1024
        conv2d t0 -> t1
        to_plain t1 -> out0
        """,
    )
    assert "concat" in planned(_read_twice(), (3, 6, 6), batch=2)
    check(_read_twice(), (3, 6, 6), batch=1)
    check(_read_twice(), (3, 6, 6), batch=2)


def _dense_block() -> nn.Module:
    def run(s: Any, x: Tensor) -> Tensor:
        first = s.a(x)
        second = torch.cat([first, s.b(first)], 1)
        third = torch.cat([second, s.c(second)], 1)
        return s.d(third)

    return net(
        run,
        a=nn.Conv2d(3, 32, 3),
        b=nn.Conv2d(32, 16, 3, padding=1),
        c=nn.Conv2d(48, 16, 3, padding=1),
        d=nn.Conv2d(64, 16, 1),
    )


def test_concatenations_of_concatenations() -> None:
    _is(
        planned(_dense_block(), (3, 6, 6), batch=1),
        """
        conv2d in0 -> t0
        conv2d t0 -> t0+2048
        conv2d t0 -> t0+3072
        conv2d t0 -> t1
        to_plain t1 -> out0
        """,
    )
    check(_dense_block(), (3, 6, 6), batch=1)
    check(_dense_block(), (3, 6, 6), batch=3)


def _twice_in_one(s: Any, x: Tensor) -> Tensor:
    part = s.c(x)
    return torch.cat([part, part], 1)


def _in_two(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b, c = s.c(x), s.d(x), s.e(x)
    return torch.cat([a, b], 1), torch.cat([c, b], 1)


def _part_is_an_output(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = s.c(x), s.d(x)
    return a, torch.cat([a, b], 1)


def _one_pixel(s: Any, x: Tensor) -> Tensor:
    pooled = [functional.adaptive_avg_pool2d(y, 1) for y in (s.c(x), s.d(x))]
    return torch.cat(pooled, 1).flatten(1)


def _viewed(s: Any, x: Tensor) -> Tensor:
    return torch.cat([s.c(x).reshape(-1, 16, 6, 6), s.d(x)], 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "function", [_twice_in_one, _in_two, _part_is_an_output, _one_pixel, _viewed]
)
def test_parts_in_odd_places(function: Callable[..., Any], batch: int) -> None:
    layers = {name: nn.Conv2d(3, 16, 3) for name in "cde"}
    check(net(function, **layers), (3, 8, 8), batch=batch)


class _Branches(nn.Module):
    """Random branches on the same image, joined, some joined again."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        torch.manual_seed(seed)
        self.branches = nn.ModuleList()
        self.again = choose.random() < 0.5
        widths = [choose.choice([16, 32, 48]) for _ in range(choose.randint(1, 3))]
        for width in [*widths, choose.choice([3, 16, 20])]:
            size = choose.choice([1, 3, 5])
            self.branches.append(nn.Conv2d(16, width, size, padding=size // 2))
        total = sum(branch.out_channels for branch in self.branches)
        self.behind = nn.Conv2d(total, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x).relu() for branch in self.branches]
        if self.again:
            parts.insert(0, functional.avg_pool2d(x.abs(), 3, 1, 1))
            joined = torch.cat(parts, 1)
            return torch.as_tensor(self.behind(joined[:, 16:]) + joined[:, :16])
        return torch.as_tensor(self.behind(torch.cat(parts, 1)))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_random_branches(seed: int, batch: int) -> None:
    check(_Branches(seed).eval(), (16, 7, 6), batch=batch)
