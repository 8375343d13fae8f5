from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from shohin.errors import SpecError, UnsupportedError
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse
from shohin.ir.program import Fact, Stage, set_tensor, tensor_of
from shohin.passes.base import Context
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.prune import Prune


def small(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten(), nn.Linear(147, 5)
    )
    return capture(network, (torch.ones(2, 2, 8, 8),), name="small")


def kept(program, name):
    return int(program.encodings[name].mask.sum())


def assert_stored_exactly(program):
    for name, encoding in program.encodings.items():
        weight = tensor_of(program.module, name).detach()
        assert torch.equal(encoding.materialise().view(torch.int32), weight.view(torch.int32))


def test_golden(apply, golden):
    program = small()
    golden("prune", program, apply(Prune(), program).program)


def test_every_layer_keeps_its_share_of_the_largest(apply):
    program = small()
    after = apply(Prune(density=0.3), program)
    assert after.program.stage is Stage.ANNOTATED
    assert set(after.program.encodings) == {"0.weight", "2.weight", "4.weight"}
    assert_stored_exactly(after.program)
    for name in after.program.encodings:
        before = tensor_of(program.module, name).detach()
        now = tensor_of(after.program.module, name).detach()
        mask = after.program.encodings[name].mask
        assert int(mask.sum()) == round(0.3 * mask.numel())
        assert torch.equal(now[mask], before[mask])
        assert before[mask].abs().min() >= before[~mask].abs().max()
        assert not now[~mask].any()


def test_outputs_are_those_of_the_masked_model(apply):
    program = small()
    after = apply(Prune(density=0.3), program).program
    masked = program.copy()
    for name, encoding in after.encodings.items():
        weight = tensor_of(masked.module, name).detach()
        set_tensor(masked.module, name, torch.where(encoding.mask, weight, 0.0))
    x = torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        assert torch.equal(masked.module(x), after.module(x))


def test_of_equal_weights_the_first_are_kept(apply):
    program = capture(nn.Linear(5, 2), (torch.ones(2, 5),))
    signs = torch.tensor([[1.0, -1, 1, -1, 1], [-1, 1, -1, 1, 2]])
    set_tensor(program.module, "weight", signs)
    mask = apply(Prune(density=0.4), program).program.encodings["weight"].mask
    assert mask.flatten().tolist() == [True, True, True] + [False] * 6 + [True]


def test_densities_by_name_and_pattern(apply):
    chosen = Prune(density=0.5, densities={"4.*": 0.1, "0.weight": 0.25}, exclude=("2.*",))
    after = apply(chosen, small())
    assert kept(after.program, "0.weight") == round(0.25 * 72)
    assert kept(after.program, "4.weight") == round(0.1 * 735)
    assert "2.weight" not in after.program.encodings
    assert after.reason("conv_transpose2d") == "excluded-by-option"


def test_an_exact_name_wins_over_a_pattern(apply):
    after = apply(Prune(densities={"*": 0.5, "0.weight": 0.25}), small())
    assert kept(after.program, "0.weight") == round(0.25 * 72)
    assert kept(after.program, "4.weight") == round(0.5 * 735)


def test_global_scope_shares_one_threshold(apply):
    program = small()
    with torch.no_grad():
        tensor_of(program.module, "0.weight").mul_(100)
    after = apply(Prune(density=0.3, scope="global", densities={"2.*": 0.5}), program).program
    assert kept(after, "2.weight") == round(0.5 * 48)
    # Every weight of the first layer is above those of the others, so it keeps them all.
    assert "0.weight" not in after.encodings
    assert kept(after, "4.weight") == round(0.3 * (72 + 735)) - 72
    assert_stored_exactly(after)


