import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shohin
from shohin.errors import ArtifactError, DivergedError, ShohinWarning
from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.program import tensor_of, weight_names
from shohin.ir.ternarising import Start, ternarised
from shohin.ir.training import trainable
from shohin.passes.trainer import Trainer

EPOCHS = 4


class StoppedError(Exception):
    """What stops a training in the middle."""


def problem(count=48):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def model(seed=0, dropout=0.5):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def batches():
    x, y = problem()
    return list(zip(x.split(16), y.split(16), strict=True))


class Failing(list):
    """Batches that stop in the middle of a pass over them, counted from 1."""

    def __init__(self, found, at):
        super().__init__(found)
        self.left = at

    def __iter__(self):
        self.left -= 1
        yield self[0]
        if self.left == 0:
            raise StoppedError
        yield from self[1:]


def stop_after(epochs):
    def progress(done, total, label):
        if done == epochs:
            raise StoppedError

    return progress


def loaders(kind):
    """Batches for a whole training, for one that is interrupted, and for one that goes on."""
    x, y = problem()
    if kind == "list":
        return [batches() for _ in range(3)]
    if kind == "drawn by PyTorch":
        return [DataLoader(TensorDataset(x, y), 16, shuffle=True) for _ in range(3)]
    return [
        DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator())
        for _ in range(3)
    ]


