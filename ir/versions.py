"""Versions of what makes files."""

from functools import cache
from importlib.metadata import version


@cache
def tool_versions() -> dict[str, str]:
    """Versions of shohin and PyTorch, by name."""
    return {"shohin": version("shohin"), "torch": version("torch")}
