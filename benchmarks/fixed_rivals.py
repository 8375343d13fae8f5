"""Integers in other runtimes, at their best settings: ONNX Runtime, and OpenVINO through NNCF."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from shohin.rivals import export_onnx

Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def onnxruntime_int8(module: nn.Module, calibration: Tensor, threads: int) -> Run:
    """Static quantization with a scale for every channel, as ONNX Runtime recommends for CPUs.

    Without instructions for sums of products of bytes, its kernels saturate unless weights have 7
    bits (``reduce_range``).

    Args:
        module: the model, in inference mode.
        calibration: images.
        threads: threads to use.
    """
    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.feeds: Iterator[dict[str, Any]] = iter(
                [{name: image[None].numpy()} for image in calibration]
            )

        def get_next(self) -> dict[str, Any] | None:
            return next(self.feeds, None)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (Path(folder) / f"{name}.onnx" for name in ("a", "b", "c"))
        export_onnx(module, (calibration[:1],), plain)
        quantization.shape_inference.quant_pre_process(str(plain), str(prepared))
        name = onnxruntime.InferenceSession(prepared).get_inputs()[0].name
        quantization.quantize_static(
            str(prepared),
            str(made),
            Reader(name),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=not _multiplies_bytes(),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        session = onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])
        size = made.stat().st_size

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        found: NDArray[np.float32] = session.run(None, {name: image})[0]
        return found

    run.bytes = size  # type: ignore[attr-defined]
    return run


def openvino_int8(module: nn.Module, calibration: Tensor, threads: int) -> Run:
    """NNCF's post-training quantization, compiled for latency.

    Args:
        module: the model, in inference mode.
        calibration: images.
        threads: threads to use.
    """
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, (calibration[:1],), path)
        model = core.read_model(path)
        data = nncf.Dataset([image[None].numpy() for image in calibration])
        made = nncf.quantize(model, data, subset_size=len(calibration))
        openvino.save_model(made, Path(folder) / "made.xml", compress_to_fp16=False)
        size = (Path(folder) / "made.bin").stat().st_size
        compiled = core.compile_model(made, "CPU", settings)
    request = compiled.create_infer_request()

    def run(image: NDArray[np.float32]) -> NDArray[np.float32]:
        found = request.infer([image], share_inputs=True, share_outputs=True)
        return next(iter(found.values()))

    run.bytes = size  # type: ignore[attr-defined]
    return run


RIVALS = {"onnxruntime int8": onnxruntime_int8, "openvino int8": openvino_int8}


def accuracy(run: Run, images: Tensor, labels: Tensor) -> float:
    """Share of right predictions, %, an image at a time."""
    found = [int(np.argmax(run(image[None].numpy()))) for image in images]
    return 100 * float((torch.tensor(found) == labels).float().mean())


def outputs(run: Run, images: Sequence[Tensor]) -> NDArray[np.float32]:
    """What a runtime says of each image."""
    return np.concatenate([np.array(run(image[None].numpy())) for image in images])


def _multiplies_bytes() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_vnni" in flags or "avx_vnni" in flags
