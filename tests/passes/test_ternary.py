import json
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import DivergedError, PassError, ShohinWarning, SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense, Sparse, same_bits
from shohin.ir.program import Fact, Stage, encoding_of, set_tensor, tensor_of
from shohin.ir.ternarising import ternary_codes
from shohin.ir.ternary import Ternary
from shohin.ir.verifier import verify
from shohin.passes.base import Context
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.pruning.candidates import find_candidates, reads_inputs
from shohin.passes.pruning.reconstruction import find_layers
from shohin.passes.remarks import Reason
from shohin.passes.sharing.compensation import without_bias
from shohin.passes.ternarising.figures import CURVES
from shohin.passes.ternarising.fitting import assign, best_threshold, fit_scales
from shohin.passes.ternarising.history import HISTORY
from shohin.passes.ternarising.layers import Choice, usable_layers
from shohin.passes.ternarising.starting import fitted_starts
from shohin.passes.ternarising.surgery import surgeon_of
from shohin.passes.ternary import TrainTernary
from shohin.passes.trainer import Trainer

NAMES = ["0.weight", "4.weight", "7.weight", "9.weight"]


def network(seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(108, 24), nn.ReLU(), nn.Linear(24, 10))


@cache
def _captured():
    return capture(network().eval(), (torch.ones(2, 1, 8, 8),), name="digits")


def small():
    return _captured().copy()


@cache
def digits():
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def batches(start=0, end=1024, size=64):
    x, y = digits()
    return list(zip(x[start:end].split(size), y[start:end].split(size), strict=True))


def accuracy(module):
    x, y = digits()
    with torch.no_grad():
        return float((module(x[1200:]).argmax(1) == y[1200:]).float().mean())


def trainer(**options):
    return Trainer(**{"loader": batches(end=128), "epochs": 2, "learning_rate": 0.02, **options})


def make(text="ternary", program=None, **options):
    options = {"train": trainer(), **options}
    return shohin.optimize(program or small(), text, drift=False, **options)


def notes(result, reason):
    return [one.detail for one in result.report.notes() if one.reason == reason]


def encoded(program):
    return {name for name, one in program.encodings.items() if isinstance(one, Ternary)}


def remarks(result, node):
    return [(one.reason, one.detail) for one in result.report.remarks if one.node == node]


def assert_stored_exactly(program):
    verify(program)
    for name, encoding in program.encodings.items():
        assert same_bits(encoding.materialise(), tensor_of(program.module, name).detach())


def fixed_steps(module):
    """A training function that moves every parameter by the same whatever it computes.

    Goldens and comparisons bit for bit then do not depend on how convolutions are summed.
    """
    with torch.no_grad():
        for number, (_, one) in enumerate(sorted(module.named_parameters())):
            one.add_(0.01 * torch.linspace(-1, 1, one.numel()).reshape(one.shape) * (number % 3))


def still(module):
    """A training function that trains nothing."""


def test_golden(golden):
    program = small()
    context = Context(train=fixed_steps)
    result = TrainTernary().run(program.copy(), context)
    verify(result.program)
    golden("ternary", program, result.program)
    assert result.modified


def test_first_and_last_stay_unless_they_are_asked_for():
    result = make()
    assert encoded(result.program) == {"4.weight", "7.weight"}
    assert remarks(result, "conv2d") == [
        (
            Reason.EXCLUDED_BY_OPTION,
            "0.weight reads inputs of the program; keep_first=false makes it ternary, too",
        )
    ]
    assert remarks(result, "linear_1") == [
        (
            Reason.EXCLUDED_BY_OPTION,
            "9.weight gives outputs of the program; keep_last=false makes it ternary, too",
        )
    ]
    assert encoded(make("ternary{keep_first=false}").program) == set(NAMES[:3])
    assert encoded(make("ternary{keep_last=false}").program) == set(NAMES[1:])
    assert result.program.facts >= {Fact.TERNARY}
    assert result.program.stage is Stage.ANNOTATED
    assert_stored_exactly(result.program)


