import os
import re
import runpy
import sys
import types
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_REFERENCE = _DOCS / "passes.md"


def _blocks(path: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page with the lines they start at."""
    text = path.read_text()
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in _BLOCK.finditer(text)]


_PAGES = [path for path in sorted(_DOCS.glob("*.md")) if _blocks(path)]


@pytest.mark.parametrize("page", _PAGES, ids=lambda path: path.stem)
def test_the_python_blocks_of_a_page_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Dataclasses look their annotations up in the module that they say they come from.
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, block in _blocks(page):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), module.__dict__)


def test_the_pages_that_teach_have_blocks() -> None:
    assert {"writing-passes", "pipeline", "deploy"} <= {page.stem for page in _PAGES}


@pytest.mark.parametrize(
    "page",
    sorted([_ROOT / "README.md", _ROOT / "CONTRIBUTING.md", *_DOCS.glob("*.md")])
    + sorted((_ROOT / "examples").rglob("*.md")),
    ids=lambda path: str(path.relative_to(_ROOT)),
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = _LINK.findall(page.read_text())
    assert [name for name in targets if not (page.parent / name).exists()] == []


def test_the_reference_of_passes_is_up_to_date() -> None:
    found = runpy.run_path(str(_DOCS / "generate_passes.py"))["reference"]()
    if os.environ.get("SHOHIN_UPDATE_GOLDENS"):
        _REFERENCE.write_text(found)
    assert found == _REFERENCE.read_text(), "run docs/generate_passes.py"
