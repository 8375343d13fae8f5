"""Which passes there are, by name: the built-in ones, and those of other people's packages.

A package offers a pass by an entry point of the group ``shohin.passes``::

    [project.entry-points."shohin.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType

from shohin.errors import PassError, ShohinError, SpecError, near_name_hint
from shohin.ir.program import Fact
from shohin.passes.base import Pass
from shohin.passes.option_docs import OptionDescription, describe_options

GROUP = "shohin.passes"
_BUILT_IN: Mapping[str, str] = MappingProxyType(
    {
        "make-functional": "shohin.passes.make_functional:MakeFunctional",
        "drop-identity": "shohin.passes.drop_identity:DropIdentity",
        "fold-constants": "shohin.passes.fold_constants:FoldConstants",
        "fold-bn": "shohin.passes.fold_bn:FoldBatchNorm",
        "eliminate-dead": "shohin.passes.eliminate_dead:EliminateDead",
        "low-rank": "shohin.passes.low_rank:LowRank",
        "prune": "shohin.passes.prune:Prune",
        "remove-dead": "shohin.passes.remove_dead:RemoveDead",
        "share-weights": "shohin.passes.share_weights:ShareWeights",
        "ternary": "shohin.passes.ternary:TrainTernary",
        "ternary-fit": "shohin.passes.ternary_fit:FitTernary",
        "fixed-point": "shohin.passes.fixed_point:ToFixedPoint",
        "entropy-code": "shohin.passes.entropy_code:EntropyCode",
    }
)


@dataclass(frozen=True)
class PassDescription:
    """What a pass is and takes.

    Attributes:
        name: its name in pipeline text.
        summary: the first line of its docstring.
        doc: its whole docstring.
        options: its options, in order.
        requires: facts that must hold before it.
        establishes: facts that hold after it.
        invalidates: facts that hold no longer after it.
    """

    name: str
    summary: str
    doc: str
    options: tuple[OptionDescription, ...]
    requires: tuple[Fact, ...]
    establishes: tuple[Fact, ...]
    invalidates: tuple[Fact, ...]


def pass_names() -> tuple[str, ...]:
    """Every known name: the built-in passes in their order, then those of other packages."""
    return tuple(dict.fromkeys([*_BUILT_IN, *sorted(point.name for point in _entry_points())]))


def pass_class(name: str) -> type[Pass]:
    """The class of a pass, imported at first use.

    Raises:
        SpecError: when no pass has that name.
        PassError: when the pass cannot be imported, is not a pass, or when several packages offer
            a pass of that name.
    """
    offers = list(_offers(name))
    if not offers:
        raise SpecError("passes", f"unknown pass '{name}'", near_name_hint(name, pass_names()))
    if len(offers) > 1:
        sources = " and ".join(source for source, _ in offers)
        raise PassError(f"pass '{name}'", f"offered by {sources}", "uninstall all but one")
    return _load(name, *offers[0])


def describe(name: str) -> PassDescription:
    """What a pass is and takes.

    Raises:
        SpecError: when no pass has that name.
        PassError: when it cannot be imported.
    """
    found = pass_class(name)
    doc = inspect.getdoc(found) or ""
    return PassDescription(
        name,
        doc.partition("\n")[0],
        doc,
        describe_options(found),
        tuple(sorted(found.requires)),
        tuple(sorted(found.establishes)),
        tuple(sorted(found.invalidates)),
    )


def passes_establishing(fact: Fact) -> tuple[str, ...]:
    """Names of the known passes that establish a fact; those that cannot be imported left out."""
    return tuple(name for name in pass_names() if _establishes(name, fact))


def _establishes(name: str, fact: Fact) -> bool:
    try:
        return fact in pass_class(name).establishes
    except PassError:
        return False  # Another package's broken pass must not hide what the good ones do.


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _offers(name: str) -> Iterator[tuple[str, str]]:
    if name in _BUILT_IN:
        yield "shohin", _BUILT_IN[name]
    # One installation may be listed twice, as an editable one and its metadata on the path.
    yield from sorted(
        {(_package(point), point.value) for point in _entry_points() if point.name == name}
    )


def _package(point: EntryPoint) -> str:
    return f"package '{point.dist.name}'" if point.dist else "an unknown package"


def _load(name: str, source: str, value: str) -> type[Pass]:
    module, _, attribute = value.partition(":")
    try:
        found = getattr(import_module(module.strip()), attribute.strip())
    except ShohinError:
        raise
    except Exception as error:
        problem = f"'{value}' of {source} cannot be imported: {type(error).__name__}: {error}"
        raise PassError(f"pass '{name}'", problem) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise PassError(f"pass '{name}'", f"'{value}' of {source} is not a Pass")
    if found.name != name:
        problem = f"'{value}' of {source} calls itself '{found.name}'"
        raise PassError(f"pass '{name}'", problem)
    return found
