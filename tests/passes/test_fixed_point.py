import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import ArtifactError, PassError, ShohinWarning, SpecError
from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.fixed_ops import FIXED_OPERATORS, fixed_conv2d, fixed_linear, fixed_quantize
from shohin.ir.fixed_point import FixedPoint, is_on_grid, quantize
from shohin.ir.program import Fact, tensor_of
from shohin.ir.sharing import codebook_of
from shohin.ir.verifier import verify
from shohin.passes.fixed.equalise import equalise
from shohin.passes.fixed.export import formats_of
from shohin.passes.fixed.fractions import candidates, fitting_fraction, weight_fraction
from shohin.passes.fixed.widths import Candidate, Evaluations, choose_widths
from shohin.passes.fixed_point import ToFixedPoint
from shohin.passes.patterns import argument
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.remarks import Outcome, Reason


class Residual(nn.Module):
    """Every operator that has an integer form."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = torch.relu(self.left(x) + x)
        z = functional.avg_pool2d(y * torch.relu(self.right(y)), 2)
        joined = torch.cat([functional.max_pool2d(y, 2), z], 1)
        return self.head(joined.mean((2, 3)))


def images(count=8, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network(module=None, example=None):
    torch.manual_seed(0)
    made = module() if module is not None else Residual()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        return capture(made.eval(), (images(2) if example is None else example,), name="net")


def fixed(program, text="fixed-point", batches=None, **options):
    batches = [(images(),)] if batches is None else batches
    return shohin.optimize(program, text, calibration=batches, drift=False, **options)


def nodes_of(program, target):
    return [node for node in program.graph.nodes if node.target == target]


def test_golden(golden):
    program = network()
    golden("fixed_point", program, fixed(program).program)


def test_every_number_is_on_its_grid():
    program = fixed(network()).program

    class Watch(torch.fx.Interpreter):
        seen = 0

        def run_node(self, n):
            value = super().run_node(n)
            carried = annotation(n, ActivationFormat)
            if carried is not None and carried.bits <= 16:
                assert is_on_grid(value, carried.bits, carried.fraction), n
                self.seen += 1
            return value

    watch = Watch(program.module)
    watch.run(images(4, seed=9))
    assert watch.seen > 10
    for name, encoding in program.encodings.items():
        assert isinstance(encoding, FixedPoint)
        assert same_bits(encoding.materialise(), tensor_of(program.module, name).detach())


def test_biases_have_the_radix_of_the_sums():
    program = fixed(network()).program
    for node in nodes_of(program, fixed_conv2d) + nodes_of(program, fixed_linear):
        bias = tensor_of(program.module, str(argument(node, "bias").target)).detach().double()
        radix = argument(node, "weight_fractions")[0] + argument(node, "input_fraction")
        assert torch.equal((bias * 2.0**radix).round(), bias * 2.0**radix)


@pytest.mark.parametrize("rounding", ["nearest-even", "truncate"])
def test_a_layer_by_hand(rounding):
    """One linear map in Python's whole numbers."""
    torch.manual_seed(3)
    program = capture(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), (torch.ones(1, 4),))
    x = torch.randn(6, 4)
    found = fixed(program, f"fixed-point{{rounding={rounding}}}", [(x,)]).program
    first = nodes_of(found, fixed_linear)[0]
    entry = argument(first, "input")
    made = first.kwargs
    (weight_fraction_,) = argument(first, "weight_fractions")
    radix = weight_fraction_ + entry.kwargs["fraction"]
    weight = (tensor_of(found.module, "0.weight") * 2.0**weight_fraction_).long().tolist()
    bias = (tensor_of(found.module, "0.bias").double() * 2.0**radix).long().tolist()
    shift = radix - made["fraction"]
    graph_values = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            graph_values[n] = super().run_node(n)
            return graph_values[n]

    Keep(found.module).run(x)
    rows = (graph_values[entry] * 2.0 ** entry.kwargs["fraction"]).long().tolist()
    for row, outputs in zip(rows, graph_values[first].tolist(), strict=True):
        for weights, shift_of, output in zip(weight, bias, outputs, strict=True):
            total = sum(a * b for a, b in zip(row, weights, strict=True)) + shift_of
            whole, rest = total >> shift, total & ((1 << shift) - 1)
            half = 1 << (shift - 1)
            if rounding == "nearest-even" and (rest > half or (rest == half and whole & 1)):
                whole += 1
            assert output == max(-128, min(127, whole)) * 2.0 ** -made["fraction"]


