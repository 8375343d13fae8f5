"""Checks of the options of pruning, and of what the context has to have for them."""

from collections.abc import Collection, Iterable

from shohin.errors import SpecError
from shohin.passes.base import Context


def check_density(option: str, density: float | None) -> None:
    """Refuse a density that is not above 0 and at most 1; None passes.

    Args:
        option: what it is the value of, e.g. ``density``.
        density: the value.

    Raises:
        SpecError: naming the option.
    """
    if density is not None and not 0 < density <= 1:
        raise SpecError(f"prune {option}", f"expected 0 < density <= 1, got {density}")


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    """Refuse a value that is none of the known ones.

    Raises:
        SpecError: naming the option.
    """
    *first, last = [f"'{choice}'" for choice in known]
    if f"'{value}'" not in (*first, last):
        raise SpecError(f"prune {option}", f"expected {', '.join(first)} or {last}, got '{value}'")


def check_positive(option: str, value: float | None) -> None:
    """Refuse a number that is not above 0, or not finite; None passes.

    Raises:
        SpecError: naming the option.
    """
    if value is not None and not 0 < value < float("inf"):
        raise SpecError(f"prune {option}", f"expected a number above 0, got {value}")


def check_apart(option: str, others: Collection[str], why: str) -> None:
    """Refuse options that make no sense beside another.

    Args:
        option: the option that was given.
        others: those of the others that were given, too.
        why: the reason, as a hint.

    Raises:
        SpecError: naming both.
    """
    for other in others:
        raise SpecError(f"prune {option}", f"does not go together with '{other}'", why)


def check_train(rounds: int, retrain: str, context: Context) -> None:
    """Refuse to retrain without a training function.

    Raises:
        SpecError: naming the option that asks for it.
    """
    if context.train is not None:
        return
    hint = "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"
    if rounds > 1:
        problem = f"{rounds} rounds retrain in between and need a train function, got none"
        raise SpecError("prune rounds", problem, hint)
    if retrain not in ("auto", "none"):
        raise SpecError("prune retrain", f"'{retrain}' needs a train function, got none", hint)


def check_calibration(method: str, context: Context) -> None:
    """Refuse to look at activations without calibration batches.

    Raises:
        SpecError: naming the method.
    """
    if method != "magnitude" and next(iter(context.calibration), None) is None:
        problem = f"'{method}' needs calibration batches, got none"
        hint = "give calibration=[(inputs,), ...], or --data on the command line"
        raise SpecError("prune method", problem, hint)
