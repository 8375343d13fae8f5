"""From TIR kernels to CUDA source, one `__global__` function each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm import s_tir, tirx

_PRELUDE = Path(__file__).parent / "shohin_device.cuh"
_POINTER = "_ptr"
_ON_DEVICE = 2
"""TVM's calling convention of functions that run on the GPU."""


_CONFIGURATION = {"tirx.UnrollLoop": {"explicit_unroll": False}}
"""Loops are unrolled by the CUDA compiler, which is faster at it."""


@dataclass(frozen=True)
class DeviceFunction:
    """A function of the source.

    Attributes:
        name: its symbol.
        parameters: names of the kernel's parameters, in the order in which it takes pointers.
    """

    name: str
    parameters: tuple[str, ...]


def write_source(functions: Mapping[str, Any], arch: str) -> tuple[str, dict[str, DeviceFunction]]:
    """CUDA source that no header is needed for.

    Args:
        functions: PrimFuncs whose threads are bound, by symbol.
        arch: e.g. ``sm_80``.

    Returns:
        The source, and what it holds by symbol.
    """
    texts, found = [_PRELUDE.read_text()], {}
    target = _target(arch)
    for symbol, function in functions.items():
        name, device = _device_function(function.with_attr("global_symbol", symbol), target)
        texts.append(_source_of(device, target))
        (lowered,) = device.functions.values()
        parameters = tuple(str(p.name).removesuffix(_POINTER) for p in lowered.params)
        found[symbol] = DeviceFunction(name, parameters)
    return "\n".join(texts), found


@lru_cache(maxsize=8)
def _target(arch: str) -> Any:
    """The target in TVM's form; what a GPU is would else be asked of the one at hand."""
    device = tvm.target.Target(
        {
            "kind": "cuda",
            "arch": arch,
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": 49152,
            "thread_warp_size": 32,
        }
    )
    return device.with_host(tvm.target.Target({"kind": "llvm"}))


def _device_function(function: Any, target: Any) -> tuple[str, Any]:
    """Lower a function; its name on the GPU, and the module that holds it alone."""
    module = tirx.transform.BindTarget(target)(tvm.IRModule({"main": function}))
    with target, tvm.transform.PassContext(config=_CONFIGURATION):
        module = tvm.transform.Sequential(_passes())(module)
    kept = {
        name: lowered
        for name, lowered in module.functions.items()
        if lowered.attrs.get("calling_conv") == _ON_DEVICE
    }
    ((_, lowered),) = kept.items()
    return str(lowered.attrs["global_symbol"]), tvm.IRModule(kept)


@lru_cache(maxsize=1)
def _passes() -> list[Any]:
    """Those of TVM's own pipeline that kernels need.

    They have no blocks of schedules and synchronise themselves; compacting their buffers alone
    would take most of the time, and functions for the processor are not made.
    """
    return [
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.UnrollLoop(),
        s_tir.transform.RenormalizeSplitPattern(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.LowerIntrin(),
    ]


def _source_of(module: Any, target: Any) -> str:
    with target:
        text = tvm.get_global_func("target.build.cuda")(module, target).inspect_source()
    # TVM's own head is for compilers with CUDA's headers, and the first of each two declares.
    _, mark, body = str(text).partition('extern "C" __global__')
    return mark + body
