"""Planning of regions: what TVM imports and legalises, with a thread for every element."""

from shohin.backends.tvm.cuda.generic import GRIDS
from shohin.backends.tvm.cuda.lowering.planner import CudaPlanner
from shohin.backends.tvm.generic.region import compile_region
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Region
from shohin.backends.tvm.lowering.place_regions import bytes_of


def place_region(planner: CudaPlanner, op: Region) -> None:
    """Compile a region and launch its kernels in order."""
    inputs = [(value.shape, value.dtype) for value in op.values]
    code = compile_region(op.module, inputs, GRIDS)
    places = {f"in{i}": planner.value(value) for i, value in enumerate(op.values)}
    for name, array in code.constants.items():
        places[name] = _constant(planner, array)
    for value, name in zip(op.results, code.outputs, strict=True):
        if name.startswith("out"):
            places[name] = planner.define(value)
    for name, (shape, dtype) in code.temporaries.items():
        places[name] = planner.new_buffer(bytes_of(shape, dtype))
    for call in code.calls:
        arguments = [places[name] for name in call.arguments]
        label = f"{op.label} ({call.label})"
        planner.call_function(call.function, arguments, call.extent, label)
    for value, name in zip(op.results, code.outputs, strict=True):
        planner.place(value, places[name])


def _constant(planner: CudaPlanner, array: Array) -> Placement:
    return planner.constant(lambda: array)
