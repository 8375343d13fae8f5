"""The verifier: what holds for a program at each stage, one small rule each."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from shohin.errors import VerifyError
from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.encodings import Dense, Encoding
from shohin.ir.fixed_rules import fixed_problems
from shohin.ir.functional import is_in_place
from shohin.ir.printer import format_node
from shohin.ir.program import Fact, Program, Stage, is_tensor_name, tensor_of
from shohin.ir.shapes import NodeType, TensorType, infer_shapes
from shohin.ir.targets import name_target

_CONTEXT = 2
_BATCH = 3
_SAME_BITS_HINT = "set the module's tensor to what the encoding materialises (-0.0 is not 0.0)"
_KINDS = {"placeholder", "get_attr", "call_function", "output"}


@dataclass(frozen=True)
class Fault:
    """A broken rule.

    Attributes:
        where: what is at fault (``node 'conv1'``, ``weight 'fc.weight'``).
        expected: what the rule asks for.
        found: what is there instead.
        node: the node at fault, if there is one.
        hint: what a pass should do instead.
    """

    where: str
    expected: str
    found: str
    node: fx.Node | None = None
    hint: str | None = None


@dataclass(frozen=True)
class Rule:
    """An invariant of programs.

    Attributes:
        name: short name, printed with every fault.
        check: gives the faults that a program has.
        stages: the stages at which it holds.
    """

    name: str
    check: Callable[[Program], Iterator[Fault]]
    stages: frozenset[Stage] = frozenset(Stage)


def verify(program: Program, after: str = "", rules: Collection[str] | None = None) -> None:
    """Check every rule of a program's stage; the first fault is an error.

    Args:
        program: the program.
        after: canonical text of the pass that made it, for the message.
        rules: names of the rules to check; None for all.

    Raises:
        VerifyError: naming the pass, the rule, the node or weight, what was expected and what was
            found, with the lines of the graph around it.
    """
    for rule in RULES:
        if program.stage in rule.stages and (rules is None or rule.name in rules):
            for fault in rule.check(program):
                raise _describe(program, rule, fault, after)


def _describe(program: Program, rule: Rule, fault: Fault, after: str) -> VerifyError:
    where = f"after '{after}': {fault.where}" if after else fault.where
    problem = f"[{rule.name}] expected {fault.expected}, found {fault.found}"
    lines = _lines_around(program.graph, fault.node) if fault.node is not None else ""
    return VerifyError(where, problem + lines, fault.hint)


def _lines_around(graph: fx.Graph, fault: fx.Node) -> str:
    nodes = list(graph.nodes)
    if fault not in nodes:
        return ""
    at = nodes.index(fault)
    shown = nodes[max(0, at - _CONTEXT) : at + _CONTEXT + 1]
    return "".join(f"\n  {'>' if node is fault else ' '} {format_node(node)}" for node in shown)


def _check_form(program: Program) -> Iterator[Fault]:
    try:
        program.graph.lint()
    except (RuntimeError, ValueError, AttributeError) as error:
        yield Fault("graph", "a well-formed graph", str(error).splitlines()[0])


def _check_kinds(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        if node.op not in _KINDS:
            yield Fault(f"node '{node.name}'", f"one of {sorted(_KINDS)}", f"'{node.op}'", node)
        if node.op == "call_function" and not _is_operator(node.target):
            found = getattr(node.target, "__qualname__", str(node.target))
            expected = "a torch operator or an arithmetic function"
            yield Fault(f"node '{node.name}'", expected, f"the function '{found}'", node)


def _is_operator(target: object) -> bool:
    return isinstance(target, HigherOrderOperator) or name_target(target) is not None


def _check_functional(program: Program) -> Iterator[Fault]:
    if Fact.FUNCTIONAL not in program.facts:
        return
    for node in program.graph.nodes:
        if is_in_place(node):
            yield Fault(f"node '{node.name}'", "no operator in place", str(node.target), node)


def _check_attributes(program: Program) -> Iterator[Fault]:
    for node in program.graph.find_nodes(op="get_attr"):
        if not _has_attribute(program, str(node.target)):
            where = f"node '{node.name}'"
            yield Fault(where, f"an attribute '{node.target}' of the module", "none", node)


def _has_attribute(program: Program, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    try:
        return hasattr(program.module.get_submodule(path), leaf)
    except AttributeError:
        return False


def _check_inputs(program: Program) -> Iterator[Fault]:
    expected = [spec.name for spec in program.inputs]
    found = [node.name for node in program.graph.find_nodes(op="placeholder")]
    if expected != found:
        yield Fault("inputs", f"placeholders {expected}", str(found))


def _check_output(program: Program) -> Iterator[Fault]:
    outputs = program.graph.find_nodes(op="output")
    if len(outputs) != 1:
        yield Fault("output", "one output node", str(len(outputs)))
        return
    results = outputs[0].args[0]
    flat = results if isinstance(results, (tuple, list)) else (results,)
    if not flat or not all(isinstance(result, fx.Node) for result in flat):
        yield Fault("output", "a node or a flat tuple of nodes", str(results), outputs[0])


def _check_names(program: Program) -> Iterator[Fault]:
    for name in program.encodings:
        if not is_tensor_name(program.module, name):
            yield Fault(f"encoding of '{name}'", "a parameter or buffer of that name", "none")


def _check_encodings(program: Program) -> Iterator[Fault]:
    for name, encoding in program.encodings.items():
        tensor, where = tensor_of(program.module, name), f"encoding of '{name}'"
        kind = TensorType(tuple(tensor.shape), tensor.dtype).describe()
        encoded = TensorType(encoding.shape, encoding.dtype).describe()
        if kind != encoded:
            yield Fault(where, f"{kind} as in the module", encoded)
        elif not encoding.is_stored_form_of(tensor):
            found = _difference(encoding, tensor)
            yield Fault(where, "the module's tensor bit for bit", found, hint=_SAME_BITS_HINT)


def _difference(encoding: Encoding, tensor: Tensor) -> str:
    dense = encoding.materialise().detach()
    pairs = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (dense, tensor)]
    unequal = (pairs[0] != pairs[1]).reshape(tensor.numel(), -1).any(1)
    first = int(unequal.nonzero()[0])
    values = (float(t.reshape(-1)[first]) for t in (dense, tensor.detach()))
    one, two = values
    return (
        f"{int(unequal.sum())} of {tensor.numel()} elements that differ, the first at {first}: "
        f"{one!r} encoded, {two!r} in the module"
    )


def _check_captured(program: Program) -> Iterator[Fault]:
    for name, encoding in program.encodings.items():
        if not isinstance(encoding, Dense):
            yield Fault(f"encoding of '{name}'", "dense weights only", encoding.describe())
    for node in program.graph.nodes:
        if annotation(node, ActivationFormat) is not None:
            yield Fault(f"node '{node.name}'", "no activation format", "one", node)


def _check_fixed(program: Program) -> Iterator[Fault]:
    for node, (expected, found) in fixed_problems(program):
        yield Fault(f"node '{node.name}'", expected, found, node)


def _check_lowered(program: Program) -> Iterator[Fault]:
    """A compressed weight is read by operators that know its encoding."""
    compressed = {n for n, encoding in program.encodings.items() if not isinstance(encoding, Dense)}
    for node in program.graph.find_nodes(op="get_attr"):
        for user in node.users if node.target in compressed else ():
            if isinstance(user.target, OpOverload) and user.target.namespace == "aten":
                expected = f"an operator for '{node.target}' in its encoding"
                yield Fault(f"node '{user.name}'", expected, str(user.target), user)


def _check_shapes(program: Program) -> Iterator[Fault]:
    try:
        types = infer_shapes(program, _BATCH)
    except VerifyError as error:
        names = {f"node '{node.name}'": node for node in program.graph.nodes}
        yield Fault(error.where, "a graph that runs", error.problem, names.get(error.where))
        return
    output = next(iter(program.graph.find_nodes(op="output")))
    if not _is_flat(types[output.name]):
        yield Fault("output", "one tensor or a flat tuple of tensors", str(types[output.name]))


def _is_flat(kind: NodeType) -> bool:
    results = kind if isinstance(kind, tuple) else (kind,)
    return all(isinstance(result, TensorType) for result in results)


RULES: tuple[Rule, ...] = (
    Rule("attributes", _check_attributes),
    Rule("well-formed", _check_form),
    Rule("known-kinds", _check_kinds),
    Rule("functional", _check_functional),
    Rule("inputs", _check_inputs),
    Rule("output", _check_output),
    Rule("encoded-names", _check_names),
    Rule("encoded-bits", _check_encodings),
    Rule("captured", _check_captured, frozenset({Stage.CAPTURED})),
    Rule("fixed-point", _check_fixed),
    Rule("lowered", _check_lowered, frozenset({Stage.LOWERED})),
    Rule("runnable", _check_shapes),
)