class Branches(nn.Module):
    """Two inputs; a depthwise convolution passes channels on, and a shortcut goes around one."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.pointwise = nn.Conv2d(4, 4, 1)
        self.inner = nn.Conv2d(4, 4, 1)
        self.late = nn.Conv2d(4, 4, 1)
        self.other = nn.Linear(4, 4)
        self.mixer = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, image, vector):
        x = torch.relu(self.pointwise(torch.relu(self.depthwise(image))))
        x = self.inner(x)
        x = self.late(x + image)
        scale = self.other(vector)
        return self.head(torch.relu(self.mixer(x)).mean((2, 3)) * scale)


def test_which_layers_read_inputs():
    example = (torch.ones(2, 4, 5, 5), torch.ones(2, 4))
    program = capture(Branches().eval(), example)
    found = {one.name: reads_inputs(program, one) for one in find_candidates(program)}
    assert found == {
        "depthwise.weight": True,
        # A depthwise convolution mixes no channels: what comes after it reads them as well.
        "pointwise.weight": True,
        "inner.weight": False,
        "late.weight": True,
        "other.weight": True,
        "mixer.weight": False,
        "head.weight": False,
    }


def test_a_size_of_an_input_is_no_input():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x).view(x.shape[0], -1))

    program = capture(Sized().eval(), (torch.ones(2, 6),))
    found = {one.name: reads_inputs(program, one) for one in find_candidates(program)}
    assert found == {"first.weight": True, "second.weight": False}


def test_excluded_layers_stay():
    result = make('ternary{exclude=["7.*"]}')
    assert encoded(result.program) == {"4.weight"}
    assert remarks(result, "linear") == [
        (Reason.EXCLUDED_BY_OPTION, "7.weight matches the option 'exclude'")
    ]


def test_sites_that_are_not_allowed_stay(tmp_path):
    context = Context(
        train=trainer(), site_filter=lambda site: site == "conv2d_1", workdir=tmp_path
    )
    result = TrainTernary().run(small(), context)
    assert encoded(result.program) == {"4.weight"}
    (remark,) = (one for one in context.remarks if one.node == "linear")
    assert (remark.reason, remark.detail) == (
        Reason.EXCLUDED_BY_OPTION,
        "7.weight may not be changed",
    )
    # A search for a bad site leaves nothing behind.
    assert list(tmp_path.iterdir()) == []


def spoiled(change):
    program = small()
    with torch.no_grad():
        change(tensor_of(program.module, "7.weight"))
    return program


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        (
            lambda weight: weight.zero_(),
            Reason.NOT_APPLICABLE,
            "7.weight is all zeros, which no threshold divides",
        ),
        (
            lambda weight: weight[2].fill_(float("nan")),
            Reason.NOT_FINITE,
            "7.weight has 108 elements that are NaN or infinite",
        ),
        (
            lambda weight: weight[2, 0].fill_(float("-inf")),
            Reason.NOT_FINITE,
            "7.weight has 1 elements that are NaN or infinite",
        ),
    ],
)
def test_weights_that_cannot_be_ternary_stay(change, reason, detail):
    program, context = spoiled(change), Context()
    choice = Choice((), keep_first=True, keep_last=True)
    found = usable_layers(program, find_candidates(program), choice, context)
    assert [one.name for one in found] == ["4.weight"]
    (remark,) = (one for one in context.remarks if one.node == "linear")
    assert (remark.reason, remark.detail) == (reason, detail)


def test_a_weight_of_zeros_trains_as_it_is():
    result = make(program=spoiled(lambda weight: weight.zero_()))
    assert encoded(result.program) == {"4.weight"}
    assert "7.weight" not in result.program.encodings


def test_elements_beyond_single_precision():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    program = capture(layers, (torch.ones(2, 4).double(),))
    with torch.no_grad():
        tensor_of(program.module, "1.weight")[0, 0] = 1e300
    result = make(program=program, train=fixed_steps)
    assert remarks(result, "linear_1") == [
        (Reason.NOT_APPLICABLE, "1.weight has elements beyond single precision")
    ]


def test_a_threshold_that_rounds_to_the_largest_element_leaves_nothing():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)]
    program = capture(nn.Sequential(*layers).to(torch.bfloat16), (torch.ones(2, 4).bfloat16(),))
    result = make("ternary{threshold=0.999}", program, train=fixed_steps)
    assert not result.program.encodings
    assert Fact.TERNARY not in result.program.facts
    assert remarks(result, "linear_1") == [
        (Reason.NOT_APPLICABLE, "1.weight: a threshold of 0.999 leaves no element")
    ]
    assert encoded(make("ternary{threshold=0.9}", program, train=fixed_steps).program) == {
        "1.weight"
    }


def test_weights_that_are_encoded_already_stay():
    program = small()
    name, weight = "7.weight", tensor_of(small().module, "7.weight").detach()
    mask = weight.abs() > 0.05
    set_tensor(program.module, name, weight.where(mask, 0.0))
    sparse = Sparse.from_dense(weight.where(mask, 0.0), mask)
    program = replace(program, encodings={name: sparse}, stage=Stage.ANNOTATED)
    result = make(program=program)
    assert remarks(result, "linear") == [
        (Reason.ALREADY_ENCODED, f"7.weight is stored as {sparse.describe()}")
    ]
    # It has trained under its mask.
    held = result.program.encodings[name]
    assert isinstance(held, Sparse)
    assert torch.equal(held.mask, mask)
    assert not same_bits(held.materialise(), sparse.materialise())
    assert_stored_exactly(result.program)
    shared = shohin.optimize(small(), 'share-weights{bits=2 exclude=["4.*"]}', drift=False)
    result = make(program=shared.program)
    assert remarks(result, "linear")[-1] == (
        Reason.ALREADY_ENCODED,
        "7.weight is stored as codebook of 4",
    )
    # Weights that share values do not train here.
    assert same_bits(
        result.program.encodings[name].materialise(), shared.program.encodings[name].materialise()
    )
    assert_stored_exactly(result.program)


def test_dense_encodings_become_ternary():
    program = small()
    held = {"4.weight": Dense(tensor_of(program.module, "4.weight").detach().clone())}
    program = replace(program, encodings=held, stage=Stage.ANNOTATED)
    assert encoded(make(program=program).program) == {"4.weight", "7.weight"}


def test_what_is_ternary_already_stays():
    once = make().program
    again = make(program=once)
    assert {one.reason for one in again.report.remarks} == {
        Reason.ALREADY_ENCODED,
        Reason.EXCLUDED_BY_OPTION,
    }
    for name in ("4.weight", "7.weight"):
        assert again.program.encodings[name] is once.encodings[name]
    assert Fact.TERNARY in again.program.facts


def test_a_weight_that_something_else_reads_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(4, 4), nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.inner(self.first(x)) + self.inner.weight.sum())

    result = make(program=capture(Both(), (torch.ones(2, 4),)), train=fixed_steps)
    ((reason, detail),) = remarks(result, "linear_1")
    assert (reason, detail) == (Reason.OTHER_USERS, "inner.weight is also read by sum_1")


def test_a_program_without_layers():
    result = make(program=capture(nn.ReLU(), (torch.ones(2, 3),)))
    assert not result.program.encodings
    assert Fact.TERNARY not in result.program.facts


def test_what_is_trained_is_what_was_there_at_first():
    """Without a step, codes are those of the weights, and the scales the means of what is left."""

    program = small()
    for text, threshold in (("ternary", 0.05), ("ternary{threshold=0.3}", 0.3)):
        after = make(text, train=still).program
        weight = tensor_of(program.module, "7.weight").detach()
        held = after.encodings["7.weight"]
        assert torch.equal(held.codes, ternary_codes(weight, threshold))
        mean = float(weight[held.codes != 0].double().abs().mean())
        assert held.scales.materialise().tolist() == pytest.approx([mean, mean], rel=2**-24)
    ones = make("ternary{start=ones}", train=still).program.encodings["7.weight"]
    assert ones.scales.materialise().tolist() == [1.0, 1.0]


def calibration():
    return [(x,) for x, _ in batches(end=256)]


def test_a_fitted_start_responds_nearer_to_the_network():
    program = capture(dense(), (torch.ones(2, 1, 8, 8),))
    x = digits()[0][:256]
    with torch.no_grad():
        wanted = program.module(x)
        lost = {}
        for start in ("means", "fitted"):
            found = make(
                f"ternary{{start={start}}}", program, train=still, calibration=calibration()
            ).program
            assert_stored_exactly(found)
            lost[start] = float((found.module(x) - wanted).square().mean())
    assert lost["fitted"] < 0.5 * lost["means"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_fitted_start_has_the_codes_and_scales_that_were_found(dtype):
    """Rounding does not push a latent weight over its threshold."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 4)).to(dtype)
    x = torch.randn(100, 8).to(dtype)
    program = capture(layers, (x[:2],))
    context = Context(calibration=[(x,)])
    (candidate,) = (one for one in find_candidates(program) if one.name == "1.weight")
    ((_, found),) = fitted_starts(program, [candidate], context)
    assert found.latent.dtype == dtype
    after = make(
        "ternary{start=fitted}", program, train=still, calibration=[(x,)]
    ).program.encodings["1.weight"]
    assert torch.equal(after.codes, ternary_codes(found.latent, found.start.threshold))
    problem = surgeon_of(program.copy(), context).problem(find_layers(program, ["1.weight"])[0])
    weights = without_bias(problem)
    assigned = assign(weights, best_threshold(weights, "layer").pairs)
    assert torch.equal(after.codes, assigned.codes)
    pair = fit_scales(weights, assigned.codes, "layer").pairs[0]
    assert after.pairs()[0].double().tolist() == pytest.approx(
        pair.tolist(), rel=4 * torch.finfo(dtype).eps
    )


