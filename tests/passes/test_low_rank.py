from dataclasses import replace

import pytest
import torch
from low_rank_networks import (
    batches,
    changed,
    images,
    lack,
    outputs,
    skipped,
    small,
    split,
    weights,
)
from torch import nn

import shohin
from shohin.errors import PassError, ShohinWarning, SpecError
from shohin.ir.encodings import Dense
from shohin.ir.program import Fact, tensor_of
from shohin.passes.base import Context
from shohin.passes.low_rank import LowRank
from shohin.passes.remarks import Reason


@pytest.mark.parametrize(
    ("scheme", "ranks"),
    [
        ("channel", "ranks={0.weight: 8, 2.weight: 16}"),
        ("spatial", "spatial_ranks={0.weight: 6, 2.weight: 16}"),
        ("3d", "ranks={0.weight: 8, 2.weight: 12} spatial_ranks={0.weight: 6, 2.weight: 16}"),
        ("bottleneck", "ranks={2.weight: 12} inner_ranks={2.weight: 8}"),
    ],
)
def test_golden(golden, scheme, ranks):
    program = small()
    result = split(program, f"scheme={scheme} solver=weights {ranks}", calibration=())
    golden(f"low_rank_{scheme}", program, result.program)


FULL = {
    "channel": "ranks={0.weight: 24, 2.weight: 32, 6.weight: 10}",
    "spatial": "spatial_ranks={0.weight: 12, 2.weight: 72}",
    "3d": "ranks={0.weight: 24, 2.weight: 32, 6.weight: 10} "
    "spatial_ranks={0.weight: 12, 2.weight: 72}",
    "bottleneck": "ranks={0.weight: 24, 2.weight: 32, 6.weight: 10} "
    "inner_ranks={0.weight: 4, 2.weight: 24}",
}


@pytest.mark.parametrize("solver", ["weights", "linear", "nonlinear", "asymmetric"])
@pytest.mark.parametrize("scheme", FULL)
def test_at_full_rank_nothing_is_lost(scheme, solver):
    program = small()
    result = split(program, f"scheme={scheme} solver={solver} {FULL[scheme]}")
    assert len(changed(result)) == (2 if scheme == "spatial" else 3)
    # The damping, 1e-6 of the mean variance, moves weights by no more than its root.
    assert lack(program, result.program) < 1e-6


@pytest.mark.parametrize("place", [{"stride": 2}, {"dilation": (2, 1), "padding": (2, 0)}])
@pytest.mark.parametrize("padding", [None, "valid", "same"])
def test_chains_move_and_pad_as_the_layer_did(place, padding):
    if padding is not None:
        place = {"padding": padding} | ({} if padding == "same" else {"stride": (2, 1)})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), **place), nn.ReLU())
    program = shohin.capture(model, torch.ones(2, 4, 10, 10), name="one")
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    for scheme, ranks in {
        "channel": "ranks={0.weight: 6}",
        "spatial": "spatial_ranks={0.weight: 12}",
        "3d": "ranks={0.weight: 6} spatial_ranks={0.weight: 12}",
        "bottleneck": "ranks={0.weight: 6} inner_ranks={0.weight: 4}",
    }.items():
        result = split(program, f"scheme={scheme} solver=weights {ranks}", calibration=())
        assert torch.allclose(outputs(result.program), outputs(program), atol=1e-5)


def test_solvers_are_in_the_published_order():
    """Inputs that lie on few axes, as real ones do, so that responses do, too."""
    program = small()
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(10, 400, generator=generator)

    def drawn(count):
        return (torch.randn(count, 10, generator=generator) @ basis).view(count, 4, 10, 10) / 3

    calibration, held_out = [(drawn(300),)], drawn(200)
    ranks = "ranks={0.weight: 6, 2.weight: 8} positions=20"
    with torch.inference_mode():
        wanted = program.module(held_out)
        errors = {}
        for solver in ("weights", "linear", "nonlinear", "asymmetric"):
            result = split(program, f"solver={solver} {ranks}", calibration=calibration)
            found = result.program.module(held_out)
            errors[solver] = float((found - wanted).square().sum() / wanted.square().sum())
    assert errors["asymmetric"] < errors["nonlinear"] < errors["linear"] < errors["weights"]


