"""Other runtimes, at their best settings, to measure shohin against."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shohin.errors import SpecError, UnsupportedError, near_name_hint


@dataclass(frozen=True)
class Rival:
    """A runtime that holds a model, ready to run.

    Attributes:
        name: its name.
        run: runs the model once on the inputs it was made for; gives what the runtime gives.
        read: turns what `run` gave into tensors.
    """

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]]

    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs of one run."""
        return tuple(tensor.clone() for tensor in self.read(self.run()))


Maker = Callable[[nn.Module, tuple[Tensor, ...], int], Rival]


def rival_names() -> tuple[str, ...]:
    """Every rival that `make_rival` knows."""
    return tuple(_RIVALS)


def check_rivals(names: Sequence[str]) -> None:
    """Check that rivals are known and installed.

    Raises:
        SpecError: naming the one that is not, and the extra that brings it.
    """
    for name in names:
        if name not in _RIVALS:
            hint = near_name_hint(name, rival_names())
            raise SpecError("rivals", f"unknown rival '{name}'", hint)
        missing = [package for package in _RIVALS[name][1] if find_spec(package) is None]
        if missing:
            problem = f"needs {' and '.join(missing)}, which is not installed"
            raise SpecError(f"rival '{name}'", problem, "pip install 'shohin[bench]'")


def make_rival(name: str, module: nn.Module, inputs: tuple[Tensor, ...], threads: int = 1) -> Rival:
    """Prepare a rival for a model.

    Args:
        name: a name of `rival_names`.
        module: the model, in inference mode.
        inputs: what to run it on.
        threads: threads to use. PyTorch knows only one number of threads for the whole process,
            so this sets it.

    Raises:
        SpecError: when the rival is unknown or not installed.
        UnsupportedError: when it cannot take the model.
    """
    check_rivals([name])
    try:
        with _quiet():
            rival = _RIVALS[name][0](module, inputs, threads)
            rival.run()
    except Exception as error:  # each runtime has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedError(f"rival '{name}'", f"cannot run this model: {lines[0]}") from error
    return rival


def export_onnx(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write a model as ONNX, for inputs of exactly these shapes."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
        if program is not None:
            program.save(path)


def _make_torch(module: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Rival:
    torch.set_num_threads(threads)

    def run() -> Any:
        with torch.inference_mode():
            return module(*inputs)

    return Rival("torch", run, _read_torch)


def _make_compile(module: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Rival:
    torch.set_num_threads(threads)
    compiled = torch.compile(module)

    def run() -> Any:
        with torch.inference_mode():
            return compiled(*inputs)

    return Rival("compile", run, _read_torch)


def _make_onnxruntime(module: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Rival:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory(prefix="shohin-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, inputs, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    feed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    return Rival("onnxruntime", lambda: session.run(None, feed), _read_arrays)


def _make_openvino(module: nn.Module, inputs: tuple[Tensor, ...], threads: int) -> Rival:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    with tempfile.TemporaryDirectory(prefix="shohin-") as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, inputs, path)
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()
    arrays = [tensor.numpy() for tensor in inputs]

    def run() -> Any:
        return request.infer(arrays, share_inputs=True, share_outputs=True)

    return Rival("openvino", run, lambda found: _read_arrays(list(found.values())))


def _read_torch(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _read_arrays(found: Any) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(array) for array in found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what exporters log and warn about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_ONNX = ("onnx", "onnxscript")
_RIVALS: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "torch": (_make_torch, ()),
    "compile": (_make_compile, ()),
    "onnxruntime": (_make_onnxruntime, (*_ONNX, "onnxruntime")),
    "openvino": (_make_openvino, (*_ONNX, "openvino")),
}