def test_layers_that_cannot_be_fitted_start_at_the_means():
    torch.manual_seed(0)
    layers = [nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(40, 2)]
    x = torch.randn(16, 4, 9)
    program = capture(nn.Sequential(*layers), (x[:2],))
    found = make("ternary{start=fitted}", program, train=still, calibration=[(x,)])
    plain = make("ternary", program, train=still).program
    (note,) = notes(found, "start")
    assert note == (
        "1.weight is read by aten.conv1d.default, expected conv2d or linear; it starts at the means"
    )
    one, two = (each.encodings["1.weight"].materialise() for each in (found.program, plain))
    assert same_bits(one, two)


def test_thresholds_by_name_and_pattern():
    text = 'ternary{threshold=0.5 thresholds={"7.*": 0.0, 4.weight: 0.9}}'
    after = make(text, train=still).program
    for name, threshold in (("7.weight", 0.0), ("4.weight", 0.9)):
        weight = tensor_of(small().module, name).detach()
        assert torch.equal(after.encodings[name].codes, ternary_codes(weight, threshold))
    assert after.encodings["7.weight"].density == 1.0


def test_scales_latent_weights_and_all_else_train():
    program = small()
    after = make().program
    for name in ("4.weight", "7.weight"):
        held = after.encodings[name]
        positive, negative = held.scales.materialise().tolist()
        assert positive != negative
        assert not torch.equal(held.codes, ternary_codes(tensor_of(program.module, name), 0.05))
    for name in ("0.weight", "9.bias", "5.running_mean"):
        assert not torch.equal(tensor_of(after.module, name), tensor_of(program.module, name))
    assert all(one.grad is None for one in after.module.parameters())
    assert not after.module.training


