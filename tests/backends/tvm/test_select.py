from collections.abc import Callable
from textwrap import dedent
from typing import Any

import pytest
import torch
from small_nets import captured, check, net, selected
from torch import Tensor, nn
from torch.nn import functional

from shohin.backends.tvm.lowering.lower import select
from shohin.errors import UnsupportedError


def _is(found: str, expected: str) -> None:
    assert found == dedent(expected).strip()


def test_convolution() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(4, 6, (3, 5), (2, 1), (1, 2), (1, 2), groups=2))
    _is(
        selected(module, (4, 9, 12)),
        """
        conv2d = Convolution(inputs_0) stride=(2,1) padding=(1,1,2,2) dilation=(1,2) groups=2
        return conv2d
        """,
    )
    check(module, (4, 9, 12))


def test_same_padding_of_an_even_kernel_is_uneven() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(1, 3)))
    _is(
        selected(module, (3, 9, 9)),
        """
        conv2d = Convolution(inputs_0) stride=(1,1) padding=(1,2,3,3) dilation=(1,3) groups=1
        return conv2d
        """,
    )
    check(module, (3, 9, 9))


def test_valid_padding() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv2d(3, 5, 3, padding="valid"))
    assert "padding=(0,0,0,0)" in selected(module, (3, 5, 5))


def test_conv1d_is_a_convolution_of_one_row() -> None:
    module = net(lambda s, x: s.c(x), c=nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2))
    _is(
        selected(module, (6, 21)),
        """
        conv1d_row = View(inputs_0)
        conv1d_out = Convolution(conv1d_row) stride=(1,2) padding=(0,0,1,1) dilation=(1,2) groups=1
        conv1d = View(conv1d_out)
        return conv1d
        """,
    )
    check(module, (6, 21))


def test_pooling() -> None:
    module = net(
        lambda s, x: (
            functional.max_pool2d(x, 3, 2, 1, ceil_mode=True),
            functional.avg_pool2d(x, (2, 3), count_include_pad=False),
            functional.avg_pool2d(x, 2, 1, 1, divisor_override=3),
            functional.avg_pool2d(x, (8, 7)),
            functional.adaptive_avg_pool2d(x, (4, 7)),
            functional.adaptive_avg_pool2d(x, 1),
            functional.adaptive_avg_pool2d(x, (8, 7)),
            x.mean((-1, 2)),
        )
    )
    _is(
        selected(module, (3, 8, 7)),
        """
        max_pool2d = Pooling(inputs_0) mode=max kernel=(3,3) stride=(2,2) padding=(1,1) \
dilation=(1,1) count_padding=True
        avg_pool2d = Pooling(inputs_0) mode=average kernel=(2,3) stride=(2,3) padding=(0,0) \
dilation=(1,1)
        avg_pool2d_1 = Pooling(inputs_0) mode=average kernel=(2,2) stride=(1,1) padding=(1,1) \
dilation=(1,1) count_padding=True divisor=3
        avg_pool2d_2 = GlobalAveragePooling(inputs_0)
        adaptive_avg_pool2d = Pooling(inputs_0) mode=average kernel=(2,1) stride=(2,1) \
padding=(0,0) dilation=(1,1) count_padding=True
        adaptive_avg_pool2d_1 = GlobalAveragePooling(inputs_0)
        adaptive_avg_pool2d_2 = View(inputs_0)
        mean_pooled = GlobalAveragePooling(inputs_0)
        mean = View(mean_pooled)
        return max_pool2d, avg_pool2d, avg_pool2d_1, avg_pool2d_2, adaptive_avg_pool2d, \
adaptive_avg_pool2d_1, adaptive_avg_pool2d_2, mean
        """,
    )
    check(module, (3, 8, 7))


