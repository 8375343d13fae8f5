"""Models, their example inputs and their data, as commands name them."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from shohin.batches import noise, noise_of
from shohin.cli.names import call_object, load_object
from shohin.errors import InputError, SpecError
from shohin.ir.capture import capture
from shohin.ir.program import BATCH, InputSpec, Program
from shohin.ir.serialise import load_program

_SHAPE = re.compile(r"(?:(?P<dtype>[a-z]+\d*)\[(?P<sizes>[\dx]*)\]|(?P<bare>\d[\dx]*))")
_FILES = (".pt2", ".shohin")
_HINT = "give --input-shape 1x3x32x32, or --data"


@dataclass(frozen=True)
class Model:
    """A model that a user named.

    Attributes:
        program: the captured model.
        module: the model in PyTorch: the user's own where there is one, else the program's.
        inputs: example inputs.
    """

    program: Program
    module: nn.Module
    inputs: tuple[Tensor, ...]


def load_model(text: str, shapes: Sequence[str] = (), data: Iterable[object] = ()) -> Model:
    """The model that a user named, captured.

    Args:
        text: ``file.py:name``, ``package.module:name``, or a ``.pt2`` or ``.shohin`` file.
        shapes: texts of the example inputs' shapes.
        data: batches; the first one stands for the example inputs when no shapes are given.

    Raises:
        SpecError: when the name or a shape is wrong, or the example inputs are not known.
        CaptureError: when the model cannot be captured.
        ArtifactError: when a ``.shohin`` file is broken.
    """
    if text.endswith(_FILES):
        program = load_program(text) if text.endswith(".shohin") else capture(text)
        return Model(program, program.module, noise(program.inputs))
    found = load_object(text, "MODEL")
    model = (
        found if isinstance(found, (nn.Module, ExportedProgram, Program)) else _build(found, text)
    )
    if isinstance(model, Program):
        return Model(model, model.module, noise(model.inputs))
    name = _title(text)
    if isinstance(model, ExportedProgram):
        program = capture(model, name=name)
        return Model(program, program.module, noise(program.inputs))
    inputs = _example_inputs(text, found, model, shapes, data)
    return Model(capture(model, inputs, name=name), model.eval(), inputs)


def load_data(text: str | None) -> Iterable[Any]:
    """The batches that a user named; none when nothing was named.

    Args:
        text: ``file.py:name`` of an iterable, or of a function without arguments that gives one.

    Raises:
        SpecError: when there is no such thing.
    """
    if text is None:
        return ()
    found = load_object(text, "--data")
    batches = found if isinstance(found, Iterable) else call_object(found, text)
    if not isinstance(batches, Iterable):
        problem = f"expected an iterable of tuples of tensors, got {type(batches).__name__}"
        raise SpecError(text, problem)
    return list(batches) if isinstance(batches, Iterator) else batches


def at_batch(model: Model, batch: int) -> tuple[Tensor, ...]:
    """A model's example inputs at a batch size: cut, or repeated."""
    pairs = zip(model.inputs, model.program.inputs, strict=True)
    return tuple(_resized(tensor, spec, batch) for tensor, spec in pairs)


def parse_shape(text: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and element type: ``1x3x32x32``, ``int64[1x64]``.

    Raises:
        SpecError: when the text is neither.
    """
    match = _SHAPE.fullmatch(text.replace(" ", ""))
    sizes = (match["bare"] or match["sizes"] or "") if match else "x"
    name = (match["dtype"] or "float32") if match else ""
    dtype = getattr(torch, name, None) if name else None
    parts = sizes.split("x") if sizes else []
    if not isinstance(dtype, torch.dtype) or not all(part.isdigit() for part in parts):
        problem = f"expected a shape such as 1x3x32x32 or int64[1x64], got '{text}'"
        raise SpecError("--input-shape", problem)
    return tuple(int(part) for part in parts), dtype


def _resized(tensor: Tensor, spec: InputSpec, batch: int) -> Tensor:
    if spec.shape[:1] != (BATCH,) or tensor.shape[0] == batch:
        return tensor
    copies = -(-batch // tensor.shape[0])
    return tensor.repeat(copies, *[1] * (tensor.dim() - 1))[:batch].contiguous()


def _build(found: object, text: str) -> nn.Module | ExportedProgram | Program:
    model = call_object(found, text)
    if not isinstance(model, (nn.Module, ExportedProgram, Program)):
        problem = (
            f"expected a module, or a function without arguments that gives one, got {model!r:.60}"
        )
        raise SpecError(text, problem)
    return model


def _title(text: str) -> str:
    source, _, name = text.rpartition(":")
    stem = Path(source).stem if source.endswith(".py") else source.rpartition(".")[2]
    return stem if name.lower() in ("model", "net", "build", "make", "factory") else name


def _example_inputs(
    text: str,
    found: object,
    model: nn.Module,
    shapes: Sequence[str],
    data: Iterable[object],
) -> tuple[Tensor, ...]:
    if shapes:
        generator = torch.Generator().manual_seed(0)
        return tuple(noise_of(*parse_shape(shape), generator) for shape in shapes)
    first = next(iter(data), None)
    if first is not None:
        return _as_inputs(first, "--data, first batch")
    carried = getattr(found, "example_inputs", getattr(model, "example_inputs", None))
    if carried is not None:
        given = call_object(carried, f"{text}.example_inputs") if callable(carried) else carried
        return _as_inputs(given, f"{text}.example_inputs")
    known = _zoo_inputs(found)
    if known is None:
        raise SpecError(text, "the shapes of its inputs are not known", _HINT)
    return known


def _as_inputs(given: object, where: str) -> tuple[Tensor, ...]:
    items = (given,) if isinstance(given, Tensor) else given
    if not isinstance(items, (tuple, list)) or not items:
        raise InputError(where, f"expected a tuple of tensors, got {type(given).__name__}")
    wrong = [type(item).__name__ for item in items if not isinstance(item, Tensor)]
    if wrong:
        raise InputError(where, f"expected tensors, got {wrong[0]}")
    return tuple(items)


def _zoo_inputs(found: object) -> tuple[Tensor, ...] | None:
    """Example inputs of a model of the zoo, by the name of its factory."""
    from shohin import zoo

    if getattr(found, "__module__", "") != zoo.resnet20.__module__:
        return None
    wanted = _letters(str(getattr(found, "__name__", "")))
    names = (name for name in zoo.names() if _letters(name) == wanted)
    return next((zoo.example_inputs(name) for name in names), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
