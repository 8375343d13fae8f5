"""Models compiled for an NVIDIA GPU: what kernels take, whether they are right, how fast."""

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tables import Table, save
from torch import Tensor, nn

import shohin
from shohin import zoo
from shohin.backends.tvm.cuda.compile import compile_kernels
from shohin.backends.tvm.cuda.device import why_not
from shohin.backends.tvm.cuda.target import CudaTarget
from shohin.bench import interleaved
from shohin.ir.program import Program

MODELS = ("lenet-5", "resnet-20", "squeezenet-1.1", "mobilenet-v2", "vgg-9")
FORMS: Mapping[str, str] = {
    "dense": "",
    "pruned": "prune{density=0.1}",
    "shared": "share-weights{bits=5}",
    "fixed point": "fixed-point",
    "low-rank": "low-rank{speedup=1.5 solver=weights}",
    "ternary": "ternary-fit",
    "ternary, fixed point": "ternary-fit, fixed-point{ternary=ratio}",
}
"""What follows on the folding of normalisations, without training: accuracy is not compared."""

_CALIBRATION = 16
_ROUNDS, _BUDGET = 25, 10.0


def describe_code(models: Sequence[str], arch: str) -> None:
    """What is compiled: sizes, launches, and the most that any kernel takes."""
    rows = [row for model in models for row in _code_rows(model, arch)]
    headings = (
        "model", "form", "launches", "kernels", "image KB", "weights KB", "arena KB",
        "most registers", "most shared KB", "spilled bytes",
    )  # fmt: skip
    table = Table(f"Models compiled for {arch}, batch 1", headings)
    for row in rows:
        table.add(
            row["model"],
            row["form"],
            *(str(row[key]) for key in ("launches", "kernels")),
            *(f"{row[key] / 1024:.0f}" for key in ("image", "weights", "arena")),
            str(row["registers"]),
            f"{row['shared'] / 1024:.1f}",
            str(row["spilled"]),
        )
    save(f"cuda_code_{arch}", rows, [table])


def _code_rows(name: str, arch: str) -> Iterator[dict[str, Any]]:
    for form, program, _ in _programs(name):
        with tempfile.TemporaryDirectory() as folder:
            made = compile_kernels(program, CudaTarget(arch), 1, Path(folder) / "constants.bin")
        used = made.code.resources.values()
        yield {
            "model": name,
            "form": form,
            "launches": len(made.plan.calls),
            "kernels": len(used),
            "image": len(made.code.image),
            "weights": made.plan.constants.size,
            "arena": made.plan.arena_bytes,
            "registers": max(one.registers for one in used),
            "shared": max(one.shared_bytes for one in used),
            "spilled": sum(one.spilled_bytes for one in used),
        }
        print(name, form, flush=True)


def measure_runs(models: Sequence[str], arch: str) -> None:
    """Differences from PyTorch, and milliseconds, at batch 1 and 32.

    Raises:
        SystemExit: where there is no GPU to measure on.
    """
    _check_gpu(arch)
    rows = [row for model in models for batch in (1, 32) for row in _run_rows(model, batch, arch)]
    rivals = [name for name in ("torch", "torch.compile", "TensorRT") if name in rows[0]["rivals"]]
    headings = ("model", "batch", "form", "difference", "shohin", *rivals, "fastest rival / shohin")
    table = Table(f"Milliseconds on {torch.cuda.get_device_name()}, copies included", headings)
    for row in rows:
        table.add(
            row["model"],
            str(row["batch"]),
            row["form"],
            "none" if row["difference"] == 0 else f"{row['difference']:.1e}",
            f"{row['milliseconds']:.3f}",
            *(f"{row['rivals'][rival]:.3f}" for rival in rivals),
            f"{min(row['rivals'].values()) / row['milliseconds']:.2f}",
        )
    save("cuda_run", rows, [table])


def _check_gpu(arch: str) -> None:
    if problem := why_not(arch):
        raise SystemExit(f"cuda: cannot run what is compiled for {arch} here: {problem}")
    if not torch.cuda.is_available():
        raise SystemExit("cuda: this PyTorch has no CUDA; install a build that does")


def _run_rows(name: str, batch: int, arch: str) -> Iterator[dict[str, Any]]:
    for form, program, model in _programs(name):
        binary = shohin.compile(program, f"cuda{{arch={arch}}}", batch=batch)
        x = zoo.example_inputs(name, max(2, batch))[0][:batch].contiguous()
        with torch.inference_mode():
            wanted, found = program.module(x), binary(x)
        functions: dict[str, Callable[[], object]] = {"shohin": lambda b=binary, x=x: b(x)}
        functions |= _rivals(model, x)
        times = interleaved(functions, _ROUNDS, _BUDGET)
        yield {
            "model": name,
            "batch": batch,
            "form": form,
            "difference": float((found - wanted).abs().max() / wanted.abs().max()),
            "milliseconds": times.pop("shohin"),
            "rivals": times,
            "steps": binary.profile([x.numpy()]),
        }
        print(name, batch, form, times, flush=True)


def _rivals(model: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """The dense network in float32 in other hands, from memory to memory as well."""
    on_gpu = copy.deepcopy(model).cuda().eval()

    def caller(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode():
                return function(x.cuda(non_blocking=True)).cpu()

        return call

    found = {
        "torch": caller(on_gpu),
        "torch.compile": caller(torch.compile(on_gpu, mode="max-autotune")),
    }
    try:
        import torch_tensorrt
    except ImportError:
        return found
    compiled = torch_tensorrt.compile(on_gpu, inputs=[x.cuda()], enabled_precisions={torch.float32})
    return {**found, "TensorRT": caller(compiled)}


def _programs(name: str) -> Iterator[tuple[str, Program, nn.Module]]:
    """The forms of a model with random weights, and the model."""
    torch.manual_seed(0)
    images = torch.randn(_CALIBRATION, *zoo.example_inputs(name, 1)[0].shape[1:])
    model = zoo.build(name).eval()
    program = shohin.capture(model, (images[:2],), name=name)
    program = shohin.optimize(program, "drop-identity, fold-bn", drift=False).program
    for form, passes in FORMS.items():
        made = program
        if passes:
            batches = [(images,)]
            made = shohin.optimize(program, passes, calibration=batches, drift=False).program
        yield form, made, model