def test_data_fractions_are_the_best_there_are():
    """Of the first feature map, by trying all of them."""
    program, x = network(), images()
    found = fixed(program).program
    (entry,) = nodes_of(found, fixed_quantize)[:1]
    errors = {f: float((x - quantize(x, 8, f)).abs().sum()) for f in range(-4, 12)}
    assert errors[entry.kwargs["fraction"]] == min(errors.values())
    first = nodes_of(found, fixed_conv2d)[0]
    values = quantize(x, 8, entry.kwargs["fraction"])
    stem = {name: tensor_of(found.module, f"stem.{name}").detach() for name in ("weight", "bias")}
    exact = functional.conv2d(values.double(), *(t.double() for t in stem.values()), padding=1)
    real = {name: tensor_of(program.module, f"stem.{name}").detach() for name in stem}
    wanted = functional.conv2d(x, *real.values(), padding=1).relu()
    errors = {f: float((wanted - quantize(exact.relu(), 8, f)).abs().sum()) for f in range(12)}
    assert errors[first.kwargs["fraction"]] == min(errors.values())


def test_weight_fractions_are_the_best_there_are():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(2))
    weight[0, 0] = 40.0  # An outlier that is better saturated.
    for bits in (2, 3, 4, 8, 16):
        chosen = weight_fraction(weight, bits)
        errors = {
            f: float((weight - quantize(weight.double(), bits, f, symmetric=True)).abs().sum())
            for f in range(-8, 20)
        }
        assert errors[chosen] == min(errors.values()), bits
    assert weight_fraction(weight, 4) > fitting_fraction(40.0, 4)


@pytest.mark.parametrize(("largest", "fraction"), [(127, 0), (127.1, -1), (63.5, 1), (1e-3, 16)])
def test_the_largest_fraction_without_an_overflow(largest, fraction):
    assert fitting_fraction(largest, 8) == fraction
    assert largest * 2.0**fraction <= 127 < largest * 2.0 ** (fraction + 1)


def test_zero_and_bounded_candidates():
    assert fitting_fraction(0.0, 8) == 7
    assert candidates(1.0, 8, most=3) == [3]
    assert candidates(1e30, 8)[0] == -64
    assert len(candidates(1.0, 2)) > len(candidates(1.0, 8))


def test_16_bits_are_nearly_exact_and_fewer_are_less_so():
    program, x = network(), images(16, seed=5)
    with torch.no_grad():
        wanted = program.module(x)
        errors = {
            bits: float(
                (
                    fixed(program, f"fixed-point{{weights={bits} data={bits}}}").program.module(x)
                    - wanted
                )
                .abs()
                .mean()
            )
            for bits in (4, 6, 8, 12, 16)
        }
    assert list(errors.values()) == sorted(errors.values(), reverse=True)
    assert errors[16] < 1e-3 < errors[8]


