from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from ternary_networks import accuracy, assert_stored_exactly, digits, encoded, remarks, rows_of
from torch import nn

import shohin
from shohin.errors import PassError, SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse
from shohin.ir.program import Fact, Stage, set_tensor, tensor_of
from shohin.ir.verifier import verify
from shohin.passes.base import Context
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.remarks import Reason
from shohin.passes.ternarising.fitting import (
    Plain,
    best_threshold,
)
from shohin.passes.ternary_fit import FitTernary

_DAMPING = 0.01


@cache
def _trained():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))
    x, y = digits()
    batches = list(zip(x[:1024].split(64), y[:1024].split(64), strict=True))
    shohin.Trainer(batches, epochs=8, learning_rate=0.05)(model)
    program = capture(model.eval(), (torch.ones(2, 1, 8, 8),), name="digits")
    return shohin.optimize(program, "fold-bn", drift=False).program


def trained():
    return _trained().copy()


def calibration():
    return [(x,) for x in digits()[0][:256].split(64)]


def fit(text="ternary-fit", program=None, batches=None):
    chosen = calibration() if batches is None else batches
    return shohin.optimize(program or trained(), text, drift=False, calibration=chosen)


def linear(*sizes, bias=False, seed=0, dtype=torch.float32):
    """Linear layers alone, and inputs that have much in common."""
    torch.manual_seed(seed)
    layers = [nn.Linear(one, two, bias=bias) for one, two in pairwise(sizes)]
    x = (torch.randn(200, sizes[0]) + 2 * torch.randn(200, 1)).to(dtype)
    program = capture(nn.Sequential(*layers).to(dtype), (x[:2],), name="linear")
    return shohin.optimize(program, "fold-bn", drift=False).program, x


def test_golden(golden):
    program, x = linear(6, 8, 8, 4, bias=True)
    context = Context(calibration=[(x,)])
    result = FitTernary().run(program.copy(), context)
    verify(result.program)
    golden("ternary_fit", program, result.program)
    assert result.modified


@pytest.mark.parametrize("scales", ["row", "layer"])
def test_what_is_stored(tmp_path, scales):
    result = fit(f"ternary-fit{{scales={scales}}}")
    after = result.program
    assert encoded(after) == {"4.weight", "8.weight"}
    assert after.stage is Stage.ANNOTATED
    assert after.facts >= {Fact.TERNARY}
    assert_stored_exactly(after)
    for name in encoded(after):
        held = after.encodings[name]
        assert (held.rows is None) == (scales == "layer")
        assert held.scales.shape == (2,)
        if scales == "row":
            assert held.scales.materialise().tolist() == [1.0, 1.0]
            assert bool((held.rows >= 0).all())
    again = shohin.load(result.save(tmp_path / "net.shohin"))
    x = digits()[0][:8]
    assert torch.equal(again.module(x), after.module(x))
    other = fit(f"ternary-fit{{scales={scales}}}").save(tmp_path / "other.shohin")
    assert other.read_bytes() == (tmp_path / "net.shohin").read_bytes()


def test_a_trained_network_keeps_most_of_its_accuracy():
    """Within 10 points, with two layers of four."""
    before = accuracy(trained().module)
    assert before > 0.95
    assert accuracy(fit().program.module) > before - 0.1


def test_the_whole_network_loses_less_with_compensation_and_with_rows():
    x = digits()[0][:256]
    wanted = trained().module(x).detach()

    def lost(text):
        found = fit(text).program.module(x).detach()
        return float((found - wanted).square().sum() / wanted.square().sum())

    assert lost("ternary-fit") < lost("ternary-fit{compensate=false}")
    assert lost("ternary-fit") < lost("ternary-fit{scales=layer}")


@pytest.mark.parametrize("scales", ["row", "layer"])
def test_inputs_are_those_that_ternary_layers_leave_and_responses_those_wanted(scales):
    """The scales are the least-squares solution for them, with the pull of the damping."""
    program, x = linear(6, 8, 8, 4)
    text = f"ternary-fit{{scales={scales} keep_first=false compensate=false}}"
    after = fit(text, program, [(x,)]).program
    assert encoded(after) == {"0.weight", "1.weight"}
    weight = tensor_of(program.module, "1.weight").detach().double()
    wanted = x.double() @ tensor_of(program.module, "0.weight").detach().double().T @ weight.T
    left = x.double() @ after.encodings["0.weight"].materialise().double().T
    held = after.encodings["1.weight"]
    codes = held.codes.double()

    def solve(responses):
        pull = _DAMPING * float((left.T @ left).diagonal().mean())
        hessian = left.T @ left + pull * torch.eye(8, dtype=torch.float64)
        target = responses.T @ left + pull * weight
        parts = [codes] if scales == "row" else [codes.clamp_min(0), codes.clamp_max(0)]
        if scales == "row":
            return (codes * target).sum(1) / ((codes @ hessian) * codes).sum(1)
        system = [[((one @ hessian) * two).sum() for two in parts] for one in parts]
        right = [(one * target).sum() for one in parts]
        return torch.linalg.solve(torch.tensor(system), torch.tensor(right))

    found = held.rows if scales == "row" else held.scales.materialise()
    assert torch.allclose(found.double(), solve(wanted), rtol=1e-4)
    # Not those that the layer itself would respond to its new inputs.
    assert not torch.allclose(found.double(), solve(left @ weight.T), rtol=1e-2)


