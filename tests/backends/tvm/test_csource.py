from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import zig
from small_nets import net, plan_of
from torch import Tensor, nn

from shohin.backends.base import ArtifactInfo
from shohin.backends.tvm.csource import Weights, steps_of, supports_dtype, write_source
from shohin.backends.tvm.link import RUNTIME
from shohin.backends.tvm.lowering.calls import Plan
from shohin.backends.tvm.lowering.operations import Value
from shohin.ir.program import InputSpec

INFO = ArtifactInfo(
    name="net",
    target="cpu{threads=2}",
    pipeline="",
    inputs=(),
    outputs=(),
    batch=2,
    content_hash="c0ffee",
    tools={"shohin": "1.2.3", "processor": "x86-64-v3"},
    needs=("avx2", "fma"),
)


def _plan() -> Plan:
    def function(s: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = s.l(x)
        return y, y.softmax(1).tanh()

    return plan_of(net(function, l=nn.Linear(4, 5)), (4,))


def _source(plan: Plan) -> str:
    symbols = tuple(f"net_k{i}" for i in range(len(plan.calls)))
    info = described(plan, ("y", "z"), name='a "quoted" é\n')
    return write_source(plan, "net", info, Weights("00ff"), steps_of(plan, symbols))


def described(plan: Plan, outputs: tuple[str, ...], **changes: Any) -> ArtifactInfo:
    """What a binary of a plan says of itself, with names for its outputs."""

    def specs(values: list[Value], names: tuple[str, ...]) -> tuple[InputSpec, ...]:
        pairs = zip(values, names, strict=True)
        return tuple(InputSpec(name, value.shape, value.dtype) for value, name in pairs)

    inputs = specs(plan.inputs, ("x",))
    return replace(INFO, inputs=inputs, outputs=specs(plan.outputs, outputs), **changes)


def test_steps() -> None:
    text = _source(_plan())
    assert "extern int net_k0(void *, void *, void *, void *, int32_t, int32_t);\n" in text
    assert (
        "static void step_0(const shohin_frame *frame, int32_t begin, int32_t end) {\n"
        "    (void)frame;\n"
        "    net_k0((void *)((const char *)frame->inputs[0] + 0), "
        "(void *)(frame->constants + 0), (void *)(frame->constants + 256), "
        "(void *)((char *)frame->outputs[0] + 0), begin, end);\n"
        "}\n"
    ) in text
    assert '    {step_0, 1, 1, "l: linear 4->5"},\n' in text


def test_model() -> None:
    plan = _plan()
    text = _source(plan)
    for line in (
        "/* sha256 00ff */",
        '"net_constants:\\n"',
        "static const int64_t input_shape_0[] = {2, 4};",
        '{"z", SHOHIN_FLOAT32, 2, output_shape_1, 40},',
        "static const size_t output_alignment[] = {64, 64};",
        f".arena_bytes = {plan.arena_bytes},",
        f".constant_bytes = {plan.constants.size},",
        ".step_count = 3,",
        '.version = "1.2.3",',
        '.target = "cpu{threads=2}",',
        '.content_hash = "c0ffee",',
        '.processor = "x86-64-v3",',
        '.needs = "avx2 fma",',
        ".batch = 2,",
        "SHOHIN_DEFINE_MODEL(net, model);",
    ):
        assert line in text
    assert r"\"name\": \"a \\\"quoted\\\" \\u00e9\\n\"" in text


def test_coded_weights(tmp_path: Path) -> None:
    plan = _plan()
    work = steps_of(plan, ("net_k0", "net_k1", "net_k2"))
    text = write_source(plan, "net", described(plan, ("y", "z")), Weights("00ff", 1234), work)
    for line in (
        '".incbin \\"coded.bin\\"\\n"',
        "SHOHIN_DECLARE_RUNTIME(net);",
        ".decode = net_shohin_decode,",
        ".coded = (const unsigned char *)net_coded,",
        ".coded_bytes = 1234,",
    ):
        assert line in text
    assert ".constants =" not in text
    (tmp_path / "coded.bin").write_bytes(bytes(1234))
    _compile(text, tmp_path)


def test_a_shared_kernel_is_declared_once() -> None:
    plan = plan_of(net(lambda s, x: s.l(s.l(x)), l=nn.Linear(4, 4)), (4,))
    text = steps_of(plan, ("net_k0", "net_k0")).definitions
    assert text.count("extern int net_k0(") == 1


def _compile(text: str, folder: Path) -> None:
    (folder / "model.c").write_text(text)
    (folder / "constants.bin").write_bytes(bytes(4096))
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{RUNTIME}"]
    zig(["cc", *flags, "-c", "model.c", "-o", "model.o"], folder)


def test_it_is_c_without_a_warning(tmp_path: Path) -> None:
    _compile(_source(_plan()), tmp_path)


@pytest.mark.parametrize(
    "label",
    [
        "日本",
        'a"b\\c',
        "what??/",
        "tab\tline\nend",
        "",
        "\N{PINE DECORATION}",
        "???/",
    ],
)
def test_labels_of_any_text(label: str, tmp_path: Path) -> None:
    plan = plan_of(net(lambda s, x: s.l(x), l=nn.Linear(4, 5)), (4,))
    plan.calls[0] = replace(plan.calls[0], label=label)
    work = steps_of(plan, ("net_k0",))
    _compile(write_source(plan, "net", described(plan, ("y",)), Weights(""), work), tmp_path)
    assert label.encode() + b"\0" in (tmp_path / "model.o").read_bytes()


def test_element_types() -> None:
    assert supports_dtype(Value("x", (1,), torch.float16))
    assert supports_dtype(Value("x", (1,), torch.bool))
    assert not supports_dtype(Value("x", (1,), torch.complex64))
    assert not supports_dtype(Value("x", (1,), torch.bfloat16))