def test_a_remark_says_what_was_done():
    result = make('ternary{exclude=["4.*"]}')
    held = result.program.encodings["7.weight"]
    (remark,) = (one for one in result.report.remarks if one.node == "linear")
    positive, negative = held.scales.materialise().tolist()
    zeros = 1 - held.nonzeros() / held.codes.numel()
    assert remark.reason == "ternary"
    assert remark.detail == (
        f"7.weight: {100 * zeros:.1f}% zeros, the others {positive:.4g} and {-negative:.4g}; "
        "2.02 bits a weight"
    )
    count = 24 * 108
    assert remark.extra == {
        "positive": positive,
        "negative": negative,
        "zeros": zeros,
        "bits": 8 * (count / 4 + 8) / count,
    }
    (note,) = result.report.notes()
    assert (note.reason, note.detail) == ("ternary", remark.detail)
    assert remark.before.stored_bytes - remark.after.stored_bytes == 4 * count - count // 4 - 8


def test_a_layer_that_becomes_all_zeros_is_noted():
    def flatten(module):
        with torch.no_grad():
            module.get_submodule("7").parametrizations.weight.original.zero_()

    result = make(train=flatten)
    assert result.program.encodings["7.weight"].nonzeros() == 0
    assert notes(result, "all-zeros") == ["7.weight has become all zeros while it trained"]
    assert_stored_exactly(result.program)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 16)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.first(x.flatten(1)))
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


