"""Models on an NVIDIA GPU: what is compiled for one, whether it is right there, and how fast.

    python benchmarks/cuda.py code                          # no GPU needed
    python benchmarks/cuda.py run                           # numbers and milliseconds, on a GPU
    python benchmarks/cuda.py run --models resnet-20 --arch sm_90

`code` compiles every model in every form and writes what kernels take of the GPU. `run` compares
every output with PyTorch's on the processor, and measures a run from arrays in memory to arrays in
memory against PyTorch on the GPU, `torch.compile` and TensorRT, as far as they are installed.
Results go to ``benchmarks/results/cuda_*``. Needs the extra ``cuda``.
"""

import argparse

if __name__ != "__main__":
    # PyTorch asks for NVIDIA's package of that name, and finds this file beside the program.
    raise ImportError("this is a benchmark, not a package")


def main() -> None:
    """Run one part of the benchmark."""
    from cuda_models import MODELS, describe_code, measure_runs

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("code", "run"))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--arch", default="sm_80")
    options = parser.parse_args()
    part = describe_code if options.part == "code" else measure_runs
    part(options.models.split(","), options.arch)


main()
