import json
import math
from dataclasses import replace

import pytest
import torch
from ternary_networks import assert_stored_exactly, batches, encoded, make, notes, small, trainer

from shohin.errors import DivergedError, PassError, ShohinWarning
from shohin.ir.encodings import same_bits
from shohin.passes.base import Context
from shohin.passes.ternarising.history import HISTORY
from shohin.passes.ternary import TrainTernary
from shohin.passes.trainer import Trainer


class Later(list):
    """Batches with a bad one, from a pass over them on that is counted from 1."""

    def __init__(self, found, since):
        super().__init__(found)
        self.passes, self.since = 0, since

    def __iter__(self):
        self.passes += 1
        yield from super().__iter__()
        if self.passes >= self.since:
            x, y = self[0]
            yield x * float("nan"), y


def test_a_training_that_diverges_stops_and_keeps_the_last_good_epoch(tmp_path):
    good = Trainer(batches(end=128), epochs=2, learning_rate=0.02, schedule="constant")
    expected = make(train=good).program
    train = replace(good, loader=Later(batches(end=128), 3), epochs=5)
    text = (
        r"trainer: the loss is nan in epoch 3, batch 3; try a lower learning rate; "
        r"the weights are those after epoch 2"
    )
    with pytest.warns(ShohinWarning, match=f"ternary, {text}"):
        result = make(train=train, workdir=tmp_path)
    (note,) = notes(result, "diverged")
    assert note.endswith("the weights are those after epoch 2")
    assert_stored_exactly(result.program)
    for name in expected.encodings:
        one, two = (program.encodings[name] for program in (result.program, expected))
        assert same_bits(one.materialise(), two.materialise())
    assert [point["epoch"] for point in json.loads((tmp_path / HISTORY).read_text())] == [0, 1, 2]


def test_a_training_that_goes_on_and_diverges_keeps_what_it_had(tmp_path):
    train = trainer(epochs=4, schedule="constant")

    def optimize(since, **options):
        loader = Later(batches(end=128), since)
        with pytest.warns(ShohinWarning, match="the weights are those after epoch 2"):
            return make(train=replace(train, loader=loader), workdir=tmp_path, **options).program

    first = optimize(3)
    for path in tmp_path.glob("*.shohin"):
        path.unlink()
    second = optimize(1, resume=True)
    for name in first.encodings:
        one, two = (program.encodings[name] for program in (first, second))
        assert same_bits(one.materialise(), two.materialise())


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_without_a_good_epoch_is_an_error(tmp_path, resume):
    """Even where the folder has the curves of another training."""
    make(workdir=tmp_path)
    program = small()
    before = {name: one.clone() for name, one in program.module.state_dict().items()}
    context = Context(train=trainer(learning_rate=1e30), workdir=tmp_path, resume=resume)
    with pytest.raises(DivergedError, match=r"trainer: .* (after|in) epoch 1"):
        TrainTernary().run(program, context)
    assert all(torch.equal(one, before[n]) for n, one in program.module.state_dict().items())
    with pytest.raises(PassError, match=r"pass 'ternary' \(1 of 1\): raised DivergedError"):
        make(train=trainer(learning_rate=1e30), workdir=tmp_path)


def poison(name, value=float("nan")):
    """A training function of a user that spoils a parameter without looking."""

    def train(module):
        with torch.no_grad():
            dict(module.named_parameters())[name].view(-1)[3] = value

    return train


@pytest.mark.parametrize(
    ("train", "text"),
    [
        (
            poison("7.parametrizations.weight.original"),
            "training of ternary weights: 1 latent elements of 7.weight are NaN or infinite; try a "
            "lower learning rate",
        ),
        (
            poison("7.parametrizations.weight.original", -math.inf),
            "training of ternary weights: 1 latent elements of 7.weight are NaN or infinite; try a "
            "lower learning rate",
        ),
        (
            poison("9.bias"),
            "training of ternary weights: 1 elements of 9.bias are NaN or infinite; try a lower "
            "learning rate",
        ),
    ],
)
def test_what_a_training_function_spoils_is_noticed(train, text):
    program = small()
    before = {name: one.clone() for name, one in program.module.state_dict().items()}
    with pytest.raises(DivergedError) as caught:
        TrainTernary().run(program, Context(train=train))
    assert str(caught.value) == text
    assert all(torch.equal(one, before[n]) for n, one in program.module.state_dict().items())


def test_scales_that_are_not_finite_are_noticed():
    def train(module):
        with torch.no_grad():
            module.get_submodule("7").parametrizations.weight[0].scales[1] = math.inf

    with pytest.raises(DivergedError, match=r"elements of 7\.weight are NaN or infinite"):
        TrainTernary().run(small(), Context(train=train))


def test_an_error_of_the_training_function_leaves_a_plain_module():
    def fail(module):
        raise ZeroDivisionError

    program = small()
    names = set(dict(program.module.named_parameters()))
    with pytest.raises(ZeroDivisionError):
        TrainTernary().run(program, Context(train=fail))
    assert set(dict(program.module.named_parameters())) == names
    assert not program.module.training


def test_a_diverged_training_of_ones_own_that_has_good_weights():
    """A function around a `Trainer` is believed as well."""
    inner = replace(trainer(schedule="constant"), loader=Later(batches(end=128), 2), epochs=3)
    with pytest.warns(ShohinWarning, match="the weights are those after epoch 1"):
        result = make(train=lambda module: inner(module))
    assert encoded(result.program) == {"4.weight", "7.weight"}