def test_one_radix_for_all_is_worse():
    class Scales(nn.Module):
        """Layers whose numbers differ a thousandfold."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)
            with torch.no_grad():
                self.one.weight.mul_(30)
                self.two.weight.mul_(0.03)

        def forward(self, x):
            return self.two(torch.relu(self.one(x)))

    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    program = network(Scales, x)
    with torch.no_grad():
        wanted = program.module(x)
        errors = {
            strategy: float(
                (
                    fixed(program, f"fixed-point{{strategy={strategy}}}", [(x,)]).program.module(x)
                    - wanted
                )
                .abs()
                .mean()
            )
            for strategy in ("dynamic", "static")
        }
    assert errors["dynamic"] < 0.1 * errors["static"]
    static = fixed(program, "fixed-point{strategy=static}", [(x,)]).program
    layers = nodes_of(static, fixed_linear)
    assert len({argument(one, "weight_fractions")[0] for one in layers}) == 1
    inner = [nodes_of(static, fixed_quantize)[0], layers[0]]
    assert len({one.kwargs["fraction"] for one in inner}) == 1


def test_a_radix_for_every_channel():
    program = network()
    with torch.no_grad():
        tensor_of(program.module, "left.weight").mul_(torch.logspace(-2, 1, 8).reshape(-1, 1, 1, 1))
    found = fixed(program, "fixed-point{by_channel=true data=16}").program
    encoding = found.encodings["left.weight"]
    assert len(encoding.fractions) == 8
    assert len(set(encoding.fractions)) > 5
    plain = fixed(program, "fixed-point{data=16}").program
    exact = tensor_of(program.module, "left.weight").detach()
    errors = [
        float(((tensor_of(one.module, "left.weight").detach() - exact) / exact).abs().mean())
        for one in (found, plain)
    ]
    assert errors[0] < 0.1 * errors[1]


def test_widths_by_kind_name_and_map():
    text = 'fixed-point{weights=7 fc_weights=4 data=9 layers={"right.*": 12} maps={stem: 6}}'
    program = fixed(network(), text).program
    bits = {name: encoding.bits for name, encoding in program.encodings.items()}
    expected = {"stem.weight": 7, "left.weight": 7, "right.weight": 12, "head.weight": 4}
    assert bits == expected
    widths = [node.kwargs["bits"] for node in nodes_of(program, fixed_conv2d)]
    assert widths == [6, 9, 9]


def test_what_only_float_operators_read_is_not_rounded():
    program = fixed(network()).program
    (head,) = nodes_of(program, fixed_linear)
    radix = argument(head, "weight_fractions")[0] + argument(head, "input_fraction")
    assert (head.kwargs["bits"], head.kwargs["fraction"]) == (32, radix)


class Mixed(nn.Module):
    """Operators without an integer form between convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        return self.two(torch.sigmoid(self.one(x)) * 2).exp()


def test_operators_without_an_integer_form_stay_between_conversions():
    result = fixed(network(Mixed))
    kinds = [
        str(node.target).removeprefix("shohin.").removeprefix("aten.").partition(".")[0]
        for node in result.program.graph.nodes
        if node.op == "call_function"
    ]
    expected = ["fixed_quantize", "fixed_conv2d", "sigmoid", "mul"]
    assert kinds == [*expected, "fixed_quantize", "fixed_conv2d", "exp"]
    skipped = {r.node: r for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert skipped["sigmoid"].reason == Reason.UNSUPPORTED_OPERATOR
    assert skipped["sigmoid"].detail == "aten.sigmoid.default has no integer form"
    assert skipped["mul"].detail == "one operand is a number"


class Alone(nn.Module):
    """Operators with an integer form that are given none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.layer((x + x.exp()).relu())


def test_operators_that_are_given_real_numbers_stay():
    result = fixed(network(Alone))
    reasons = {r.node: (r.reason, r.detail) for r in result.report.remarks if r.node}
    expected = (Reason.NOT_APPLICABLE, "it is given numbers that no fixed-point operator computes")
    assert reasons["add"] == reasons["relu"] == expected


class Odd(nn.Module):
    """Averages, sums and weights that integers do not have."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 4, 3)
        self.shift = nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x):
        x = self.conv(x)
        a = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        b = functional.adaptive_avg_pool2d(x, 3)
        c = torch.add(x, x, alpha=2) + self.shift
        d = self.line(x.flatten(2))
        return a.mean() + b.mean() + c.mean() + d.mean() + x.mean(1).mean()


def test_reasons_of_what_stays():
    result = fixed(network(Odd))
    details = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert details["avg_pool2d"] == "windows at the border have other sizes"
    assert details["adaptive_avg_pool2d"] == "its windows have different sizes"
    assert details["add"] == "its second operand has a factor"
    assert details["add_1"] == "its operands have shapes [N, 4, 8, 8] and [1, 4, 1, 1]"
    assert details["conv1d"] == "aten.conv1d.default has no integer form"
    assert "it is no mean over the pixels of images" in details.values()


def test_layers_that_are_left_out():
    program = network()
    with torch.no_grad():
        tensor_of(program.module, "right.weight")[0, 0] = float("inf")
    for encoding in ({"exclude": '["left.*"]'},):
        ((option, value),) = encoding.items()
        result = shohin.optimize(
            network(), f"fixed-point{{{option}={value}}}", calibration=[(images(),)], drift=False
        )
    skipped = {r.node: (r.reason, r.detail) for r in result.report.remarks if r.node}
    expected = (Reason.EXCLUDED_BY_OPTION, "left.weight matches the option 'exclude'")
    assert skipped["conv2d_1"] == expected
    assert "left.weight" not in result.program.encodings
    with pytest.raises(PassError, match="NaN or infinite on the calibration data"):
        fixed(program)


