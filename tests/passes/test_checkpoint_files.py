import json
import pickle

import pytest
import torch
from interrupted_trainings import assert_same, batches, model, problem, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from shohin.errors import ArtifactError, ShohinWarning
from shohin.ir.capture import capture
from shohin.ir.ternarising import Start, Threshold, ternarised
from shohin.ir.training import trainable
from shohin.passes.trainer import Trainer


def names(folder):
    return {path.name for path in folder.iterdir()}


def trained_file(folder, module, **options):
    """The name of the file that a training writes."""
    before = names(folder) if folder.exists() else set()
    chosen = {"loader": batches(), "workdir": folder, **options}
    Trainer(**chosen)(module)
    (found,) = names(folder) - before
    return found


def test_other_options_weights_and_modules_have_other_files(tmp_path):
    def tied():
        made = model()
        made[6].weight.requires_grad_(False)
        return made

    changed = model()
    with torch.no_grad():
        changed[0].weight[0, 0] += 1e-3
    cases = [
        (model(), {}),
        (model(), {"epochs": 2}),
        (model(), {"learning_rate": 0.02}),
        (model(), {"optimizer": "adam"}),
        (model(), {"momentum": 0.5}),
        (model(), {"weight_decay": 0.1}),
        (model(), {"l1": 0.1}),
        (model(), {"schedule": "constant"}),
        (model(), {"precision": "bfloat16"}),
        (model(), {"seed": 1}),
        (model(), {"loader": batches()[:2]}),
        (changed, {}),
        (model(dropout=0.25), {}),
        (tied(), {}),
    ]
    files = {trained_file(tmp_path, module, **options) for module, options in cases}
    assert len(files) == len(cases)


def test_what_is_computed_with_the_same_tensors_is_told_apart(tmp_path):
    """Thresholds, units, dropout and what is frozen are no tensors of the module."""
    program = capture(model().eval(), (torch.ones(2, 5),))
    dropout = next(
        n.name for n in program.graph.nodes if n.target == torch.ops.aten.dropout.default
    )
    files = set()
    forms = [
        {},
        {"dropout": {dropout: 0.25}},
        {"frozen": ["4.weight"]},
        {"frozen_statistics": ["batch_norm"]},
    ]
    for form in forms:
        module = program.copy().module
        with trainable(module, **form):
            files.add(trained_file(tmp_path, module))
    for start in (
        Start(Threshold(0.05), 1.0),
        Start(Threshold(0.1), 1.0),
        Start(Threshold(0.05), 0.5),
    ):
        module = program.copy().module
        with trainable(module), ternarised(module, {"4.weight": start}):
            files.add(trained_file(tmp_path, module))
    assert len(files) == len(forms) + 3


