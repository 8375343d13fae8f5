"""The C interface under the sanitizers of a compiler: leaks, freed memory, undefined behaviour."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from stub_models import FLAGS, MODEL, PARTS, define

# FLAGS ask for pedantic C; warnings of another compiler than ziglang's are failures as well.
_SANITIZERS = {
    "address, leak, undefined": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc and its sanitizers")
@pytest.mark.parametrize("name", _SANITIZERS)
def test_the_interface(name: str, tmp_path: Path) -> None:
    source = tmp_path / "net.c"
    source.write_text(MODEL)
    flags = [*FLAGS, *define("net"), "-g", _SANITIZERS[name], "-fno-sanitize-recover=all"]
    parts = [source, *PARTS, Path(__file__).with_name("interface.c")]
    built = subprocess.run(
        ["gcc", *flags, *map(str, parts), "-o", str(tmp_path / "interface")],
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in built.stderr:
        pytest.skip("gcc has no such sanitizer here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [tmp_path / "interface"],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