def test_a_pruned_weight_stays_pruned():
    program = fixed(network(), "prune{density=0.3}, fixed-point").program
    for name, encoding in program.encodings.items():
        assert isinstance(encoding, Sparse), name
        assert isinstance(encoding.values, FixedPoint)
        assert same_bits(encoding.materialise(), tensor_of(program.module, name).detach())


def test_shared_values_lie_on_the_grid():
    program = fixed(network(), "share-weights{bits=3}, fixed-point").program
    book = codebook_of(program.encodings["left.weight"])
    assert book is not None
    (node,) = [n for n in nodes_of(program, fixed_conv2d) if "left.weight" in str(n.args[1].target)]
    (fraction,) = argument(node, "weight_fractions")
    assert is_on_grid(book.centroids, 8, fraction)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.two.bias = self.one.bias

    def forward(self, x):
        return self.two(torch.relu(self.one(4 * x)))


def test_tied_weights_are_rounded_once_and_biases_copied():
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    program = fixed(network(Tied, x), batches=[(x,)]).program
    one, two = nodes_of(program, fixed_linear)
    assert argument(one, "weight").target == argument(two, "weight").target
    assert argument(one, "bias").target != argument(two, "bias").target
    verify(program)


@pytest.mark.parametrize("data", [torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 2.5)])
def test_constant_data(data):
    result = fixed(network(), batches=[(data,)])
    if not data.any():
        notes = [r.detail for r in result.report.notes() if r.detail.startswith("x: ")]
        assert notes[0].endswith("values to 0; it is zero on all calibration data")
    with torch.no_grad():
        found, wanted = result.program.module(data), network().module(data)
    assert torch.allclose(found, wanted, atol=0.1)


def test_sums_beyond_32_bits_are_told():
    result = fixed(network(), "fixed-point{weights=16 data=16}")
    notes = [r for r in result.report.notes() if r.reason == "wide-sums"]
    assert {note.detail.partition(":")[0] for note in notes} >= {"conv2d_1"}
    assert all(note.detail.endswith("so they have 64") for note in notes)
    assert not [r for r in fixed(network()).report.notes() if r.reason == "wide-sums"]


def test_again_it_changes_nothing():
    once = fixed(network())
    again = fixed(once.program)
    assert not [r for r in again.report.remarks if r.outcome == Outcome.CHANGED]
    x = images(2)
    assert torch.equal(once.program.module(x), again.program.module(x))


def test_the_same_input_gives_the_same_bytes(tmp_path):
    files = []
    for index in range(2):
        path = tmp_path / f"{index}.shohin"
        fixed(network()).save(path)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_a_program_comes_back_from_its_file(tmp_path):
    result = fixed(network(), "fixed-point{by_channel=true}, entropy-code")
    path = tmp_path / "net.shohin"
    result.save(path)
    again = shohin.load(path)
    x = images(3)
    assert torch.equal(again.module(x), result.program.module(x))
    assert {Fact.FIXED_POINT, Fact.ENTROPY_CODED} <= again.facts
    assert path.stat().st_size < sum(4 * p.numel() for p in network().module.parameters())