def state(module):
    return {name: one.detach().clone() for name, one in module.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    assert all(same_bits(one[name], two[name]) for name in one)


OPTIONS = {
    "sgd": {"optimizer": "sgd", "weight_decay": 1e-3},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0},
    "adam": {"optimizer": "adam", "schedule": "step", "l1": 1e-4},
    "mixed precision": {"precision": "bfloat16"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", ["list", "drawn by PyTorch", "own generator"])
@pytest.mark.parametrize("captured", [False, True])
def test_it_goes_on_to_the_same_weights(tmp_path, options, kind, captured):
    whole, cut, again = loaders(kind)
    options = {"epochs": EPOCHS, "learning_rate": 0.05, **options}

    def start(trainer):
        made = model()
        if captured:
            made = capture(made.eval(), (torch.ones(2, 5),)).module
        trainer(made)
        return state(made)

    expected = start(Trainer(whole, **options))
    with pytest.raises(StoppedError):
        start(Trainer(cut, workdir=tmp_path, progress=stop_after(2), **options))
    seen = []
    found = start(
        Trainer(
            again,
            workdir=str(tmp_path),
            resume=True,
            progress=lambda done, total, label: seen.append(done),
            **options,
        )
    )
    assert seen == [3, 4]
    assert_same(found, expected)
    assert not same_bits(found["0.weight"], state(model())["0.weight"])


def test_an_epoch_that_was_begun_is_done_again(tmp_path):
    expected = model()
    Trainer(batches(), epochs=EPOCHS)(expected)
    with pytest.raises(StoppedError):
        Trainer(Failing(batches(), 3), epochs=EPOCHS, workdir=tmp_path)(model())
    seen = []
    resumed = model()
    Trainer(
        batches(),
        epochs=EPOCHS,
        workdir=tmp_path,
        resume=True,
        progress=lambda done, *_: seen.append(done),
    )(resumed)
    assert seen == [3, 4]
    assert_same(state(resumed), state(expected))


def test_a_training_that_is_over_is_not_done_again(tmp_path):
    trained, again = model(), model()
    Trainer(batches(), epochs=2, workdir=tmp_path)(trained)
    nothing = Failing(batches(), 1)
    Trainer(nothing, epochs=2, workdir=tmp_path, resume=True)(again)
    assert nothing.left == 1
    assert_same(state(trained), state(again))


def test_without_resume_it_starts_anew(tmp_path):
    seen = []
    trainer = Trainer(
        batches(), epochs=2, workdir=tmp_path, progress=lambda done, *_: seen.append(done)
    )
    trainer(model())
    trainer(model())
    assert seen == [1, 2, 1, 2]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_training_that_diverged_diverges_again(tmp_path):
    class Later(list):
        """Batches of which the last is bad from the second epoch on."""

        epoch = 0

        def __iter__(self):
            self.epoch += 1
            found = list(super().__iter__())
            return iter(found[:-1] if self.epoch == 1 else found)

    bad = (batches()[0][0] * float("nan"), batches()[0][1])
    trained = model()
    with pytest.raises(DivergedError) as caught:
        Trainer(Later([*batches(), bad]), epochs=3, workdir=tmp_path)(trained)
    assert caught.value.epochs == 1
    resumed, always = model(), Later([*batches(), bad])
    always.epoch = 1
    with pytest.raises(DivergedError, match="epoch 2, batch 4") as caught:
        Trainer(always, epochs=3, workdir=tmp_path, resume=True)(resumed)
    assert caught.value.epochs == 1
    assert_same(state(resumed), state(trained))


@pytest.mark.parametrize("resumed", [False, True])
def test_the_random_state_of_pytorch_stays(tmp_path, resumed):
    Trainer(batches(), workdir=tmp_path, epochs=2)(model())
    trained = model()
    before = torch.get_rng_state()
    Trainer(batches(), workdir=tmp_path, epochs=2, resume=resumed)(trained)
    assert torch.equal(before, torch.get_rng_state())


def test_frozen_parameters_and_buffers_that_no_dictionary_holds(tmp_path):
    class Counting(nn.Module):
        """Has a buffer of its own that decides what it computes."""

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.fc.bias.requires_grad_(False)
            self.register_buffer("steps", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.steps += 1
            return self.fc(x) * (1 + 0.1 * self.steps)

    def counting():
        torch.manual_seed(0)
        return Counting()

    expected, resumed = counting(), counting()
    Trainer(batches(), epochs=EPOCHS)(expected)
    cut = Trainer(batches(), epochs=EPOCHS, workdir=tmp_path, progress=stop_after(2))
    with pytest.raises(StoppedError):
        cut(counting())
    Trainer(batches(), epochs=EPOCHS, workdir=tmp_path, resume=True)(resumed)
    assert float(resumed.steps) == float(expected.steps) == 12
    assert_same(state(resumed), state(expected))


class Ordered(nn.Module):
    """Layers that are registered in some order, and two of which share their weights."""

    def __init__(self, order):
        super().__init__()
        torch.manual_seed(0)
        parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 8)}
        parts["c"].weight = parts["b"].weight
        parts["d"] = nn.Linear(8, 3)
        for name in order:
            self.add_module(name, parts[name])

    def forward(self, x):
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_order_of_parts_does_not_matter(tmp_path, optimizer):
    """A graph module holds its tensors in an order that is another in every process."""
    options = {"epochs": EPOCHS, "learning_rate": 0.05, "optimizer": optimizer}
    expected, resumed = Ordered("abcd"), Ordered("dcba")
    Trainer(batches(), **options)(expected)
    cut = Trainer(batches(), workdir=tmp_path, progress=stop_after(2), **options)
    with pytest.raises(StoppedError):
        cut(Ordered("abcd"))
    seen = []
    trainer = Trainer(
        batches(), workdir=tmp_path, resume=True, progress=lambda d, *_: seen.append(d), **options
    )
    trainer(resumed)
    assert seen == [3, 4]
    assert_same(state(resumed), state(expected))
    (path,) = tmp_path.iterdir()
    assert sum(name.startswith("module/") for name in load_file(path)) == 7


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
    for start in (Start(0.05, 1.0), Start(0.1, 1.0), Start(0.05, 0.5)):
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


PIPELINES = {
    "prune": ("prune{density=0.4 rounds=2}", (1, 4)),
    "prune one kind after the other": ("prune{density=0.4 rounds=2 retrain=fc-conv}", (2, 4, 8)),
    "share-weights": ("share-weights{bits=2}", (1, 2)),
    "share-weights that move": ("share-weights{bits=2 assignments=trained}", (1, 2)),
    "ternary": ("ternary", (1, 2)),
    "ternary after prune": (
        'prune{density=0.5 exclude=["0.weight"]}, ternary{keep_first=false}',
        (2, 5),
    ),
}
CUTS = [pytest.param(t, n, id=f"{k}, {n}") for k, (t, all_) in PIPELINES.items() for n in all_]


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    head = [nn.Linear(144, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3)]
    return capture(nn.Sequential(*layers, *head).eval(), (torch.ones(2, 1, 6, 6),))


def images():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(48, 1, 6, 6, generator=generator)
    return x, (x[:, 0, 0, 0] > 0).long() + (x[:, 0, 3, 3] > 0).long()


@pytest.mark.parametrize(("text", "stop"), CUTS)
def test_passes_go_on_within_a_training(tmp_path, text, stop):
    x, y = images()

    class Counted(list):
        """Batches that may stop at the begin of a pass over them, counted from all trainings."""

        passes = 0
        most = None

        def __iter__(self):
            if self.passes == self.most:
                raise StoppedError
            self.passes += 1
            return super().__iter__()

    def optimize(loader, **options):
        train = Trainer(loader, epochs=3, learning_rate=0.05)
        return shohin.optimize(network(), text, drift=False, train=train, **options).program

    whole, cut, rest = (Counted(zip(x.split(16), y.split(16), strict=True)) for _ in range(3))
    expected = optimize(whole)
    cut.most = stop
    with pytest.raises(shohin.PassError, match="raised StoppedError"):
        optimize(cut, workdir=tmp_path)
    found = optimize(rest, workdir=tmp_path, resume=True)
    # No epoch is trained twice.
    assert rest.passes == whole.passes - stop > 0
    assert found.encodings.keys() == expected.encodings.keys()
    for name in weight_names(expected):
        pair = (tensor_of(one.module, name).detach() for one in (found, expected))
        assert same_bits(*pair)


def test_a_folder_of_ones_own_is_used_by_passes(tmp_path):
    x, y = images()
    train = Trainer([(x, y)], workdir=tmp_path / "own")
    shohin.optimize(network(), "ternary", drift=False, train=train, workdir=tmp_path / "all")
    assert len(list((tmp_path / "own").glob("training-*.safetensors"))) == 1
    assert not list((tmp_path / "all").glob("training-*.safetensors"))


def test_other_thresholds_do_not_go_on_from_each_other(tmp_path):
    x, y = images()
    train = Trainer([(x, y)], epochs=2, learning_rate=0.05)

    def trained(threshold, folder):
        text = f"ternary{{threshold={threshold} start=ones keep_first=false}}"
        return shohin.optimize(
            network(), text, drift=False, train=train, workdir=folder, resume=True
        ).program

    trained(0.05, tmp_path)
    found = trained(0.3, tmp_path)
    expected = trained(0.3, tmp_path / "empty")
    for name in expected.encodings:
        one, two = (program.encodings[name] for program in (found, expected))
        assert same_bits(one.materialise(), two.materialise())
