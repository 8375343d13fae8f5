"""Capture: from a PyTorch model to a `Program`."""

import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shohin.errors import CaptureError, ShohinWarning, VerifyError
from shohin.ir.export_errors import explain_failure, explain_specialisation
from shohin.ir.functional import make_functional
from shohin.ir.normalise import name_outputs, normalise, own_weights, specify_inputs
from shohin.ir.program import Fact, Program, single_bytes, tensor_of, weight_names
from shohin.ir.shapes import fake_values

Source: TypeAlias = nn.Module | ExportedProgram | str | PathLike[str]


def capture(
    model: Source,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    kwargs: Mapping[str, Tensor] | None = None,
    dynamic_batch: bool = True,
    name: str | None = None,
) -> Program:
    """Capture a model to a functional ATen graph in inference mode.

    The program owns its weights: the model is left as it was, training flags included, and what
    happens to the program later does not reach it. Parameters keep their names; of a tied
    parameter the first name. Each node carries the module it comes from as an `Origin`.

    A model that writes to its inputs is captured with the same outputs but leaves them as they
    are, with a warning.

    Args:
        model: a module, an exported program, or the path of a ``.pt2`` file.
        example_inputs: the tensors to call a module with; one tensor stands for a tuple of one.
            Needed for a module, ignored for an exported program.
        kwargs: example tensors for arguments that are given by name. They become inputs of these
            names, in the order of the module's ``forward``.
        dynamic_batch: keep the size of axis 0 symbolic in every input that has the same size
            there as the first. A model that fixes its batch size is captured with the size of the
            examples, with a warning that says why.
        name: what the program is called in reports; by default the class or file name.

    Returns:
        The program, captured and functional.

    Raises:
        CaptureError: when the inputs do not fit, the file cannot be read, or torch cannot export
            the model; it names the line of the model at fault.
    """
    if isinstance(model, (str, PathLike)):
        exported = _load(Path(model))
        title = Path(model).stem
    elif isinstance(model, ExportedProgram):
        exported, title = model, "model"
    else:
        inputs = _check_inputs(model, example_inputs, kwargs or {})
        exported, title = _export(model, inputs, dynamic_batch), type(model).__name__.lower()
    return _to_program(exported, name or title)


def _to_program(exported: ExportedProgram, name: str) -> Program:
    specified = specify_inputs(exported)
    module = normalise(exported)
    holders = module.graph.find_nodes(op="placeholder")
    inputs = tuple(
        replace(spec, name=holder.name) for spec, holder in zip(specified, holders, strict=True)
    )
    with _as_capture_error():
        make_functional(module, inputs)
        fake_values(module, inputs, batch=3)
    own_weights(module)
    for node in module.graph.nodes:
        node.meta = {key: node.meta[key] for key in _KEPT_METADATA & node.meta.keys()}
    facts = frozenset({Fact.FUNCTIONAL})
    program = Program(module, inputs, facts=facts, name=name, outputs=name_outputs(exported))
    _warn_of_non_finite(program)
    return replace(program, captured_bytes=_weight_bytes(program))


_KEPT_METADATA = {"shohin", "nn_module_stack", "stack_trace"}


@contextmanager
def _as_capture_error() -> Iterator[None]:
    try:
        yield
    except VerifyError as error:
        raise CaptureError(error.where, error.problem, error.hint) from error


def _weight_bytes(program: Program) -> int:
    """Bytes of all weights in single precision, tied ones once."""
    weights = [tensor_of(program.module, name) for name in weight_names(program)]
    own = {id(weight): weight for weight in weights}.values()
    return sum(single_bytes(weight.dtype, weight.numel()) for weight in own)


def _warn_of_non_finite(program: Program) -> None:
    weights = {name: tensor_of(program.module, name) for name in weight_names(program)}
    bad = [
        name
        for name, weight in weights.items()
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all())
    ]
    if bad:
        shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        text = f"{program.name}: weights that are NaN or infinite are kept as they are: {shown}"
        warnings.warn(text, ShohinWarning, stacklevel=4)