def test_slices_and_padding() -> None:
    module = net(
        lambda s, x: (
            x[:, 1:3],
            x[:, :, -3:],
            x[:, :, :, 1::2],
            functional.pad(x, (1, 2, -1, 0, 0, 3), value=0.5),
        )
    )
    lines = [line for line in selected(module, (5, 6, 7)).splitlines() if "WindowCopy" in line]
    assert [line.partition(") ")[2] for line in lines] == [
        "start=(1,0,0) step=(1,1)",
        "start=(0,3,0) step=(1,1)",
        "start=(0,0,1) step=(1,2)",
        "start=(0,1,-1) step=(1,1) value=0.5",
    ]
    check(module, (5, 6, 7))


def test_slices_of_a_batch_of_one_are_views() -> None:
    module = net(lambda s, x: (x[:, 1:3], x.split([2, 3], 1)[1], x.select(1, -1), x.unbind(1)[2]))
    text = selected(module, (5, 6, 7), batch=1)
    assert "WindowCopy" not in text
    assert "Region" not in text
    check(module, (5, 6, 7), batch=1)


def test_elementwise_operators() -> None:
    module = net(
        lambda s, x, y: (
            x - y,
            s.w - x,
            x * 3,
            x / 4,
            s.channel + x,
            x.clamp(min=-1),
            functional.leaky_relu(x, 0.2),
            functional.gelu(x, approximate="tanh"),
        ),
        w=nn.Parameter(torch.zeros(1, 3, 1, 1)),
        channel=nn.Parameter(torch.zeros(3, 1, 1)),
    )
    lines = [
        line.partition(" + ")[2] for line in selected(module, (3, 4, 5), (3, 4, 5)).split("\n")
    ]
    assert lines == [
        "subtract(inputs_1)",
        "subtract-from(w)",
        "multiply-scalar(3)",
        "multiply-scalar(0.25)",
        "add(channel)",
        "clamp(-1, inf)",
        "leaky-relu(0.2)",
        "gelu-tanh",
        "",
    ]
    check(module, (3, 4, 5), (3, 4, 5))


_OPERATORS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.relu,
    torch.sigmoid,
    functional.silu,
    functional.hardsigmoid,
    functional.hardswish,
    torch.tanh,
    torch.neg,
    torch.abs,
    functional.relu6,
    functional.hardtanh,
    functional.elu,
    functional.gelu,
    functional.leaky_relu,
    lambda x: torch.maximum(x, x * 2),
    lambda x: torch.minimum(x, x * 2),
    lambda x: x.clamp(-0.25, 0.5),
    lambda x: x.clamp(max=0.1),
    lambda x: 1 - x,
    lambda x: x.softmax(-1),
    lambda x: x.log_softmax(-1),
    lambda x: functional.layer_norm(x, (5,)),
    lambda x: functional.layer_norm(x, (4, 5)),
    lambda x: x.softmax(1),
    lambda x: functional.elu(x, 0.5),
    lambda x: x.mean(1),
    lambda x: x.transpose(1, 2).contiguous(),
)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_operator_by_itself(batch: int) -> None:
    check(net(lambda s, x: tuple(f(x) for f in _OPERATORS)), (3, 4, 5), batch=batch)


@pytest.mark.parametrize("kind", [torch.add, torch.sub])
def test_scaled_operands(kind: Callable[..., Tensor]) -> None:
    check(net(lambda s, x, y: kind(x, y, alpha=2)), (3, 4, 5), (3, 4, 5))


def test_batch_norm_that_nothing_could_take() -> None:
    module = net(lambda s, x: s.b(x.relu()), b=nn.BatchNorm2d(20))
    _is(
        selected(module, (20, 3, 3)),
        """
        relu = Elementwise(inputs_0) + relu
        batch_norm = Elementwise(relu) + multiply(batch_norm_multiply) + add(batch_norm_add)
        return batch_norm
        """,
    )
    check(module, (20, 3, 3))


