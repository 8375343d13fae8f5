"""Targets as text, and backends of other people's packages."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.backends import registry
from shohin.backends.base import Artifact, Backend, Diagnostic, Progress, WeightForm
from shohin.backends.registry import backend_class, parse_target, target_kinds
from shohin.errors import ArtifactError, SpecError
from shohin.ir import Program


@dataclass(frozen=True)
class NpuTarget:
    """Options of a target: one must be given."""

    cores: int
    model: str = "small"


class NpuBackend(Backend):
    """A backend of somebody else's."""

    name = "npu"
    targets: ClassVar[Mapping[str, type[Any]]] = {"npu": NpuTarget}

    def supports(self, program: Program) -> list[Diagnostic]:
        return []

    def compile(
        self,
        program: Program,
        target: str,
        *,
        batch: int = 1,
        weights: WeightForm = "plain",
        progress: Progress | None = None,
    ) -> Artifact:
        raise NotImplementedError


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Any:
    def offer(*values: str, kind: str = "npu") -> None:
        points = tuple(EntryPoint(kind, value, registry.GROUP) for value in values)
        monkeypatch.setattr(registry, "_entry_points", lambda: points)

    return offer


def test_built_in_targets() -> None:
    assert target_kinds()[:6] == ("cpu", "arm", "armv7", "riscv64", "cuda", "reference")
    target = parse_target(" cpu{ threads=2 arch=x86-64-v3 } ")
    assert target.text == "cpu{arch=x86-64-v3 threads=2}"
    assert target.backend.name == "tvm"
    assert (target.options.arch, target.options.threads) == ("x86-64-v3", 2)
    assert parse_target("cpu{threads=1}").text == "cpu"
    assert parse_target("reference").backend.name == "reference"


@pytest.mark.parametrize(
    ("text", "problem", "column"),
    [
        ("cpuu", "unknown target 'cpuu'; did you mean 'cpu' or 'cuda'?", 0),
        ("vulkan", "unknown target 'vulkan'", 0),
        ("cpu{thread=2}", "unknown option 'thread' of target 'cpu'; did you mean 'threads'?", 4),
        ("cpu{threads=two}", "option 'threads' of target 'cpu': expected int, got 'two'", 12),
        ("cpu{threads=300}", "expected threads from 1 to 256, got 300", 12),
        ("cpu{threads=2 arch=v4}", "unknown arch 'v4'", 19),
        ("cpu, cpu", "expected one target, got 'cpu' as well", 5),
        ("reference{threads=2}", "unknown option 'threads' of target 'reference'", 10),
        ("cpu{threads=2", "'{' is never closed", 3),
        ("cpu{threads=2 threads=3}", "option 'threads' is given twice", 14),
    ],
)
def test_wrong_texts_have_a_caret(text, problem, column) -> None:
    with pytest.raises(SpecError) as raised:
        parse_target(text)
    assert str(raised.value).startswith(f"target: {problem}")
    assert raised.value.excerpt == f"  {text}\n  {' ' * column}^"


def test_empty_text() -> None:
    with pytest.raises(SpecError, match="expected at least one name"):
        parse_target("  ")


def test_backend_of_another_package(offer) -> None:
    offer(f"{__name__}:NpuBackend")
    assert target_kinds() == ("cpu", "arm", "armv7", "riscv64", "cuda", "reference", "npu")
    target = parse_target("npu{model=large cores=4}")
    assert isinstance(target.backend, NpuBackend)
    assert target.text == "npu{cores=4 model=large}"
    with pytest.raises(SpecError, match="target 'npu' needs option 'cores'"):
        parse_target("npu")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (["no_such_module:Npu"], "cannot be imported: ModuleNotFoundError"),
        (["dataclasses:dataclass"], "is not a Backend"),
        (["shohin.backends.reference:ReferenceBackend"], "compiles for reference only"),
        (["a:B", "c:D"], "offered by an unknown package and an unknown package"),
    ],
)
def test_packages_that_cannot_be_used(offer, values, text) -> None:
    offer(*values)
    with pytest.raises(ArtifactError, match=text):
        parse_target("npu")


def test_kind_that_nothing_offers() -> None:
    with pytest.raises(ArtifactError, match="no backend compiles for it"):
        backend_class("gpu")


def test_a_package_may_not_replace_a_built_in_backend(offer) -> None:
    offer("shohin.backends.reference:ReferenceBackend", kind="cpu")
    with pytest.raises(ArtifactError, match="offered by shohin and an unknown package"):
        parse_target("cpu")


def test_tvm_backend_says_what_it_cannot_compile() -> None:
    class Sorts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.svdvals(torch.relu(x))

    backend = parse_target("cpu").backend
    program = shohin.capture(Sorts(), torch.zeros(2, 4, 4))
    (found,) = backend.supports(program)
    assert "svd" in found.operator
    assert found.node in {node.name for node in program.graph.nodes}
    with pytest.raises(shohin.UnsupportedError, match=found.node):
        shohin.compile(program)
    simple = shohin.capture(nn.Linear(3, 2), torch.zeros(2, 3))
    assert backend.supports(simple) == []
