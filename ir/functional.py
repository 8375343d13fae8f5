"""In-place operators made functional.

PyTorch code may write to a tensor (``x.add_(1)``) or to a view of one (``x[:, 1:3] = 0``). Here
every write becomes a new value, and whoever reads the tensor, or a view of it, afterwards reads
the new value::

    %view = aten.slice(%x, 1, 1, 3)           %view = aten.slice(%x, 1, 1, 3)
    %fill_ = aten.fill_(%view, 0)             %fill = aten.fill(%view, 0)
    %y = aten.relu(%x)                        %new = aten.slice_scatter(%x, %fill, 1, 1, 3)
                                              %y = aten.relu(%new)

Which values alias each other is not guessed from operator names: the graph is run on fake
tensors, which share their storage exactly where PyTorch's would (``reshape``, ``contiguous`` and
``dropout`` return a view or a copy depending on their argument).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import Argument, map_aggregate, map_arg

from shohin.errors import CaptureError, ShohinWarning
from shohin.ir.program import BATCH, InputSpec, remove_unused_tensors, tensor_of
from shohin.ir.shapes import fake_values, first_line
from shohin.ir.views import Views, make_node, no_exact_form

aten = torch.ops.aten
_PROBES = (3, 5)
_STATE_HINT = "export the model in inference mode, and keep state out of it"
_COPIES_OF_CONSTANTS = {aten.lift_fresh_copy.default, aten.lift_fresh.default}


def is_in_place(node: fx.Node) -> bool:
    """Whether a node's operator writes to one of its arguments."""
    return isinstance(node.target, OpOverload) and bool(node.target._schema.is_mutable)


def make_functional(
    module: fx.GraphModule, inputs: Sequence[InputSpec] | None = None
) -> list[fx.Node]:
    """Replace in-place operators by functional ones, in the module's graph.

    Args:
        module: ATen graph module; changed in place.
        inputs: its inputs; by default read from the ``val`` that torch.export leaves in the
            metadata of placeholders.

    Returns:
        The nodes that were made, in graph order; empty when nothing was in place.

    Raises:
        CaptureError: naming a node that has no exact functional form, or that writes to a weight.
    """
    if not any(is_in_place(node) for node in module.graph.nodes):
        return []
    specs = inputs if inputs is not None else _specs_from_metadata(module.graph)
    values, others = (fake_values(module, specs, batch) for batch in _PROBES)
    functionaliser = _Functionaliser(module, values, Views(values, others))
    made = functionaliser.run()
    _warn_of_written(functionaliser.written_inputs)
    remove_unused_tensors(module)
    module.recompile()
    return made


