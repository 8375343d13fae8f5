"""Kernels for GPUs: their numbers by an emulator, and what they take of every generation."""

import numpy as np
import pytest
from emulated_kernels import EmulatedKernels
from kernel_cases import all_cases

from shohin.backends.tvm.cuda import nvrtc
from shohin.backends.tvm.cuda.device_code import write_source
from shohin.backends.tvm.cuda.nvrtc import compile_source
from shohin.backends.tvm.cuda.target import ARCHITECTURES, CudaTarget
from shohin.errors import ArtifactError

CASES = all_cases()


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    kernels = {name: case.kernel for name, case in CASES.items()}
    return EmulatedKernels(kernels, "sm_80", tmp_path_factory.mktemp("kernels"))


@pytest.mark.parametrize("name", CASES)
def test_numbers(name, emulated):
    case = CASES[name]
    found = emulated.run(name, case.inputs).reshape(case.wanted.shape)
    if case.tolerance == 0:
        assert np.array_equal(found, case.wanted)
        return
    known = np.isfinite(case.wanted)
    assert np.array_equal(np.isnan(found), np.isnan(case.wanted))
    assert np.array_equal(found[~known], case.wanted[~known], equal_nan=True)
    scale = np.abs(case.wanted[known]).max()
    assert np.abs(found - case.wanted)[known].max() <= case.tolerance * max(1.0, scale)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_registers_are_spilled(arch):
    """What ptxas says; a few kernels of each form, of the largest tiles."""
    tensor_cores = CudaTarget(arch).has_tensor_cores
    forms = ["conv_fma_128x128", "conv_dp4a_128x128", "conv_fma_ternary", "vector_float_4x1030"]
    forms += ["vector_ternary_bytes_4x1030", "sparse_conv_large", "softmax_False"]
    forms += ["conv_mma_float_128x128", "conv_mma_bytes_128x128"] if tensor_cores else []
    kernels = {name: CASES[name].kernel for name in forms}
    source, _ = write_source({name: one.build() for name, one in kernels.items()}, arch)
    code = compile_source(source, arch)
    assert len(code.resources) == len(forms)
    for name, one in kernels.items():
        used = code.resources[f"{name}_kernel"]
        assert used.spilled_bytes == used.stack_bytes == 0, name
        assert used.registers * one.threads <= 65536, name
        assert used.shared_bytes <= 48 << 10, name
    assert code.image[:4] == bytes.fromhex("50ed55ba")


def test_the_same_kernels_are_the_same_bytes():
    sources = [
        write_source(
            {name: CASES[name].kernel.build() for name in ("softmax_True", "window")}, arch
        )
        for arch in ("sm_80", "sm_80", "sm_90")
    ]
    images = [
        compile_source(source, arch).image
        for (source, _), arch in zip(sources, ("sm_80", "sm_80", "sm_90"), strict=True)
    ]
    assert images[0] == images[1] != images[2]


def test_what_the_compiler_refuses_is_told():
    with pytest.raises(ArtifactError, match=r"CUDA compiler: refused the kernels: model.cu\(1\)"):
        compile_source("no kernel", "sm_80")


@pytest.mark.parametrize(
    ("library", "package"), [("libnvrtc", "nvidia-cuda-nvrtc"), ("libnvfatbin", "nvidia-nvfatbin")]
)
def test_a_compiler_that_is_not_installed_is_named(library, package, monkeypatch):
    def missing(path):
        raise OSError(path)

    monkeypatch.setattr("ctypes.CDLL", missing)
    nvrtc._library.cache_clear()
    with pytest.raises(ArtifactError) as caught:
        nvrtc._library(library)
    assert str(caught.value) == (
        f"library {library}: is not installed; compiling for GPUs needs {package}"
        "; pip install 'shohin[cuda]'"
    )
