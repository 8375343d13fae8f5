"""Linking with the C compiler and linker of the ``ziglang`` package: no system toolchain."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import platformdirs

from shohin.backends.tvm.forms import Form, Libc
from shohin.backends.tvm.processor import Machine, host_machine
from shohin.errors import ArtifactError

PUBLIC_FUNCTIONS = (
    "info",
    "create",
    "run",
    "run_sized",
    "profile",
    "step_label",
    "destroy",
    "status_text",
    "last_error",
)
"""What ``SHOHIN_DECLARE_MODEL`` declares, without the model's name."""

RUNTIME = Path(__file__).parent / "runtime"

_SYSTEMS: Mapping[Libc, Mapping[Machine, str]] = MappingProxyType(
    {
        "glibc": {
            "x86_64": "x86_64-linux-gnu.2.17",
            "aarch64": "aarch64-linux-gnu.2.17",
            "arm": "arm-linux-gnueabihf.2.17",
            "riscv64": "riscv64-linux-gnu.2.27",
        },
        "musl": {
            "x86_64": "x86_64-linux-musl",
            "aarch64": "aarch64-linux-musl",
            "arm": "arm-linux-musleabihf",
            "riscv64": "riscv64-linux-musl",
        },
    }
)
"""What is linked for, as the toolchain calls it."""

_FLAGS = ("-std=c11", "-g0", "-fvisibility=hidden", "-fPIC", "-pthread", f"-I{RUNTIME}")
# Tables for unwinding the stack would be a tenth of a small program; C has no exceptions.
_LEAN = ("-ffunction-sections", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables")
_FAST, _SMALL = "-O2", "-Os"
_DROP_UNUSED = "-Wl,--gc-sections"


@dataclass(frozen=True)
class Parts:
    """What a binary is linked from, all in one folder.

    Attributes:
        folder: where the files are, and where the linker runs, so that no path of this machine
            gets into the result.
        name: prefix of the model's symbols.
        machine: family of the processor to link for.
        coded: whether the weights are coded, and so a decoder is needed.
        gpu: whether kernels run on a GPU, in whose code there is no object file.
    """

    folder: Path
    name: str
    machine: Machine
    coded: bool = False
    gpu: bool = False

    @property
    def runtime(self) -> tuple[str, ...]:
        """Parts of the runtime that the model needs."""
        always = ("texts", "checks", *(("cuda",) if self.gpu else ("runtime", "processor")))
        return (*always, "decode") if self.coded else always

    @property
    def kernels(self) -> Path:
        """Object file of the kernels."""
        return self.folder / "kernels.o"

    @property
    def source(self) -> Path:
        """Generated C."""
        return self.folder / "model.c"


def link(parts: Parts, form: Form, output: Path, libc: Libc) -> None:
    """Link a binary.

    Args:
        parts: the files.
        form: what to make; not the header, which needs no linker.
        output: file to write; it is replaced only when everything went well.
        libc: the C library to use. Programs hold musl, and load glibc.
    """
    linkers: dict[Form, Callable[[Parts, Path, Libc], None]] = {
        "so": _link_shared,
        "static": _link_static,
        "object": _link_object,
        "exe": _link_executable,
    }
    linkers[form](parts, output.resolve(), libc)


def link_kernels(folder: Path, output: Path) -> None:
    """Link ``kernels.o`` of a folder alone to a shared library, for measuring on this machine."""
    (machine,) = (each for each in _SYSTEMS["glibc"] if each == host_machine())
    parts = Parts(folder, "kernels", machine)
    _cc(parts, "glibc", ["kernels.o", "-shared", "-lm", "-o", str(output)])


def _objects(parts: Parts, libc: Libc) -> list[str]:
    """Compile the C files, unless an earlier link did."""
    sources = {"model": "model.c", **{part: _runtime_source(part) for part in parts.runtime}}
    objects = {f"{name}-{libc}.o": source for name, source in sources.items()}
    for name, source in objects.items():
        if not (parts.folder / name).exists():
            _compile(parts, libc, source, name, _FAST)
    return [*objects] if parts.gpu else [*objects, parts.kernels.name]


def _compile(parts: Parts, libc: Libc, source: str, output: str, optimise: str) -> None:
    flags = [*_FLAGS, *_LEAN, optimise, f"-DSHOHIN_NAME={parts.name}"]
    _cc(parts, libc, [*flags, "-c", source, "-o", output])


def _runtime_source(part: str) -> str:
    return str(RUNTIME / f"shohin_{part}.c")


def _link_shared(parts: Parts, output: Path, libc: Libc) -> None:
    objects = _objects(parts, libc)
    (parts.folder / "exports.map").write_text(_exports(parts.name))
    flags = ["-shared", "-s", *_libraries(parts), _DROP_UNUSED, "-Wl,--version-script=exports.map"]
    _cc(parts, libc, [*objects, *flags, "-o", str(output)])


def _libraries(parts: Parts) -> list[str]:
    return ["-pthread", "-lm", *(["-ldl"] if parts.gpu else [])]


def _exports(name: str) -> str:
    """A version script that exports the public functions alone: kernels cannot be hidden in TVM."""
    functions = " ".join(f"{name}_{function};" for function in PUBLIC_FUNCTIONS)
    return f"{{ global: {functions} local: *; }};\n"


def _link_object(parts: Parts, output: Path, libc: Libc) -> None:
    _cc(parts, libc, ["-r", *_objects(parts, libc), "-o", str(output)])


def _link_static(parts: Parts, output: Path, libc: Libc) -> None:
    output.unlink(missing_ok=True)
    _zig(parts, ["ar", "rcsD", str(output), *_objects(parts, libc)])


def _link_executable(parts: Parts, output: Path, libc: Libc) -> None:
    objects = _objects(parts, libc)
    for part in ("npy", "main"):
        objects.append(f"{part}-{libc}.o")
        _compile(parts, libc, _runtime_source(part), objects[-1], _SMALL)
    # The C library is built by the same flags.
    flags = [*_LEAN, _SMALL, "-s", *_libraries(parts), _DROP_UNUSED]
    flags += ["-static"] if libc == "musl" else []
    _cc(parts, libc, [*objects, *flags, "-o", str(output)])


def _cc(parts: Parts, libc: Libc, arguments: Sequence[str]) -> None:
    """Run the C compiler for the system that the parts' processor runs."""
    _zig(parts, ["cc", "-target", _SYSTEMS[libc][parts.machine], *arguments])


def _zig(parts: Parts, arguments: Sequence[str]) -> None:
    """Run the toolchain in the parts' folder."""
    libraries = Path(platformdirs.user_cache_dir("shohin")) / "zig"
    environment = {
        **os.environ,
        "ZIG_GLOBAL_CACHE_DIR": os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(libraries)),
        "ZIG_LOCAL_CACHE_DIR": str(parts.folder / "zig"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", *arguments],
        cwd=parts.folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(parts.folder / "zig", ignore_errors=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()][:8]
        raise ArtifactError(
            "linker",
            f"zig {arguments[0]} failed with exit code {done.returncode}: " + " | ".join(lines),
            "is there space left on the disk?",
        )
