import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import shohin
from shohin.errors import DivergedError, PassError, SpecError
from shohin.ir.capture import capture
from shohin.ir.program import tensor_of
from shohin.passes.trainer import Trainer


def problem(count=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def model(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, 3))


def batches():
    x, y = problem()
    return list(zip(x.split(16), y.split(16), strict=True))


def weights(module):
    return torch.cat([one.detach().flatten() for one in module.state_dict().values()])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("schedule", ["cosine", "step", "constant"])
def test_it_learns(optimizer, schedule):
    program = capture(model(), (torch.ones(2, 5),))
    trainer = Trainer(
        batches(), epochs=30, learning_rate=0.02, optimizer=optimizer, schedule=schedule
    )
    trainer(program.module)
    x, y = problem()
    assert float((program.module(x).argmax(1) == y).float().mean()) > 0.9
    assert not program.module.training


def test_a_captured_module_trains_like_the_model():
    plain, program = model(), capture(model(), (torch.ones(2, 5),))
    trainer = Trainer(batches(), epochs=3, learning_rate=0.05, weight_decay=1e-3, l1=1e-4)
    trainer(plain)
    trainer(program.module)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(parameter, tensor_of(program.module, name), atol=1e-6)
    mean = tensor_of(program.module, "1.running_mean")
    assert torch.allclose(plain[1].running_mean, mean, atol=1e-6)


def test_bfloat16_computes_in_mixed_precision():
    single, mixed = model(), model()
    seen = []
    mixed[0].register_forward_hook(lambda part, given, found: seen.append(found.dtype))
    options = {"learning_rate": 0.1, "momentum": 0.0, "schedule": "constant"}
    before = weights(single)
    Trainer(batches()[:1], **options)(single)
    Trainer(batches()[:1], precision="bfloat16", **options)(mixed)
    assert seen == [torch.bfloat16]
    assert all(one.dtype == torch.float32 for one in mixed.parameters())
    # 8 bits of mantissa, and some roundings one after the other.
    step = float((weights(single) - before).abs().max())
    assert 0 < float((weights(mixed) - weights(single)).abs().max()) < step * 2**-5


def test_the_seed_decides_everything():
    x, y = problem()
    loaders = [
        DataLoader(TensorDataset(x, y), 16, shuffle=True),
        DataLoader(TensorDataset(x, y), 16, shuffle=True, generator=torch.Generator()),
    ]
    for loader in loaders:
        found = []
        for seed in (1, 1, 2):
            trained = model(dropout=0.5)
            Trainer(loader, epochs=2, seed=seed)(trained)
            found.append(weights(trained))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])


def test_the_random_state_of_pytorch_stays():
    trained = model(dropout=0.5)
    before = torch.get_rng_state()
    Trainer(batches())(trained)
    assert torch.equal(before, torch.get_rng_state())


def test_penalties_are_on_weights_alone():
    x, y = problem()
    trained = nn.Linear(5, 3)
    bias = trained.bias.detach().clone()

    def nothing(output, label):
        return output.sum() * 0.0

    Trainer([(x, y)], learning_rate=0.1, momentum=0.0, l1=0.1, loss=nothing, schedule="constant")(
        trained
    )
    assert torch.equal(trained.bias.detach(), bias)
    plain = nn.Linear(5, 3)
    before = plain.weight.detach().clone()
    options = {"learning_rate": 0.1, "momentum": 0.0, "schedule": "constant", "loss": nothing}
    Trainer([(x, y)], l1=0.1, **options)(plain)
    assert torch.allclose(plain.weight.detach(), before - 0.01 * before.sign())
    before = plain.weight.detach().clone()
    Trainer([(x, y)], weight_decay=0.1, **options)(plain)
    assert torch.allclose(plain.weight.detach(), before * 0.99)


def test_progress():
    told = []
    Trainer(batches(), epochs=2, progress=lambda *what: told.append(what))(model())
    assert [what[:2] for what in told] == [(1, 2), (2, 2)]
    assert told[0][2].startswith("epoch 1 of 2, loss ")


