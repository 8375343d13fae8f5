"""Runs executables on an x86 processor that this machine is not, emulated by Bochs.

For instructions that no machine at hand has: a Linux kernel is booted from a CD image that holds
the executables and their inputs, and the outputs come back over the serial line. Speed means
nothing there; results do. Needs Debian's packages ``bochs``, ``bochs-term``, ``bochsbios``,
``vgabios``, ``isolinux``, ``syslinux-common``, ``xorriso``, ``busybox-static`` and ``cpio``, and a
kernel (SHOHIN_KERNEL, or the newest in ``/boot``).
"""

import base64
import io
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MODELS: Mapping[str, str] = {
    "x86-64-v4-vnni": "corei7_icelake_u",
    "x86-64-v4": "corei7_skylake_x",
    "x86-64-v3": "corei7_haswell_4770",
}
"""Bochs' name of a processor of each level that it has one of."""

_TOOLS = ("bochs", "xorriso", "busybox", "cpio")
_ISOLINUX = Path("/usr/lib/ISOLINUX/isolinux.bin")
_LOADER = Path("/usr/lib/syslinux/modules/bios/ldlinux.c32")
_SECONDS = 3 * 3600

_BOOT = "default linux\nlabel linux\n kernel vmlinuz\n append initrd=initrd console=ttyS0 quiet\n"
_INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t devtmpfs none /dev
exec > /dev/ttyS0 2>&1
cd /work
for name in {names}; do
    ./$name $name.x.npy --output $name.y.npy || echo "FAILED $name"
    echo "BEGIN $name"
    /bin/busybox base64 $name.y.npy
    echo "END $name"
done
echo FINISHED
/bin/busybox poweroff -f
"""
_MACHINE = """megs: 1024
cpu: model={model}, count=1, ips=50000000
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
ata0-master: type=cdrom, path={image}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={serial}
display_library: term
clock: sync=none
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
"""


@dataclass(frozen=True)
class Program:
    """An executable and what it is given.

    Attributes:
        executable: a statically linked program of `shohin.compile`.
        inputs: all that it is to compute, batch after batch.
    """

    executable: Path
    inputs: Any


def missing_tools() -> list[str]:
    """What is not installed of what an emulation needs."""
    absent = [tool for tool in _TOOLS if shutil.which(tool) is None]
    absent += [str(path) for path in (_ISOLINUX, _LOADER) if not path.exists()]
    return absent if _kernel() is not None else [*absent, "a Linux kernel"]


def run(programs: Mapping[str, Program], arch: str, folder: Path) -> dict[str, Any]:
    """The outputs of programs on a processor of a level.

    Args:
        programs: by name, which is a plain word.
        arch: in `MODELS`.
        folder: an empty folder.
    """
    image, serial = folder / "cd.iso", folder / "serial.txt"
    _make_image(programs, folder / "cd", image)
    config = folder / "bochsrc"
    config.write_text(
        _MACHINE.format(model=MODELS[arch], image=image, serial=serial, log=folder / "log.txt")
    )
    # Debian's build stops in its debugger first; and its display is a terminal, so it gets one.
    orders = folder / "orders"
    orders.write_text("continue\n")
    command = ["script", "-qec", f"bochs -q -f {config} -rc {orders}", "/dev/null"]
    with (folder / "bochs.txt").open("w") as said:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            timeout=_SECONDS,
            check=False,
        )
    text = serial.read_text(errors="replace").replace("\r", "")
    if "FINISHED" not in text or "FAILED" in text:
        raise RuntimeError(f"the emulated machine said:\n{text[-2000:]}")
    return {name: _output(text, name) for name in programs}


def _output(text: str, name: str) -> Any:
    found = re.search(rf"BEGIN {name}\n(.*?)END {name}\n", text, re.DOTALL)
    if found is None:
        raise RuntimeError(f"no output of {name}:\n{text[-2000:]}")
    return np.load(io.BytesIO(base64.b64decode(found[1])))


def _make_image(programs: Mapping[str, Program], root: Path, image: Path) -> None:
    disk, files = root / "iso", root / "files"
    (files / "work").mkdir(parents=True)
    for name in ("bin", "proc", "dev"):
        (files / name).mkdir()
    disk.mkdir()
    shutil.copy(str(shutil.which("busybox")), files / "bin" / "busybox")
    init = files / "init"
    init.write_text(_INIT.format(names=" ".join(programs)))
    init.chmod(0o755)
    for name, program in programs.items():
        shutil.copy(program.executable, files / "work" / name)
        np.save(files / "work" / f"{name}.x.npy", program.inputs)
    names = subprocess.run(["find", "."], cwd=files, check=True, capture_output=True).stdout
    with (disk / "initrd").open("wb") as packed:
        subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            cwd=files,
            input=names,
            stdout=packed,
            check=True,
        )
    shutil.copy(str(_kernel()), disk / "vmlinuz")
    shutil.copy(_ISOLINUX, disk / "isolinux.bin")
    shutil.copy(_LOADER, disk / "ldlinux.c32")
    (disk / "isolinux.cfg").write_text(_BOOT)
    boot = ["-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4"]
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", image, *boot, "-boot-info-table", disk]
    subprocess.run(command, check=True, capture_output=True)


def _kernel() -> Path | None:
    given = os.environ.get("SHOHIN_KERNEL")
    if given:
        return Path(given)
    found = sorted(Path("/boot").glob("vmlinuz-*"))
    return found[-1] if found else None
