"""The generated C: a table of steps over the kernels, and what describes the model."""

import json
from dataclasses import dataclass, replace

from shohin.backends.base import ArtifactInfo
from shohin.backends.tvm.lowering.calls import KernelCall, Plan
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Value
from shohin.backends.tvm.lowering.values import dtype_text
from shohin.backends.tvm.manifest import manifest_of
from shohin.ir.program import InputSpec

CONSTANTS_FILE = "constants.bin"
CODED_FILE = "coded.bin"

_DTYPES = {
    "float32": "SHOHIN_FLOAT32",
    "float16": "SHOHIN_FLOAT16",
    "int64": "SHOHIN_INT64",
    "int32": "SHOHIN_INT32",
    "int16": "SHOHIN_INT16",
    "int8": "SHOHIN_INT8",
    "uint8": "SHOHIN_UINT8",
    "bool": "SHOHIN_BOOL",
}

_HEAD = """\
/* Generated. Kernels are in an object file of their own; their weights follow below. */
#include "shohin_runtime.h"

"""

_INCLUDED = """\
/* sha256 {digest} */
__asm__(".section .rodata\\n"
        ".balign 64\\n"
        ".hidden {name}_{part}\\n"
        ".globl {name}_{part}\\n"
        "{name}_{part}:\\n"
        ".incbin \\"{file}\\"\\n"
        ".byte 0\\n"
        ".previous\\n");
extern const char {name}_{part}[];

"""


@dataclass(frozen=True)
class Weights:
    """The file that holds the weights.

    Attributes:
        digest: its hash: compilers that cache do not look into included binaries.
        coded: its size where its content is coded, else None.
    """

    digest: str
    coded: int | None = None


@dataclass(frozen=True)
class Work:
    """What a model does.

    Attributes:
        definitions: C that defines it.
        fields: of ``shohin_model``, that say where it is.
    """

    definitions: str
    fields: str


def supports_dtype(value: Value) -> bool:
    """Whether an input or output of that type can cross the C interface."""
    return dtype_text(value.dtype) in _DTYPES


def write_source(plan: Plan, model: str, info: ArtifactInfo, weights: Weights, work: Work) -> str:
    """The whole C file.

    Args:
        plan: calls and memory.
        model: prefix of every symbol.
        info: what the binary says of itself.
        weights: where they are.
        work: what the model does.
    """
    return "".join(
        [
            _HEAD,
            _constants(model, weights),
            work.definitions,
            _tensors("input", plan.inputs, info.inputs),
            _tensors("output", plan.outputs, info.outputs),
            _model(plan, model, info, weights, work),
        ]
    )


def steps_of(plan: Plan, symbols: tuple[str, ...]) -> Work:
    """What a model does on a processor: functions, one after another.

    Args:
        plan: calls and memory.
        symbols: C symbol of each call's kernel, in order of the calls.
    """
    signatures = {s: len(c.arguments) for s, c in zip(symbols, plan.calls, strict=True)}
    parts = []
    for symbol, count in signatures.items():
        pointers = "".join("void *, " for _ in range(count))
        parts.append(f"extern int {symbol}({pointers}int32_t, int32_t);\n")
    parts.append("\n")
    for index, (symbol, call) in enumerate(zip(symbols, plan.calls, strict=True)):
        parts.append(_step(index, symbol, call))
    parts.append(_steps_table(plan))
    return Work("".join(parts), "    .steps = steps,\n")


def included(name: str, part: str, file: str, digest: str) -> str:
    """C that includes a file as bytes.

    Args:
        name: prefix of the model's symbols.
        part: what the bytes are.
        file: in the folder that is compiled in.
        digest: its hash.
    """
    return _INCLUDED.format(digest=digest, name=name, part=part, file=file)


def _constants(model: str, weights: Weights) -> str:
    part, file = ("constants", CONSTANTS_FILE) if weights.coded is None else ("coded", CODED_FILE)
    text = included(model, part, file, weights.digest)
    return text if weights.coded is None else text + f"SHOHIN_DECLARE_RUNTIME({model});\n\n"


