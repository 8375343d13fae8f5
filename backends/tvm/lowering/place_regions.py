"""Planning of regions: TVM's own kernels, wired into the same memory plan."""

from shohin.backends.tvm.generic.region import (
    RegionCode,
    RegionError,
    compile_region,
    unsupported_nodes,
)
from shohin.backends.tvm.lowering.memory import Placement
from shohin.backends.tvm.lowering.operations import Array, Region
from shohin.backends.tvm.lowering.plan import Planner
from shohin.errors import UnsupportedError


def place_region(planner: Planner, op: Region) -> None:
    """Compile a region and call its kernels in order."""
    code = compile_region(op.module, [(value.shape, value.dtype) for value in op.values])
    places = {f"in{i}": planner.plain(value) for i, value in enumerate(op.values)}
    places |= {name: _constant(planner, array) for name, array in code.constants.items()}
    places |= _results(planner, op, code)
    for name, (shape, dtype) in code.temporaries.items():
        places[name] = planner.new_buffer(bytes_of(shape, dtype))
    for call in map(planner.tuner.searcher.choose, code.calls):
        arguments = [places[name] for name in call.arguments]
        label = f"{op.label} ({call.label})"
        planner.call_function(call.function, arguments, call.extent, call.operations, label)
    for value, name in zip(op.results, code.outputs, strict=True):
        planner.place_plain(value, places[name])


def _constant(planner: Planner, array: Array) -> Placement:
    return planner.constant(lambda: array)


def _results(planner: Planner, op: Region, code: RegionCode) -> dict[str, Placement]:
    return {
        name: planner.define_plain(value)
        for value, name in zip(op.results, code.outputs, strict=True)
        if name.startswith("out")
    }


def bytes_of(shape: tuple[int, ...], dtype: str) -> int:
    """Size of an array of a region."""
    width = 1 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit())) // 8
    for size in shape:
        width *= size
    return width


def refuse_unsupported(regions: list[Region]) -> None:
    """Raise one error that lists every node that TVM cannot take.

    Raises:
        UnsupportedError: naming the nodes, their operators and the reasons.
    """
    faults: list[str] = []
    for region in regions:
        inputs = [(value.shape, value.dtype) for value in region.values]
        try:
            compile_region(region.module, inputs)
        except RegionError:
            found = unsupported_nodes(region.module, inputs)
            faults += [f"  {node.name} ({node.target}): {reason}" for node, reason in found]
    if faults:
        raise UnsupportedError(
            "backend tvm",
            "these nodes have no kernel:\n" + "\n".join(faults),
            "replace the operators in the model, or run the program with the reference backend",
        )