def test_tied_weights_stay_tied():
    program = capture(Tied(), (torch.ones(2, 1, 8, 8),), name="tied")
    after = make("ternary{thresholds={b.weight: 0.3}}", program).program
    # A capture keeps one name of each tensor.
    assert encoded(after) == {"a.weight"}
    held = after.encodings["a.weight"]
    assert_stored_exactly(after)
    x = digits()[0][:4]
    dense = held.materialise()
    rest = {name: one.detach() for name, one in after.module.named_parameters()}
    hidden = torch.relu(functional.linear(x.flatten(1), rest["first.weight"], rest["first.bias"]))
    for name in ("a", "b"):
        hidden = torch.relu(functional.linear(hidden, dense, rest[f"{name}.bias"]))
    expected = functional.linear(hidden, rest["head.weight"], rest["head.bias"])
    assert torch.allclose(after.module(x), expected, atol=1e-5)
    found = make("ternary{thresholds={b.weight: 0.3}}", program, train=still).program
    weight = tensor_of(program.module, "a.weight").detach()
    assert torch.equal(found.encodings["a.weight"].codes, ternary_codes(weight, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types(tmp_path, dtype):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10)]
    program = capture(nn.Sequential(nn.Flatten(), *layers).to(dtype), (batches()[0][0].to(dtype),))
    found = [(x.to(dtype), y) for x, y in batches(end=128)]
    result = make(program=program, train=trainer(loader=found))
    assert result.program.encodings["2.weight"].dtype == dtype
    assert_stored_exactly(result.program)
    again = shohin.load(result.save(tmp_path / "typed.shohin"))
    assert same_bits(
        again.encodings["2.weight"].materialise(),
        tensor_of(result.program.module, "2.weight").detach(),
    )


@cache
def dense():
    model = network()
    Trainer(batches(), epochs=8, learning_rate=0.05)(model)
    return model.eval()


def test_a_trained_network_keeps_its_accuracy():
    """Within 3 points of the dense network, whose own differs by 1 from seed to seed."""
    before = accuracy(dense())
    assert before > 0.95
    program = capture(dense(), (torch.ones(2, 1, 8, 8),))
    train = Trainer(batches(), epochs=6, learning_rate=0.02)
    after = make(program=program, train=train).program
    assert encoded(after) == {"4.weight", "7.weight"}
    assert accuracy(after.module) > before - 0.03
    untrained = make(program=program, train=still).program
    assert accuracy(untrained.module) < accuracy(after.module)


@pytest.mark.parametrize("options", ["", '{start=ones exclude=["7.*"]}'])
def test_it_learns_from_scratch(options):
    """Within 4 points of the dense network; scales of 1 where a normalisation follows."""
    train = Trainer(batches(), epochs=10, learning_rate=0.05)
    after = make(f"ternary{options}", train=train).program
    assert accuracy(after.module) > accuracy(dense()) - 0.04