def _warn_of_written(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(f"'{name}'" for name in dict.fromkeys(names))
        text = f"writes to its input {shown}; the compiled model leaves it as it is"
        warnings.warn(text, ShohinWarning, stacklevel=5)


def _specs_from_metadata(graph: fx.Graph) -> list[InputSpec]:
    specs = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            raise CaptureError(f"input '{node.name}'", "its shape is unknown", "give its InputSpec")
        shape = tuple(size if isinstance(size, int) else BATCH for size in value.shape)
        specs.append(InputSpec(node.name, shape, value.dtype))
    return specs


@dataclass
class _Link:
    """What stands for an original value now.

    Attributes:
        base: the original value that it is a view of, None for a root.
        current: the node that has its value.
        version: version of the root at which `current` was made.
    """

    base: fx.Node | None
    current: fx.Node
    version: int = 0


class _Functionaliser:
    """Walks a graph once and keeps, for each original value, the node that stands for it now.

    The root of every family of views has a version that each write raises. A view made at an
    older version is made anew from its base when it is read next.
    """

    def __init__(self, module: fx.GraphModule, values: dict[fx.Node, object], views: Views) -> None:
        self.module = module
        self.graph = module.graph
        self.values = values
        self.views = views
        self.links: dict[fx.Node, _Link] = {}
        self.versions: dict[fx.Node, int] = {}
        self.made: list[fx.Node] = []
        self.replaced: set[fx.Node] = set()
        self.written_inputs: list[str] = []

    def run(self) -> list[fx.Node]:
        """Rewrite the graph and return the new nodes that are left in it."""
        for node in list(self.graph.nodes):
            if _changes_only_shape(node):
                node.target = _functional(node)
                node._rename(node.name.rstrip("_"))
                self.made.append(node)
            if is_in_place(node):
                self._replace_write(node)
            else:
                self._pass_by(node)
        self._erase_leftovers()
        kept = set(self.graph.nodes)
        return [node for node in self.made if node in kept]

    def _pass_by(self, node: fx.Node) -> None:
        base = self.views.base_of(node)
        self._read_current(node)
        if base is not None and self.views.is_full_slice(node):
            self._link(node, base, self._current(base))
            self.replaced.add(node)
        else:
            self._link(node, base, node)

    def _link(self, node: fx.Node, base: fx.Node | None, current: fx.Node) -> None:
        if base is None:
            self.versions[node] = 0
            self.links[node] = _Link(None, current)
        else:
            self.links[node] = _Link(base, current, self.versions[self._root(base)])

    def _root(self, node: fx.Node) -> fx.Node:
        base = self.links[node].base
        return node if base is None else self._root(base)

    def _read_current(self, node: fx.Node) -> None:
        """Point a node's arguments at the values that are current where it stands."""
        for argument in node.all_input_nodes:
            with self._making(node):
                current = self._current(argument)
            if current is not argument:
                node.replace_input_with(argument, current)
                self.replaced.add(argument)

    def _current(self, original: fx.Node) -> fx.Node:
        """The node with the present value of an original one, made here if need be."""
        link = self.links[original]
        if link.base is None:
            return link.current
        version = self.versions[self._root(original)]
        if link.version != version:
            link.current = self._view_again(original, link.base)
            link.version = version
        return link.current

    def _view_again(self, view: fx.Node, base: fx.Node) -> fx.Node:
        """The same view of the present value of its base."""
        current = self._current(base)
        if self.views.is_identity(view, base):
            return current
        if view.target is aten.as_strided.default:
            raise no_exact_form(view, "cannot follow a write through as_strided")
        fresh = self.graph.node_copy(view)
        fresh.args = (current, *fresh.args[1:])
        if fresh.target is aten.view.default:
            # The new value may lie otherwise in memory, where a view is impossible.
            fresh.target = aten.reshape.default
        return fresh

    def _replace_write(self, node: fx.Node) -> None:
        written = _written_argument(node)
        root = self._root(written)
        if node.target is aten.detach_.default:
            self._link(node, written, self._current(written))
        elif root.op == "get_attr":
            problem = f"{node.target} writes to the weight '{root.target}' whenever the model runs"
            raise no_exact_form(node, problem, _STATE_HINT)
        else:
            if root.op == "placeholder":
                self.written_inputs.append(str(root.target))
            with self._making(node):
                self._write(written, self._new_value(node))
            self._link(node, written, self._current(written))
        self.replaced.add(node)

    def _write(self, original: fx.Node, value: fx.Node) -> None:
        """Let a value be the present one of an original node and of what it is a view of."""
        link = self.links[original]
        if link.base is None:
            self.versions[original] += 1
        else:
            base = link.base
            if not isinstance(self.values[base], Tensor):
                base = self.links[base].base or base
            merged = self.views.scatter(original, value, base, self._current(base))
            self._write(base, merged)
        link.current = value
        link.version = self.versions[self._root(original)]

    def _new_value(self, node: fx.Node) -> fx.Node:
        """The value that an in-place operator gives the tensor it writes to."""
        arguments = map_arg(node.args, self._current)
        keywords = map_arg(dict(node.kwargs), self._current)
        written = self._current(_written_argument(node))
        if node.target is aten.zero_.default:
            return make_node(self.graph, aten.zeros_like.default, (written,))
        if node.target is aten.fill_.Scalar:
            return make_node(self.graph, aten.full_like.default, arguments, keywords)
        if node.target is aten.fill_.Tensor and self._constant(node.args[1]) is not None:
            number = self._constant(node.args[1])
            return make_node(self.graph, aten.full_like.default, (written, number))
        if node.target is aten.copy_.default:
            return self._copy(node, written)
        return self._call(node, arguments, keywords)

    def _copy(self, node: fx.Node, written: fx.Node) -> fx.Node:
        argument = node.args[1]
        if not isinstance(argument, fx.Node):
            raise no_exact_form(node, f"expected a tensor to copy, got {argument}")
        old, new = self.values[_written_argument(node)], self.values[argument]
        source = self._current(argument)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and _same_type(old, new):
            return source
        return make_node(self.graph, aten.copy.default, (written, source))

    def _call(
        self, node: fx.Node, arguments: tuple[Argument, ...], keywords: dict[str, Argument]
    ) -> fx.Node:
        target = _functional(node)
        old, new = self.values[node], self._imitate(target, node)
        if not isinstance(old, Tensor) or not isinstance(new, Tensor) or old.shape != new.shape:
            raise no_exact_form(node, f"{target} does not give what {node.target} writes")
        result = make_node(self.graph, target, arguments, keywords)
        if old.dtype == new.dtype:
            return result
        return make_node(self.graph, aten.to.dtype, (result, old.dtype))

    def _imitate(self, target: OpOverload, node: fx.Node) -> object:
        """The fake value of the functional operator."""
        arguments = cast("tuple[Any, ...]", map_aggregate(node.args, self._value))
        keywords = cast("dict[str, Any]", map_aggregate(dict(node.kwargs), self._value))
        fakes = [self.values[argument] for argument in node.all_input_nodes]
        mode = next(fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor))
        try:
            with mode, torch.no_grad():
                return cast("object", target(*arguments, **keywords))
        except Exception as error:  # an operator may raise anything
            problem = f"{target} refuses the arguments of {node.target}: {first_line(error)}"
            raise no_exact_form(node, problem) from error

    def _value(self, argument: Any) -> Any:
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def _constant(self, argument: object) -> int | float | bool | None:
        """The number that a scalar constant of the graph holds."""
        node = argument
        while isinstance(node, fx.Node) and node.target in _COPIES_OF_CONSTANTS:
            node = node.args[0]
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        number = tensor_of(self.module, str(node.target))
        return number.item() if number.dim() == 0 else None

    @contextmanager
    def _making(self, node: fx.Node) -> Iterator[None]:
        """Nodes made in the block stand before a node and take its metadata over."""
        before = node.prev
        with self.graph.inserting_before(node):
            yield
        fresh = before.next
        while fresh is not node:
            if not fresh.meta:
                fresh.meta = dict(node.meta)
            self.made.append(fresh)
            fresh = fresh.next

    def _erase_leftovers(self) -> None:
        """Erase what only the in-place operators needed."""
        candidates = self.replaced | set(self.made)
        for node in reversed(self.graph.nodes):
            if node in candidates and not node.users and node.op != "placeholder":
                candidates |= set(node.all_input_nodes)
                self.graph.erase_node(node)