def test_remarks_say_what_was_done_and_what_it_costs():
    result = split(small(), "ranks={2.weight: 12}")
    (remark,) = changed(result).values()
    assert remark.reason == "split"
    assert "rank 12 of 32" in remark.detail
    assert "% of the energy; error" in remark.detail
    assert "after the ReLU" in remark.detail
    assert remark.before.macs == 100 * 32 * 24 * 9
    assert remark.after.macs == 100 * (12 * 24 * 9 + 32 * 12)
    assert 0 < remark.extra["error"] < 1
    assert "no rank in the options" in skipped(result)["conv2d"].detail


def test_responses_that_others_read_are_reproduced_as_they_are():
    torch.manual_seed(0)

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Conv2d(4, 16, 3, padding=1)
            self.two = nn.Conv2d(16, 16, 3, padding=1)

        def forward(self, x):
            first = torch.relu(self.one(x))
            return torch.nn.functional.elu(self.two(first) + first)

    program = shohin.capture(Residual(), torch.ones(2, 4, 10, 10))
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    found = changed(split(program, "ranks={two.weight: 5, one.weight: 5}"))
    assert (
        "reproduced as it is, without a ReLU: aten.add.Tensor reads it" in found["conv2d_1"].detail
    )
    assert "after the ReLU" in found["conv2d"].detail


def refusals():
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 3, padding=1)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        shared,
        nn.ReLU(),
        shared,
        nn.ConvTranspose2d(8, 8, 3),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 3),
    )
    program = shohin.capture(model, torch.ones(2, 4, 10, 10), name="odd")
    return replace(program, facts=program.facts | {Fact.BN_FOLDED})


def test_layers_that_cannot_be_split_are_left_with_a_reason():
    with pytest.raises(PassError, match="speedup"):
        split(refusals(), "speedup=2")
    found = skipped(split(refusals(), "speedup=1"))
    texts = {remark.detail for remark in found.values()}
    assert any("has 2 groups" in text for text in texts)
    assert any("is shared by conv2d_1, conv2d_2" in text for text in texts)
    assert any("aten.conv_transpose2d" in text for text in texts)
    assert any("aten.conv1d" in text for text in texts)


def test_sparse_weights_are_left():
    program = small()
    pruned = shohin.optimize(program, "prune{densities={2.weight: 0.5}}", drift=False).program
    found = skipped(split(pruned, "ranks={0.weight: 8}"))
    assert found["conv2d_1"].reason == Reason.ALREADY_ENCODED


def test_layers_that_always_respond_alike_are_left():
    program = small()
    with torch.no_grad():
        tensor_of(program.module, "0.weight").zero_()
    found = skipped(split(program, "speedup=1.1 exclude=[6.weight]"))
    assert "its responses are the same on all calibration batches" in found["conv2d"].detail


def test_only_some_sites_may_be_changed():
    program = small()
    context = Context(calibration=batches(), site_filter=lambda name: name == "conv2d_1")
    chosen = LowRank(ranks={"*.weight": 6}, compare="macs")
    result = chosen.run(program.copy(), context)
    assert set(weights(result.program)) == {
        *("0.weight", "0.bias", "2.factors.0.weight", "2.factors.1.weight", "2.factors.1.bias"),
        *("6.weight", "6.bias"),
    }


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    paths = [tmp_path / f"{index}.shohin" for index in range(3)]
    for index, seed in enumerate((1, 1, 2)):
        split(small(), "speedup=2 scheme=3d multiple=4 positions=5", seed=seed).save(paths[index])
    first, second, other = (path.read_bytes() for path in paths)
    assert first == second != other


def test_few_samples_are_noted_with_how_many_would_do():
    result = split(small(), "ranks={2.weight: 8} positions=2", calibration=batches(12))
    (note,) = (r for r in result.report.remarks if r.reason == "few-samples")
    assert note.extra == {"samples": 24, "features": 32, "needed": 32}
    assert "32 examples would do, or more positions of each" in note.detail


