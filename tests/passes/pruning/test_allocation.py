import pytest
import torch
from torch import nn

from shohin.errors import PassError, ShohinWarning, SpecError
from shohin.ir.capture import capture
from shohin.ir.program import tensor_of
from shohin.passes.analyses.sensitivity import LayerCurve
from shohin.passes.base import Context
from shohin.passes.prune import Prune
from shohin.passes.pruning.allocation import (
    Curve,
    curve_of,
    densities_at,
    least_pruning,
    measured_densities,
)
from shohin.passes.pruning.candidates import find_candidates
from shohin.passes.pruning.measuring import measure_units
from shohin.passes.pruning.units import units_of

TOUGH = Curve((0.1, 0.5, 1.0), (0.9, 0.9, 0.9))
FRAIL = Curve((0.1, 0.5, 1.0), (0.1, 0.7, 0.9))


def test_curves_are_made_to_rise():
    points = ((0.1, 0.5), (0.2, 0.4), (0.5, 0.95), (1.0, 0.8))
    curve = curve_of(LayerCurve("w", "n", points), 0.9)
    assert curve == Curve((0.1, 0.2, 0.5, 1.0), (0.5, 0.5, 0.9, 0.9))
    assert curve.density_for(0.0) == 0.5
    assert curve.density_for(0.2) == pytest.approx(0.35)
    assert curve.density_for(1.0) == 0.1


def test_nothing_is_lost_before_all_that_is_free_is_taken():
    curves = {"tough": TOUGH, "frail": FRAIL}
    assert densities_at(curves, 0.0) == {"tough": 1.0, "frail": 1.0}
    assert densities_at(curves, 1.0) == {"tough": pytest.approx(0.1), "frail": 1.0}
    assert densities_at(curves, 1.25)["frail"] == pytest.approx(0.5)
    assert densities_at(curves, 2.0) == {"tough": 0.1, "frail": 0.1}


@pytest.mark.parametrize("target", [0.9, 0.5, 0.3, 0.12])
def test_the_least_pruning_that_meets_the_target(target):
    curves = {"tough": TOUGH, "frail": FRAIL}

    def figure(densities):
        return sum(densities.values()) / 2

    found = least_pruning(curves, figure, target, "share")
    assert figure(found) == pytest.approx(target)
    assert found["tough"] <= found["frail"]


def test_targets_out_of_reach():
    with pytest.raises(PassError) as caught:
        least_pruning({"frail": FRAIL}, lambda found: found["frail"], 0.05, "share of it")
    assert str(caught.value) == (
        "prune scope 'sensitivity': expected a share of it of 0.05, got 0.1 at the lowest "
        "densities; choose a higher target"
    )
    with pytest.warns(ShohinWarning, match="within 2 without any pruning"):
        assert least_pruning({"frail": FRAIL}, lambda found: 1.0, 2, "time") == {"frail": 1.0}


def test_densities_to_measure():
    found = measured_densities(0.1)
    assert list(found) == sorted(set(found))
    assert found[0] == 0.025
    assert found[-1] < 1
    assert all(0 < density < 1 for density in measured_densities(0.001))


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 30), nn.Linear(30, 5)]
    return capture(nn.Sequential(*layers), (torch.ones(2, 1, 8, 8),))


def likeness(program):
    """A measure that falls as outputs move away from those of the whole network."""
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    wanted = program.copy().module(x).detach()

    def evaluate(module):
        return 1.0 - float((module(x).detach() - wanted).square().mean() / wanted.var())

    return evaluate