class Shared(nn.Module):
    """A weight that two linear maps share."""

    def __init__(self, tied_to_table=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.tied_to_table = tied_to_table

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(functional.relu(functional.linear(x, self.weight)), self.weight)
        return y + functional.embedding(x.argmax(1), self.weight) if self.tied_to_table else y


def test_shared_weights_are_pruned_once(apply):
    after = apply(Prune(density=0.5), capture(Shared(), (torch.ones(2, 6),)))
    assert [remark.reason for remark in after.remarks] == ["pruned"]
    assert kept(after.program, "weight") == 18


def test_weights_with_other_readers_stay(apply):
    after = apply(Prune(), capture(Shared(tied_to_table=True), (torch.ones(2, 6),)))
    assert not after.modified
    assert after.reasons() == {"other-users"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stay(apply, value):
    program = small()
    with torch.no_grad():
        tensor_of(program.module, "0.weight")[0, 0, 0, 0] = value
    after = apply(Prune(), program)
    assert after.reason("conv2d") == "not-finite"
    assert set(after.program.encodings) == {"2.weight", "4.weight"}


def test_other_encodings_stay(apply):
    program = capture(nn.Linear(4, 2), (torch.ones(2, 4),))
    every = torch.ones(8, dtype=torch.bool)
    weight = tensor_of(program.module, "weight").detach()
    nested = Sparse(every.view(2, 4), Sparse.from_dense(weight.flatten(), every))
    encoded = replace(program, encodings={"weight": nested}, stage=Stage.ANNOTATED)
    assert apply(Prune(), encoded).reason("linear") == "already-encoded"


def test_a_layer_is_never_emptied(apply):
    program = capture(nn.Linear(2, 2), (torch.ones(2, 2),))
    after = apply(Prune(density=0.1), program)
    assert kept(after.program, "weight") == 1
    mask = after.program.encodings["weight"].mask
    assert int(tensor_of(program.module, "weight").detach().abs().argmax()) == int(
        mask.int().argmax()
    )


@pytest.mark.parametrize("quality", [3.0, 50.0])
def test_a_threshold_that_nothing_reaches_keeps_the_largest(apply, quality):
    program = capture(nn.Linear(4, 3), (torch.ones(2, 4),))
    assert kept(apply(Prune(quality=quality), program).program, "weight") == 1


def test_a_single_unit_stays(apply):
    program = capture(nn.Linear(1, 1), (torch.ones(2, 1),))
    after = apply(Prune(density=0.1), program)
    assert not after.modified
    (remark,) = after.remarks
    assert remark.reason == "too-small"
    assert remark.detail == "weight is a single unit of pruning, and of each weight one is kept"


def pyramid():
    """Layers of several sizes, the first of very small weights."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Conv2d(6, 10, 3), nn.ReLU(), nn.Flatten()]
    program = capture(nn.Sequential(*layers, nn.Linear(160, 20)), (torch.ones(2, 2, 8, 8),))
    with torch.no_grad():
        tensor_of(program.module, "0.weight").mul_(1e-4)
    return program


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({}, [108, 540, 3200]),
        ({"granularity": "block", "block": "4x2"}, [2 * 9, 3 * 27, 5 * 80]),
        ({"granularity": "channel", "densities": {"5.weight": 0.5}}, [6, 10]),
    ],
)
def test_global_scope_keeps_its_share_with_one_unit_of_each(apply, options, units):
    after = apply(Prune(density=0.2, scope="global", **options), pyramid()).program
    names = ["0.weight", "2.weight", "5.weight"]
    alive = []
    for name in names[: len(units)]:
        rows = after.encodings[name].mask.flatten(1).float()
        if options.get("granularity") == "block":
            rows = functional.max_pool2d(rows[None, None], (4, 2), ceil_mode=True)[0, 0]
        elif options:
            rows = rows.amax(1)
        alive.append(int(rows.count_nonzero()))
    assert sum(alive) == round(0.2 * sum(units))
    assert alive[0] == 1


def test_tied_weights_go_by_any_name(apply):
    program = capture(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), (torch.ones(2, 6),))
    program.module.get_submodule("1").weight = program.module.get_submodule("0").weight
    for name in ("0.weight", "1.weight", "1.*"):
        after = apply(Prune(densities={name: 0.25}), program).program
        assert {one: int(e.mask.sum()) for one, e in after.encodings.items()} == {
            "0.weight": 9,
            "1.weight": 9,
        }
        excluded = apply(Prune(exclude=(name,)), program)
        assert excluded.reasons() == {"excluded-by-option"}
        assert excluded.remarks[0].detail.startswith(name.replace("*", "weight"))


class Tied(nn.Module):
    """Two linear maps of one weight, whose second name a capture does not keep, and another."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.last = (nn.Linear(6, 6) for _ in range(3))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x).relu()))


def test_tied_weights_go_by_the_name_that_capture_drops(apply):
    program = capture(Tied(), (torch.ones(2, 6),))
    after = apply(Prune(densities={"two.weight": 0.25}), program).program
    assert {name: one.nonzeros() for name, one in after.encodings.items()} == {
        "one.weight": 9,
        "last.weight": 4,
    }
    excluded = apply(Prune(exclude=("two.weight",)), program)
    assert set(excluded.program.encodings) == {"last.weight"}
    assert "two.weight matches the option 'exclude'" in {one.detail for one in excluded.remarks}


class Products(nn.Module):
    """A product with a parameter, and a linear map whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.matrix, self.gain = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4, 1))
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.linear(x @ self.matrix, self.matrix.t() * self.gain).relu())


def test_weights_of_other_products_are_remarked_on(apply):
    after = apply(Prune(density=0.5), capture(Products(), (torch.ones(2, 4),)))
    assert set(after.program.encodings) == {"last.weight"}
    found = {r.node: r.detail for r in after.remarks if r.reason == "not-applicable"}
    assert found == {
        "matmul": "aten.matmul.default multiplies by matrix, not conv or linear",
        "linear": "its weight is computed from gain, matrix",
    }


class Headed(nn.Module):
    """Outputs through pooling and a softmax, and from the middle of the network."""

    def __init__(self):
        super().__init__()
        self.first, self.side = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1)
        self.deep, self.head = nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.first(x).relu()
        z = self.head(self.side(y).mean((2, 3)))
        return z.view(x.shape[0], -1).softmax(1), self.deep(self.side(y * 2))


def test_channels_that_are_outputs_stay(apply):
    program = capture(Headed(), (torch.ones(2, 2, 8, 8),))
    chosen = Prune(density=0.5, granularity="channel", densities={"head*": 0.25})
    after = apply(chosen, program)
    assert set(after.program.encodings) == {"first.weight"}
    details = {remark.detail for remark in after.remarks if remark.node == "linear"}
    assert details == {
        "channels of head.weight are outputs of the program; only a density for 'head.weight' in "
        "'densities' prunes them"
    }
    named = apply(replace(chosen, densities={"head.weight": 0.25}), program).program
    assert int(named.encodings["head.weight"].mask.all(1).sum()) == 2
    assert "head.weight" in apply(replace(chosen, granularity="element"), program).program.encodings


def run_with_data(chosen, network, shape):
    torch.manual_seed(0)
    x = torch.randn(12, *shape)
    context = Context(calibration=[(x,)])
    result = chosen.run(capture(network.eval(), (x[:2],)), context)
    return result.program, context.remarks


def mixed():
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3))


def test_obs_leaves_layers_that_it_cannot_rank():
    after, remarks = run_with_data(Prune(method="obs", density=0.25), mixed(), (2, 8))
    assert {name: one.nonzeros() for name, one in after.encodings.items()} == {"3.weight": 18}
    (left,) = [remark for remark in remarks if remark.reason == "unsupported-operator"]
    assert left.detail == "0.weight is read by aten.conv1d.default, expected conv2d or linear"


def test_obd_leaves_layers_that_it_cannot_rank():
    network = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3))
    after, remarks = run_with_data(Prune(method="obd", density=0.25), network, (8,))
    assert {name: one.nonzeros() for name, one in after.encodings.items()} == {"2.weight": 6}
    (left,) = [remark for remark in remarks if remark.reason == "unsupported-operator"]
    assert left.detail.startswith("0.weight lies before node 'group_norm': second derivatives")


@pytest.mark.parametrize(
    ("method", "network", "shape"),
    [
        ("obs", nn.Conv1d(2, 4, 3), (2, 8)),
        ("obd", nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8)), (8,)),
    ],
)
def test_a_method_that_can_rank_nothing_is_refused(method, network, shape):
    with pytest.raises(UnsupportedError) as caught:
        run_with_data(Prune(method=method), network, shape)
    text = str(caught.value)
    assert text.startswith(f"prune method: '{method}' can rank none of the weights: ")
    assert text.endswith("; choose method=magnitude")


def test_full_density_changes_nothing(apply):
    after = apply(Prune(density=1.0), small())
    assert not after.modified
    assert after.reasons() == {"not-applicable"}


def test_sparse_weights_only_become_sparser(apply):
    once = apply(Prune(density=0.3), small()).program
    assert not apply(Prune(density=0.3), once).modified
    assert not apply(Prune(density=0.6), once).modified
    twice = apply(Prune(density=0.1), once).program
    direct = apply(Prune(density=0.1), small()).program
    assert torch.equal(twice.encodings["4.weight"].mask, direct.encodings["4.weight"].mask)


def test_remarks_state_the_cost(apply):
    program = capture(nn.Linear(100, 20, bias=False), (torch.ones(2, 100),))
    (remark,) = apply(Prune(density=0.1), program).remarks
    assert remark.detail == "weight: 200 of 2000 elements kept"
    assert (remark.before.parameters, remark.before.macs) == (2000, 2000)
    assert (remark.after.parameters, remark.after.macs) == (200, 200)
    # 200 values of 4 bytes, and as many gaps and fillers of 4 bits as this mask needs.
    assert (remark.before.stored_bytes, remark.after.stored_bytes) == (8000, 924)


def test_sites_that_are_not_allowed_stay(apply):
    after = apply(Prune(), small(), allows=lambda site: site != "linear")
    assert after.reason("linear") == "excluded-by-option"
    assert "4.weight" not in after.program.encodings


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (Prune(density=1.5), "prune density: expected 0 < density <= 1, got 1.5"),
        (Prune(density=0.0), "prune density: expected 0 < density <= 1, got 0.0"),
        (Prune(density=float("nan")), "prune density: expected 0 < density <= 1, got nan"),
        (
            Prune(densities={"fc*": -1.0}),
            "prune densities 'fc*': expected 0 < density <= 1, got -1.0",
        ),
        (
            Prune(scope="model"),
            "prune scope: expected 'layer', 'global' or 'sensitivity', got 'model'",
        ),
        (
            Prune(method="taylor"),
            "prune method: expected 'magnitude', 'obd' or 'obs', got 'taylor'",
        ),
        (
            Prune(granularity="row"),
            "prune granularity: expected 'element', 'block' or 'channel', got 'row'",
        ),
        (
            Prune(retrain="fc"),
            "prune retrain: expected 'auto', 'none', 'all', 'fc-conv' or 'conv-fc', got 'fc'",
        ),
        (Prune(first=0.0), "prune first: expected 0 < density <= 1, got 0.0"),
        (Prune(last=2.0), "prune last: expected 0 < density <= 1, got 2.0"),
        (Prune(quality=0.0), "prune quality: expected a number above 0, got 0.0"),
        (
            Prune(quality=1.0, density=0.2),
            "prune quality: does not go together with 'density'; "
            "a quality is a threshold on each layer's magnitudes",
        ),
        (
            Prune(quality=1.0, scope="global"),
            "prune quality: does not go together with 'scope=global'; "
            "a quality is a threshold on each layer's magnitudes",
        ),
        (
            Prune(quality=1.0, method="obd"),
            "prune quality: does not go together with 'method=obd'; "
            "a quality is a threshold on each layer's magnitudes",
        ),
        (
            Prune(granularity="block", block="16x0"),
            "prune block: expected rows x columns such as '16x1', got '16x0'",
        ),
        (Prune(block="8x1"), "prune block: expected granularity=block beside it"),
        (
            Prune(method="obs", granularity="channel"),
            "prune method: does not go together with 'granularity=channel'; "
            "obs drops single elements",
        ),
        (Prune(rounds=0), "prune rounds: expected 1 or more, got 0"),
        (
            Prune(rounds=2, retrain="none"),
            "prune rounds: does not go together with 'retrain=none'; "
            "without retraining one round does the same",
        ),
        (Prune(damping=-1.0), "prune damping: expected a number above 0, got -1.0"),
        (
            Prune(scope="sensitivity"),
            "prune scope: 'sensitivity' needs one of target_parameters, target_macs and target_ms, "
            "got none",
        ),
        (
            Prune(scope="sensitivity", target_macs=0.1, target_ms=1.0),
            "prune scope: 'sensitivity' needs one of target_parameters, target_macs and target_ms, "
            "got target_macs and target_ms",
        ),
        (Prune(target_ms=1.0), "prune target_ms: expected scope=sensitivity beside it"),
        (
            Prune(scope="sensitivity", target_parameters=1.5),
            "prune target_parameters: expected 0 < density <= 1, got 1.5",
        ),
    ],
)
def test_option_errors(chosen, text):
    with pytest.raises(SpecError) as caught:
        chosen.validate()
    assert str(caught.value) == text


@pytest.mark.parametrize("chosen", [Prune(exclude=("0.wieght",)), Prune(densities={"0.wieght": 1})])
def test_patterns_that_match_nothing_are_refused(apply, chosen):
    with pytest.raises(SpecError, match=r"did you mean '0\.weight'"):
        apply(chosen, small())


class Grouped(nn.Module):
    """A depthwise convolution and a plain one."""

    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(4, 4, 3, groups=4)
        self.plain = nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.deep(x))


@pytest.mark.parametrize("granularity", ["block", "channel"])
def test_grouped_convolutions_are_pruned_by_element_only(apply, granularity):
    program = capture(Grouped(), (torch.ones(2, 4, 6, 6),))
    after = apply(Prune(density=0.5, granularity=granularity), program)
    assert ("plain.weight" in after.program.encodings) == (granularity == "block")
    assert "deep.weight" not in after.program.encodings
    assert after.reason("conv2d") == "not-applicable"
    assert set(apply(Prune(density=0.5), program).program.encodings) == {
        "deep.weight",
        "plain.weight",
    }


def test_options_in_text():
    text = "prune{densities={a: 0.5} quality=0.7 granularity=block block=8x1 rounds=3}"
    (parsed,) = parse_pipeline(text)
    assert parsed == Prune(
        densities={"a": 0.5}, quality=0.7, granularity="block", block="8x1", rounds=3
    )
    assert format_pass(parsed) == text


def test_the_caret_points_to_the_option():
    with pytest.raises(SpecError) as caught:
        parse_pipeline("prune{density=0.2 quality=1}")
    assert str(caught.value).splitlines()[-1].index("^") == 2 + 26


def test_facts():
    assert Prune.establishes == {Fact.PRUNED}


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    density=st.floats(0.01, 1.0),
    levels=st.integers(1, 5),
    scope=st.sampled_from(["layer", "global"]),
)
def test_exact_counts_with_many_ties(apply, seed, density, levels, scope):
    program = capture(nn.Linear(7, 5), (torch.ones(2, 7),))
    torch.manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (5, 7)).float()
    set_tensor(program.module, "weight", weight)
    after = apply(Prune(density=density, scope=scope), program).program
    count = max(1, round(density * 35))
    if count == 35:
        assert not after.encodings
        return
    order = torch.argsort(weight.abs().flatten(), descending=True, stable=True)
    expected = torch.zeros(35, dtype=torch.bool)
    expected[order[:count]] = True
    assert torch.equal(after.encodings["weight"].mask.flatten(), expected)
    assert_stored_exactly(after)


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000), density=st.floats(0.05, 0.95))
def test_random_networks_run_with_the_masked_weights(apply, random_network, seed, density):
    program = capture(random_network(seed), (torch.ones(2, 4, 6, 6),))
    after = apply(Prune(density=density), program).program
    assert_stored_exactly(after)
    masked = program.copy()
    for name, encoding in after.encodings.items():
        weight = tensor_of(masked.module, name).detach()
        set_tensor(masked.module, name, torch.where(encoding.mask, weight, 0.0))
    x = torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(masked.module(x), after.module(x))