def _changes_only_shape(node: fx.Node) -> bool:
    """Whether an operator makes its argument a view of what it was (``unsqueeze_``)."""
    found = isinstance(node.target, OpOverload) and torch.Tag.inplace_view in node.target.tags
    return found and node.target is not aten.detach_.default


def _same_type(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and one.dtype == two.dtype


def _overload(node: fx.Node) -> OpOverload:
    if not isinstance(node.target, OpOverload):
        raise no_exact_form(node, f"expected an operator, got {node.target}")
    return node.target


def _written_argument(node: fx.Node) -> fx.Node:
    """The one argument that an in-place operator writes to."""
    schema = _overload(node)._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    first = node.args[0] if node.args else None
    if len(written) != 1 or written[0] != schema.arguments[0] or not isinstance(first, fx.Node):
        raise no_exact_form(node, f"{node.target} writes to arguments beside its first")
    return first


def _functional(node: fx.Node) -> OpOverload:
    """The operator that gives as a new value what an in-place one writes (``add_``: ``add``)."""
    namespace, _, name = _overload(node)._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), _without_mark(name), None)
    found = getattr(packet, _overload(node)._overloadname, None)
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        raise no_exact_form(node, f"{node.target} has no functional form")
    return found


def _without_mark(name: str) -> str:
    return name.replace("__i", "__", 1) if name.startswith("__i") else name.removesuffix("_")
