"""Checks programs between passes, and that passes tell the truth about what they did."""

from torch import Tensor, fx

from shohin.errors import VerifyError
from shohin.ir.annotations import annotations
from shohin.ir.encodings import same_bits
from shohin.ir.program import Program
from shohin.ir.verifier import verify
from shohin.passes.instruments.base import Instrument, PassEnd, PipelineEvent


class Verifying(Instrument):
    """Verifies the program before the pipeline and after every pass.

    The manager runs one of these before all other instruments unless told not to.
    """

    def before_pipeline(self, event: PipelineEvent) -> None:
        """Verify the program that the pipeline is given.

        Raises:
            VerifyError: when it is invalid.
        """
        verify(event.program)

    def after_pass(self, event: PassEnd) -> None:
        """Verify a pass' result.

        Raises:
            VerifyError: when it is invalid, or differs although the pass reported that it
                modified nothing.
        """
        verify(event.result, after=event.current.name)
        found = None if event.modified else find_difference(event.program, event.result)
        if found:
            raise VerifyError("", f"it was reported as not modified, but {found}")


def find_difference(first: Program, second: Program) -> str | None:
    """The first difference between two programs in what they compute or store, in words.

    Facts, history and name are not compared. Tensors are compared bit for bit.
    """
    if first is second:
        return None
    if (first.inputs, first.stage) != (second.inputs, second.stage):
        return "the inputs or the stage differ"
    if dict(first.encodings) != dict(second.encodings):
        return "the encodings differ"
    return _find_node_difference(first, second) or _find_tensor_difference(first, second)


def _find_node_difference(first: Program, second: Program) -> str | None:
    nodes = list(zip(first.graph.nodes, second.graph.nodes, strict=False))
    for before, after in nodes:
        if _signature(before) != _signature(after):
            return f"node '{before.name}' differs"
    if len(first.graph.nodes) != len(second.graph.nodes):
        return f"the graph has {len(second.graph.nodes)} nodes, not {len(first.graph.nodes)}"
    return None


def _signature(node: fx.Node) -> tuple[object, ...]:
    arguments = (repr(node.args), repr(node.kwargs))
    return (node.op, node.name, str(node.target), arguments, annotations(node))


def _find_tensor_difference(first: Program, second: Program) -> str | None:
    before, after = _tensors(first), _tensors(second)
    if before.keys() != after.keys():
        return f"tensor '{min(before.keys() ^ after.keys())}' was added or removed"
    changed = (name for name in before if not same_bits(before[name], after[name]))
    return next((f"tensor '{name}' differs" for name in changed), None)


def _tensors(program: Program) -> dict[str, Tensor]:
    module = program.module
    return {
        name: tensor.detach()
        for tensors in (module.named_parameters, module.named_buffers)
        for name, tensor in tensors(remove_duplicate=False)
    }