def test_the_same_run_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make("ternary{keep_first=false}, entropy-code").save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_random_numbers_of_a_users_function_come_from_the_seed():
    def noisy(module):
        with torch.no_grad():
            for _, one in sorted(module.named_parameters()):
                one.add_(0.01 * torch.randn(one.shape))

    before = torch.get_rng_state()
    found = [make(train=noisy, seed=seed).program for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    one, two, three = (program.encodings["7.weight"].codes for program in found)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_files(tmp_path):
    result = make("ternary{keep_first=false}")
    x = digits()[0][:8]
    again = shohin.load(result.save(tmp_path / "net.shohin"))
    assert torch.equal(again.module(x), result.program.module(x))
    assert again.facts >= {Fact.TERNARY}
    for name in encoded(result.program):
        one, two = (program.encodings[name] for program in (again, result.program))
        assert isinstance(one, Ternary)
        assert torch.equal(one.codes, two.codes)
        assert one.stored_bytes() == two.stored_bytes()


def test_folding_afterwards_gives_rows():
    program = make("ternary{keep_first=false}").program
    after = shohin.optimize(program, "fold-bn", drift=False).program
    for name in ("0.weight", "4.weight"):
        before, held = program.encodings[name], after.encodings[name]
        assert isinstance(held, Ternary)
        assert torch.equal(held.codes, before.codes)
        assert held.rows.shape == (held.codes.shape[0],)
        assert held.scales is before.scales
        assert held.describe().endswith("by row")
    assert after.encodings["7.weight"] is program.encodings["7.weight"]
    assert not [node for node in after.graph.nodes if "batch_norm" in str(node.target)]
    assert_stored_exactly(after)
    x = digits()[0][:64].double()
    with torch.no_grad():
        expected, found = program.copy().module.double()(x), after.copy().module.double()(x)
    # Three roundings of 2**-24 of each weight, and of a bias; sums have 108 terms at most.
    bound = 3 * 2.0**-24 * 108 * (1 + float(expected.abs().max()))
    assert float((expected - found).abs().max()) <= bound


def test_coding_comes_close_to_the_entropy():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 600), nn.Linear(600, 500), nn.Linear(500, 2))
    program = capture(layers, (torch.ones(2, 8),))
    nn.init.normal_(program.module.get_parameter("1.weight"))
    result = make("ternary{threshold=0.2}, entropy-code", program, train=still)
    (remark,) = (one for one in result.report.remarks if one.reason == "coded")
    held = result.program.encodings["1.weight"]
    assert held.coder != "plain"
    figures = remark.extra
    assert figures["code_coder"] == held.coder
    taken = figures["code_bytes"] + figures["code_table_bytes"]
    counts = torch.bincount(held.codes.flatten().int() + 1).double()
    least = float(-(counts * (counts / counts.sum()).log2()).sum()) / 8
    assert figures["code_entropy_bytes"] == pytest.approx(least)
    assert least <= taken <= 1.03 * least
    assert taken + 8 == held.stored_bytes() == remark.after.stored_bytes
    bits = 8 * figures["code_bytes"] / 300_000
    assert f"codes {bits:.2f} bits a weight ({held.coder}, entropy " in remark.detail
    again = shohin.optimize(result.program, "entropy-code", drift=False)
    assert again.program.encodings["1.weight"] is held
    # What is made anew is not coded.
    assert Fact.ENTROPY_CODED in result.program.facts
    assert Fact.ENTROPY_CODED not in make(program=result.program).program.facts


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


def history(folder):
    return json.loads((folder / HISTORY).read_text(), parse_constant=lambda text: pytest.fail(text))


