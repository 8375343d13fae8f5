import warnings
from dataclasses import replace

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import shohin
from shohin.errors import DivergedError, ShohinWarning, SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.program import Fact, tensor_of, weight_names
from shohin.ir.serialise import content_hash
from shohin.ir.verifier import verify
from shohin.passes.base import Context
from shohin.passes.manager import PassManager
from shohin.passes.prune import Prune
from shohin.passes.pruning.candidates import find_candidates
from shohin.passes.pruning.dropout import scaled_dropout
from shohin.passes.pruning.freezing import members
from shohin.passes.trainer import Trainer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn(self.conv(x))).flatten(1)
        return self.fc(self.drop(y))


def net():
    torch.manual_seed(0)
    return capture(Net(), (torch.ones(2, 1, 8, 8),))


def batches(count=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16 * count, 1, 8, 8, generator=generator)
    y = torch.randint(10, (16 * count,), generator=generator)
    return list(zip(x.split(16), y.split(16), strict=True))


def trainer(**options):
    return Trainer(batches(), **{"epochs": 1, "learning_rate": 0.01, **options})


def run(chosen, program, **context):
    """Run the pass as the manager does; the program and the remarks."""
    given = Context(**context)
    chosen.validate()
    return PassManager([chosen]).run(program, given), given.remarks


def assert_masked(program):
    for name, encoding in program.encodings.items():
        weight = tensor_of(program.module, name).detach()
        assert isinstance(encoding, Sparse)
        assert same_bits(encoding.materialise(), weight)
        assert not weight[~encoding.mask].any()


def densities(program):
    return {name: float(one.mask.double().mean()) for name, one in program.encodings.items()}


# ---------------------------------------------------------------- schedule


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("granularity", ["element", "block", "channel"])
def test_densities_go_down_geometrically_to_the_exact_ones(scope, granularity):
    program, seen = net(), []

    def train(module):
        masks = [part.dropped for part in module.modules() if hasattr(part, "dropped")]
        total = sum(mask.numel() for mask in masks)
        seen.append(1 - sum(int(mask.sum()) for mask in masks) / total)

    chosen = Prune(density=0.25, rounds=2, scope=scope, granularity=granularity, block="2x1")
    chosen = chosen if granularity == "block" else replace(chosen, block="16x1")
    after, _ = run(chosen, program, train=train)
    assert len(seen) == 2
    assert_masked(after)
    if granularity == "element":
        assert seen[0] == pytest.approx(0.5, abs=1e-3)
        total = sum(encoding.mask.numel() for encoding in after.encodings.values())
        kept = sum(int(encoding.mask.sum()) for encoding in after.encodings.values())
        assert kept == round(0.25 * total)
    if granularity == "channel" and scope == "layer":
        rows = after.encodings["conv.weight"].mask.flatten(1)
        assert rows.any(1).sum() == rows.all(1).sum() == 2


def test_masks_only_ever_shrink():
    program, masks = net(), []

    def train(module):
        found = module.fc.parametrizations.weight[0].dropped.clone()
        assert not masks or bool((found | ~masks[-1]).all())
        masks.append(found)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))

    after, _ = run(Prune(density=0.1, rounds=5), program, train=train)
    assert [int((~mask).sum()) for mask in masks] == [
        round(2880 * 0.1 ** (index / 5)) for index in range(1, 6)
    ]
    assert densities(after)["fc.weight"] == pytest.approx(0.1)


def test_quality_is_a_threshold_in_standard_deviations():
    program = net()
    weight = tensor_of(program.module, "fc.weight").detach()
    after, _ = run(Prune(quality=0.7), program)
    wanted = weight.abs() >= 0.7 * weight.double().std(correction=0)
    assert torch.equal(after.encodings["fc.weight"].mask, wanted)
    after, _ = run(Prune(quality=0.7, densities={"fc.weight": 0.5}), program)
    assert densities(after)["fc.weight"] == 0.5


