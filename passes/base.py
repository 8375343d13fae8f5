"""The pass contract: what a pass is, what it is given, what it gives back.

A pass is a frozen dataclass whose fields are its options. It holds no mutable state and reads no
globals; everything it needs beside the program comes in the `Context`. It is given its own copy of
the program, so it may edit the graph freely, and must not care about timing, printing,
verification or checkpoints: these are instruments of the manager.

A *site* is one place that a pass may change: a node, named as in the graph the pass was given, or
a weight, named as in the module. A pass asks ``context.allows(name)`` before it changes a site,
leaves the site as it is and remarks ``Reason.EXCLUDED_BY_OPTION`` when it may not, and names the
same site in the `changed` remark when it did. Bisection restricts a pass to some of its sites this
way to find the one that breaks a program.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar, TypeAlias

from torch import Tensor, fx, nn

from shohin.errors import SpecError
from shohin.ir.annotations import Origin, annotation
from shohin.ir.encodings import Json
from shohin.ir.program import Fact, Program
from shohin.passes.analysis import AnalysisCache
from shohin.passes.remarks import NodeCost, Outcome, Remark

Batch: TypeAlias = tuple[Tensor, ...]
Evaluate: TypeAlias = Callable[[nn.Module], float]
Train: TypeAlias = Callable[[nn.Module], None]
Measure: TypeAlias = Callable[[Program, str], float]
Profile: TypeAlias = Callable[[Program, str], Mapping[str, float]]
Progress: TypeAlias = Callable[[int, int, str], None]
SiteFilter: TypeAlias = Callable[[str], bool]


def _no_progress(done: int, total: int, label: str) -> None:
    """Progress callback for callers that want none."""


@dataclass
class Context:
    """What a pass may use beside the program.

    Attributes:
        calibration: input batches, each a tuple of tensors; read once per use, in order.
        evaluate: the user's measure of a module, higher is better, or None.
        train: the user's in-place training of a module, or None.
        seed: seed of every random choice.
        workdir: folder for files that outlive the run, or None.
        analyses: cached analyses of the program.
        remarks: where decisions go; use `changed` and `skipped`.
        progress: called as ``progress(done, total, label)`` during long work.
        pass_name: the pass that runs now; remarks are attributed to it.
        site_filter: says by name which sites may be changed; None allows all.
        measure: milliseconds that a program takes at batch 1 once it is compiled for a target,
            given as text, or None.
        profile: the same by the module that each step comes from, or None.
        resume: whether to go on from what an interrupted run left in `workdir`.
    """

    calibration: Iterable[Batch] = ()
    evaluate: Evaluate | None = None
    train: Train | None = None
    seed: int = 0
    workdir: Path | None = None
    analyses: AnalysisCache = field(default_factory=AnalysisCache)
    remarks: list[Remark] = field(default_factory=list)
    progress: Progress = _no_progress
    pass_name: str = ""
    site_filter: SiteFilter | None = None
    measure: Measure | None = None
    profile: Profile | None = None
    resume: bool = False

    def allows(self, site: str) -> bool:
        """Whether the pass may change a site, a node or a weight given by name."""
        return self.site_filter is None or self.site_filter(site)

    def changed(
        self,
        node: fx.Node,
        code: str,
        detail: str = "",
        *,
        before: NodeCost | None = None,
        after: NodeCost | None = None,
        figures: Mapping[str, Json] | None = None,
    ) -> None:
        """Remark that a node was changed.

        Args:
            node: the node, as it was captured where it still exists.
            code: short code of what was done, e.g. ``folded``.
            detail: one sentence for people.
            before: cost before the change.
            after: cost after it.
            figures: further figures, by name.
        """
        self._remark(node, Outcome.CHANGED, code, detail, before, after, figures)

    def skipped(self, node: fx.Node, reason: str, detail: str = "") -> None:
        """Remark that a node was looked at and left as it is, with a `Reason` code."""
        self._remark(node, Outcome.SKIPPED, reason, detail, None, None)

    def noted(self, code: str, detail: str, **figures: Json) -> None:
        """Remark on the program as a whole, e.g. on its accuracy after a round of training.

        Args:
            code: short code of what it is about.
            detail: one sentence for people.
            figures: further figures, by name.
        """
        self.remarks.append(
            Remark(self.pass_name, "", "", Outcome.NOTED, code, detail, extra=figures)
        )

    def _remark(
        self,
        node: fx.Node,
        outcome: Outcome,
        reason: str,
        detail: str,
        before: NodeCost | None,
        after: NodeCost | None,
        figures: Mapping[str, Json] | None = None,
    ) -> None:
        origin = annotation(node, Origin)
        module = origin.module if origin else ""
        self.remarks.append(
            Remark(
                self.pass_name,
                node.name,
                module,
                outcome,
                str(reason),
                detail,
                before,
                after,
                dict(figures or {}),
            )
        )


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Attributes:
        program: the rewritten program; the very same object when nothing was modified.
        modified: whether anything changed, so that cached analyses must be dropped.
        failed: facts that the pass usually establishes and could not this time.
    """

    program: Program
    modified: bool
    failed: frozenset[Fact] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Pass(ABC):
    """Base of every pass.

    Class attributes:
        name: kebab-case name in pipeline text.
        requires: facts that must hold before.
        establishes: facts that hold afterwards.
        invalidates: facts that hold no longer afterwards; every other fact is preserved.
        preserves_analyses: names of the analyses that stay valid although the pass modified.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    invalidates: ClassVar[frozenset[Fact]] = frozenset()
    preserves_analyses: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, program: Program, context: Context) -> PassResult:
        """Rewrite the program.

        Args:
            program: a copy that belongs to this call; edit it in place or return another.
            context: calibration data, callbacks, seed, analyses, and the sink of remarks.
        """

    def validate(self) -> None:  # noqa: B027 - most options need no check
        """Check the options' values; called on parsing and before a pipeline runs.

        Raises:
            SpecError: naming the option in its `where`, so that the text at fault can be shown;
                `invalid_option` makes one.
        """

    def check_context(self, context: Context) -> None:  # noqa: B027 - most passes need nothing
        """Check that the context has what the pass needs; called before a pipeline runs.

        Raises:
            SpecError: naming the option that asks for it, and how to give it.
        """

    def invalid_option(self, option: str, expected: str) -> SpecError:
        """The error for an option whose value is out of range.

        Args:
            option: the option's name.
            expected: what its value should be, e.g. ``above 0 and at most 1``.
        """
        where = f"option '{option}' of pass '{self.name}'"
        return SpecError(where, f"expected {expected}, got {getattr(self, option)!r}")

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of the options, in order."""
        return tuple(option.name for option in fields(cls))