@pytest.mark.parametrize("seed", range(8))
def test_random_networks(random_network, seed):
    x = torch.randn(6, 4, 6, 6, generator=torch.Generator().manual_seed(seed))
    program = capture(random_network(seed), (x,))
    result = fixed(program, "fold-bn, fixed-point{weights=16 data=16}", [(x,)])
    verify(result.program)
    with torch.no_grad():
        wanted, found = program.module(x), result.program.module(x)
    # Every rounding to 16 bits is off by at most 2^-15 of the largest value of its map.
    assert (found - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert any(node.target in FIXED_OPERATORS for node in result.program.graph.nodes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("fixed-point{weights=1}", "fixed-point weights: expected 2 to 16 bits, got 1"),
        ("fixed-point{data=17}", "fixed-point data: expected 2 to 16 bits, got 17"),
        ("fixed-point{fc_weights=0}", "fixed-point fc_weights: expected 2 to 16 bits, got 0"),
        ("fixed-point{layers={a: 40}}", "fixed-point layers 'a': expected 2 to 16 bits, got 40"),
        ("fixed-point{maps={stem: 1}}", "fixed-point maps 'stem': expected 2 to 16 bits, got 1"),
        ("fixed-point{strategy=static by_channel=true}", "does not go together with"),
        ("fixed-point{layers={stam.weight: 4}}", "got no match; did you mean 'stem.weight'"),
        ("fixed-point{maps={nowhere: 4}}", "expected a module or node that computes a feature map"),
        ("fixed-point{rounding=up}", "nearest-even"),
        ("fixed-point{max_drop=-1.0}", "expected 0 or more, got -1.0"),
        ("fixed-point{bits=auto}", "fixed-point bits: 'auto' needs an evaluate function"),
        ("fixed-point{retrain=all}", "fixed-point retrain: 'all' needs a train function, got none"),
    ],
)
def test_errors(text, problem):
    with pytest.raises(SpecError) as caught:
        fixed(network(), text)
    assert problem in str(caught.value)


def test_without_calibration():
    with pytest.raises(SpecError, match="found on calibration batches, got none; give calibration"):
        fixed(network(), batches=[])


def test_calibration_that_is_not_finite():
    bad = images()
    bad[0, 0, 0, 0] = float("nan")
    text = r"node 'x'.*1 of 1536 numbers are NaN or infinite.*look at the calibration batches"
    with pytest.raises(PassError, match=text):
        fixed(network(), batches=[(bad,)])


def test_text_comes_back():
    chosen = ToFixedPoint(weights=4, maps={"a": 6}, strategy="static", rounding="truncate")
    (again,) = parse_pipeline(format_pass(chosen))
    assert again == chosen


def test_a_program_that_has_nothing_to_round():
    result = fixed(capture(nn.Softmax(1), (torch.ones(2, 3),)), batches=[(torch.ones(2, 3),)])
    assert Fact.FIXED_POINT not in result.program.facts


class Chain(nn.Module):
    """Two convolutions whose channels have very different ranges."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            scale = torch.logspace(-2, 1, 8)
            self.one.weight.mul_(scale.reshape(-1, 1, 1, 1))
            self.one.bias.mul_(scale)
            self.two.weight.div_(scale.reshape(1, -1, 1, 1))

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


def mean_error(program, found, x):
    with torch.no_grad():
        return float((found.module(x) - program.module(x)).abs().mean())


def test_equal_ranges_change_nothing_but_what_rounding_costs():
    program, x = network(Chain), images(8, seed=4)
    plain = fixed(program).program
    result = fixed(program, "fixed-point{equalise=true}")
    assert mean_error(program, result.program, x) < 0.2 * mean_error(program, plain, x)
    assert [r.detail for r in result.report.notes() if r.reason == "equalised"] == [
        "conv2d and conv2d_1 have ranges alike"
    ]
    moved = program.copy()
    assert len(equalise(moved)) == 1
    with torch.no_grad():
        assert torch.equal(moved.module(x), program.module(x))
    ranges = tensor_of(moved.module, "one.weight").detach().abs().amax((1, 2, 3))
    inputs = tensor_of(moved.module, "two.weight").detach().abs().amax((0, 2, 3))
    assert (ranges / inputs).log2().abs().max() <= 1.0
    assert not equalise(moved)


@pytest.mark.parametrize("between", [nn.Sigmoid(), nn.AvgPool2d(2), nn.BatchNorm2d(8)])
def test_ranges_that_cannot_be_made_alike(between):
    module = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(8, 4, 3))
    assert not equalise(network(lambda: module))


def test_biases_make_up_for_mean_errors():
    program, x = network(Chain), images(64, seed=4)
    batches = [(part,) for part in images(64).split(16)]
    text = "fixed-point{weights=4 data=16 correct_bias=%s}"
    lacks = []
    for correct in ("false", "true"):
        found = fixed(program, text % correct, batches).program
        with torch.no_grad():
            lack = found.module(x) - program.module(x)
        lacks.append(float(lack.mean((0, 2, 3)).abs().mean()))
    assert lacks[1] < 0.3 * lacks[0]


def test_what_a_relu_hides_moves_no_bias():
    """The correction is the mean of what is missing where either network lets anything through."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with torch.no_grad():
        module[0].bias.sub_(0.6)  # Most results are negative.
    program, x = network(lambda: module), images(16)
    text = "fixed-point{weights=3 data=12 correct_bias=%s}"
    plain, corrected = (fixed(program, text % value, [(x,)]).program for value in ("false", "true"))
    first = next(node for node in plain.graph.nodes if node.target is fixed_conv2d)
    name = str(argument(first, "bias").target)
    with torch.no_grad():
        weight = tensor_of(plain.module, str(argument(first, "weight").target))
        rounded = quantize(x.double(), 12, argument(first, "input_fraction"))
        raw = functional.conv2d(rounded, weight.double(), tensor_of(plain.module, name).double())
        wanted = module[0](x).double()
    seen = (wanted > 0) | (raw > 0)
    lack = ((wanted - raw) * seen).sum((0, 2, 3)) / seen.sum((0, 2, 3))
    moved = tensor_of(corrected.module, name) - tensor_of(plain.module, name)
    radix = argument(first, "weight_fractions")[0] + argument(first, "input_fraction")
    assert seen.float().mean() < 0.5
    assert float(lack.abs().max()) > 4 * 2.0**-radix
    # Two roundings of the bias to its radix, and float32 in the pass.
    assert torch.allclose(moved.double(), lack, rtol=0, atol=1.1 * 2.0**-radix + 1e-5)


