"""What to tell a user whose model torch cannot export: one line of the model, not a trace."""

import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from shohin.errors import CaptureError

_LONGEST = 400
_TORCH = Path(torch.__file__).parent
_SHOHIN = Path(__file__).parent
_ADVICE = re.compile(
    r"For more information, run with.*"
    r"|For more debugging help.*"
    r"|For C\+\+ stack trace.*"
    r"|For extended logs.*"
    r"|If you're using .*"
    r"|If you suspect.*"
    r"|Caused by: .*"
    r"|consider using data-dependent friendly.*"
    r"|\(unhinted: [^)]*\)+\.?.*"
)
_END = re.compile(
    r"Suggested fixes|To fix|The following call|From node|Traceback|User Stack|  File "
)
_DATA_DEPENDENT = (
    "the graph may not depend on values: use torch.where or torch.cond, or move it out of forward"
)
_HINTS = {
    r"data.dependent|GuardOnDataDependent|\.item\(\)|unbacked": _DATA_DEPENDENT,
    r"shapes cannot be multiplied|reduction dim|expected input\[|must match the size|size mismatch"
    r"": "check the shapes of the example inputs",
    r"same dtype|expected scalar type|should be the same|Input type": (
        "check the element types of the example inputs"
    ),
    r"TorchScript|ScriptModule|ScriptMethod": "capture the Python module, not its TorchScript form",
    r"deepcopy|numpy": "keep to torch operations inside forward",
}
_DEFAULT_HINT = "rewrite that line with torch operations, or keep that part out of the model"


def explain_failure(model: nn.Module, error: BaseException) -> CaptureError:
    """The error for a model that torch cannot export.

    Args:
        model: the model.
        error: what torch raised.

    Returns:
        An error of one screen: the line of the model, what torch says, and a hint.
    """
    text = _summarise(error)
    line = _user_line(error)
    place = f"\n  at {line}\n" if line else " "
    problem = f"torch cannot export this model:{place}{'  ' if line else ''}{text}"
    return CaptureError(type(model).__name__, problem, _choose_hint(f"{type(error)} {error}"))


def explain_specialisation(error: BaseException) -> str:
    """Why a model's batch size is fixed, in one line, with the line of the model where known."""
    line = _user_line(error)
    text = " ".join(_summarise(error).split()).replace("! - ", ": ")
    return f"{text} (at {' '.join(line.split())})" if line else text


def _summarise(error: BaseException) -> str:
    """The lines of an error's text that a user can read, without torch's advice and traces."""
    text = _ADVICE.sub("", str(error))
    kept: list[str] = []
    for line in text.splitlines():
        if _END.match(line):
            break
        if re.search(r"\w", line):
            kept.append(line.strip())
    text = "\n  ".join(kept[:4]).rstrip(".") or type(error).__name__
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."


def _user_line(error: BaseException) -> str:
    """``model.py:12, in forward: x = f(x)``: the innermost line outside torch and shohin."""
    for link in _chain(error):
        frames = traceback.extract_tb(link.__traceback__)
        for frame in reversed(frames):
            if _is_user_file(frame.filename):
                name = Path(frame.filename).name
                return f"{name}:{frame.lineno}, in {frame.name}: {frame.line}"
    return ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _is_user_file(filename: str) -> bool:
    path = Path(filename).resolve()
    inside = any(path.is_relative_to(root.resolve()) for root in (_TORCH, _SHOHIN))
    return not inside and not filename.startswith("<")


def _choose_hint(text: str) -> str:
    for pattern, hint in _HINTS.items():
        if re.search(pattern, text, re.IGNORECASE):
            return hint
    return _DEFAULT_HINT