def test_the_history_of_a_training(tmp_path):
    told = []
    train = trainer(
        epochs=3, schedule="constant", progress=lambda done, total, label: told.append(label)
    )
    result = make(train=train, workdir=tmp_path)
    points = history(tmp_path)
    assert [point["epoch"] for point in points] == [0, 1, 2, 3]
    assert points[0]["loss"] is None
    # The same mean that the trainer tells, in four digits.
    means = [label.rpartition(" ")[2] for label in told]
    assert [f"{point['loss']:.4g}" for point in points[1:]] == means
    for name in ("4.weight", "7.weight"):
        weight = tensor_of(small().module, name).detach()
        codes = ternary_codes(weight, 0.05)
        mean = float(weight[codes != 0].double().abs().mean())
        assert points[0]["positive"][name] == pytest.approx(mean, rel=2**-23)
        assert points[0]["zeros"][name] == pytest.approx(1 - float((codes != 0).double().mean()))
        held = result.program.encodings[name]
        pair = held.scales.materialise().tolist()
        assert [points[3]["positive"][name], points[3]["negative"][name]] == pair
        assert points[3]["zeros"][name] == 1 - held.density
    assert all(point["zeros"].keys() == {"4.weight", "7.weight"} for point in points)


def stop_after(epochs):
    def progress(done, total, label):
        if done == epochs:
            raise KeyboardInterrupt

    return progress


def test_the_history_goes_on_after_an_interruption(tmp_path):
    whole = tmp_path / "whole"
    make(train=trainer(epochs=4), workdir=whole)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        make(train=trainer(epochs=4, progress=stop_after(2)), workdir=cut)
    assert len(history(cut)) == 3
    make(train=trainer(epochs=4), workdir=cut, resume=True)
    assert history(cut) == history(whole)


def test_points_of_epochs_that_are_done_again_go(tmp_path):
    make(train=trainer(epochs=3), workdir=tmp_path)
    first = history(tmp_path)
    for path in (*tmp_path.glob("training-*"), *tmp_path.glob("*.shohin")):
        path.unlink()
    make(train=trainer(epochs=3), workdir=tmp_path, resume=True)
    assert history(tmp_path) == first
    assert [point["epoch"] for point in first] == [0, 1, 2, 3]


