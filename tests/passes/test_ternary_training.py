import pytest
import torch
from ternary_networks import (
    accuracy,
    assert_stored_exactly,
    batches,
    calibration,
    dense,
    digits,
    encoded,
    make,
    notes,
    small,
    still,
    trainer,
)
from torch import nn
from torch.nn import functional

import shohin
from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.program import Fact, tensor_of
from shohin.ir.ternarising import Threshold, ternary_codes
from shohin.ir.ternary import Ternary
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import find_candidates
from shohin.passes.pruning.reconstruction import find_layers
from shohin.passes.sharing.compensation import without_bias
from shohin.passes.ternarising.fitting import assign, best_threshold, fit_scales
from shohin.passes.ternarising.starting import fitted_starts
from shohin.passes.ternarising.surgery import surgeon_of
from shohin.passes.trainer import Trainer


def test_what_is_trained_is_what_was_there_at_first():
    """Without a step, codes are those of the weights, and the scales the means of what is left."""

    program = small()
    for text, threshold in (("ternary", 0.05), ("ternary{threshold=0.3}", 0.3)):
        after = make(text, train=still).program
        weight = tensor_of(program.module, "7.weight").detach()
        held = after.encodings["7.weight"]
        assert torch.equal(held.codes, ternary_codes(weight, Threshold(threshold)))
        mean = float(weight[held.codes != 0].double().abs().mean())
        assert held.scales.materialise().tolist() == pytest.approx([mean, mean], rel=2**-24)
    ones = make("ternary{start=ones}", train=still).program.encodings["7.weight"]
    assert ones.scales.materialise().tolist() == [1.0, 1.0]


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
    assert torch.equal(after.codes, ternary_codes(found.latent, found.start.zeros))
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
        assert torch.equal(after.encodings[name].codes, ternary_codes(weight, Threshold(threshold)))
    assert after.encodings["7.weight"].density == 1.0


def test_a_sparsity_is_the_same_in_every_layer_before_and_after():
    program = small()
    untrained = make("ternary{sparsity=0.6}", program, train=still).program.encodings
    trained = make("ternary{sparsity=0.6}", program).program.encodings
    for name in ("4.weight", "7.weight"):
        count = untrained[name].parameters()
        assert count - untrained[name].nonzeros() == int(0.6 * count)
        assert trained[name].nonzeros() == untrained[name].nonzeros()
        assert not torch.equal(trained[name].codes, untrained[name].codes)
        weight = tensor_of(program.module, name).detach()
        mean = float(weight[untrained[name].codes != 0].double().abs().mean())
        scales = untrained[name].scales.materialise().tolist()
        assert scales == pytest.approx([mean, mean], rel=2**-24)


def test_scales_latent_weights_and_all_else_train():
    program = small()
    after = make().program
    for name in ("4.weight", "7.weight"):
        held = after.encodings[name]
        positive, negative = held.scales.materialise().tolist()
        assert positive != negative
        assert not torch.equal(
            held.codes, ternary_codes(tensor_of(program.module, name), Threshold(0.05))
        )
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
    assert torch.equal(found.encodings["a.weight"].codes, ternary_codes(weight, Threshold(0.3)))


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
