import pytest
import torch
from interrupted_trainings import (
    EPOCHS,
    Failing,
    StoppedError,
    assert_same,
    batches,
    loaders,
    model,
    state,
    stop_after,
)
from safetensors.torch import load_file
from torch import nn

import shohin
from shohin.errors import DivergedError
from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.program import tensor_of, weight_names
from shohin.passes.trainer import Trainer

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
