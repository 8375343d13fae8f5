import ast
import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_SOURCE = _ROOT / "src" / "shohin"
_LINKED = ("ir", "passes", "backends")
_DATA_SUFFIXES = {".c", ".cuh", ".h", ".lark", ".txt", ".typed"}

# Each may import those before it, and itself. Whatever is not named is a part of the public API.
_LAYERS = ("errors", "spec", "ir", "passes", "backends", "api", "cli")
# The zoo makes plain PyTorch models: it may import nothing but errors.
_ASIDE = {"zoo": ("errors", "zoo")}


def _tracked() -> list[Path]:
    """The files of the repository, those that are not yet added included."""
    if (_ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(command, cwd=_ROOT, check=True, capture_output=True)
        names = filter(None, done.stdout.decode().split("\0"))
        return [path for path in map(_ROOT.joinpath, names) if path.exists()]
    ignored = {".venv", "out", "build", "dist", "__pycache__", "shohin.egg-info"}
    return [
        path
        for path in _ROOT.rglob("*")
        if (path.is_file() or path.is_symlink())
        and not any(
            part in ignored or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(_ROOT).parts
        )
    ]


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    own = {path.relative_to(_SOURCE): path for path in _SOURCE.rglob("*.py")}
    linked = {
        path.relative_to(_ROOT): path for name in _LINKED for path in (_ROOT / name).rglob("*.py")
    }
    return {_module_name(relative): path for relative, path in sorted({**own, **linked}.items())}


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(["shohin", *(parts[:-1] if parts[-1] == "__init__" else parts)])


# ---------------------------------------------------------------- layout


@pytest.mark.parametrize("name", _LINKED)
def test_links_are_relative_and_lead_to_the_folders_at_the_root(name: str) -> None:
    link = _SOURCE / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == _ROOT / name


def test_licence_is_the_text_of_apache_2() -> None:
    digest = hashlib.sha256((_ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"


def test_every_built_in_pass_has_a_test_file() -> None:
    from shohin.passes import pass_class, pass_names

    modules = [pass_class(name).__module__ for name in pass_names()]
    own = [name.removeprefix("shohin.passes.") for name in modules if name.startswith("shohin.")]
    files = [_ROOT / "tests/passes" / f"test_{name.rpartition('.')[2]}.py" for name in own]
    assert [path.name for path in files if not path.exists()] == []


# ---------------------------------------------------------------- what the files say

_MACHINE = re.compile("|".join(["/" + f"{folder}/" for folder in ("work", "root", "home")]))
_UNFINISHED = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b")


def _texts() -> Iterator[tuple[str, str]]:
    for path in _tracked():
        if path.is_symlink() or not path.is_file():
            continue
        try:
            yield str(path.relative_to(_ROOT)), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


@pytest.mark.parametrize("pattern", [_MACHINE, _UNFINISHED], ids=["machine paths", "unfinished"])
def test_no_file_says_what_none_should(pattern: re.Pattern[str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in _texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_the_patterns_find_what_they_are_for() -> None:
    assert _MACHINE.search("see /" + "root/file")
    assert _UNFINISHED.search("# TO" + "DO: later")


# ---------------------------------------------------------------- imports


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line; imports for the type checker alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ignored = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from _imported_from(node)


def _imported_from(node: ast.ImportFrom) -> Iterator[tuple[str, int]]:
    names = [alias.name for alias in node.names]
    if node.module == "shohin":
        yield from ((f"shohin.{name}", node.lineno) for name in names)
    else:
        yield node.module or "", node.lineno


def _layer(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    part = "cli" if part == "__main__" else part
    return part if part in _LAYERS or part in _ASIDE else "api"


def _allowed(layer: str) -> tuple[str, ...]:
    if layer in _ASIDE:
        return _ASIDE[layer]
    below = _LAYERS[: _LAYERS.index(layer) + 1]
    return (*below, *_ASIDE) if layer in ("api", "cli") else below


def test_modules_import_only_what_lies_below_them() -> None:
    wrong = [
        f"{name}:{line} imports {imported}"
        for name, path in _modules().items()
        for imported, line in _imports(path)
        if imported.split(".")[0] == "shohin" and _layer(imported) not in _allowed(_layer(name))
    ]
    assert wrong == []


def test_tvm_is_imported_only_by_its_backend() -> None:
    wrong = [
        f"{name}:{line}"
        for name, path in _modules().items()
        for imported, line in _imports(path)
        if imported.split(".")[0] in {"tvm", "tvm_ffi", "ziglang"}
        and not name.startswith("shohin.backends.tvm")
    ]
    assert wrong == []


def test_every_module_is_found() -> None:
    assert {"shohin", "shohin.errors", "shohin.ir.program", "shohin.passes"} <= _modules().keys()


def test_the_imports_of_a_module_are_all_found(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import tvm.relax\nfrom shohin import cli\nfrom shohin.ir import program\n"
        "def late():\n    from shohin.passes.base import Pass\n"
    )
    found = [name for name, _ in _imports(source)]
    assert found == ["tvm.relax", "shohin.cli", "shohin.ir", "shohin.passes.base"]
    assert _layer("shohin.cli") == "cli"
    assert _layer("shohin") == _layer("shohin.report") == "api"
    assert "passes" not in _allowed("ir")


@pytest.mark.parametrize("module", ["shohin", "shohin.cli", "shohin.passes", "shohin.zoo"])
def test_importing_is_light(module: str) -> None:
    heavy = {"tvm", "tvm_ffi", "sklearn", "matplotlib", "onnx", "onnxruntime", "openvino", "pytest"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---------------------------------------------------------------- packages


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that is built from it, made without a network."""
    folder, tree = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("tree")
    for path in _tracked():
        target = tree / path.relative_to(_ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def _expected_files() -> set[str]:
    """Paths that a wheel must hold: every module and data file."""
    links = [_SOURCE / name for name in _LINKED]
    files = {path for path in _tracked() if path.is_relative_to(_SOURCE)} - set(links)
    inside = {str(path.relative_to(_SOURCE.parent)) for path in files}
    for name in _LINKED:
        below = (path for path in _tracked() if path.is_relative_to(_ROOT / name))
        inside |= {f"shohin/{path.relative_to(_ROOT)}" for path in below}
    return {name for name in inside if Path(name).suffix in {".py", *_DATA_SUFFIXES}}


def test_the_wheel_holds_every_module_and_data_file(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    expected = _expected_files()
    assert {Path(name).suffix for name in expected} == {".py", *_DATA_SUFFIXES}
    assert expected - held == set()
    assert {name for name in held if name.startswith("shohin/")} == expected
    assert any(name.endswith("licenses/LICENSE") for name in held)


def test_the_sdist_holds_every_module_and_data_file(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"src/{name}" for name in _expected_files()} - held == set()
    assert {"README.md", "LICENSE", "pyproject.toml"} - held == set()
