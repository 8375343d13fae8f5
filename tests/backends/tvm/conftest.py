"""Makes the helpers beside the tests importable, and skips where binaries cannot run."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "cuda"))


@pytest.fixture(autouse=True, scope="session")
def _without_tuning() -> Iterator[None]:
    """What is compiled must not depend on measurements, nor write to the user's cache of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOHIN_TUNE", "off")
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return
    reason = "runs the binaries it builds, which are for x86_64 Linux"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def always_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Estimates by which sparse kernels win wherever there is one."""
    costs = "shohin.backends.tvm.lowering.sparse_costs"
    monkeypatch.setattr(f"{costs}._SPARSE_COST", 1e-9)
    monkeypatch.setattr(f"{costs}._ELEMENTS_A_MILLISECOND", 1e30)