def test_it_trains_afterwards():
    program, seen = small(), []

    def train(module):
        seen.append([name for name, _ in module.named_parameters()])
        with torch.no_grad():
            module.get_parameter("2.factors.1.bias").fill_(0.5)

    result = split(program, "ranks={2.weight: 8}", train=train)
    assert "2.factors.0.weight" in seen[0]
    assert bool((tensor_of(result.program.module, "2.factors.1.bias") == 0.5).all())
    assert split(program, "ranks={2.weight: 8} tune=none", train=train)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "before",
    [
        "prune{densities={2.weight: 0.3} exclude=[0.weight, 6.weight]}",
        "share-weights{bits=3 exclude=[0.weight]}",
    ],
)
def test_weights_in_other_forms_keep_them_while_it_trains(before):
    program = shohin.optimize(small(), before, drift=False).program
    loader = [(images(20), torch.arange(20) % 10)]
    train = shohin.Trainer(loader, epochs=2, learning_rate=0.05)
    result = split(program, "ranks={0.weight: 8}", train=train)
    assert result.program.encodings.keys() == program.encodings.keys()
    for name, encoding in result.program.encodings.items():
        stored = encoding.materialise()
        assert torch.equal(stored, tensor_of(result.program.module, name).detach())


def test_entries_of_weights_that_are_gone_are_dropped():
    program = small()
    dense = Dense(tensor_of(program.module, "0.weight").detach())
    program = replace(program, encodings={"0.weight": dense})
    assert not split(program, "ranks={0.weight: 8}").program.encodings


def test_a_parameter_called_factors_is_not_in_the_way():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
            self.factors = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            return torch.nn.functional.conv2d(x, self.weight) * self.factors

    torch.manual_seed(0)
    program = shohin.capture(Odd(), torch.ones(2, 4, 10, 10))
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    result = split(program, "ranks={weight: 4}")
    assert set(weights(result.program)) == {
        *("factors", "factors_1.0.weight", "factors_1.1.weight", "factors_1.1.bias")
    }


def test_layers_of_very_many_outputs_are_fitted_without_the_relu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1100), nn.ReLU(), nn.Linear(1100, 3))
    program = shohin.capture(model, torch.randn(4, 8), name="wide")
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    result = split(program, "ranks={0.weight: 4}", calibration=[(torch.randn(50, 8),)])
    assert "fitted without the ReLU: more than 1,024 outputs" in changed(result)["linear"].detail


def test_programs_with_a_fixed_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 3))
    program = shohin.capture(model.eval(), torch.ones(8, 4, 10, 10), dynamic_batch=False)
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    data = [(part,) for part in images(40).split(8)]
    result = split(program, "ranks={0.weight: 5} images=20", calibration=data)
    assert len(changed(result)) == 1


def test_a_relu_counts_through_changes_of_shape():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.ReLU(), nn.Linear(1024, 3))
    program = shohin.capture(model.eval(), torch.ones(2, 4, 10, 10))
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    found = changed(split(program, "ranks={0.weight: 5, 3.weight: 2}"))
    assert "after the ReLU" in found["conv2d"].detail
    assert "reproduced as it is, without a ReLU: the output reads it" in found["linear"].detail


def test_training_that_diverges_is_undone():
    program = small()

    def train(module):
        with torch.no_grad():
            module.get_parameter("2.factors.1.bias").fill_(float("nan"))

    with pytest.warns(ShohinWarning, match="low-rank.*are those before the training"):
        result = split(program, "ranks={2.weight: 8}", train=train)
    assert lack(program, result.program) < 1


def test_figures_are_drawn(tmp_path):
    split(small(), "speedup=2 multiple=4 figures=true", workdir=tmp_path)
    for name in ("energy", "ranks", "errors"):
        assert (tmp_path / f"low-rank-{name}.png").stat().st_size > 5000
    with pytest.raises(SpecError, match="low-rank figures: needs a work directory, got none"):
        split(small(), "figures=true")


def test_a_split_network_compiles_to_what_it_computes():
    program = split(small(), "speedup=2 scheme=3d multiple=4").program
    binary = shohin.compile(program, "cpu{threads=2}")
    x = images(1)
    with torch.inference_mode():
        assert torch.allclose(binary(x), program.module(x), atol=1e-5)


def test_batch_normalisation_has_to_be_folded_first():
    program = small()
    program = replace(program, facts=program.facts - {Fact.BN_FOLDED})
    with pytest.raises(PassError, match="fold-bn"):
        split(program, "speedup=2")
