import json
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from low_rank_networks import (
    changed,
    fake_profile,
    run,
    skipped,
    small,
    split,
)
from torch import nn

import shohin
from shohin.errors import PassError, SpecError
from shohin.ir.program import Fact, tensor_of
from shohin.passes.base import Context
from shohin.passes.low_rank import LowRank
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.remarks import Outcome, Reason


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("scheme", ["channel", "spatial", "3d", "bottleneck"])
def test_the_operations_are_those_of_the_budget(scheme, speedup):
    program = small()
    result = split(program, f"speedup={speedup} scheme={scheme} multiple=1")
    before, after = result.report.before.macs, result.report.after.macs
    # Whole ranks of the largest layer, some 4 % of it, are what is left over at most.
    assert (1 - 0.04 * speedup) * before / speedup <= after <= before / speedup


def test_the_weights_are_those_of_the_budget():
    program = small()
    total = sum(tensor_of(program.module, f"{n}.weight").numel() for n in (0, 2, 6))
    result = split(program, "parameters=0.4 multiple=1")
    kept = sum(one.numel() for one in result.program.module.parameters() if one.dim() > 1)
    assert 0.36 * total <= kept <= 0.4 * total


def test_two_is_the_speedup_where_nothing_is_said():
    result = split(small(), "multiple=1")
    assert result.report.after.macs <= result.report.before.macs / 2


def test_ranks_are_multiples():
    found = changed(split(small(), "speedup=2 multiple=8"))
    assert all(remark.extra["rank"] % 2 == 0 for remark in found.values())
    wide = changed(split(small(), "ranks={2.weight: 7}"))
    assert [remark.extra["rank"] for remark in wide.values()] == [7]


def test_even_selection_splits_every_layer_by_about_as_much():
    result = split(small(), "speedup=2 selection=uniform multiple=1 exclude=[6.weight]")
    shares = [r.after.macs / r.before.macs for r in changed(result).values()]
    assert len(shares) == 2
    assert max(shares) - min(shares) < 0.12


def test_a_layer_that_gets_no_faster_is_left_with_both_times():
    def slow(one):
        """A 1 x 1 convolution after the second layer takes longer than the layer as it is."""
        return 9.0 if one.shape[2:] == (1, 1) and len(one) == 32 else one.numel() / 1e3

    profile = fake_profile(slow)
    options = {"speedup": 1.05, "multiple": 1, "exclude": ("6.weight",)}
    _, context = run(options, profile=profile)
    found = {r.node: r for r in context.remarks if r.reason == Reason.NOT_FASTER}
    assert found["conv2d_1"].detail.startswith("2.weight takes 6.94 ms, and 1")
    split = [r for r in context.remarks if r.outcome is Outcome.CHANGED]
    assert [remark.node for remark in split] == ["conv2d"]


def test_a_budget_that_layers_which_get_faster_cannot_meet_is_refused_with_the_times():
    profile = fake_profile(lambda one: 9.0 if one.shape[2:] == (1, 1) else one.numel() / 1e3)
    with pytest.raises(
        PassError, match=r"2\.weight takes 6\.94 ms, and \d+\.?\d* at rank \d+ of 32"
    ):
        run({"speedup": 1.5, "multiple": 4, "exclude": ("6.weight",)}, profile=profile)


def test_ranks_that_are_faster_are_found_where_wide_ones_are_not():
    """Chains of more than 12 ranks take longer than the layer."""

    def steep(one):
        wide = one.dim() == 4 and len(one) > 12 and one.shape[2:] == (3, 3) and len(one) < 24
        return 50.0 if wide else one.numel() / 1e3

    options = {"speedup": 1.5, "multiple": 1, "exclude": ("6.weight",)}
    _, context = run(options, profile=fake_profile(steep))
    split = [r for r in context.remarks if r.outcome is Outcome.CHANGED]
    assert split
    assert all(r.extra["ms_after"] < r.extra["ms_before"] for r in split)
    assert all(r.extra["rank"] <= 12 for r in split)


def test_faster_layers_say_both_times():
    profile = fake_profile(lambda one: one.numel() / 1e3)
    _, context = run({"ranks": {"2.weight": 8}}, profile=profile)
    (remark,) = (r for r in context.remarks if r.outcome is Outcome.CHANGED)
    assert remark.extra["ms_before"] == pytest.approx((32 * 24 * 9 + 32) / 1e3)
    assert remark.extra["ms_after"] == pytest.approx((8 * 24 * 9 + 8 + 32 * 8 + 32) / 1e3)
    assert "6.94 ms, now 2.02" in remark.detail


def test_a_budget_of_time_is_met_by_the_table():
    profile = fake_profile(lambda one: one.numel() / 1e3)
    result, context = run(
        {"latency": 0.5, "multiple": 2}, profile=profile, measure=lambda program, target: 0.0
    )
    (note,) = (r for r in context.remarks if r.reason == "latency")
    assert note.extra["before"] == pytest.approx(9.18, rel=0.01)
    assert note.extra["after"] <= 0.5 * note.extra["before"]
    assert result.modified


def test_what_was_measured_is_kept(tmp_path):
    options = {"ranks": {"2.weight": 8}}
    profile = fake_profile(lambda one: one.numel() / 1e3)
    run(options, profile=profile, workdir=tmp_path)
    again = fake_profile(lambda one: 0.0)
    _, context = run(options, profile=again, workdir=tmp_path, resume=True)
    assert not again.asked
    (remark,) = (r for r in context.remarks if r.outcome is Outcome.CHANGED)
    assert remark.extra["ms_before"] == pytest.approx(6.944)
    (path,) = tmp_path.glob("low-rank-latency-*.json")
    path.write_text("{")
    with pytest.raises(shohin.ShohinError, match="cannot be read"):
        run(options, profile=profile, workdir=tmp_path, resume=True)