def test_a_quality_goes_on_to_the_last_round():
    torch.manual_seed(0)
    program, calls = capture(nn.Linear(10, 10), (torch.ones(2, 10),)), []
    after, remarks = run(Prune(quality=3.0, rounds=4), program, train=calls.append)
    assert after.encodings["weight"].nonzeros() == 1
    notes = [remark.detail for remark in remarks if remark.reason == "round"]
    assert len(notes) == 4
    assert len(calls) == sum("weights left" in note for note in notes) < 4
    assert notes[3] == "round 4 of 4: there is nothing to drop, so nothing is retrained"


@pytest.mark.parametrize("rounds", [1, 5])
def test_small_layers_keep_one_whatever_the_rounds(rounds):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 30))
    program = capture(network, (torch.ones(2, 1),))
    after, _ = run(Prune(density=0.1, rounds=rounds), program, train=lambda module: None)
    assert {name: one.nonzeros() for name, one in after.encodings.items()} == {
        "0.weight": 1,
        "2.weight": 12,
    }


@pytest.mark.parametrize(
    "options", [{"rounds": 3}, {"rounds": 3, "method": "obs"}, {"method": "obs"}]
)
def test_global_scope_keeps_exactly_its_share(options):
    torch.manual_seed(1)
    layers = [nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10), nn.ReLU(), nn.Linear(10, 1)]
    network = nn.Sequential(*layers, nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        network[0].weight.mul_(1e-3)
    data = torch.randn(64, 20)
    program = capture(network, (data[:2],))
    given = {"train": lambda module: None} if "rounds" in options else {}
    after, _ = run(
        Prune(density=0.1, scope="global", **options), program, calibration=[(data,)], **given
    )
    left = [int(tensor_of(after.module, f"{i}.weight").count_nonzero()) for i in (0, 2, 4, 5)]
    assert sum(left) == round(0.1 * (600 + 300 + 10 + 2))
    assert min(left) >= 1
    assert_masked(after)


def test_first_and_last():
    program = net()
    after, _ = run(Prune(density=0.1, first=0.5, last=0.25), program)
    assert densities(after) == {"conv.weight": 0.5, "fc.weight": 0.25}
    after, _ = run(Prune(density=0.1, first=0.5, densities={"conv*": 0.25}), program)
    assert densities(after)["conv.weight"] == 0.25


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_masks_survive_training(optimizer):
    after, remarks = run(
        Prune(density=0.2, rounds=2),
        net(),
        train=trainer(epochs=3, optimizer=optimizer, weight_decay=0.1, l1=1e-3),
        evaluate=lambda module: 0.5,
    )
    assert_masked(after)
    verify(after)
    assert densities(after)["fc.weight"] == 0.2
    rounds = [remark for remark in remarks if remark.reason == "round"]
    assert [remark.extra["evaluation"] for remark in rounds] == [0.5, 0.5]
    assert rounds[1].detail.startswith("round 2 of 2: 590 of 2,952 weights left (20.0%), evalu")


def test_batch_normalisation_trains_and_the_graph_is_as_before():
    program = net()
    after, _ = run(Prune(density=0.5), program, train=trainer())
    for name in ("bn.running_mean", "bn.weight"):
        now, then = (tensor_of(one.module, name) for one in (after, program))
        assert not torch.equal(now, then)
    assert str(after.graph) == str(program.graph)
    assert not after.module.training


def test_one_shot_without_a_training_function_or_against_it():
    program = net()
    plain, _ = run(Prune(density=0.5), program)
    refused, remarks = run(Prune(density=0.5, retrain="none"), program, train=trainer())
    assert content_hash(replace(plain, history=())) == content_hash(replace(refused, history=()))
    assert {remark.reason for remark in remarks} == {"pruned"}


def test_full_density_does_not_train():
    def train(module):
        raise AssertionError("there is nothing to retrain")

    program = net()
    after, _ = run(Prune(density=1.0, rounds=2), program, train=train)
    assert not after.encodings


@pytest.mark.parametrize(
    ("order", "stages"), [("fc-conv", ["fc", "conv"]), ("conv-fc", ["conv", "fc"])]
)
def test_freezing_really_freezes(order, stages):
    program, changes = net(), []

    def train(module):
        before = {name: one.clone() for name, one in module.state_dict().items()}
        Trainer(batches(), epochs=2, learning_rate=0.1, weight_decay=0.1)(module)
        after = module.state_dict()
        changes.append({name for name in before if not torch.equal(before[name], after[name])})

    run(Prune(density=0.5, retrain=order), program, train=train)
    expected = {
        "fc": {"fc.parametrizations.weight.original", "fc.bias"},
        "conv": {
            "conv.parametrizations.weight.original",
            "bn.weight",
            "bn.bias",
            "bn.running_mean",
            "bn.running_var",
        },
    }
    assert changes == [expected[stage] for stage in stages]


def test_a_network_of_one_kind_of_layer_trains_once():
    calls = []
    program = capture(nn.Linear(8, 8), (torch.ones(2, 8),))
    run(Prune(density=0.5, retrain="fc-conv"), program, train=lambda module: calls.append(module))
    assert len(calls) == 1


def test_members():
    program = net()
    conv, fc = (members(program, group) for group in ("conv", "fc"))
    assert set(conv.weights) == {
        *("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    }
    assert fc.weights == ("fc.weight", "fc.bias")
    assert conv.norms == ("batch_norm",)
    assert (conv.layers, fc.layers) == (1, 1)


def test_dropout_shrinks_with_the_layer_it_feeds():
    program = net()
    mask = torch.zeros(10, 288, dtype=torch.bool)
    mask[:, ::4] = True
    found = scaled_dropout(program, find_candidates(program), {"fc.weight": mask})
    assert found == {"dropout": pytest.approx(0.5 * 0.25**0.5)}


@pytest.mark.parametrize("adjusted", [True, False])
def test_dropout_while_retraining(adjusted):
    program, found = net(), []

    def train(module):
        (node,) = module.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
        found.append(node.args[1])

    after, _ = run(Prune(density=0.25, rounds=2, dropout=adjusted), program, train=train)
    expected = [0.5 * 0.5**0.5, 0.25] if adjusted else [0.5, 0.5]
    assert found == pytest.approx(expected, abs=1e-3)
    (node,) = after.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert node.args[1:] == (0.5, False)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.relu(functional.linear(x, self.weight)), self.weight)


def test_shared_weights_train_with_one_mask():
    torch.manual_seed(0)
    program = capture(Shared(), (torch.ones(2, 6),))
    x = torch.randn(16, 6)
    train = Trainer([(x, torch.randint(6, (16,)))], epochs=3)
    after, remarks = run(Prune(density=0.5, rounds=2), program, train=train)
    assert_masked(after)
    assert densities(after) == {"weight": 0.5}
    assert [remark.reason for remark in remarks if remark.outcome == "changed"] == ["pruned"]


def test_weights_of_two_names_are_pruned_once():
    torch.manual_seed(0)
    program = capture(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), (torch.ones(2, 6),))
    program.module.get_submodule("1").weight = program.module.get_submodule("0").weight
    x = torch.randn(16, 6)
    train = Trainer([(x, torch.randint(6, (16,)))], epochs=3)
    after, remarks = run(Prune(density=0.5, rounds=2), program, train=train)
    assert_masked(after)
    assert densities(after) == {"0.weight": 0.5, "1.weight": 0.5}
    first, second = (tensor_of(after.module, name) for name in after.encodings)
    assert first is second
    assert sum(remark.outcome == "changed" for remark in remarks) == 1


def test_weights_that_were_sparse_before_stay_so():
    program, _ = run(Prune(density=0.3, exclude=("fc.weight",)), net())
    after, _ = run(Prune(density=0.2, exclude=("conv.weight",)), program, train=trainer())
    assert_masked(after)
    old, new = (one.encodings["conv.weight"] for one in (program, after))
    assert torch.equal(old.mask, new.mask)
    assert not torch.equal(old.values.values, new.values.values)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("rounds_before", [0, 1])
def test_divergence_keeps_the_last_good_state(rounds_before):
    program, calls, states = net(), [], []

    def train(module):
        calls.append(module)
        if len(calls) > rounds_before:
            Trainer([(x * float("nan"), y) for x, y in batches()])(module)
        trainer()(module)

    def evaluate(module):
        states.append({name: one.clone() for name, one in module.state_dict().items()})
        return 1.0

    with pytest.warns(ShohinWarning, match="the loss is nan in epoch 1, batch 1"):
        after, remarks = run(Prune(density=0.04, rounds=3), program, train=train, evaluate=evaluate)
    assert len(calls) == rounds_before + 1
    (note,) = [remark for remark in remarks if remark.reason == "diverged"]
    assert note.outcome == "noted"
    if rounds_before == 0:
        assert not after.encodings
        assert Fact.PRUNED not in after.facts
        assert note.detail == (
            "round 1 of 3: the loss is nan in epoch 1, batch 1; the weights are those from before "
            "the pruning, and no further round begins; try a lower learning rate"
        )
        assert {remark.reason for remark in remarks} == {"diverged", "not-finite"}
        for name in weight_names(program):
            assert same_bits(tensor_of(after.module, name), tensor_of(program.module, name))
    else:
        assert_masked(after)
        assert Fact.PRUNED in after.facts
        assert densities(after)["fc.weight"] == pytest.approx(0.04 ** (1 / 3), abs=1e-3)
        for name, kept in states[-1].items():
            assert same_bits(after.module.state_dict()[name], kept)


def test_weights_that_are_not_finite_after_training_count_as_divergence():
    def train(module):
        with torch.no_grad():
            module.bn.running_var.fill_(float("inf"))

    with pytest.warns(ShohinWarning, match=r"8 elements of bn\.running_var are NaN or infinite"):
        after, _ = run(Prune(density=0.5), net(), train=train)
    assert not after.encodings


# ---------------------------------------------------------------- resuming


def interrupted(count):
    """A training function that is interrupted in a round."""
    calls = []

    def train(module):
        calls.append(module)
        if len(calls) > count:
            raise KeyboardInterrupt
        noisy(module)

    return train


def noisy(module):
    """Training that draws random numbers of its own."""
    Trainer(batches(), epochs=1, learning_rate=0.01 + 0.01 * float(torch.rand(())))(module)


@pytest.mark.parametrize(
    ("options", "calls"), [({}, 1), ({"scope": "global", "retrain": "fc-conv"}, 3)]
)
def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, options, calls):
    chosen, program = Prune(density=0.1, rounds=3, **options), net()
    folders = [tmp_path / name for name in ("whole", "cut")]
    given = {
        "evaluate": lambda module: float(module.fc.bias.detach().sum()),
        "resume": True,
        "seed": 3,
    }
    whole, whole_remarks = run(chosen, program, train=noisy, workdir=folders[0], **given)
    with pytest.raises(KeyboardInterrupt):
        run(chosen, program, train=interrupted(calls), workdir=folders[1], **given)
    again = []

    def counted(module):
        again.append(module)
        noisy(module)

    cut, cut_remarks = run(chosen, program, train=counted, workdir=folders[1], **given)
    assert content_hash(whole) == content_hash(cut)
    assert whole_remarks == cut_remarks
    assert len(again) == (4 if options else 2)