def labels_of(program, x):
    with torch.no_grad():
        return program.module(x).argmax(1)


def test_training_through_the_rounding():
    program, x = network(), images(64)
    y = labels_of(program, x)
    train = shohin.Trainer([(x, y)], epochs=30, learning_rate=0.02)
    text = "fixed-point{weights=3 retrain=%s}"
    losses = {}
    for retrain in ("none", "auto"):
        found = fixed(program, text % retrain, [(x,)], train=train).program
        with torch.no_grad():
            losses[retrain] = float(functional.cross_entropy(found.module(x), y))
        for name, encoding in found.encodings.items():
            assert isinstance(encoding, FixedPoint)
            assert encoding.bits == 3
            assert same_bits(encoding.materialise(), tensor_of(found.module, name).detach())
        verify(found)
    assert losses["auto"] < 0.5 * losses["none"]


def test_pruned_weights_stay_zero_in_training():
    program, x = shohin.optimize(network(), "prune{density=0.4}", drift=False).program, images(32)
    train = shohin.Trainer([(x, labels_of(program, x))], epochs=3, learning_rate=0.05)
    found = fixed(program, "fixed-point{retrain=all}", [(x,)], train=train).program
    for name, encoding in found.encodings.items():
        assert torch.equal(encoding.mask, program.encodings[name].mask)


def test_training_that_diverges_is_undone():
    program = network()

    def train(module):
        with torch.no_grad():
            module.get_submodule("left").parametrizations.weight.original[0] = float("nan")

    plain = fixed(program).program
    with pytest.warns(ShohinWarning, match="the weights are those before the training"):
        result = fixed(program, "fixed-point{retrain=all}", train=train)
    for name in plain.encodings:
        one, two = (tensor_of(p.module, name).detach() for p in (plain, result.program))
        assert same_bits(one, two)
    assert any(one.reason == "diverged" for one in result.report.remarks)


def test_widths_that_a_budget_allows(tmp_path):
    program, x = network(), images(200, seed=8)
    with torch.no_grad():
        wanted = program.module(x)
        centred = wanted - wanted.mean(0)
    calls = []

    def evaluate(module):
        calls.append(None)
        with torch.no_grad():
            return 100 - 100 * float((module(x) - wanted).norm() / centred.norm())

    options = {"evaluate": evaluate, "workdir": tmp_path, "resume": True}
    text = "fixed-point{bits=auto max_drop=%s}"
    sizes = {}
    for drop in ("30.0", "60.0"):
        found = fixed(program, text % drop, [(x,)], **options).program
        assert evaluate(found.module) >= 100 - float(drop)
        bits = {name: encoding.bits for name, encoding in found.encodings.items()}
        assert min(bits.values()) < 8
        sizes[drop] = sum(e.bits * e.parameters() for e in found.encodings.values())
    assert sizes["60.0"] < sizes["30.0"]
    spent = len(calls)
    for file in tmp_path.glob("*.shohin"):
        file.unlink()
    again = fixed(program, text % "60.0", [(x,)], **options).program
    assert {n: e.bits for n, e in again.encodings.items()} == bits
    # The layers alone are known from the file.
    assert len(calls) - spent < 10


