"""A compiled model in this process: loaded by ctypes, fed with numpy or torch."""

import ctypes
import math
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shohin.backends.base import Artifact, ArtifactInfo
from shohin.backends.inputs import Array, check_inputs, numpy_dtype
from shohin.backends.tvm.forms import form_of, libc_of
from shohin.backends.tvm.header import write_header
from shohin.backends.tvm.link import Parts, link
from shohin.backends.tvm.manifest import info_of, manifest_of
from shohin.backends.tvm.target import host_example, host_runs
from shohin.backends.tvm.trailer import append_trailer, read_trailer
from shohin.errors import ArtifactError
from shohin.ir.files import atomic_path
from shohin.ir.program import InputSpec

_ALIGNMENT = 64


@dataclass(frozen=True)
class Build:
    """What a binary was linked from; the files live as long as the binary.

    Attributes:
        folder: holds the files.
        parts: the files.
        arena_bytes: working memory of each instance.
        constant_bytes: size of the packed weights.
    """

    folder: "tempfile.TemporaryDirectory[str]"
    parts: Parts
    arena_bytes: int
    constant_bytes: int


class Binary(Artifact):
    """A compiled model. Callable from any thread; every thread has memory of its own.

    One that was compiled for a processor that this machine is not can be saved, but not run.

    Attributes:
        info: what it is, what goes in and what comes out.
        threads: threads that a run uses.
        path: the shared library.
    """

    def __init__(
        self,
        info: ArtifactInfo,
        library: Path,
        prefix: str,
        build: Build | None = None,
        threads: int | None = None,
    ) -> None:
        self.info = info
        self.threads = threads or _threads_of(info.target)
        self.path = library
        self._prefix = prefix
        self._build = build
        self._local = threading.local()

    @classmethod
    def load(cls, path: str | Path, threads: int | None = None) -> "Binary":
        """Load a shared library that shohin made.

        Args:
            path: the shared library.
            threads: threads that a run uses; by default those of its target.

        Raises:
            ArtifactError: when the file is missing, foreign, truncated, corrupted, of a newer
                version, or for another processor. Nothing of it has run by then.
        """
        file = Path(path)
        info, prefix = info_of(read_trailer(file), str(file))
        _check_processor(info, str(file))
        binary = cls(info, file, prefix, threads=threads)
        binary._library.info()
        return binary

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run once on numpy arrays.

        Raises:
            InputError: naming the input, what was expected and what was given.
            ArtifactError: when the binary is for a processor that this machine is not.
        """
        arrays = check_inputs(self.info.name, self.info.inputs, self.info.batch, inputs)
        outputs = [_empty(spec) for spec in self.info.outputs]
        self._instance().run(arrays, outputs)
        return outputs

    def profile(self, inputs: Sequence[Array], runs: int = 10) -> list[tuple[str, float]]:
        """Median milliseconds of each step.

        Args:
            inputs: as for `run`.
            runs: how often to run.

        Returns:
            Label and milliseconds of each step, in order.
        """
        arrays = check_inputs(self.info.name, self.info.inputs, self.info.batch, inputs)
        outputs = [_empty(spec) for spec in self.info.outputs]
        instance = self._instance()
        times = np.stack([instance.profile(arrays, outputs) for _ in range(runs)])
        medians: list[float] = np.median(times, axis=0).tolist()
        labels = self._library.step_labels()
        return [(label, time) for label, time in zip(labels, medians, strict=True)]

    @property
    def arena_bytes(self) -> int:
        """Working memory of each instance."""
        return int((self._build or self._library.info()).arena_bytes)

    @property
    def constant_bytes(self) -> int:
        """Size of the packed weights."""
        return int((self._build or self._library.info()).constant_bytes)

    def save(self, path: str | Path, *, form: str | None = None, libc: str | None = None) -> Path:
        """Write the binary; the ending of the name chooses the form unless `form` does.

        ``.so`` is a shared library and ``.a`` a static one, ``.o`` an object; each comes with a
        header beside it. A name without ending is a standalone executable, ``.h`` the header alone.

        Args:
            path: file to write.
            form: ``so``, ``static``, ``object``, ``exe`` or ``c-header``.
            libc: ``glibc``, or ``musl`` for systems like Alpine and OpenWrt. Executables hold musl
                unless they are asked to load glibc.

        Raises:
            SpecError: when there is no such form or C library.
            ArtifactError: when the file cannot be written, or when the binary was loaded from a
                shared library and another form is asked for.
        """
        file = Path(path)
        chosen = form_of(file, form)
        gpu = self._build is not None and self._build.parts.gpu
        library = libc_of(chosen, libc, gpu=gpu)
        if chosen == "c-header":
            write_header(file, self.info, self._prefix)
            return file
        if self._build is None and (chosen != "so" or libc is not None):
            raise ArtifactError(
                str(file),
                "a loaded shared library cannot be linked anew",
                "compile the program again",
            )
        with atomic_path(file) as temporary:
            if self._build is None or (chosen == "so" and library == "glibc"):
                shutil.copyfile(self.path, temporary)
            else:
                link(self._build.parts, chosen, temporary, library)
                if chosen in ("exe", "so"):
                    append_trailer(temporary, manifest_of(self.info, self._prefix))
            temporary.chmod(0o755 if chosen in ("exe", "so") else 0o644)
        if chosen != "exe":
            write_header(file.with_suffix(".h"), self.info, self._prefix)
        return file

    @cached_property
    def _library(self) -> "_Library":
        """The shared library, opened when it is first needed: it may be for another machine."""
        _check_processor(self.info, self.info.name)
        return _Library(self.path, self._prefix)

    def _instance(self) -> "_Instance":
        if not hasattr(self._local, "instance"):
            self._local.instance = _Instance(self._library, self.threads)
        instance: _Instance = self._local.instance
        return instance


def _check_processor(info: ArtifactInfo, where: str) -> None:
    """Refuse code that this machine cannot run."""
    processor = info.tools.get("processor", "")
    missing = host_runs(processor)
    if missing:
        raise ArtifactError(
            where,
            f"was compiled for {processor}, {missing}",
            "run it on the machine it is for, or compile it for this one, e.g. with "
            + host_example(),
        )


def _threads_of(target: str) -> int:
    _, found, rest = target.partition("threads=")
    return int(rest.strip("}").split()[0]) if found else 1


def _empty(spec: InputSpec) -> Array:
    """An uninitialised array on a boundary that kernels can write to directly."""
    dtype = numpy_dtype(spec)
    shape = spec.concrete(1)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, dtype=np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    result: Array = raw[start : start + size].view(dtype).reshape(shape)
    return result


class _Info(ctypes.Structure):
    """``shohin_info``."""

    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("name", ctypes.c_char_p),
        ("version", ctypes.c_char_p),
        ("target", ctypes.c_char_p),
        ("content_hash", ctypes.c_char_p),
        ("metadata", ctypes.c_char_p),
        ("input_count", ctypes.c_int32),
        ("output_count", ctypes.c_int32),
        ("inputs", ctypes.c_void_p),
        ("outputs", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_size_t),
        ("constant_bytes", ctypes.c_size_t),
        ("step_count", ctypes.c_int32),
        ("batch", ctypes.c_int32),
    )


class _Library:
    """The functions of a loaded shared library."""

    def __init__(self, path: Path, prefix: str) -> None:
        try:
            library = ctypes.CDLL(str(path.resolve()))
            functions = {
                name: getattr(library, f"{prefix}_{name}")
                for name in ("info", "create", "run", "profile", "destroy", "last_error")
            }
            label = getattr(library, f"{prefix}_step_label")
        except (OSError, AttributeError) as error:
            raise ArtifactError(str(path), f"cannot be loaded: {error}") from error
        functions["info"].restype = ctypes.POINTER(_Info)
        functions["last_error"].restype = ctypes.c_char_p
        functions["destroy"].argtypes = [ctypes.c_void_p]
        functions["destroy"].restype = None
        label.restype = ctypes.c_char_p
        self.functions = functions
        self._label = label

    def info(self) -> Any:
        """The ``shohin_info`` structure."""
        return self.functions["info"]().contents

    def step_labels(self) -> list[str]:
        """Labels of the steps in order."""
        return [self._label(i).decode() for i in range(self.info().step_count)]

    def check(self, status: int) -> None:
        """Raise unless a call went well."""
        if status:
            raise ArtifactError("binary", self.functions["last_error"]().decode())


class _Instance:
    """Memory and threads for one run at a time; freed with the object."""

    def __init__(self, library: _Library, threads: int) -> None:
        self._library = library
        self._handle = ctypes.c_void_p()
        library.check(library.functions["create"](threads, ctypes.byref(self._handle)))
        weakref.finalize(self, library.functions["destroy"], self._handle)

    def run(self, inputs: list[Array], outputs: list[Array]) -> None:
        """Run once."""
        run = self._library.functions["run"]
        self._library.check(run(self._handle, _pointers(inputs), _pointers(outputs)))

    def profile(self, inputs: list[Array], outputs: list[Array]) -> "NDArray[np.float64]":
        """Run once and give each step's milliseconds."""
        times = np.zeros(max(1, self._library.info().step_count))
        status = self._library.functions["profile"](
            self._handle,
            _pointers(inputs),
            _pointers(outputs),
            times.ctypes.data_as(ctypes.c_void_p),
        )
        self._library.check(status)
        return times[: self._library.info().step_count]


def _pointers(arrays: list[Array]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*(array.ctypes.data for array in arrays))