def _load(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise CaptureError(str(path), "there is no such file", "give the path of a .pt2 file")
    try:
        with _quiet():
            return torch.export.load(path)
    except Exception as error:  # torch raises anything on a foreign archive
        raise CaptureError(
            str(path),
            "expected a .pt2 file written by torch.export.save, got something truncated or foreign",
            "write it again with this version of torch",
        ) from error


@dataclass(frozen=True)
class _Examples:
    """What to call a model with.

    Attributes:
        positional: tensors given by position.
        named: tensors given by name.
    """

    positional: tuple[Tensor, ...]
    named: dict[str, Tensor]

    def all(self) -> tuple[Tensor, ...]:
        """Every tensor, those given by position first."""
        return (*self.positional, *self.named.values())


def _check_inputs(
    model: object, inputs: Tensor | Sequence[Tensor] | None, named: Mapping[str, Tensor]
) -> _Examples:
    if not isinstance(model, nn.Module):
        raise CaptureError(
            "model",
            f"expected an nn.Module, an ExportedProgram or a path, got {type(model).__name__}",
        )
    where = type(model).__name__
    if inputs is None and not named:
        raise CaptureError(
            where, "example inputs are missing", "call capture(model, (tensor, ...))"
        )
    given = () if inputs is None else inputs
    tensors = (given,) if isinstance(given, Tensor) else given
    if not isinstance(tensors, (tuple, list)) or not (tensors or named):
        raise CaptureError(
            where,
            f"expected a tensor or a tuple of at least one tensor, got {_describe(inputs)}",
        )
    for label, tensor in [*enumerate(tensors), *((f"'{key}'", named[key]) for key in named)]:
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                where,
                f"example input {label}: expected a tensor, got {type(tensor).__name__}",
                "wrap the model in a module whose forward takes tensors only",
            )
    examples = _Examples(tuple(tensors), _in_order(model, named))
    _check_count(model, examples)
    return examples


def _in_order(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors given by name, in the order of the model's arguments."""
    order = list(inspect.signature(model.forward).parameters)
    known = {name: named[name] for name in order if name in named}
    return known | dict(named)


def _describe(inputs: object) -> str:
    if isinstance(inputs, (tuple, list)):
        return f"an empty {type(inputs).__name__}"
    return type(inputs).__name__


def _check_count(model: nn.Module, inputs: _Examples) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs.positional, **inputs.named)
    except TypeError as error:
        raise CaptureError(
            type(model).__name__,
            f"{len(inputs.all())} example inputs do not fit forward{signature}: {error}",
            "give one tensor for each argument",
        ) from error


def _export(model: nn.Module, inputs: _Examples, dynamic: bool) -> ExportedProgram:
    first = inputs.all()[0]
    with _inference(model):
        if dynamic and first.dim():
            try:
                return _export_dynamic(model, inputs)
            except Exception as error:  # export raises anything the model raises
                exported = _export_static(model, inputs)
                warnings.warn(
                    f"{type(model).__name__}: captured with a fixed batch size of "
                    f"{first.shape[0]}: {explain_specialisation(error)}",
                    ShohinWarning,
                    stacklevel=3,
                )
                return exported
        return _export_static(model, inputs)


def _shares_batch(tensor: Tensor, first: Tensor) -> bool:
    return tensor.dim() > 0 and first.dim() > 0 and tensor.shape[0] == first.shape[0]


def _export_dynamic(model: nn.Module, inputs: _Examples) -> ExportedProgram:
    """Export with a symbolic batch; torch would take an example batch of 1 for a constant."""
    batch, first = Dim("batch", min=1), inputs.all()[0]

    def shape_of(tensor: Tensor) -> dict[int, Dim] | None:
        return {0: batch} if _shares_batch(tensor, first) else None

    def example_of(tensor: Tensor) -> Tensor:
        is_one = _shares_batch(tensor, first) and tensor.shape[0] == 1
        return tensor.repeat_interleave(2, dim=0) if is_one else tensor

    shapes = inspect.signature(model.forward).bind(
        *(shape_of(tensor) for tensor in inputs.positional),
        **{name: shape_of(tensor) for name, tensor in inputs.named.items()},
    )
    return torch.export.export(
        model,
        tuple(example_of(tensor) for tensor in inputs.positional),
        {name: example_of(tensor) for name, tensor in inputs.named.items()},
        dynamic_shapes=dict(shapes.arguments),
        strict=False,
    )


def _export_static(model: nn.Module, inputs: _Examples) -> ExportedProgram:
    try:
        return torch.export.export(model, inputs.positional, inputs.named, strict=False)
    except Exception as error:  # export raises anything the model raises
        raise explain_failure(model, error) from error


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Put a model in inference mode, and every module's flag back afterwards.

    Attention modules would take a fused path that no other backend knows, so it is switched off.
    """
    flags = {module: module.training for module in model.modules()}
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad(), _quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, flag in flags.items():
            module.training = flag


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what torch logs and prints about an error that is caught here.

    With TORCH_LOGS set everything is shown, for those who look for the cause.
    """
    if "TORCH_LOGS" in os.environ:
        yield
        return
    level, heard = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(heard):
            yield
    finally:
        logging.disable(level)
    sys.stderr.write(heard.getvalue())