def test_a_budget_that_cannot_be_met():
    text = r"fixed-point max_drop: expected an evaluation of at least 1, got 0 with the most bits"
    wanted = images(2)
    exact = network().module(wanted)

    def evaluate(module):
        return float(torch.equal(module(wanted), exact))

    with pytest.raises(PassError, match=text):
        fixed(network(), "fixed-point{bits=auto max_drop=0.0}", evaluate=evaluate)


def test_a_broken_file_of_evaluations(tmp_path):
    evaluations = Evaluations.of(tmp_path, ["a"], resume=True)
    assert evaluations.get("w", 4, lambda name, bits: 0.5) == 0.5
    again = Evaluations.of(tmp_path, ["a"], resume=True)
    assert again.get("w", 4, lambda name, bits: 0.0) == 0.5
    assert not Evaluations.of(tmp_path, ["b"], resume=True).known
    assert not Evaluations.of(tmp_path, ["a"], resume=False).known
    (file,) = tmp_path.iterdir()
    file.write_text("[")
    with pytest.raises(ArtifactError, match=r"cannot be read: .*; delete it to evaluate anew"):
        Evaluations.of(tmp_path, ["a"], resume=True)


def test_widths_go_where_they_save_most_for_what_they_lose():
    layers = [Candidate("a", 100, 8), Candidate("b", 1000, 8)]
    drops = {"a": {8: 0.0, 4: 0.1, 2: 0.5}, "b": {8: 0.0, 4: 0.3, 3: 0.9}}
    assert choose_widths(layers, drops, 0.05) == {"a": 8, "b": 8}
    assert choose_widths(layers, drops, 0.1) == {"a": 4, "b": 8}
    assert choose_widths(layers, drops, 0.4) == {"a": 4, "b": 4}
    assert choose_widths(layers, drops, 1.5) == {"a": 2, "b": 3}


def test_formats_for_hardware():
    """Every shift follows from the formats beside it."""
    found = formats_of(fixed(network()).program)
    assert [one["operator"] for one in found] == [
        "quantize", "convolution", "convolution", "add", "convolution", "multiply", "average",
        "quantize", "average", "linear",
    ]  # fmt: skip
    for one in found[1:]:
        fractions = [given["fraction"] for given in one["inputs"]]
        made = one["output"]["fraction"]
        if one["operator"] in ("convolution", "linear"):
            assert one["shift"] == fractions[0] + one["weight"]["fraction"] - made
            assert one["bias"]["fraction"] == fractions[0] + one["weight"]["fraction"]
        elif one["operator"] == "multiply":
            assert one["shift"] == sum(fractions) - made
        elif one["operator"] == "average":
            divisor = 2 ** (one["shift"] + made - fractions[0]) / one["multiplier"]
            assert divisor in (4, 16)
        else:
            assert one["shift"] == max(fractions) - made
    assert found[0]["inputs"] == [None]
    assert found[1]["weight"]["name"] == "stem.weight"
    program = network()
    with torch.no_grad():
        tensor_of(program.module, "stem.weight")[3] *= 8
    by_channel = formats_of(fixed(program, "fixed-point{by_channel=true}").program)
    assert len(by_channel[1]["shift"]) == 8
    assert not formats_of(network())


def test_widths_are_chosen_by_what_the_network_computes():
    """What is evaluated first is the network with the most bits, as it would come out."""
    program, x = network(Chain), images(16, seed=8)
    with torch.no_grad():
        wanted = program.module(x)
    calls = []

    def evaluate(module):
        with torch.no_grad():
            calls.append(-float((module(x) - wanted).abs().mean()))
        return calls[-1]

    fixed(program, "fixed-point{bits=auto max_drop=1.0}", [(x,)], evaluate=evaluate)
    plain = fixed(program, "fixed-point", [(x,)]).program
    # The program twice, for the report and for the budget; then the most bits.
    assert calls[:2] == [0, 0]
    assert calls[2] == evaluate(plain.module) < 0


