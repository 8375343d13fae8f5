"""From TIR kernels to an object file of plain C functions.

TVM's own route wraps every function in its packed calling convention and needs its runtime. Here
buffers become raw pointers and the pass that makes that wrapper sees a function it must leave
alone, so the object's symbols are ordinary C and need nothing but libc.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import PointerType, PrimType

from shohin.backends.tvm.processor import Processor

_C_FUNCTION = 1
"""TVM's calling convention that MakePackedAPI leaves as it is."""


def take_raw_pointers(function: Any, symbol: str) -> Any:
    """The function with its buffers as raw pointers and a C symbol.

    Args:
        function: PrimFunc whose parameters are buffers and scalars.
        symbol: name of the C function.
    """
    parameters, declarations = [], []
    for parameter in function.params:
        if isinstance(parameter.ty, PrimType):
            parameters.append(parameter)
            continue
        pointer = tirx.Var(f"{parameter.name}_data", PointerType(PrimType(str(parameter.dtype))))
        parameters.append(pointer)
        declarations.append(tirx.DeclBuffer(parameter, data=pointer))
    body = tirx.SeqStmt([*declarations, function.body]) if declarations else function.body
    raw = tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)
    return raw.with_attr(
        {"global_symbol": symbol, "calling_conv": _C_FUNCTION, "tirx.noalias": True}
    )


def _return_zero(function: Any) -> Any:
    """TVM emits an int function; without a return its value would be undefined."""
    body = tirx.SeqStmt([function.body, tirx.Return(tirx.IntImm("int32", 0))])
    return tirx.PrimFunc(function.params, body, PrimType("int32"), function.attrs)


def lower(functions: Mapping[str, Any], target: Processor) -> Any:
    """Run TVM's lowering pipeline over functions with raw pointers.

    Args:
        functions: PrimFuncs by C symbol.
        target: where the code will run.

    Returns:
        The lowered IRModule, ready for code generation.
    """
    tvm_target = tvm.target.Target(target.tvm_description())
    tvm_target = tvm_target.with_host(tvm_target)
    module = tvm.IRModule(
        {symbol: take_raw_pointers(function, symbol) for symbol, function in functions.items()}
    )
    module = tirx.transform.BindTarget(tvm_target)(module)
    pipeline, finish, _ = tirx.get_default_tir_pipeline(tvm_target)
    # Storage rewriting would merge the accumulators of tiles into shared memory on the heap.
    with tvm.transform.PassContext(config={"tirx.disable_storage_rewrite": True}):
        module = pipeline(module)
    module = tvm.IRModule(
        {name: _return_zero(function) for name, function in module.functions.items()},
        attrs=module.attrs,
    )
    return finish()(module)


def emit_object(functions: Mapping[str, Any], target: Processor, path: Path) -> None:
    """Write an object file with one C function per kernel.

    Args:
        functions: PrimFuncs by C symbol.
        target: where the code will run.
        path: the object file to write.
    """
    tvm_target = tvm.target.Target(target.tvm_description())
    module = lower(functions, target)
    build = tvm.get_global_func("target.build.llvm")
    build(module, tvm_target.with_host(tvm_target)).write_to_file(str(path))
