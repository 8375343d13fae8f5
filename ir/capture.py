"""Capture: from a PyTorch model to a `Program`."""

import inspect
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from shohin.errors import CaptureError, ShohinWarning, VerifyError
from shohin.ir.export_errors import explain_failure, explain_specialisation
from shohin.ir.functional import make_functional
from shohin.ir.normalise import normalise, own_weights, specify_inputs
from shohin.ir.program import Fact, Program, tensor_of, weight_names
from shohin.ir.shapes import fake_values

Source: TypeAlias = nn.Module | ExportedProgram | str | PathLike[str]


def capture(
    model: Source,
    example_inputs: Tensor | Sequence[Tensor] | None = None,
    *,
    dynamic_batch: bool = True,
    name: str | None = None,
) -> Program:
    """Capture a model to a functional ATen graph in inference mode.

    The program owns its weights: the model is left as it was, training flags included, and what
    happens to the program later does not reach it. Parameters keep their names; of a tied
    parameter the first name. Each node carries the module it comes from as an `Origin`.

    A model that writes to its inputs is captured with the same outputs but leaves them as they
    are.

    Args:
        model: a module, an exported program, or the path of a ``.pt2`` file.
        example_inputs: the tensors to call a module with; one tensor stands for a tuple of one.
            Needed for a module, ignored for an exported program.
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
        inputs = _check_inputs(model, example_inputs)
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
    program = Program(module, inputs, facts=frozenset({Fact.FUNCTIONAL}), name=name)
    _warn_of_non_finite(program)
    return program


_KEPT_METADATA = {"shohin", "nn_module_stack", "stack_trace"}


@contextmanager
def _as_capture_error() -> Iterator[None]:
    try:
        yield
    except VerifyError as error:
        raise CaptureError(error.where, error.problem, error.hint) from error


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


def _check_inputs(model: object, inputs: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, ...]:
    if not isinstance(model, nn.Module):
        raise CaptureError(
            "model",
            f"expected an nn.Module, an ExportedProgram or a path, got {type(model).__name__}",
        )
    where = type(model).__name__
    if inputs is None:
        raise CaptureError(
            where, "example inputs are missing", "call capture(model, (tensor, ...))"
        )
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    if not isinstance(tensors, (tuple, list)) or not tensors:
        raise CaptureError(
            where,
            f"expected a tensor or a tuple of at least one tensor, got {_describe(inputs)}",
        )
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                where,
                f"example input {index}: expected a tensor, got {type(tensor).__name__}",
                "wrap the model in a module whose forward takes tensors only",
            )
    _check_count(model, tuple(tensors))
    return tuple(tensors)


def _describe(inputs: object) -> str:
    if isinstance(inputs, (tuple, list)):
        return f"an empty {type(inputs).__name__}"
    return type(inputs).__name__


def _check_count(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*inputs)
    except TypeError as error:
        raise CaptureError(
            type(model).__name__,
            f"{len(inputs)} example inputs do not fit forward{signature}: {error}",
            "give one tensor for each argument",
        ) from error


def _export(model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool) -> ExportedProgram:
    sharing = [_shares_batch(tensor, inputs[0]) for tensor in inputs]
    with _inference(model):
        if dynamic and any(sharing):
            try:
                return _export_dynamic(model, inputs, sharing)
            except Exception as error:  # export raises anything the model raises
                exported = _export_static(model, inputs)
                warnings.warn(
                    f"{type(model).__name__}: captured with a fixed batch size of "
                    f"{inputs[0].shape[0]}: {explain_specialisation(error)}",
                    ShohinWarning,
                    stacklevel=3,
                )
                return exported
        return _export_static(model, inputs)


def _shares_batch(tensor: Tensor, first: Tensor) -> bool:
    return tensor.dim() > 0 and first.dim() > 0 and tensor.shape[0] == first.shape[0]


def _export_dynamic(
    model: nn.Module, inputs: tuple[Tensor, ...], sharing: list[bool]
) -> ExportedProgram:
    """Export with a symbolic batch; torch would take an example batch of 1 for a constant."""
    batch = Dim("batch", min=1)
    examples, shapes = list(inputs), []
    for index, shared in enumerate(sharing):
        if shared and inputs[index].shape[0] == 1:
            examples[index] = inputs[index].repeat_interleave(2, dim=0)
        shapes.append({0: batch} if shared else None)
    signature = inspect.signature(model.forward)
    return torch.export.export(
        model, tuple(examples), dynamic_shapes=_match_signature(signature, shapes), strict=False
    )


def _match_signature(
    signature: inspect.Signature, shapes: list[dict[int, Dim] | None]
) -> tuple[object, ...]:
    """Shapes in the structure of the arguments: those that ``*args`` takes are a tuple."""
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:position], tuple(shapes[position:]))
    return tuple(shapes)


def _export_static(model: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    try:
        return torch.export.export(model, inputs, strict=False)
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
