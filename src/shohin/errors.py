"""Errors that shohin raises for its users.

Every message has the same form, *where: problem; hint*: where it happened, what was expected and
what was found, and what to do about it.
"""

from difflib import get_close_matches
from typing import ClassVar


class ShohinError(Exception):
    """Base of every error a user can meet.

    Args:
        where: the file, option, pass, node or value at fault.
        problem: what was expected and what was found.
        hint: what to do about it, where there is something to do.
        excerpt: lines that show the place, e.g. the faulty text with a caret below it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, where: str, problem: str, hint: str | None = None, excerpt: str | None = None
    ) -> None:
        self.where = where
        self.problem = problem
        self.hint = hint
        self.excerpt = excerpt
        super().__init__(where, problem, hint, excerpt)

    def __str__(self) -> str:
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        text = f"{text}; {self.hint}" if self.hint else text
        return f"{text}\n{self.excerpt}" if self.excerpt else text


class SpecError(ShohinError):
    """A text or value that the user gave does not say anything valid (exit code 2)."""

    exit_code = 2


class CaptureError(ShohinError):
    """A model could not be captured to a graph (exit code 3)."""

    exit_code = 3


class PassError(ShohinError):
    """A pass failed or was asked to run in an impossible order (exit code 4)."""

    exit_code = 4


class DivergedError(PassError):
    """Training gave a loss, a weight or a statistic that is NaN or infinite (exit code 4).

    Attributes:
        epochs: how many went well before, where weights and statistics are those after the last
            of them; 0 where nobody knows.
    """

    epochs: int = 0


class VerifyError(ShohinError):
    """A program breaks an invariant of its stage (exit code 5)."""

    exit_code = 5


class UnsupportedError(ShohinError):
    """A backend cannot compile a program (exit code 6)."""

    exit_code = 6


class ArtifactError(ShohinError):
    """A file is truncated, corrupted, foreign, of a newer version, or unwritable (exit code 7)."""

    exit_code = 7


class InputError(ShohinError):
    """An input tensor has the wrong shape, type or number (exit code 8)."""

    exit_code = 8


class ShohinWarning(UserWarning):
    """Something a user should know of that does not stop the work."""


def near_name_hint(name: str, known: list[str] | tuple[str, ...]) -> str:
    """The hint for an unknown name: the nearest known ones, or all of them.

    Args:
        name: the unknown name.
        known: every valid name.
    """
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{candidate}'" for candidate in near) + "?"
    return "known: " + ", ".join(sorted(known))
