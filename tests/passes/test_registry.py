import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from shohin.errors import PassError, SpecError
from shohin.ir.program import Fact, Program
from shohin.passes import registry
from shohin.passes.base import Context, Pass, PassResult
from shohin.passes.registry import OptionDescription, describe, pass_class, pass_names


@dataclass(frozen=True, kw_only=True)
class Described(Pass):
    """Do a thing.

    More about it.

    Attributes:
        depth: how deep it goes,
            told in two lines.
        mode: which way.
    """

    name: ClassVar[str] = "described"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.FUNCTIONAL, Fact.BN_FOLDED})
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.LOW_RANK})
    depth: int
    mode: Literal["up", "down"] = "up"
    weights: dict[str, float] | None = None

    def run(self, program: Program, context: Context) -> PassResult:
        return PassResult(program, False)


Offer = Callable[..., None]
GOOD = '''
from dataclasses import dataclass
from shohin.passes.base import Pass
from shohin.ir.program import Fact

@dataclass(frozen=True, kw_only=True)
class Good(Pass):
    """A pass of another package."""
    name = "good"
    establishes = frozenset({Fact.TERNARY})
    def run(self, program, context): ...
'''


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Install a package that offers passes by entry points."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, source: str, **points: str) -> None:
        (tmp_path / f"{package}.py").write_text(source)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"{name.replace('_', '-')} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("[shohin.passes]\n" + "\n".join(lines))
        monkeypatch.delitem(sys.modules, package, raising=False)

    return install


def test_a_pass_of_another_package_is_found(offer: Offer) -> None:
    offer("toy_good", GOOD, good="toy_good:Good")
    assert pass_names()[-1] == "good"
    assert pass_class("good").name == "good"
    assert describe("good").summary == "A pass of another package."
    assert "good" in registry.passes_establishing(Fact.TERNARY)


def test_an_unknown_name_hints_at_near_ones() -> None:
    with pytest.raises(SpecError) as caught:
        pass_class("prun")
    assert str(caught.value) == "passes: unknown pass 'prun'; did you mean 'prune'?"


@pytest.mark.parametrize(
    ("source", "value", "problem"),
    [
        (
            "raise ValueError('no luck')",
            "toy_bad:Bad",
            "cannot be imported: ValueError: no luck",
        ),
        (
            "import no_such_module",
            "toy_bad:Bad",
            "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
        ),
        (
            "x = 1",
            "toy_bad:Bad",
            "cannot be imported: AttributeError: module 'toy_bad' has no attribute 'Bad'",
        ),
        ("Bad = int", "toy_bad:Bad", "is not a Pass"),
        (GOOD, "toy_bad:Good", "calls itself 'good'"),
    ],
)
def test_a_broken_entry_point_names_its_package_and_hides_no_other(
    offer: Offer, source: str, value: str, problem: str
) -> None:
    offer("toy_bad", source, bad=value)
    offer("toy_good", GOOD, good="toy_good:Good")
    with pytest.raises(PassError) as caught:
        pass_class("bad")
    assert str(caught.value) == f"pass 'bad': '{value}' of package 'toy_bad' {problem}"
    assert {"bad", "good"} <= set(pass_names())
    assert pass_class("good").name == "good"
    assert registry.passes_establishing(Fact.TERNARY) == ("ternary", "ternary-fit", "good")


def test_a_clash_with_a_built_in_pass_is_reported(offer: Offer) -> None:
    offer("toy_clash", GOOD, prune="toy_clash:Good")
    with pytest.raises(PassError) as caught:
        pass_class("prune")
    assert str(caught.value) == (
        "pass 'prune': offered by shohin and package 'toy_clash'; uninstall all but one"
    )
    assert pass_names().count("prune") == 1


def test_a_clash_of_two_packages_is_reported(offer: Offer) -> None:
    offer("toy_a", GOOD, good="toy_a:Good")
    offer("toy_b", GOOD, good="toy_b:Good")
    with pytest.raises(PassError, match="offered by package 'toy_a' and package 'toy_b'"):
        pass_class("good")


def test_a_description_tells_options_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "pass_class", lambda _: Described)
    found = describe("described")
    assert found.summary == "Do a thing."
    assert found.options == (
        OptionDescription("depth", "int", None, "how deep it goes, told in two lines."),
        OptionDescription("mode", "up | down", "up", "which way."),
        OptionDescription("weights", "{str: float} | none", "none", ""),
    )
    assert found.requires == (Fact.BN_FOLDED, Fact.FUNCTIONAL)
    assert found.establishes == (Fact.LOW_RANK,)
    assert found.invalidates == ()


@pytest.mark.parametrize("name", list(registry._BUILT_IN))
def test_every_built_in_pass_exists_under_its_name(name: str) -> None:
    assert pass_class(name).name == name
    assert describe(name).summary
