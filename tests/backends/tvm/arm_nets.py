"""Networks of every kind of kernel, for processors that are emulated."""

import torch
from small_nets import net
from torch import nn
from torch.nn import functional


def small() -> nn.Module:
    return net(
        lambda s, x: s.l(s.c(x).relu().flatten(1)), c=nn.Conv2d(3, 20, 3), l=nn.Linear(320, 5)
    )


IMAGES: dict[str, nn.Module] = {
    "ragged channels": net(lambda s, x: s.c(x), c=nn.Conv2d(5, 21, 3, padding=1)),
    "stride and bias": net(lambda s, x: s.c(x).relu(), c=nn.Conv2d(5, 40, 5, 2, padding=2)),
    "many filters": net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(5, 64, 1), b=nn.Conv2d(64, 96, 3)),
    "groups": net(
        lambda s, x: s.b(s.a(x)), a=nn.Conv2d(5, 32, 1), b=nn.Conv2d(32, 64, 3, groups=2)
    ),
    "dilation": net(lambda s, x: s.c(x), c=nn.Conv2d(5, 7, 3, padding=2, dilation=2)),
    "depthwise": net(
        lambda s, x: functional.hardswish(s.b(s.a(x))),
        a=nn.Conv2d(5, 24, 1),
        b=nn.Conv2d(24, 24, 3, padding=1, groups=24),
    ),
    "depthwise with stride": net(
        lambda s, x: s.b(s.a(x)),
        a=nn.Conv2d(5, 24, 1),
        b=nn.Conv2d(24, 24, 5, 2, padding=2, groups=24),
    ),
    "max pool": net(lambda s, x: functional.max_pool2d(s.c(x), 3, 2, 1), c=nn.Conv2d(5, 20, 1)),
    "average pool": net(
        lambda s, x: functional.avg_pool2d(s.c(x), 3, 2, 1, count_include_pad=False),
        c=nn.Conv2d(5, 20, 1),
    ),
    "global average and softmax": net(
        lambda s, x: s.l(functional.silu(s.c(x)).mean((2, 3))).softmax(-1),
        c=nn.Conv2d(5, 20, 3),
        l=nn.Linear(20, 11),
    ),
    "concatenation and slice": net(
        lambda s, x: torch.cat([s.a(x), s.b(x)], 1)[:, 3:-2, 1:],
        a=nn.Conv2d(5, 20, 1),
        b=nn.Conv2d(5, 13, 1),
    ),
}


ROWS: dict[str, nn.Module] = {
    "linear": net(lambda s, x: s.a(x), a=nn.Linear(50, 33)),
    "gelu": net(lambda s, x: s.b(functional.gelu(s.a(x))), a=nn.Linear(50, 70), b=nn.Linear(70, 9)),
    "layer norm": net(lambda s, x: s.n(s.a(x)), a=nn.Linear(50, 37), n=nn.LayerNorm(37)),
    "attention": net(
        lambda s, x: ((s.q(x) @ s.k(x).transpose(-2, -1)) * 0.2).softmax(-1) @ s.v(x),
        q=nn.Linear(50, 12),
        k=nn.Linear(50, 12),
        v=nn.Linear(50, 20),
    ),
    "elementary functions": net(lambda s, x: x.tanh() * x.sigmoid() + functional.elu(x)),
    "no template": net(lambda s, x: (x.cumsum(1).sin() + x.amax(-1, keepdim=True)).log1p().abs()),
}
