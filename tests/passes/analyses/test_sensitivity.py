"""Sensitivity curves of small networks for the digits of scikit-learn."""

import sys

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import ArtifactError, SpecError
from shohin.ir.capture import capture
from shohin.ir.encodings import same_bits
from shohin.ir.program import tensor_of, weight_names
from shohin.passes.analyses.sensitivity import LayerCurve, Sensitivity, measure_sensitivity

DENSITIES = (0.02, 0.1, 0.4, 1.0)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


class Net(nn.Module):
    """The first layer has few weights, all needed; the second has far more than are needed."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(64, 6)
        self.wide = nn.Linear(6, 200)
        self.head = nn.Linear(200, 10)

    def forward(self, x):
        return self.head(functional.relu(self.wide(functional.relu(self.narrow(x)))))


@pytest.fixture(scope="module")
def program(digits):
    """The network, trained for a moment."""
    images, labels = digits
    torch.manual_seed(0)
    net = Net()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        optimiser.zero_grad()
        functional.cross_entropy(net(images), labels).backward()
        optimiser.step()
    return capture(net.eval(), (images[:2],), name="digits")


class Accuracy:
    """Accuracy on the digits; counts its calls, and fails at one of them when told so."""

    def __init__(self, digits, fail_at=None):
        self.digits, self.calls, self.fail_at = digits, 0, fail_at

    def __call__(self, module):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        images, labels = self.digits
        with torch.no_grad():
            return float((module(images).argmax(1) == labels).double().mean())


def weights_of(program):
    names = weight_names(program)
    return {name: tensor_of(program.module, name).detach().clone() for name in names}


def assert_same_weights(program, before):
    for name, value in before.items():
        assert same_bits(tensor_of(program.module, name), value)


@pytest.fixture(scope="module")
def curves(program, digits):
    return measure_sensitivity(program, Accuracy(digits), DENSITIES)


def test_every_layer_has_a_curve_that_ends_at_the_baseline(curves, program, digits):
    assert [curve.weight for curve in curves.layers] == [
        "narrow.weight",
        "wide.weight",
        "head.weight",
    ]
    assert [curve.node for curve in curves.layers] == ["linear", "linear_1", "linear_2"]
    assert curves.baseline == Accuracy(digits)(program.module) > 0.9
    for curve in curves.layers:
        assert tuple(density for density, _ in curve.points) == DENSITIES
        assert curve.points[-1] == (1.0, curves.baseline)


def test_the_most_sensitive_layer_is_found(program, digits):
    # Every pair of neurons of `wide` computes the same thing: half its readers do as well.
    program = program.copy()
    wide, head = (program.module.get_submodule(name) for name in ("wide", "head"))
    with torch.no_grad():
        wide.weight[100:], wide.bias[100:] = wide.weight[:100].clone(), wide.bias[:100].clone()
        head.weight[:, :100] = (head.weight[:, :100] + head.weight[:, 100:]) * 0.99
        head.weight[:, 100:] *= 0.001
    found = measure_sensitivity(program, Accuracy(digits), (0.1, 0.5))
    losses = {curve.weight: found.baseline - curve.points[0][1] for curve in found.layers}
    assert max(losses, key=losses.__getitem__) == "narrow.weight"
    assert losses["narrow.weight"] > 0.2
    assert abs(dict(found.layers[2].points)[0.5] - found.baseline) < 0.01


def test_the_measure_is_that_of_the_largest_weights(program, digits):
    found = measure_sensitivity(program, Accuracy(digits), (0.1,), names=["narrow.weight"])
    by_hand = program.copy()
    weight = by_hand.module.get_submodule("narrow").weight
    kept = weight.detach().abs().flatten().topk(round(0.1 * weight.numel())).indices
    mask = torch.zeros(weight.numel())
    mask[kept] = 1.0
    weight.data *= mask.view(weight.shape)
    assert found.layers[0].points == ((0.1, Accuracy(digits)(by_hand.module)),)


def test_weights_are_restored_bit_for_bit(program, digits):
    program = program.copy()
    with torch.no_grad():
        program.module.get_submodule("wide").weight[0, :2] = torch.tensor([-0.0, 0.0])
    before = weights_of(program)
    measure_sensitivity(program, Accuracy(digits), (0.1,))
    assert_same_weights(program, before)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(program, Accuracy(digits, fail_at=2), (0.1,))
    assert_same_weights(program, before)


@pytest.mark.parametrize("stop", [1, 2, 5, 10])
def test_resuming_measures_nothing_again(program, digits, curves, tmp_path, stop):
    first = Accuracy(digits, fail_at=stop)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(program, first, DENSITIES, workdir=tmp_path)
    second = Accuracy(digits)
    assert measure_sensitivity(program, second, DENSITIES, workdir=tmp_path) == curves
    # The baseline, and three densities below 1 for each of three layers.
    assert (stop - 1) + second.calls == 1 + 3 * 3
    third = Accuracy(digits)
    assert measure_sensitivity(program, third, DENSITIES[:2], workdir=tmp_path).layers[0] == (
        LayerCurve("narrow.weight", "linear", curves.layers[0].points[:2])
    )
    assert third.calls == 0


def test_without_resuming_all_is_measured(program, digits, tmp_path):
    measure_sensitivity(program, Accuracy(digits), (0.1,), workdir=tmp_path)
    again = Accuracy(digits)
    measure_sensitivity(program, again, (0.1,), workdir=tmp_path, resume=False)
    assert again.calls == 4


def test_another_program_has_its_own_file(program, digits, tmp_path):
    measure_sensitivity(program, Accuracy(digits), (0.1,), workdir=tmp_path)
    other = program.copy()
    other.module.get_submodule("head").bias.data[0] += 1
    counted = Accuracy(digits)
    measure_sensitivity(other, counted, (0.1,), workdir=tmp_path)
    assert counted.calls == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_a_broken_file_of_points_is_refused(program, digits, tmp_path):
    measure_sensitivity(program, Accuracy(digits), (0.1,), workdir=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-10])
    with pytest.raises(ArtifactError, match="truncated: its last line has no end"):
        measure_sensitivity(program, Accuracy(digits), (0.1,), workdir=tmp_path)


def test_progress_counts_every_measurement(program, digits):
    steps = []
    measure_sensitivity(
        program,
        Accuracy(digits),
        (0.1, 1.0),
        names=["head*", "wide.weight"],
        progress=lambda *step: steps.append(step),
    )
    assert steps == [
        (0, 5, "the whole model"),
        (1, 5, "wide.weight at 10 %"),
        (2, 5, "wide.weight at 100 %"),
        (3, 5, "head.weight at 10 %"),
        (4, 5, "head.weight at 100 %"),
        (5, 5, ""),
    ]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"densities": (0.1, 1.5)}, "above 0 and at most 1, got 1.5"),
        ({"densities": (0.0,)}, "above 0 and at most 1, got 0"),
        ({"densities": ()}, "expected at least one"),
        ({"names": ["narow.weight"]}, "did you mean 'narrow.weight'"),
        ({"names": ["head.bias"]}, "matches no weight of a convolution or linear map"),
    ],
)
def test_wrong_options(program, digits, options, text):
    with pytest.raises(SpecError, match=text):
        measure_sensitivity(program, Accuracy(digits), **options)


def test_a_measure_that_is_not_finite_is_refused(program):
    measures = iter([1.0, 0.5, float("nan")])
    message = r"expected a finite number for narrow.weight at density 0.4, got nan"
    with pytest.raises(SpecError, match=message):
        measure_sensitivity(program, lambda module: next(measures), densities=(0.1, 0.4))


def test_a_measure_that_is_no_number_is_refused(program):
    with pytest.raises(SpecError, match="a finite number for the whole model, got NoneType"):
        measure_sensitivity(program, lambda module: None)


def test_weights_that_cannot_be_pruned_are_left_out(digits):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(64, 10), nn.Linear(64, 10)
            self.tied = nn.Linear(10, 10)

        def forward(self, x):
            y = self.tied(self.tied(self.one(x) + self.two(x)))
            return y + self.two.weight.sum()

    module = Odd()
    module.one.weight.data[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        program = capture(module, (digits[0][:2],))
    found = measure_sensitivity(program, lambda module: 1.0, (0.5,))
    assert [curve.weight for curve in found.layers] == ["tied.weight"]


# ---------------------------------------------------------------- files


def test_csv_round_trip(curves, tmp_path):
    path = curves.save_csv(tmp_path / "curves.csv")
    assert Sensitivity.read_csv(path) == curves
    assert path.read_text().splitlines()[:2] == [
        "weight,node,density,accuracy",
        f",,1.0,{curves.baseline!r}",
    ]
    odd = Sensitivity((LayerCurve('a,"b', "n", ((0.1, float("-inf")), (1 / 3, -1e-300))),), 1e-17)
    assert Sensitivity.read_csv(odd.save_csv(path)) == odd


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns"),
        ("weight,density\n", "line 1: expected the columns"),
        ("HEAD\n", "line 2: expected the baseline"),
        ("HEAD\n,,1.0,1\na,n,0.5,0.9", "truncated: its last line has no end"),
        ('HEAD\n,,1.0,1\n"a"b,n,0.5,0.9\n', "line 3: malformed"),
        ("HEAD\na,n,0.5,1\n", "line 2: expected the baseline"),
        ("HEAD\n,,1.0,1\na,n,0.5\n", "line 3: expected 4 columns, got 3"),
        ("HEAD\n,,1.0,1\na,n,0.5,good\n", "line 3: expected two numbers, got 0.5,good"),
        ("HEAD\n,,1.0,1\na,n,1.5,1\n", "line 3: expected 0 < density <= 1"),
        ("HEAD\n,,1.0,1\na,n,0.5,1\na,n,0.5,1\n", "line 4: expected a density above 0.5"),
        ("HEAD\n,,1.0,1\na,n,0.5,1\nb,n,0.5,1\na,n,0.6,1\n", "lines of 'a' do not lie together"),
    ],
)
def test_foreign_csv_files(tmp_path, text, message):
    path = tmp_path / "curves.csv"
    path.write_text(text.replace("HEAD", "weight,node,density,accuracy"))
    with pytest.raises(ArtifactError, match=message):
        Sensitivity.read_csv(path)


def test_missing_csv_file(tmp_path):
    with pytest.raises(ArtifactError, match="there is no such file"):
        Sensitivity.read_csv(tmp_path / "curves.csv")


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")]
)
def test_figures(curves, tmp_path, suffix, start):
    path = curves.draw(tmp_path / f"curves{suffix}")
    assert path.read_bytes().startswith(start)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_figure_of_many_layers(tmp_path):
    layers = [LayerCurve(f"layer{i}", "n", ((0.1, 0.1 * i), (1.0, 1.0))) for i in range(16)]
    assert Sensitivity(tuple(layers), 1.0).draw(tmp_path / "many.png").stat().st_size > 1000


def test_figures_of_another_form_are_refused(curves, tmp_path):
    with pytest.raises(SpecError, match=r"ends in .png, .pdf, .svg, got '.gif'"):
        curves.draw(tmp_path / "curves.gif")


def test_without_matplotlib_the_error_says_what_to_install(curves, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SpecError, match=r"matplotlib, which is not installed; pip install 'shohin"):
        curves.draw(tmp_path / "curves.png")


# ---------------------------------------------------------------- public function


def test_public_function(program, digits, curves):
    assert shohin.sensitivity(program, Accuracy(digits), DENSITIES, progress=True) == curves
    assert shohin.Sensitivity is Sensitivity
    with pytest.raises(SpecError, match="expected a Program, got Net"):
        shohin.sensitivity(Net(), Accuracy(digits))