def test_patterns_pass_over_layers_that_cannot_have_such_a_rank():
    result = split(small(), "ranks={*: 28}")
    assert list(changed(result)) == ["conv2d_1"]
    details = [r.detail for r in result.report.remarks if r.node == "conv2d"]
    assert details == ["0.weight is not split: expected at most 24 of 0.weight, got 28"]


def test_layers_that_give_outputs_are_split_only_by_their_very_name():
    left = skipped(split(small(), "ranks={*: 8}"))["linear"]
    assert left.detail == (
        "6.weight gives outputs of the program, whose errors nothing makes up for; only a rank "
        "for '6.weight' itself splits it"
    )
    assert "linear" in skipped(split(small(), "speedup=2"))
    assert list(changed(split(small(), "ranks={6.weight: 8}"))) == ["linear"]


def test_what_cannot_be_looked_at_is_not():
    """Without a budget only layers with ranks are observed: others may have any outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5000))
    program = shohin.capture(model, torch.randn(4, 8), name="wide")
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    data = [(torch.randn(50, 8),)]
    result = split(program, "ranks={0.weight: 4}", calibration=data)
    assert list(changed(result)) == ["linear"]
    wide = skipped(split(program, "speedup=1", calibration=data))["linear_1"]
    assert "has 5,000 outputs, expected at most 4,096" in wide.detail


def test_with_room_for_all_nothing_is_split_evenly_either():
    result = split(small(), "speedup=1 selection=uniform")
    assert not changed(result)


def test_measured_on_this_machine(tmp_path):
    result = split(small(), "ranks={2.weight: 8}", text="", workdir=tmp_path)
    (remark,) = changed(result).values()
    assert 0 < remark.extra["ms_after"] < 50
    assert 0 < remark.extra["ms_before"] < 50
    (path,) = tmp_path.glob("low-rank-latency-*.json")
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ("speedup=0.5", "'speedup' of pass 'low-rank': expected 1 or more, got 0.5"),
        ("latency=1.5", "'latency' of pass 'low-rank': expected above 0 and at most 1"),
        ("parameters=0", "'parameters' of pass 'low-rank': expected above 0 and at most 1"),
        ("speedup=2 latency=0.5", "speedup: does not go together with 'latency'"),
        ("multiple=0", "'multiple' of pass 'low-rank': expected 1 or more"),
        ("positions=0", "'positions' of pass 'low-rank': expected 1 or more"),
        ("ranks={0.weight: 0}", "ranks '0.weight': expected 1 or more, got 0"),
        ("spatial_ranks={0.weight: 3}", "spatial_ranks: does not go together with scheme=channel"),
        ("ranks={0.weight: 3} scheme=spatial", "ranks: does not go together with scheme=spatial"),
        ("penalties=[1]", "iterations: expected one for each of 1 penalties, got 2"),
        ("penalties=[0, 1]", "'penalties' of pass 'low-rank': expected numbers above 0"),
        ("ranks={0.weight: 25}", "ranks: expected at most 24 of 0.weight, got 25"),
        ("ranks={0.weigth: 5}", "ranks '0.weigth': expected a convolution or linear weight"),
        ("ranks={0.weight: 5} scheme=3d", "spatial_ranks: scheme=3d needs a rank of 0.weight"),
        ("inner_ranks={0.weight: 5} scheme=3d", "inner_ranks: does not go together with scheme=3d"),
        (
            "ranks={0.weight: 5} inner_ranks={0.weight: 5} scheme=bottleneck",
            "inner_ranks: expected at most 4 of 0.weight, got 5",
        ),
        ("tune=all", "tune: 'all' needs a train function, got none"),
        ("scheme=4d", "expected channel | spatial | 3d | bottleneck"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(SpecError) as caught:
        split(small(), options)
    assert text in str(caught.value)


def test_solvers_that_look_at_responses_need_batches():
    with pytest.raises(SpecError, match="solver: 'asymmetric' needs calibration batches, got none"):
        split(small(), "", calibration=())


def test_a_budget_that_cannot_be_met_says_what_can():
    with pytest.raises(PassError, match=r"low-rank speedup: expected at most .* choose at most"):
        split(small(), "speedup=1000 multiple=1")


def test_options_survive_text():
    text = "low-rank{speedup=3.0 ranks={a: 4} penalties=[0.5, 2.0] iterations=[3, 4] compare=macs}"
    (chosen,) = parse_pipeline(text)
    assert parse_pipeline(format_pass(chosen)) == (chosen,)


def test_without_responses_layers_may_have_any_outputs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5000))
    program = shohin.capture(model, torch.randn(4, 8), name="wide")
    program = replace(program, facts=program.facts | {Fact.BN_FOLDED})
    result = split(program, "solver=weights ranks={2.weight: 4}", calibration=())
    assert list(changed(result)) == ["linear_1"]


def test_whatever_is_measured_no_layer_gets_slower():
    options = {"speedup": 1.05, "multiple": 1, "exclude": ("6.weight",), "solver": "weights"}
    split = []
    for seed in range(6):
        times = random.Random(seed)
        profile = fake_profile(lambda _, times=times: times.uniform(0.1, 1.0))
        context = Context(profile=profile)
        with suppress(PassError):
            LowRank(**options).run(small(), context)
        split += [r for r in context.remarks if r.outcome is Outcome.CHANGED]
    assert split
    assert all(r.extra["ms_after"] < r.extra["ms_before"] for r in split)