class Positions(nn.Module):
    """Constants among the operands, one with an axis of 1 where examples are."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)
        self.place = nn.Parameter(torch.randn(1, 4))

    def forward(self, x):
        y = self.a(x.flatten(2)[:, 0, :6])
        y = y + self.place
        y = y * y[:1]
        return self.b(torch.cat([y, self.place.expand(2, 4)], 0))


def test_sums_and_products_over_examples_stay():
    result = fixed(network(Positions, images(2)))
    reasons = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert "operands have shapes" in reasons["add"]
    assert len(nodes_of(result.program, fixed_linear)) == 2
    assert {"mul", "cat"} <= set(reasons)


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(8, 3, 1)
        self.table = nn.Parameter(torch.randn(2, 4, 8, 8))

    def forward(self, x):
        return self.b(torch.cat([self.a(x), self.table], 1))


def test_constants_among_feature_maps_are_rounded_where_a_layer_reads_them():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShohinWarning)
        program = capture(Table().eval(), (images(2),), name="net", dynamic_batch=False)
    result = fixed(program, batches=[(images(2),)])
    reasons = {r.node: r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert reasons["cat"] == "it is given numbers that no fixed-point operator computes"
    assert len(nodes_of(result.program, fixed_conv2d)) == 2


@pytest.mark.parametrize(
    ("make", "detail"),
    [
        (lambda y: functional.avg_pool2d(y[:, 0], 2), "its input is no batch of images"),
        (lambda y: functional.adaptive_avg_pool2d(y[:, 0], 4), "its input is no batch of images"),
        (lambda y: functional.avg_pool2d(y, 2, divisor_override=-3), "it divides by -3"),
    ],
)
def test_averages_without_an_integer_form(make, detail):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

        def forward(self, x):
            return self.b(make(self.a(x)))

    result = fixed(network(Pooled))
    details = {r.detail for r in result.report.remarks if r.outcome == Outcome.SKIPPED}
    assert detail in details


class Heads(nn.Module):
    """Two results joined."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        y = torch.relu(self.a(x))
        return torch.cat([self.b(y), self.c(y)], 1)


def test_joined_results_are_not_rounded():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    result = fixed(network(Heads, x), batches=[(x,)])
    last = nodes_of(result.program, fixed_linear)[1:]
    assert [node.kwargs["bits"] for node in last] == [32, 32]


@pytest.mark.parametrize("by_channel", ["true", "false"])
def test_a_bias_beside_tiny_weights_is_kept(by_channel):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    module = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].weight.mul_(1e-16)
        module[0].bias.fill_(0.7)
    result = fixed(network(lambda: module, x), f"fixed-point{{by_channel={by_channel}}}", [(x,)])
    bias = tensor_of(result.program.module, "0.bias")
    assert torch.allclose(bias, torch.full((4,), 0.7), rtol=0, atol=1e-7)
    assert not any(one.reason == "wide-sums" for one in result.report.remarks)
    with torch.no_grad():
        assert torch.allclose(result.program.module(x), module(x), atol=0.05)


class Far(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        with torch.no_grad():
            self.a.weight.mul_(1e-15)
            self.a.bias.mul_(1e-15)

    def forward(self, x):
        x = self.first(x)
        return self.b(x + self.a(x))


def test_summands_of_scales_too_far_apart():
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    text = r"node 'add': expected summands whose radixes are at most 36 bits apart, got \d+"
    with pytest.raises(PassError, match=text):
        fixed(network(Far, x), batches=[(x,)])


def test_averages_beyond_32_bits_are_told():
    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 2, 1), nn.Linear(2, 2)

        def forward(self, x):
            return self.b(self.a(x).mean((2, 3)))

    x = torch.rand(2, 1, 300, 300, generator=torch.Generator().manual_seed(2))
    result = fixed(network(Large, x), "fixed-point{data=16}", [(x,)])
    notes = [one.detail for one in result.report.remarks if one.reason == "wide-sums"]
    assert "mean: sums need 33 bits, so they have 64" in notes


def test_batches_without_examples():
    with pytest.raises(PassError, match="expected at least one example, got none"):
        fixed(network(), batches=[(images()[:0],)])
