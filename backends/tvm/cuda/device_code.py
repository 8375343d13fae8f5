"""From TIR kernels to CUDA source, one `__global__` function each."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx

_PRELUDE = Path(__file__).parent / "shohin_device.cuh"
_POINTER = "_ptr"
_ON_DEVICE = 2
"""TVM's calling convention of functions that run on the GPU."""


# Registers are the kernel's own affair: rewriting storage would share them among tiles. Loops are
# unrolled by the CUDA compiler, which is faster at it.
_CONFIGURATION = {
    "tirx.disable_storage_rewrite": True,
    "tirx.UnrollLoop": {"explicit_unroll": False},
}


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
    pipeline, _, finish = tirx.get_default_tir_pipeline(target)
    with target, tvm.transform.PassContext(config=_CONFIGURATION):
        module = pipeline(module)
        kept = {
            name: lowered
            for name, lowered in module.functions.items()
            if int(lowered.attrs["calling_conv"]) == _ON_DEVICE
        }
        ((_, lowered),) = kept.items()
        return str(lowered.attrs["global_symbol"]), finish()(tvm.IRModule(kept))


def _source_of(module: Any, target: Any) -> str:
    with target:
        text = tvm.get_global_func("target.build.cuda")(module, target).inspect_source()
    # TVM's own head is for compilers with CUDA's headers, and the first of each two declares.
    _, mark, body = str(text).partition('extern "C" __global__')
    return mark + body