def test_the_same_training_has_the_same_file_wherever_it_runs(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    assert len({trained_file(folder, model()) for folder in folders}) == 1


def test_addresses_are_no_part_of_the_name(tmp_path):
    class Scaled(nn.Linear):
        """Says where one of its parts lies."""

        def extra_repr(self):
            return f"hook={object()!r}"

    def scaled():
        torch.manual_seed(0)
        return Scaled(5, 3)

    held = [object() for _ in range(3)]
    folders = tmp_path / "a", tmp_path / "b"
    assert len({trained_file(folder, scaled()) for folder in folders}) == 1
    assert held


def damaged(path, change):
    """Write a file again, its tensors or its text changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        text = dict(file.metadata())
    change(tensors, text)
    save_file(tensors, path, text)


def drop(name):
    return lambda tensors, text: tensors.pop(name)


def put(name, tensor):
    return lambda tensors, text: tensors.update({name: tensor})


def say(**values):
    return lambda tensors, text: (text.clear(), text.update(values))


DAMAGES = {
    "a weight is missing": drop("module/0.weight"),
    "a weight of another shape": put("module/0.weight", torch.zeros(16, 6)),
    "a weight of another type": put("module/0.weight", torch.zeros(16, 5).double()),
    "no random state": drop("random"),
    "a short random state": put("random", torch.zeros(7, dtype=torch.uint8)),
    "a random state of numbers": put("random", torch.zeros(5056)),
    "no state of the generator": drop("generator"),
    "a bad state of the generator": put("generator", torch.zeros(7, dtype=torch.uint8)),
    "momentum of another shape": put("optimizer/momentum_buffer/0.weight", torch.zeros(3)),
    "momentum of no tensor": put("optimizer/momentum_buffer/9.weight", torch.zeros(3)),
    "momentum of a buffer": put("optimizer/momentum_buffer/1.running_mean", torch.zeros(16)),
    "momentum of nothing": put("optimizer/momentum_buffer", torch.zeros(3)),
    "no text": say(),
    "epochs that are no number": say(epochs='"two"'),
    "epochs that are no JSON": say(epochs="two"),
    "epochs below zero": say(epochs="-3"),
    "endless epochs": say(epochs="1e999"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_broken_file_is_reported_and_the_training_starts_anew(tmp_path, damage):
    generator = torch.Generator()
    x, y = problem()
    loader = DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=generator)
    expected, found = model(), model()
    Trainer(loader, epochs=2, workdir=tmp_path)(expected)
    (path,) = tmp_path.iterdir()
    damaged(path, damage)
    seen = []
    trainer = Trainer(
        loader, epochs=2, workdir=tmp_path, resume=True, progress=lambda d, *_: seen.append(d)
    )
    with pytest.warns(ShohinWarning, match=r"training-\w+\.safetensors is not used, and the"):
        trainer(found)
    assert seen == [1, 2]
    assert_same(state(found), state(expected))


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"\xff" * 100])
def test_a_foreign_file_is_reported_and_replaced(tmp_path, content):
    expected, found = model(), model()
    Trainer(batches(), epochs=2, workdir=tmp_path)(expected)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    with pytest.warns(ShohinWarning, match="is not used, and the training starts anew"):
        Trainer(batches(), epochs=2, workdir=tmp_path, resume=True)(found)
    assert_same(state(found), state(expected))
    assert load_file(path).keys() == load_file_bytes(whole, tmp_path).keys()


def load_file_bytes(content, folder):
    other = folder / "other.safetensors"
    other.write_bytes(content)
    return load_file(other)


def test_half_a_file_is_reported(tmp_path):
    expected, found = model(), model()
    Trainer(batches(), epochs=2, workdir=tmp_path)(expected)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.warns(ShohinWarning, match="is not used"):
        Trainer(batches(), epochs=2, workdir=tmp_path, resume=True)(found)
    assert_same(state(found), state(expected))


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("no pickles")

    for place in ((torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads")):
        monkeypatch.setattr(*place, refuse)
    trained = model()
    Trainer(batches(), epochs=2, optimizer="adam", workdir=tmp_path)(trained)
    again = model()
    Trainer(batches(), epochs=2, optimizer="adam", workdir=tmp_path, resume=True)(again)
    assert_same(state(again), state(trained))
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"epochs": json.dumps(2)}
        kinds = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118
    assert kinds == {"module", "optimizer", "random"}


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    trained = model()
    before = state(trained)
    with pytest.raises(ArtifactError) as caught:
        Trainer(batches(), workdir=tmp_path / "file" / "folder")(trained)
    assert str(caught.value) == (
        f"{tmp_path / 'file' / 'folder'}: cannot be made: not a directory; "
        "choose a folder that you may write to"
    )
    # Before the first epoch, not after it.
    assert_same(state(trained), before)


def test_a_file_that_cannot_be_written(tmp_path):
    trainer = Trainer(batches(), workdir=tmp_path)
    trainer(model())
    (path,) = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match="cannot be written: is a directory"):
        trainer(model())
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    from shohin.passes import checkpoints

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left on device"):
        Trainer(batches(), workdir=tmp_path)(model())
    assert list(tmp_path.iterdir()) == []
