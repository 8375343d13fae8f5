"""Kernels of a GPU that are run, on the processor, on arrays in memory."""

import ctypes

import numpy as np
from emulated_gpu import build_driver

from shohin.backends.tvm.cuda.device_code import write_source


class EmulatedKernels:
    """Kernels by name, compiled together.

    Args:
        kernels: by name.
        arch: of the GPU.
        folder: where files are written.
    """

    def __init__(self, kernels, arch, folder):
        functions = {name: kernel.build() for name, kernel in kernels.items()}
        source, self.functions = write_source(functions, arch)
        self.kernels = kernels
        build_driver(source, folder)
        self.driver = ctypes.CDLL(str(folder / "libcuda.so.1"))
        self.stream = ctypes.c_void_p()
        self.driver.cuStreamCreate(ctypes.byref(self.stream), 0)

    def run(self, name, inputs):
        """The output of a kernel, its bytes all 255 where nothing was written.

        Args:
            name: which.
            inputs: an array for every parameter but the last.
        """
        kernel, function = self.kernels[name], self.functions[name]
        parameters = kernel.parameters()
        arrays = {}
        for parameter, array in zip(parameters, inputs, strict=False):
            assert array.dtype == parameter.dtype, (parameter, array.dtype)
            assert array.size == np.prod(parameter.shape), (parameter, array.shape)
            arrays[parameter.name] = np.ascontiguousarray(array)
        last = parameters[-1]
        if len(inputs) < len(parameters):
            raw = np.full(last.bytes, 255, np.uint8)
            arrays[last.name] = raw.view(last.dtype).reshape(last.shape)
        pointers = [ctypes.c_void_p(arrays[one].ctypes.data) for one in function.parameters]
        values = (ctypes.c_void_p * len(pointers))(
            *(ctypes.addressof(pointer) for pointer in pointers)
        )
        handle = ctypes.c_void_p()
        named = function.name.encode()
        assert self.driver.cuModuleGetFunction(ctypes.byref(handle), None, named) == 0
        sizes = [ctypes.c_uint(size) for size in (*kernel.grid, 1, kernel.threads, 1, 1, 0)]
        assert self.driver.cuLaunchKernel(handle, *sizes, self.stream, values, None) == 0
        return arrays[last.name]