def test_a_point_that_an_interruption_has_cost_is_a_gap(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(train=trainer(epochs=3, progress=stop_after(2)), workdir=tmp_path)
    path = tmp_path / HISTORY
    path.write_text(json.dumps(history(tmp_path)[:2]))
    make(train=trainer(epochs=3), workdir=tmp_path, resume=True)
    assert [point["epoch"] for point in history(tmp_path)] == [0, 1, 3]


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", '[{"epoch": 0}]', "null", "7"])
def test_a_broken_history_begins_anew(tmp_path, content):
    (tmp_path / HISTORY).write_text(content)
    with pytest.warns(ShohinWarning, match="ternary-history.json is not used, its curves begin"):
        make(workdir=tmp_path, resume=True)
    assert [point["epoch"] for point in history(tmp_path)] == [0, 1, 2]


def test_the_history_of_other_layers_is_not_continued(tmp_path):
    pytest.importorskip("matplotlib")
    make("ternary{keep_first=false}", workdir=tmp_path)
    make("ternary{figures=true}", workdir=tmp_path, resume=True)
    points = history(tmp_path)
    assert [point["epoch"] for point in points] == [0, 1, 2]
    assert all(point["zeros"].keys() == {"4.weight", "7.weight"} for point in points)


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    make("ternary{figures=true}", workdir=tmp_path / "new")
    assert (tmp_path / "new" / CURVES).read_bytes().startswith(b"\x89PNG")
    make(workdir=tmp_path / "plain")
    assert not (tmp_path / "plain" / CURVES).exists()


def test_what_curves_show(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    make("ternary{figures=true}", train=trainer(epochs=3), workdir=tmp_path)
    points = history(tmp_path)
    loss, zeros, positive, negative = drawn[0].axes
    assert loss.lines[0].get_xydata().tolist() == [[p["epoch"], p["loss"]] for p in points[1:]]
    assert [line.get_label() for line in zeros.lines] == ["4.weight", "7.weight"]
    for axes, key, factor in (
        (zeros, "zeros", 100),
        (positive, "positive", 1),
        (negative, "negative", 1),
    ):
        for line in axes.lines:
            found = [[p["epoch"], factor * p[key][line.get_label()]] for p in points]
            assert line.get_xydata().tolist() == found


def test_without_a_folder_nothing_is_drawn():
    with pytest.raises(SpecError) as caught:
        make("ternary{figures=true}")
    assert (
        "ternary figures: needs a work directory, got none; "
        "give workdir=..., or --workdir on the command line"
    ) in str(caught.value)


def test_without_a_training_function():
    with pytest.raises(SpecError) as caught:
        make(train=None)
    assert str(caught.value) == (
        "ternary: needs a train function, got none; "
        "give train=shohin.Trainer(loader, epochs=...), or --train on the command line; "
        "ternary-fit needs calibration batches only"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ternary{threshold=1.0}", "expected from 0 to below 1, got 1.0"),
        ("ternary{threshold=-0.1}", "expected from 0 to below 1, got -0.1"),
        (
            "ternary{thresholds={4.weight: 1.5}}",
            "ternary thresholds '4.weight': expected from 0 to below 1, got 1.5",
        ),
        (
            "ternary{thresholds={5.weigth: 0.1}}",
            "ternary thresholds '5.weigth': expected a convolution or linear weight, got no match",
        ),
        (
            'ternary{exclude=["4.weigth"]}',
            "ternary exclude '4.weigth': expected a convolution or linear weight, got no match; "
            "did you mean '4.weight'",
        ),
        ("ternary{start=zeros}", "zeros"),
        (
            "ternary{start=fitted}",
            "ternary start: 'fitted' needs calibration batches, got none; "
            "give calibration=[(inputs,), ...], or --data on the command line",
        ),
        (
            "ternary{start=fitted threshold=0.1}",
            "ternary threshold: does not go together with 'start=fitted'; give one of the two",
        ),
        (
            "ternary{start=fitted thresholds={4.weight: 0.1}}",
            "ternary thresholds: does not go together with 'start=fitted'",
        ),
    ],
)
def test_option_errors(text, problem):
    with pytest.raises(SpecError) as caught:
        make(text)
    assert problem in str(caught.value)


def test_the_text_of_an_option_error():
    with pytest.raises(SpecError) as caught:
        TrainTernary(threshold=1.0).validate()
    assert str(caught.value) == (
        "option 'threshold' of pass 'ternary': expected from 0 to below 1, got 1.0"
    )


def test_text_comes_back():
    chosen = TrainTernary(threshold=0.1, thresholds={"a": 0.2}, start="ones", exclude=("b",))
    (again,) = parse_pipeline(format_pass(chosen))
    assert again == chosen


def test_weights_count_by_what_they_stand_for():
    """The penalty of a trainer is on latent weights and scales, not on biases."""

    def nothing(output, label):
        return output.sum() * 0.0

    train = trainer(
        loader=batches(end=64),
        epochs=1,
        learning_rate=0.1,
        momentum=0.0,
        weight_decay=0.1,
        loss=nothing,
        schedule="constant",
    )
    program = small()
    before, after = make(train=still).program, make(train=train).program
    for name in ("4.weight", "7.weight"):
        one, two = (found.encodings[name] for found in (before, after))
        assert torch.equal(one.codes, two.codes)
        assert torch.allclose(two.scales.materialise(), 0.99 * one.scales.materialise())
    bias = tensor_of(program.module, "9.bias")
    assert torch.equal(tensor_of(after.module, "9.bias"), bias)
    assert torch.allclose(
        tensor_of(after.module, "9.weight"), 0.99 * tensor_of(program.module, "9.weight")
    )


def test_encodings_name_what_is_read():
    after = make("ternary{keep_first=false keep_last=false}").program
    assert encoded(after) == set(NAMES)
    assert all(isinstance(encoding_of(after, name), Ternary) for name in NAMES)