def one_position(groups=1, bias=False):
    """A convolution that sees its whole input at once, and a head."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=bias)
    network = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(300, 4, 3, 3) + torch.randn(300, 1, 1, 1)
    program = capture(network, (x[:2],), name="one")
    return shohin.optimize(program, "fold-bn", drift=False).program, x


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scales", ["row", "layer"])
def test_grouped_convolutions_lose_what_the_remark_says(groups, scales):
    program, x = one_position(groups)
    text = f"ternary-fit{{keep_first=false scales={scales}}}"
    result = fit(text, program, [(x,)])
    assert encoded(result.program) == {"0.weight"}
    assert_stored_exactly(result.program)
    (remark,) = (one for one in result.report.remarks if one.node == "conv2d")
    weights = [
        one.detach().double()
        for one in (
            tensor_of(program.module, "0.weight"),
            result.program.encodings["0.weight"].materialise(),
        )
    ]
    wanted, found = (nn.functional.conv2d(x.double(), weight, groups=groups) for weight in weights)
    lost = float((found - wanted).square().sum() / wanted.square().sum())
    # The damping counts as a hundredth of the inputs' mean square.
    assert remark.extra["lost"] == pytest.approx(lost, rel=0.1)
    assert f"{100 * remark.extra['lost']:.1f}% of the responses lost" in remark.detail
    assert lost < 0.2
    # Less than what the best scales for the weights alone would lose.
    alone = best_threshold(Plain(weights[0].flatten(1)), scales)
    rows = rows_of(alone.codes, alone.pairs).reshape(weights[0].shape)
    plain = nn.functional.conv2d(x.double(), rows, groups=groups)
    assert lost < float((plain - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_biases_make_up_for_what_responses_lose_in_the_mean(groups):
    program, x = one_position(groups, bias=True)
    after = fit("ternary-fit{keep_first=false}", program, [(x + 1,)]).program
    x = (x + 1).double()

    def responses(found, bias):
        weight = tensor_of(found.module, "0.weight").detach().double()
        return nn.functional.conv2d(
            x, weight, tensor_of(bias.module, "0.bias").detach().double(), groups=groups
        )

    wanted = responses(program, program).mean(0)
    corrected = (responses(after, after).mean(0) - wanted).abs()
    left = (responses(after, program).mean(0) - wanted).abs()
    # The pull to the old bias leaves a hundredth of the lack.
    assert float(corrected.max()) <= 0.011 * float(left.max())
    assert float(left.max()) > 0.01
    assert "0.bias" not in after.encodings


def test_a_bias_that_another_layer_reads_stays():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.bias = self.a.bias
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.b(self.a(self.first(x))))

    torch.manual_seed(0)
    x = torch.randn(50, 6) + 1
    program = shohin.optimize(capture(Shared(), (x[:2],)), "fold-bn", drift=False).program
    after = fit(program=program, batches=[(x,)]).program
    assert encoded(after) == {"a.weight", "b.weight"}
    assert torch.equal(tensor_of(after.module, "a.bias"), tensor_of(program.module, "a.bias"))


def test_constant_inputs():
    """Their common part goes into the bias; there is nothing else to fit."""
    program, x = linear(6, 8, 8, 4, bias=True)
    same = torch.ones_like(x)
    result = fit(program=program, batches=[(same,)])
    assert_stored_exactly(result.program)
    with torch.no_grad():
        wanted, found = program.module(same), result.program.module(same)
    # The pull to the old bias leaves a hundredth of the lack.
    assert torch.allclose(found, wanted, atol=0.02)


def test_inputs_of_zeros():
    """They say nothing, so the weights alone are fitted."""
    program, x = linear(6, 8, 8, 4)
    after = fit("ternary-fit{compensate=false}", program, [(torch.zeros_like(x),)]).program
    assert_stored_exactly(after)
    weight = tensor_of(program.module, "1.weight").detach()
    alone = best_threshold(Plain(weight.double()), "row")
    held = after.encodings["1.weight"]
    assert torch.equal(held.codes, alone.codes)
    assert torch.allclose(held.rows.double(), alone.pairs[:, 0], rtol=1e-6)


def test_rows_of_zeros_stay_zeros():
    program, x = linear(6, 8, 8, 4)
    weight = tensor_of(program.module, "1.weight").detach().clone()
    weight[3] = 0.0
    set_tensor(program.module, "1.weight", weight)
    held = fit(program=program, batches=[(x,)]).program.encodings["1.weight"]
    assert not held.materialise()[3].any()
    assert bool(torch.isfinite(held.rows).all())
    assert held.nonzeros() > 0


@pytest.mark.parametrize("scales", ["row", "layer"])
def test_layers_of_other_kinds_are_fitted_to_their_weights(scales):
    torch.manual_seed(0)
    layers = [nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten()]
    network = nn.Sequential(*layers, nn.Linear(40, 8), nn.Linear(8, 2))
    x = torch.randn(64, 4, 9)
    program = shohin.optimize(capture(network, (x[:2],)), "fold-bn", drift=False).program
    result = fit(f"ternary-fit{{scales={scales}}}", program, [(x,)])
    assert encoded(result.program) == {"2.weight", "4.weight"}
    assert_stored_exactly(result.program)
    (note,) = (one.detail for one in result.report.notes() if one.reason == "weights")
    assert note == (
        "2.weight is read by aten.conv1d.default, expected conv2d or linear; "
        "it is fitted to its weights alone"
    )
    weight = tensor_of(program.module, "2.weight").detach()
    alone = best_threshold(Plain(weight.flatten(1).double()), scales)
    held = result.program.encodings["2.weight"]
    assert torch.equal(held.codes.flatten(1), alone.codes)
    assert torch.allclose(
        held.materialise().flatten(1).double(), rows_of(alone.codes, alone.pairs), rtol=1e-5
    )
    assert remarks(result, "conv1d_1")[0][1].endswith(
        f"fitted to the weights; {8 * held.stored_bytes() / 192:.2f} bits a weight"
    )
    # Layers after them are held against what the original network responds.
    left = nn.functional.conv1d(
        torch.relu(nn.functional.conv1d(x, *both(program, "0"))),
        held.materialise(),
        tensor_of(program.module, "2.bias").detach(),
    )
    hidden = nn.functional.conv1d(
        torch.relu(nn.functional.conv1d(x, *both(program, "0"))), *both(program, "2")
    )
    wanted = nn.functional.linear(hidden.flatten(1), *both(program, "4"))
    dense, bias = both(result.program, "4")
    lack = nn.functional.linear(left.flatten(1), dense, bias) - wanted
    own = nn.functional.linear(left.flatten(1), *both(program, "4")) - wanted
    assert float(lack.mean(0).abs().max()) < 0.05 * float(own.mean(0).abs().max())


def both(program, layer):
    return [tensor_of(program.module, f"{layer}.{leaf}").detach() for leaf in ("weight", "bias")]


def test_transposed_convolutions_have_two_values_of_the_layer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3), nn.Conv2d(6, 2, 1))
    x = torch.randn(8, 2, 5, 5)
    program = shohin.optimize(capture(network, (x[:2],)), "fold-bn", drift=False).program
    result = fit(program=program, batches=[(x,)])
    held = result.program.encodings["1.weight"]
    assert (held.rows, held.scales.shape) == (None, (2,))
    assert_stored_exactly(result.program)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scales", ["row", "layer"])
def test_other_floating_point_types(dtype, scales):
    program, x = linear(6, 8, 8, 4, bias=True, dtype=dtype)
    after = fit(f"ternary-fit{{scales={scales}}}", program, [(x,)]).program
    assert after.encodings["1.weight"].dtype == dtype
    assert_stored_exactly(after)


def test_tied_weights_are_fitted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.b(torch.relu(self.a(self.first(x)))))

    torch.manual_seed(0)
    x = torch.randn(50, 6)
    program = shohin.optimize(capture(Tied(), (x[:2],)), "fold-bn", drift=False).program
    after = fit(program=program, batches=[(x,)]).program
    assert "a.weight" in encoded(after)
    assert_stored_exactly(after)
    assert len(tensor_of(after.module, "a.weight").abs().unique()) <= 7


def test_first_last_and_excluded_layers_stay():
    result = fit('ternary-fit{exclude=["4.*"]}')
    assert encoded(result.program) == {"8.weight"}
    reasons = {one.detail: one.reason for one in result.report.skipped()}
    assert reasons == {
        "0.weight reads inputs of the program; keep_first=false makes it ternary, too": (
            Reason.EXCLUDED_BY_OPTION
        ),
        "4.weight matches the option 'exclude'": Reason.EXCLUDED_BY_OPTION,
        "10.weight gives outputs of the program; keep_last=false makes it ternary, too": (
            Reason.EXCLUDED_BY_OPTION
        ),
    }
    every = fit("ternary-fit{keep_first=false keep_last=false}").program
    assert encoded(every) == {"0.weight", "4.weight", "8.weight", "10.weight"}


def test_sites_that_are_not_allowed_stay():
    program, x = linear(6, 8, 8, 8, 4)
    context = Context(calibration=[(x,)], site_filter=lambda site: site == "linear_1")
    result = FitTernary().run(program, context)
    assert encoded(result.program) == {"1.weight"}
    details = {one.detail for one in context.remarks if one.node == "linear_2"}
    assert details == {"2.weight may not be changed"}


def test_what_is_encoded_already_stays():
    program, x = linear(6, 8, 8, 8, 4)
    weight = tensor_of(program.module, "1.weight").detach()
    mask = weight.abs() > 0.1
    set_tensor(program.module, "1.weight", weight.where(mask, 0.0))
    sparse = Sparse.from_dense(weight.where(mask, 0.0), mask)
    program = replace(program, encodings={"1.weight": sparse}, stage=Stage.ANNOTATED)
    result = fit(program=program, batches=[(x,)])
    assert encoded(result.program) == {"2.weight"}
    assert result.program.encodings["1.weight"] is sparse
    assert remarks(result, "linear_1") == [
        (Reason.ALREADY_ENCODED, f"1.weight is stored as {sparse.describe()}")
    ]
    again = fit(program=result.program, batches=[(x,)])
    assert again.program.encodings == result.program.encodings
    assert Fact.TERNARY in again.program.facts


def test_a_program_with_nothing_to_fit():
    program, x = linear(6, 4)
    result = fit(program=program, batches=[(x,)])
    assert not result.program.encodings
    assert Fact.TERNARY not in result.program.facts


def test_a_remark_says_what_was_done():
    result = fit('ternary-fit{exclude=["4.*"]}')
    held = result.program.encodings["8.weight"]
    (remark,) = (one for one in result.report.remarks if one.node == "linear")
    zeros, count = 1 - held.density, 32 * 144
    bits = 8 * (count // 4 + 8 + 4 * 32) / count
    lost = remark.extra["lost"]
    assert 0 < lost < 0.5
    assert remark.extra == {"zeros": zeros, "bits": bits, "lost": lost}
    assert remark.detail == (
        f"8.weight: {100 * zeros:.1f}% zeros, {100 * lost:.1f}% of the responses lost; "
        f"{bits:.2f} bits a weight"
    )
    saved = remark.before.stored_bytes - remark.after.stored_bytes
    assert saved == 4 * count - count // 4 - 8 - 4 * 32


def test_inputs_that_are_not_finite():
    program, x = linear(6, 8, 8, 4)
    x[3, 2] = float("nan")
    with pytest.raises(PassError, match=r"layer '1\.weight': its inputs on the calibration"):
        fit(program=program, batches=[(x,)])


def test_without_calibration():
    with pytest.raises(SpecError) as caught:
        fit(batches=[])
    assert str(caught.value) == (
        "ternary-fit: needs calibration batches, got none; "
        "give calibration=[(inputs,), ...], or --data on the command line"
    )


def test_normalisation_is_folded_before():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    program = capture(network.eval(), (torch.ones(2, 4),))
    with pytest.raises(PassError, match=r"requires 'bn-folded', .*; add 'fold-bn' before it"):
        fit(program=program, batches=[(torch.ones(8, 4),)])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ternary-fit{scales=column}", "column"),
        (
            'ternary-fit{exclude=["4.weigth"]}',
            "ternary-fit exclude '4.weigth': expected a convolution or linear weight, got no "
            "match; did you mean '4.weight'",
        ),
    ],
)
def test_option_errors(text, problem):
    with pytest.raises(SpecError) as caught:
        fit(text)
    assert problem in str(caught.value)


def test_text_comes_back():
    chosen = FitTernary(scales="layer", compensate=False, exclude=("a",), keep_last=False)
    (again,) = parse_pipeline(format_pass(chosen))
    assert again == chosen