def test_other_runs_do_not_take_the_state(tmp_path):
    program, calls = net(), []

    def train(module):
        calls.append(module)

    given = {"train": train, "workdir": tmp_path}
    run(Prune(density=0.1, rounds=2), program, **given)
    assert len(calls) == 2
    run(Prune(density=0.1, rounds=2), program, resume=True, **given)
    assert len(calls) == 2
    run(Prune(density=0.1, rounds=2), program, **given)
    assert len(calls) == 4
    run(Prune(density=0.2, rounds=2), program, resume=True, **given)
    assert len(calls) == 6
    run(Prune(density=0.1, rounds=2), program, resume=True, seed=1, **given)
    assert len(calls) == 8


def test_a_broken_state_is_reported_and_made_anew(tmp_path):
    program = net()
    given = {"train": trainer(), "workdir": tmp_path, "resume": True}
    first, _ = run(Prune(density=0.1, rounds=2), program, **given)
    (file,) = tmp_path.glob("prune-rounds-*.shohin")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(ShohinWarning, match="state of the rounds is not used"):
        second, _ = run(Prune(density=0.1, rounds=2), program, **given)
    assert content_hash(first) == content_hash(second)


# ---------------------------------------------------------------- what is refused


HINT = "give train=shohin.Trainer(loader, epochs=...), or --train on the command line"


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (
            Prune(rounds=5),
            "prune rounds: 5 rounds retrain in between and need a train function, got none; "
            f"{HINT}",
        ),
        (
            Prune(retrain="all"),
            f"prune retrain: 'all' needs a train function, got none; {HINT}",
        ),
        (
            Prune(method="obs"),
            "prune method: 'obs' needs calibration batches, got none; "
            "give calibration=[(inputs,), ...], or --data on the command line",
        ),
        (
            Prune(scope="sensitivity", target_macs=0.1),
            "prune scope: 'sensitivity' needs an evaluate function, got none; "
            "give evaluate=..., or --evaluate on the command line",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_runs(chosen, text):
    with pytest.raises(SpecError) as caught:
        PassManager([Prune(density=0.5), chosen]).run(net(), Context())
    assert str(caught.value) == text


def test_errors_of_the_training_function_come_through():
    def train(module):
        raise ValueError("my own mistake")

    with pytest.raises(shohin.PassError, match="my own mistake"):
        run(Prune(density=0.5), net(), train=train)


def test_divergence_is_an_error_of_its_own():
    assert issubclass(DivergedError, shohin.PassError)


# ---------------------------------------------------------------- other methods


def test_obd_keeps_the_largest_saliencies():
    from shohin.passes.pruning.obd import saliencies

    program = net()
    calibration = [(x,) for x, _ in batches()]
    found = saliencies(program, ["fc.weight"], calibration)["fc.weight"]
    after, _ = run(
        Prune(method="obd", density=0.1, exclude=("conv.weight",)),
        program,
        calibration=calibration,
    )
    mask = after.encodings["fc.weight"].mask
    assert int(mask.sum()) == 288
    assert found[mask].min() >= found[~mask].max()
    assert_masked(after)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_obs_corrects_what_it_keeps(scope):
    program = net()
    calibration = [(x,) for x, _ in batches()]
    x = calibration[0][0]
    chosen = {"density": 0.3, "scope": scope}
    outputs = {}
    for method in ("magnitude", "obs"):
        after, _ = run(Prune(method=method, **chosen), program, calibration=calibration)
        verify(after)
        assert_masked(after)
        outputs[method] = after.module(x)
        # A weight may be kept whole, and has no mask then.
        kept = (tensor_of(after.module, name) for name in ("conv.weight", "fc.weight"))
        assert sum(int(one.count_nonzero()) for one in kept) == pytest.approx(0.3 * 2952, abs=2)
    wanted = program.module(x)
    errors = {name: float((found - wanted).square().mean()) for name, found in outputs.items()}
    assert errors["obs"] < 0.5 * errors["magnitude"]


# ---------------------------------------------------------------- digits


def test_digits_pruned_to_a_tenth():
    data, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(data).float().view(-1, 1, 8, 8) / 16
    y = torch.from_numpy(labels)
    torch.manual_seed(0)
    order = torch.randperm(len(y))
    train, test = order[:1300], order[1300:]
    loader = [(x[part], y[part]) for part in train.split(50)]
    program = capture(Net(), (x[:2],))
    learn = Trainer(loader, epochs=8, learning_rate=0.05, weight_decay=1e-4)
    learn(program.module)

    def evaluate(module):
        with torch.no_grad():
            return float((module(x[test]).argmax(1) == y[test]).float().mean())

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = shohin.optimize(
            program,
            "prune{density=0.1 rounds=3 densities={conv.weight: 0.5}}, fold-bn",
            train=replace(learn, epochs=4, learning_rate=0.02),
            evaluate=evaluate,
        )
    found = result.report.evaluation
    assert found.before > 0.93
    assert found.after > found.before - 0.02
    assert result.program.encodings["fc.weight"].density == 0.1
