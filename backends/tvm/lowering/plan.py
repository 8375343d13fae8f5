"""Planning: a layout for every value, a kernel for every operation, a place for every array."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from shohin.backends.tvm.kernels.emit import LANES, Kernel, blocks
from shohin.backends.tvm.kernels.exchange import Exchange
from shohin.backends.tvm.kernels.layout import Copy, ToBlocked, ToPlain
from shohin.backends.tvm.kernels.plane_layout import FromPlanes, Source, ToPlanes
from shohin.backends.tvm.kernels.planes import Planes
from shohin.backends.tvm.kernels.sparse_conv2d import needed_planes
from shohin.backends.tvm.lowering.calls import KernelCall
from shohin.backends.tvm.lowering.memory import ALIGNMENT, Buffer, ConstantFile, Placement
from shohin.backends.tvm.lowering.operations import (
    Array,
    Concatenation,
    Convolution,
    Operation,
    Operations,
    Pooling,
    Value,
)
from shohin.backends.tvm.lowering.slices import Slice, find_slices
from shohin.backends.tvm.lowering.values import (
    blocked_bytes,
    constant_numbers,
    dtype_text,
    geometry_of,
    numpy_of,
    padded,
)
from shohin.backends.tvm.processor import Processor
from shohin.backends.tvm.tuning.tuner import Tuner

KernelType = TypeVar("KernelType", bound=Kernel)

WORTH_SPLITTING = 16_000
"""Operations from which on a second thread saves more than the barrier costs."""


Placer = Callable[["Planner", Any], None]


@dataclass
class Planner:
    """Turns operations into kernel calls, converting layouts only where it must.

    A value is *plain* (row-major, as in PyTorch) or *blocked* (``[N, C/16, H, W, 16]``, images
    only), or both once something asked for the other form.

    Attributes:
        tuner: where the code will run, and which variant of a kernel it should use.
        constants: where packed weights go.
        placers: how to plan each kind of operation.
        narrow: whether some constants are integers of fewer bits than they lie in, which had better
            be stored in as many as they have.
    """

    tuner: Tuner
    constants: ConstantFile
    placers: dict[type[Operation], Placer]
    narrow: bool = False
    calls: list[KernelCall] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    _plain: dict[Value, Placement] = field(default_factory=dict)
    _blocked: dict[Value, Placement] = field(default_factory=dict)
    _views: dict[Value, tuple[Value, int]] = field(default_factory=dict)
    _slices: dict[Value, Slice] = field(default_factory=dict)
    _planes: dict[Value, tuple[Planes, Placement]] = field(default_factory=dict)
    _readers: dict[Value, list[Operation]] = field(default_factory=dict)
    _notes: dict[str, str] = field(default_factory=dict)

    @property
    def target(self) -> Processor:
        """Where the code will run."""
        return self.tuner.target

    def choose(self, kernel: KernelType, timed: bool = False) -> KernelType:
        """The variant of a kernel to use; `timed` where its time is to be compared."""
        return cast(KernelType, self.tuner.choose(kernel, timed))

    def plan(self, operations: Operations) -> list[KernelCall]:
        """Plan every operation, and put the outputs where the caller wants them."""
        for index, value in enumerate(operations.inputs):
            self._plain[value] = Placement(Buffer("input", value.bytes, index))
        self._slices = find_slices(operations)
        for operation in operations.operations:
            for value in operation.inputs:
                self._readers.setdefault(value, []).append(operation)
        for operation in operations.operations:
            self.placers[type(operation)](self, operation)
        for index, value in enumerate(operations.outputs):
            self._place_output(index, value)
        return self.calls

    def call(self, kernel: Kernel, arguments: list[Placement], label: str, macs: int = 0) -> None:
        """Append a call of a template instance."""
        self.call_function(kernel, arguments, kernel.extent, kernel.operations, label, macs)

    def call_function(
        self,
        function: Any,
        arguments: list[Placement],
        extent: int,
        operations: int,
        label: str,
        macs: int = 0,
    ) -> None:
        """Append a call, noting what it keeps alive."""
        for argument in arguments:
            argument.buffer.touch(len(self.calls))
        parts = max(1, extent) if operations >= WORTH_SPLITTING else 1
        note = self._notes.get(label, "")
        self.calls.append(
            KernelCall(function, tuple(arguments), extent, parts, label, operations, macs, note)
        )

    def note(self, label: str, text: str) -> None:
        """Say something of the calls of that label that follow."""
        self._notes[label] = text

    def new_buffer(self, size: int) -> Placement:
        """Fresh memory in the arena."""
        buffer = Buffer("arena", max(1, size))
        self.buffers.append(buffer)
        return Placement(buffer)

    def constant(self, pack: Callable[[], Array]) -> Placement:
        """A constant.

        Args:
            pack: gives the array; called only when constants are really written.
        """
        return self.constants.add(pack)

    def define_plain(self, value: Value) -> Placement:
        """Memory for a value about to be computed in plain layout."""
        self._plain[value] = self.new_buffer(value.bytes)
        return self._plain[value]

    def define_blocked(self, value: Value) -> Placement:
        """Memory for an image about to be computed in blocked layout.

        An image that is joined to others is put in its place among them. With several images,
        those are `image_blocks` blocks of channels apart.
        """
        if value in self._blocked:
            return self._blocked[value]
        part = self._slices.get(value)
        if part is None:
            self._blocked[value] = self.new_buffer(blocked_bytes(value))
        else:
            whole = self.define_blocked(part.whole)
            block_bytes = blocked_bytes(value) // value.shape[0] // blocks(value.shape[1])
            self._blocked[value] = Placement(whole.buffer, whole.offset + part.block * block_bytes)
        return self._blocked[value]

    def image_blocks(self, value: Value) -> int:
        """Blocks of channels from one image of a value to the next, its own or those around it."""
        part = self._slices.get(value)
        if part is None or value.shape[0] == 1:
            return blocks(value.shape[1])
        return self.image_blocks(part.whole)

    def is_joined(self, part: Value, whole: Value) -> bool:
        """Whether a value is computed straight into its place in a concatenation."""
        return part in self._slices and self._slices[part].whole is whole

    def define_view(self, value: Value, source: Value, offset: int) -> None:
        """Make a value the elements of another from an offset on."""
        self._views[value] = (source, offset)

    def define_planes(self, value: Value, planes: Planes) -> Placement:
        """Memory for an image about to be computed as planes."""
        size = math.prod(planes.shape(value.shape[0], value.shape[1])) * value.dtype.itemsize
        self._planes[value] = (planes, self.new_buffer(size))
        return self._planes[value][1]

    def has_planes(self, value: Value, needed: Planes) -> bool:
        """Whether the image exists as planes that serve."""
        return value in self._planes and self._planes[value][0].serves(needed)

    def suitable_planes(self, value: Value, needed: Planes) -> Planes:
        """The planes that the image exists as if they serve, else what is needed."""
        return self._planes[value][0] if self.has_planes(value, needed) else needed

    def wanted_border(self, value: Value, planes: Planes) -> int:
        """Width of the frame that those who will read an image as planes want around its tiles.

        Args:
            value: the image.
            planes: how it is cut. Readers that need it cut in another way do not count: it is
                converted for them.
        """
        widths = [0]
        for reader in self._readers.get(value, []):
            if isinstance(reader, Convolution) and reader.may_be_sparse:
                needed = needed_planes(geometry_of(reader))
                widths += [needed.border] if planes.cut_like(needed) else []
            elif isinstance(reader, Concatenation) and reader.axis == 1:
                widths.append(self.wanted_border(reader.output, planes))
        return max(widths)

    def is_read_by(self, value: Value, kinds: tuple[type[Operation], ...]) -> bool:
        """Whether all who read a value as their input are operations of some kinds."""
        readers = self._readers.get(value, [])
        return bool(readers) and all(isinstance(reader, kinds) for reader in readers)

    def wants_planes(self, value: Value) -> bool:
        """Whether a convolution with a sparse weight reads the image."""
        readers = self._readers.get(value, [])
        return any(isinstance(reader, Convolution) and reader.may_be_sparse for reader in readers)

    def moved_for_readers(self, value: Value, *, planes: bool) -> int:
        """Elements whose layout changes for the readers of an image.

        Args:
            value: the image.
            planes: whether it is computed as planes.
        """
        moved = [0]
        for reader in self._readers.get(value, []):
            sparse = isinstance(reader, Convolution) and reader.may_be_sparse
            if isinstance(reader, Concatenation) or (
                isinstance(reader, Pooling) and (not planes or self.wants_planes(reader.output))
            ):
                moved.append(self.moved_for_readers(reader.output, planes=planes))
            elif sparse != planes:
                moved.append(value.elements)
        return max(moved)

    def pooled_planes(self, value: Value) -> Planes | None:
        """The planes that an image exists as, where it has no other layout."""
        if value not in self._planes or self.has_blocked(value) or self.has_plain(value):
            return None
        return self._planes[value][0]

    def exchange(self, value: Value, label: str) -> None:
        """Fill the borders of an image that was computed as planes, if somebody wants them."""
        planes, place = self._planes[value]
        if self.wanted_border(value, planes):
            kernel = Exchange(value.shape[0], value.shape[1], planes)
            self.call(kernel, [place], f"{label}: borders")

    def common_planes(self, values: Sequence[Value]) -> Planes | None:
        """The planes that images all exist as, None where they do not or differ."""
        found = {self._planes[value][0] for value in values if value in self._planes}
        alike = len(found) == 1 and all(value in self._planes for value in values)
        return found.pop() if alike else None

    def operand_border(self, operation: Operation, result: Planes) -> int:
        """The widest frame of those second operands that are cut as the result is."""
        operands = [
            self._planes[s.operand][0] for s in operation.steps if s.operand in self._planes
        ]
        return max((planes.border for planes in operands if planes.cut_like(result)), default=0)

    def planes(self, value: Value, wanted: Planes) -> Placement:
        """The image as exactly these planes, converted if need be."""
        if value in self._planes and self._planes[value][0] == wanted:
            return self._planes[value][1]
        batch, channels = value.shape[:2]
        blocked = self.has_blocked(value)
        x = self.blocked(value) if blocked else self.plain(value)
        y = self.define_planes(value, wanted)
        kernel = ToPlanes(batch, channels, wanted, "blocked" if blocked else "plain")
        self.call(kernel, [x, y], f"{value.name}: to planes")
        return y

    def _from_planes(self, value: Value, target: Source, y: Placement) -> Placement:
        planes, x = self._planes[value]
        kernel = FromPlanes(value.shape[0], value.shape[1], planes, target)
        self.call(kernel, [x, y], f"{value.name}: to {target}")
        return y

    def place_plain(self, value: Value, placement: Placement) -> None:
        """Say where a value lies in plain layout."""
        self._plain[value] = placement

    def has_blocked(self, value: Value) -> bool:
        """Whether the value exists in blocked layout, itself or as what it views."""
        source = self._same_image(value)
        return value in self._blocked or (source is not None and self.has_blocked(source))

    def has_plain(self, value: Value) -> bool:
        """Whether the value exists in plain layout without a conversion."""
        if value in self._plain or value.constant is not None:
            return True
        viewed = self._views.get(value)
        return viewed is not None and self.has_plain(viewed[0])

    def _same_image(self, value: Value) -> Value | None:
        source, offset = self._views.get(value, (value, 0))
        return (
            source if source is not value and offset == 0 and source.shape == value.shape else None
        )

    def flattened_image(self, value: Value) -> Value | None:
        """The image that a matrix is the flattened form of, if that is only there blocked."""
        source, offset = self._views.get(value, (value, 0))
        if source is value or offset:
            return None
        if len(source.shape) == 4 and self.has_blocked(source) and not self.has_plain(source):
            flat = (source.shape[0], source.elements // max(1, source.shape[0]))
            return source if value.shape == flat else None
        return self.flattened_image(source) if source.shape == value.shape else None

    def plain(self, value: Value) -> Placement:
        """The value in plain layout, converted if need be."""
        if value not in self._plain:
            self._plain[value] = self._make_plain(value)
        return self._plain[value]

    def _make_plain(self, value: Value) -> Placement:
        if value.constant is not None:
            constant = value.constant
            return self.constant(lambda: numpy_of(constant))
        if value in self._views:
            return self._view(value, *self._views[value])
        if value in self._planes and value not in self._blocked:
            return self._from_planes(value, "plain", self.new_buffer(value.bytes))
        blocked = self._blocked[value]
        batch, channels, height, width = value.shape
        if height * width == 1 and (channels % LANES == 0 or batch == 1):
            return blocked
        y = self.new_buffer(value.bytes)
        element = dtype_text(value.dtype)
        kernel = ToPlain(batch, channels, height * width, element, element)
        self.call(kernel, [blocked, y], f"{value.name}: to plain")
        return y

    def _view(self, value: Value, source: Value, offset: int) -> Placement:
        base = self.plain(source)
        shift = offset * value.dtype.itemsize
        if shift % ALIGNMENT == 0:
            return Placement(base.buffer, base.offset + shift)
        return self._copy(value, base, source.elements, offset)

    def _copy(self, value: Value, source: Placement, size: int, offset: int) -> Placement:
        y = self.new_buffer(value.bytes)
        kernel = Copy(size, offset, value.elements, dtype_text(value.dtype))
        self.call(kernel, [source, y], f"{value.name}: copy")
        return y

    def blocked(self, value: Value) -> Placement:
        """The image in blocked layout, converted if need be."""
        if value not in self._blocked:
            source = self._same_image(value)
            if source is not None and self.has_blocked(source):
                self._blocked[value] = self.blocked(source)
            else:
                self._blocked[value] = self._make_blocked(value)
        return self._blocked[value]

    def _make_blocked(self, value: Value) -> Placement:
        if value in self._planes and not self.has_plain(value):
            return self._from_planes(value, "blocked", self.new_buffer(blocked_bytes(value)))
        x = self.plain(value)
        batch, channels, height, width = value.shape
        if height * width == 1 and channels % LANES == 0:
            return x
        y = self.new_buffer(blocked_bytes(value))
        element = dtype_text(value.dtype)
        kernel = ToBlocked(batch, channels, height * width, element, element)
        self.call(kernel, [x, y], f"{value.name}: to blocked")
        return y

    def image(self, value: Value, *, plain: bool) -> Placement:
        """The image in plain or in blocked layout, converted if need be."""
        return self.plain(value) if plain else self.blocked(value)

    def operands(self, operation: Operation, blocked: bool, width: int) -> list[Placement]:
        """Places of the second operands of an operation's steps.

        Args:
            operation: whose steps.
            blocked: whether full operands are needed in blocked layout.
            width: length that per-channel operands are padded to with zeros.
        """
        return self._operands(operation, self.blocked if blocked else self.plain, width)

    def planes_operands(self, operation: Operation, planes: Planes, width: int) -> list[Placement]:
        """The same for a result that is planes: full operands are needed as the same planes."""
        return self._operands(operation, lambda value: self.planes(value, planes), width)

    def _operands(
        self, operation: Operation, full: Callable[[Value], Placement], width: int
    ) -> list[Placement]:
        places = []
        for step in operation.steps:
            if step.operand is not None and step.step.operand == "channel":
                places.append(self._channel_numbers(step.operand, width))
            elif step.operand is not None:
                places.append(full(step.operand))
        return places

    def _channel_numbers(self, operand: Value, width: int) -> Placement:
        return self.constant(lambda: padded(constant_numbers(operand), width))

    def _place_output(self, index: int, value: Value) -> None:
        """Let the last kernel write to the caller's memory, or copy there."""
        place = self.plain(value)
        buffer = place.buffer
        if buffer.kind == "arena" and place.offset == 0 and buffer.bytes == value.bytes:
            buffer.kind, buffer.index = "output", index
            return
        y = Placement(Buffer("output", value.bytes, index))
        kernel = Copy(value.elements, 0, value.elements, dtype_text(value.dtype))
        self.call(kernel, [place, y], f"{value.name}: copy to output")