@pytest.mark.parametrize("figure", ["parameters", "macs"])
def test_shares_of_the_whole_network(apply, figure):
    program = network()
    chosen = Prune(scope="sensitivity", **{f"target_{figure}": 0.3})
    context = Context(evaluate=likeness(program))
    result = chosen.run(program.copy(), context).program
    sizes = {"0.weight": (36, 36 * 36), "3.weight": (4320, 4320), "4.weight": (150, 150)}
    index = 0 if figure == "parameters" else 1
    total = sum(size[index] for size in sizes.values())
    kept = sum(
        sizes[name][index] * float(encoding.mask.float().mean())
        for name, encoding in result.encodings.items()
    )
    kept += sum(size[index] for name, size in sizes.items() if name not in result.encodings)
    assert kept / total == pytest.approx(0.3, abs=0.01)
    (note,) = [remark for remark in context.remarks if remark.reason == "densities"]
    assert "0.weight" in note.detail


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("figure", ["parameters", "macs"])
@pytest.mark.parametrize("granularity", ["element", "block", "channel"])
def test_targets_are_never_exceeded(granularity, figure, rounds):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 7, 3), nn.ReLU(), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(112, 9), nn.ReLU(), nn.Linear(9, 3))
    program = capture(network, (torch.ones(2, 3, 8, 8),))
    x = torch.randn(16, 3, 8, 8)
    wanted = program.copy().module(x).detach()

    def evaluate(module):
        return -float((module(x).detach() - wanted).square().mean())

    def scramble(module):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))

    macs = {"0.weight": 36, "2.weight": 16, "5.weight": 1, "7.weight": 1}
    for target in (0.3, 0.4, 0.55):
        chosen = Prune(
            scope="sensitivity",
            granularity=granularity,
            block="4x4" if granularity == "block" else "16x1",
            rounds=rounds,
            **{f"target_{figure}": target},
        )
        context = Context(evaluate=evaluate, train=scramble if rounds > 1 else None)
        result = chosen.run(program.copy(), context).program
        kept = total = 0
        for name, times in macs.items():
            weight, each = tensor_of(result.module, name), times if figure == "macs" else 1
            kept += each * int(weight.count_nonzero())
            total += each * weight.numel()
        assert kept / total <= target
        # Units that training chooses anew may all be small ones.
        assert kept / total > target - (0.25 if rounds > 1 and granularity == "block" else 0.1)


def test_curves_are_of_the_units_that_are_pruned(tmp_path):
    program = network()
    before = tensor_of(program.module, "3.weight").detach().clone()
    found, seen = {}, []

    def evaluate(module):
        rows = module.get_parameter("3.weight").detach().count_nonzero(1)
        seen.append(set(rows.tolist()))
        return likeness_of(module)

    likeness_of = likeness(program)
    context = Context(evaluate=evaluate, workdir=tmp_path, resume=True)
    for granularity in ("element", "channel"):
        candidates = [one for one in find_candidates(program) if one.name == "3.weight"]
        weights = [units_of(one, granularity, "16x1") for one in candidates]
        known = len(seen)
        found[granularity] = measure_units(program, weights, (0.1, 0.5), evaluate, context)
        if granularity == "channel":
            assert all(one <= {0, 144} for one in seen[known:])
    assert found["element"] != found["channel"]
    assert torch.equal(tensor_of(program.module, "3.weight"), before)
    # Twice the whole network and two points; all of them are taken from the files then.
    assert len(seen) == 6
    assert measure_units(program, weights, (0.1, 0.5), evaluate, context) == found["channel"]
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("call", "label"), [(1, "the whole model"), (3, "0.weight at density 0.1029")]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much"])
def test_evaluations_that_are_not_finite_are_refused(call, label, value):
    calls = []

    def evaluate(module):
        calls.append(module)
        return 0.5 if len(calls) < call else value

    context = Context(evaluate=evaluate)
    with pytest.raises(SpecError) as caught:
        Prune(scope="sensitivity", target_parameters=0.3).run(network(), context)
    got = f"got {value if isinstance(value, float) else 'str'}"
    assert str(caught.value).startswith(f"evaluate: expected a finite number for {label}, {got}")


def test_milliseconds(tmp_path):
    program = network()
    probes = []

    def measure(candidate, target):
        left = sum(encoding.nonzeros() for encoding in candidate.encodings.values())
        whole = {"0.weight": 36, "3.weight": 4320, "4.weight": 150}
        left += sum(size for name, size in whole.items() if name not in candidate.encodings)
        probes.append((target, left))
        return left / 1000

    context = Context(evaluate=likeness(program), measure=measure, workdir=tmp_path, resume=True)
    chosen = Prune(scope="sensitivity", target_ms=2.0, target="cpu{threads=1}")
    result = chosen.run(program.copy(), context).program
    left = sum(encoding.nonzeros() for encoding in result.encodings.values())
    assert 1500 < left <= 2000
    assert len(probes) <= 10
    assert {target for target, _ in probes} == {"cpu{threads=1}"}
    # Another measurement might say otherwise, so a resumed run keeps to what was found.
    count = len(probes)
    again = chosen.run(program.copy(), context).program
    assert len(probes) == count
    assert {n: e.nonzeros() for n, e in again.encodings.items()} == {
        n: e.nonzeros() for n, e in result.encodings.items()
    }