def _step(index: int, symbol: str, call: KernelCall) -> str:
    arguments = "".join(f"(void *)({_address(place)}), " for place in call.arguments)
    return (
        f"static void step_{index}(const shohin_frame *frame, int32_t begin, int32_t end) {{\n"
        f"    (void)frame;\n    {symbol}({arguments}begin, end);\n}}\n"
    )


def _address(place: Placement) -> str:
    buffer = place.buffer
    if buffer.kind == "input":
        return f"(const char *)frame->inputs[{buffer.index}] + {place.offset}"
    if buffer.kind == "output":
        return f"(char *)frame->outputs[{buffer.index}] + {place.offset}"
    base = "frame->arena" if buffer.kind == "arena" else "frame->constants"
    return f"{base} + {buffer.offset + place.offset}"


def _steps_table(plan: Plan) -> str:
    rows = [
        f"    {{step_{i}, {call.extent}, {call.max_parts}, {c_string(call.label)}}},\n"
        for i, call in enumerate(plan.calls)
    ]
    filler = "" if rows else '    {0, 0, 0, ""},\n'
    return "\nstatic const shohin_step steps[] = {\n" + "".join(rows) + filler + "};\n\n"


def _tensors(kind: str, values: list[Value], specs: tuple[InputSpec, ...]) -> str:
    shapes, rows = [], []
    for index, (value, spec) in enumerate(zip(values, specs, strict=True)):
        sizes = ", ".join(str(size) for size in value.shape) or "0"
        shapes.append(f"static const int64_t {kind}_shape_{index}[] = {{{sizes}}};\n")
        dtype = _DTYPES[dtype_text(value.dtype)]
        rows.append(
            f"    {{{c_string(spec.name)}, {dtype}, {len(value.shape)}, {kind}_shape_{index}, "
            f"{value.bytes}}},\n"
        )
    alignment = ", ".join("64" for _ in values)
    return (
        "".join(shapes)
        + f"static const shohin_tensor_info {kind}s[] = {{\n{''.join(rows)}}};\n"
        + f"static const size_t {kind}_alignment[] = {{{alignment}}};\n\n"
    )


def _model(plan: Plan, model: str, info: ArtifactInfo, weights: Weights, work: Work) -> str:
    # Steps have functions of their own; all about them is in the trailer.
    metadata = manifest_of(replace(info, steps=()), model)
    facts = {
        "abi_version": "SHOHIN_ABI_VERSION",
        "name": c_string(model),
        "version": c_string(info.tools["shohin"]),
        "target": c_string(info.target),
        "content_hash": c_string(info.content_hash),
        "metadata": c_string(json.dumps(metadata, sort_keys=True)),
        "input_count": len(plan.inputs),
        "output_count": len(plan.outputs),
        "inputs": "inputs",
        "outputs": "outputs",
        "arena_bytes": plan.arena_bytes,
        "constant_bytes": plan.constants.size,
        "step_count": len(plan.calls),
        "batch": info.batch,
    }
    fields = "".join(f"        .{name} = {value},\n" for name, value in facts.items())
    return (
        "static const shohin_model model = {\n"
        f"    .info = {{\n{fields}    }},\n"
        f"{work.fields}"
        f"{_weights(model, weights)}"
        f"    .processor = {c_string(info.tools['processor'])},\n"
        f"    .needs = {c_string(' '.join(info.needs))},\n"
        "    .input_alignment = input_alignment,\n"
        "    .output_alignment = output_alignment,\n"
        "};\n\n"
        f"SHOHIN_DEFINE_MODEL({model}, model);\n"
    )


def _weights(model: str, weights: Weights) -> str:
    if weights.coded is None:
        return f"    .constants = {model}_constants,\n"
    return (
        f"    .decode = {model}_shohin_decode,\n"
        f"    .coded = (const unsigned char *){model}_coded,\n"
        f"    .coded_bytes = {weights.coded},\n"
    )


def c_string(text: str) -> str:
    """A C string literal in UTF-8, every byte that is not a plain character escaped."""
    return '"' + "".join(_escape(byte) for byte in text.encode()) + '"'


def _escape(byte: int) -> str:
    if chr(byte) in '"\\?':
        return "\\" + chr(byte)
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"