def test_matrices() -> None:
    module = net(
        lambda s, x: (x @ x.mT.contiguous(), x @ s.w, s.l(x), x[0] @ x[0, 0]),
        w=nn.Parameter(torch.zeros(6, 3)),
        l=nn.Linear(6, 2, bias=False),
    )
    lines = selected(module, (5, 6), batch=3).splitlines()
    kinds = [line.split("(")[0].split(" = ")[1] for line in lines[:-1]]
    assert kinds.count("BatchedMatMul") == 1
    assert kinds.count("Linear") == 2
    check(module, (5, 6), batch=3)


def test_attention() -> None:
    module = net(
        lambda s, x: functional.scaled_dot_product_attention(x, x.relu(), x.tanh(), scale=0.3)
    )
    lines = selected(module, (2, 5, 8)).splitlines()
    assert [line.partition(" = ")[2] for line in lines[2:5]] == [
        "BatchedMatMul(inputs_0, relu) transpose_b=True scale=0.3",
        "SoftmaxRows(scaled_dot_product_attention_scores)",
        "BatchedMatMul(scaled_dot_product_attention_shares, tanh) scale=1.0",
    ]
    check(module, (2, 5, 8))


def test_what_changes_nothing_is_a_view() -> None:
    module = net(lambda s, x: s.d(x).flatten(1).unsqueeze(1).squeeze(1).clone(), d=nn.Dropout())
    kinds = {
        line.partition(" = ")[2].split("(")[0] for line in selected(module, (3, 4)).split("\n")
    }
    assert kinds == {"View", ""}


def test_transposition_of_axes_of_one() -> None:
    module = net(lambda s, x: (x.transpose(1, 2), x.permute(0, 2, 3, 1)))
    assert "Region" not in selected(module, (1, 5, 4), batch=2).splitlines()[0]
    assert "Region" in selected(module, (3, 5, 4), batch=2)
    check(module, (1, 5, 4))
    check(module, (3, 5, 4))


def test_neighbours_without_a_template_are_one_region() -> None:
    module = net(lambda s, x: s.l(x.cos().exp().sin()).cos(), l=nn.Linear(6, 4))
    lines = selected(module, (6,)).splitlines()
    assert lines == [
        "sin = Region(inputs_0)",
        "linear = Linear(sin)",
        "cos_1 = Region(linear)",
        "return cos_1",
    ]
    check(module, (6,))


def test_parts_of_a_result() -> None:
    def parts(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.add(*x.chunk(2, 1)),
            torch.cat([s.c(part).relu() for part in x.relu().chunk(2, 1)], 1),
            torch.split(x, [20, 12], 1)[1] + 1,
            x.max(1)[0],
            x.unbind(1)[3] * 2,
            s.c(x.chunk(2, 1)[0]).chunk(2, 1)[1].flatten(1),
        )

    check(net(parts, c=nn.Conv2d(16, 16, 1)), (32, 3, 3))


def test_what_nothing_compiles_is_named() -> None:
    program = captured(net(lambda s, x: x.relu().topk(3, 1)[0]), (16,))
    with pytest.raises(UnsupportedError) as caught:
        select(program, 2)
    text = str(caught.value)
    assert text.startswith("backend tvm: these nodes have no kernel:\n  topk (aten.topk.default): ")
    assert text.endswith(
        "; replace the operators in the model, or run the program with the reference backend"
    )


def test_what_needs_no_input_is_computed_beforehand() -> None:
    module = net(lambda s, x: (x + torch.full((6, 6), 2.0).triu(1), torch.arange(4) * 2))
    lines = selected(module, (6, 6)).splitlines()
    assert not any(name in "".join(lines[:-1]) for name in ("full =", "triu =", "arange ="))
    check(module, (6, 6))


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_with_a_causal_mask(need_weights: bool) -> None:
    def attend(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        mask = nn.Transformer.generate_square_subsequent_mask(6)
        found = s.a(x, x, x, attn_mask=mask, need_weights=need_weights)
        return tuple(part for part in found if part is not None)

    check(net(attend, a=nn.MultiheadAttention(16, 4, batch_first=True)), (6, 16))