def test_centroids_have_the_penalties_of_their_weights():
    program = capture(nn.Linear(5, 3), (torch.ones(2, 5),))
    shared = shohin.optimize(program, "share-weights{bits=1}", drift=False).program
    before = shared.encodings["weight"].centroids

    def nothing(output, label):
        return output.sum() * 0.0

    options = {"learning_rate": 0.1, "momentum": 0.0, "schedule": "constant", "loss": nothing}
    for penalty, expected in (
        ({"weight_decay": 0.1}, before * 0.99),
        ({"l1": 0.1}, before - 0.01 * before.sign()),
    ):
        train = Trainer([problem()], **penalty, **options)
        found = shohin.optimize(program, "share-weights{bits=1}", drift=False, train=train)
        assert torch.allclose(found.program.encodings["weight"].centroids, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops(bad):
    found = batches()
    x, y = found[2]
    found[2] = (x * bad, y)
    trained = model()
    before = weights(trained)
    with pytest.raises(DivergedError) as caught:
        Trainer(found)(trained)
    assert str(caught.value) == (
        "trainer: the loss is nan in epoch 1, batch 3; try a lower learning rate"
    )
    # Not the weights alone: the bad batch went into the running statistics before the loss.
    assert torch.equal(weights(trained), before)
    assert trained.training


def test_the_epochs_before_the_one_that_diverges_stay():
    found = batches()
    once, twice = model(), model()
    Trainer(found, schedule="constant")(once)
    bad = [*found, (found[0][0] * float("nan"), found[0][1])]

    class Later(list):
        """Batches with a bad one from the second epoch on."""

        def __iter__(self):
            self.epoch = getattr(self, "epoch", 0) + 1
            return iter(found if self.epoch == 1 else bad)

    with pytest.raises(DivergedError, match="the loss is nan in epoch 2, batch 5"):
        Trainer(Later(found), epochs=2, schedule="constant")(twice)
    assert torch.equal(weights(twice), weights(once))


def test_a_last_step_that_overflows_is_noticed():
    trained = model()
    before = weights(trained)
    with pytest.raises(DivergedError) as caught:
        Trainer(batches()[:1], learning_rate=1e38, schedule="constant", loss=_steep)(trained)
    assert str(caught.value) == (
        "trainer: 0.weight is NaN or infinite after epoch 1; try a lower learning rate"
    )
    assert torch.equal(weights(trained), before)


def _steep(output, label):
    return nn.functional.cross_entropy(output, label) * 1e20


def test_constants_may_be_infinite():
    class Capped(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 3)
            self.register_buffer("most", torch.full((3,), float("inf")))

        def forward(self, x):
            return torch.minimum(self.fc(x), self.most)

    Trainer(batches())(Capped())


def test_several_inputs_and_a_loss_of_ones_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(5, 1)

        def forward(self, a, b):
            return self.fc(a + b)

    x, _ = problem()
    seen = []

    def loss(output, label):
        seen.append(tuple(output.shape))
        return (output - label).square().mean()

    Trainer([(x, x, x[:, :1])], loss=loss)(Two())
    assert seen == [(64, 1)]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"epochs": 0}, "trainer epochs: expected 1 or more, got 0"),
        ({"learning_rate": 0.0}, "trainer learning_rate: expected above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "trainer learning_rate: expected above 0, got nan"),
        ({"momentum": 1.0}, "trainer momentum: expected from 0 to below 1, got 1.0"),
        ({"weight_decay": -1.0}, "trainer weight_decay: expected 0 or more, got -1.0"),
        ({"l1": -1.0}, "trainer l1: expected 0 or more, got -1.0"),
        ({"optimizer": "lion"}, "trainer optimizer: expected 'sgd' or 'adam', got 'lion'"),
        (
            {"schedule": "warm"},
            "trainer schedule: expected 'cosine', 'step' or 'constant', got 'warm'",
        ),
        (
            {"precision": "int8"},
            "trainer precision: expected 'float32' or 'bfloat16', got 'int8'",
        ),
    ],
)
def test_option_errors(options, text):
    with pytest.raises(SpecError) as caught:
        Trainer([], **options)
    assert str(caught.value) == text


def test_loader_errors():
    with pytest.raises(SpecError, match="again and again, got generator; give a DataLoader"):
        Trainer(one for one in batches())
    with pytest.raises(SpecError, match="expected at least one batch, got none"):
        Trainer([])(model())
    with pytest.raises(SpecError, match=r"epoch 1, batch 1: expected \(input, label\), got Tensor"):
        Trainer([torch.ones(2, 5)])(model())


def test_nothing_to_train():
    frozen = model().requires_grad_(False)
    with pytest.raises(PassError, match="nothing to train"):
        Trainer(batches())(frozen)


def test_it_is_public():
    assert shohin.Trainer is Trainer
