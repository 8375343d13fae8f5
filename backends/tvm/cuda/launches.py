"""The generated C of a model for a GPU: its image, and a table of launches."""

import hashlib
from collections.abc import Sequence

from shohin.backends.tvm.csource import Work, c_string, included
from shohin.backends.tvm.cuda.device_code import DeviceFunction
from shohin.backends.tvm.cuda.generic import THREADS
from shohin.backends.tvm.cuda.kernels.grid import GridKernel
from shohin.backends.tvm.cuda.nvrtc import DeviceBinary
from shohin.backends.tvm.cuda.target import CudaTarget
from shohin.backends.tvm.lowering.calls import KernelCall, Plan
from shohin.backends.tvm.lowering.memory import Placement
from shohin.errors import UnsupportedError

IMAGE_FILE = "kernels.fatbin"

MOST_ARGUMENTS = 500
"""Of a launch: ``SHOHIN_MOST_ARGUMENTS`` of ``shohin_runtime.h``."""

_PLACES = {
    "arena": "SHOHIN_IN_ARENA",
    "constant": "SHOHIN_IN_CONSTANTS",
    "input": "SHOHIN_IN_INPUT",
    "output": "SHOHIN_IN_OUTPUT",
}


def launches_of(
    plan: Plan,
    functions: Sequence[DeviceFunction],
    name: str,
    target: CudaTarget,
    code: DeviceBinary,
) -> Work:
    """What a model does on a GPU.

    Args:
        plan: calls and memory.
        functions: of the image, one for each call.
        name: prefix of the model's symbols.
        target: the GPU.
        code: what the compiler made of the functions.

    Raises:
        UnsupportedError: when a kernel takes more arrays than the runtime can pass.
    """
    rows: list[str] = []
    arguments: list[str] = []
    for call, function in zip(plan.calls, functions, strict=True):
        places = _in_order(call, function)
        rows.append(_launch(call, function, len(arguments), len(places)))
        arguments += [_argument(place) for place in places]
    definitions = (
        included(name, "image", IMAGE_FILE, hashlib.sha256(code.image).hexdigest())
        + _table("shohin_launch launches", rows, '    {"", {0, 0}, 0, 0, 0, ""},\n')
        + _table("shohin_argument arguments", arguments, "    {SHOHIN_IN_ARENA, 0, 0},\n")
        + "static const shohin_device_code device = {\n"
        f"    .image = (const unsigned char *){name}_image,\n"
        f"    .arch = {c_string(target.arch)},\n"
        f"    .capability = {target.capability},\n"
        f"    .cuda = {code.cuda},\n"
        "    .launches = launches,\n"
        "    .arguments = arguments,\n"
        "};\n\n"
    )
    return Work(definitions, "    .device = &device,\n")


def _table(declaration: str, rows: Sequence[str], filler: str) -> str:
    return f"static const {declaration}[] = {{\n{''.join(rows) or filler}}};\n\n"


def _in_order(call: KernelCall, function: DeviceFunction) -> list[Placement]:
    """The arrays of a call in the order in which the function takes them."""
    if len(function.parameters) > MOST_ARGUMENTS:
        raise UnsupportedError(
            f"kernel {call.label}",
            f"takes {len(function.parameters)} arrays; at most {MOST_ARGUMENTS} can be passed",
        )
    kernel = call.kernel
    if isinstance(kernel, GridKernel):
        names = [parameter.name for parameter in kernel.parameters()]
    else:
        names = [str(parameter.name) for parameter in kernel.params]
    known = dict(zip(names, call.arguments, strict=True))
    return [known[name] for name in function.parameters]


def _launch(call: KernelCall, function: DeviceFunction, first: int, count: int) -> str:
    kernel = call.kernel
    if isinstance(kernel, GridKernel):
        grid, threads = kernel.grid, kernel.threads
    else:
        grid, threads = (call.extent, 1), THREADS
    sizes = ", ".join(map(str, grid))
    return (
        f"    {{{c_string(function.name)}, {{{sizes}}}, {threads}, {first}, {count}, "
        f"{c_string(call.label)}}},\n"
    )


def _argument(place: Placement) -> str:
    buffer = place.buffer
    index = buffer.index if buffer.kind in ("input", "output") else 0
    offset = place.offset if buffer.kind in ("input", "output") else buffer.offset + place.offset
    return f"    {{{_PLACES[buffer.kind]}, {index}, {offset}}},\n"
