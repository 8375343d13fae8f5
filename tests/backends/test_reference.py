"""The reference backend, and what every artifact checks of its inputs."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import shohin
from shohin.backends.inputs import as_array, check_inputs
from shohin.backends.reference import ReferenceBackend
from shohin.errors import ArtifactError, InputError, UnsupportedError
from shohin.ir.program import InputSpec


class TwoInTwoOut(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, torch.cat([x, y], dim=1)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.table(tokens)
        return found


@pytest.fixture(scope="module")
def program() -> shohin.Program:
    return shohin.capture(TwoInTwoOut(), (torch.zeros(2, 3), torch.zeros(2, 4)))


def test_runs_like_the_program(program) -> None:
    artifact = shohin.compile(program, "reference", batch=2)
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    first, second = artifact(x, y)
    assert torch.equal(first, x + 1)
    assert torch.equal(second, torch.cat([x, y], dim=1))
    arrays = artifact(x.numpy(), y.numpy())
    assert all(isinstance(array, np.ndarray) for array in arrays)


def test_describes_itself(program) -> None:
    info = shohin.compile(program, "reference", batch=4).info
    assert [spec.describe() for spec in info.inputs] == ["float32[4,3]", "float32[4,4]"]
    assert [spec.describe() for spec in info.outputs] == ["float32[4,3]", "float32[4,7]"]
    assert (info.name, info.target, info.batch) == ("twointwoout", "reference", 4)
    assert set(info.tools) == {"shohin", "torch"}
    assert info.content_hash == shohin.compile(program, "reference").info.content_hash


def test_runs_in_batches(program) -> None:
    artifact = shohin.compile(program, "reference", batch=2)
    x, y = np.ones((6, 3), np.float32), np.ones((6, 4), np.float32)
    first, second = artifact.run_batches([x, y])
    assert first.shape == (6, 3)
    assert second.shape == (6, 7)
    with pytest.raises(InputError, match="multiple of the compiled batch 2, got 3"):
        artifact.run_batches([x[:3], y[:3]])
    with pytest.raises(InputError, match=r"of one batch size, got \[3, 6\]"):
        artifact.run_batches([x[:3], y])


def test_a_model_without_batch_axis_does_not_run_in_batches() -> None:
    class Whole(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum()

    artifact = shohin.compile(shohin.capture(Whole(), torch.zeros(2, 3)), "reference")
    assert artifact.info.batch == 0
    with pytest.raises(InputError, match="has no batch axis"):
        artifact.run_batches([np.zeros((2, 3), np.float32)])


def test_leaves_the_program_and_the_inputs_alone(program) -> None:
    artifact = shohin.compile(program, "reference")
    x, y = np.ones((1, 3), np.float32), np.ones((1, 4), np.float32)
    x.setflags(write=False)
    found, _ = artifact.run([x, y])
    found += 1
    assert (x == 1).all()


def test_saves_a_program(program, tmp_path) -> None:
    artifact = shohin.compile(program, "reference")
    loaded = shohin.load(artifact.save(tmp_path / "net.shohin"))
    assert loaded.inputs == program.inputs
    with pytest.raises(ArtifactError, match=r"ends in \.shohin, got '\.so'"):
        artifact.save(tmp_path / "net.so")


def test_numbers_that_an_operator_refuses() -> None:
    program = shohin.capture(Lookup(), torch.zeros(2, 4, dtype=torch.int64))
    artifact = shohin.compile(program, "reference")
    with pytest.raises(InputError, match="lookup: cannot run on these numbers: index out of range"):
        artifact(torch.full((1, 4), 9))


def test_an_output_that_is_no_tensor_is_refused(program) -> None:
    changed = program.copy()
    node = changed.graph.output_node()
    node.args = ((node.args[0][0], 3),)
    with pytest.raises(UnsupportedError, match="every output to be a tensor, got '3'"):
        shohin.compile(changed, "reference")


def test_supports_everything(program) -> None:
    assert ReferenceBackend().supports(program) == []


SPECS = (InputSpec("x", (2, 3), torch.float32),)


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ([], r"net: expected 1 input \(x: float32\[2,3\]\), got 0"),
        ([np.zeros((2, 4), np.float32)], r"got float32\[2,4\]; reshape it"),
        ([np.zeros((5, 3), np.float32)], r"got float32\[5,3\]; compile with batch=5"),
        ([np.zeros((2, 3))], r"got float64\[2,3\]; convert it with \.astype\('float32'\)"),
        ([np.float32(0)], r"got float32\[\]; reshape it"),
    ],
)
def test_inputs_that_do_not_fit(arrays, text) -> None:
    with pytest.raises(InputError, match=text):
        check_inputs("net", SPECS, 2, arrays)


def test_inputs_are_made_contiguous() -> None:
    (found,) = check_inputs("net", SPECS, 2, [np.zeros((3, 2), np.float32).T])
    assert found.flags["C_CONTIGUOUS"]
    scalar = np.asarray(1.0, dtype=np.float32)
    (kept,) = check_inputs("net", (InputSpec("x", (), torch.float32),), 0, [scalar])
    assert kept.shape == ()


def test_what_is_no_array() -> None:
    with pytest.raises(InputError, match="input 1: expected a numpy array or torch tensor, got li"):
        as_array([1.0], 1)
    with pytest.raises(InputError, match="numpy has no element type bfloat16"):
        as_array(torch.zeros(1, dtype=torch.bfloat16), 0)
