"""Networks rounded to fixed point: formats, numbers, errors."""

import pytest
import torch
from fixed_networks import fixed, images, network, nodes_of
from torch import nn
from torch.nn import functional

import shohin
from shohin.errors import PassError, SpecError
from shohin.ir.annotations import ActivationFormat, annotation
from shohin.ir.capture import capture
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.fixed_ops import FIXED_OPERATORS, fixed_conv2d, fixed_linear, fixed_quantize
from shohin.ir.fixed_point import FixedPoint, is_on_grid, quantize
from shohin.ir.program import Fact, tensor_of
from shohin.ir.sharing import codebook_of
from shohin.ir.verifier import verify
from shohin.passes.fixed.export import formats_of
from shohin.passes.fixed.fractions import candidates, fitting_fraction, weight_fraction
from shohin.passes.fixed_point import ToFixedPoint
from shohin.passes.patterns import argument
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.remarks import Outcome


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


@pytest.mark.parametrize(("error", "power"), [("absolute", 1), ("squared", 2)])
def test_data_fractions_are_the_best_there_are(error, power):
    """Of the first feature map, by trying all of them."""
    program, x = network(), images()
    x[0, 0, 0, 0] = 6.5  # Worth saturating, if its error is not squared.
    found = fixed(program, f"fixed-point{{error={error}}}", [(x,)]).program
    (entry,) = nodes_of(found, fixed_quantize)[:1]
    errors = {f: float((x - quantize(x, 8, f)).abs().pow(power).sum()) for f in range(-4, 12)}
    assert entry.kwargs["fraction"] == {1: 5, 2: 4}[power]
    assert errors[entry.kwargs["fraction"]] == min(errors.values())
    first = nodes_of(found, fixed_conv2d)[0]
    values = quantize(x, 8, entry.kwargs["fraction"])
    stem = {name: tensor_of(found.module, f"stem.{name}").detach() for name in ("weight", "bias")}
    exact = functional.conv2d(values.double(), *(t.double() for t in stem.values()), padding=1)
    real = {name: tensor_of(program.module, f"stem.{name}").detach() for name in stem}
    wanted = functional.conv2d(x, *real.values(), padding=1).relu()
    lacks = {f: wanted - quantize(exact.relu(), 8, f) for f in range(12)}
    errors = {f: float(lack.abs().pow(power).sum()) for f, lack in lacks.items()}
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


@pytest.mark.parametrize("by_channel", ["true", "false"])
def test_tiny_weights_without_a_bias_to_speak_of_are_kept(by_channel):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(2))
    module = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        module[0].weight.mul_(1e-10)
        module[0].bias.zero_()
    result = fixed(network(lambda: module, x), f"fixed-point{{by_channel={by_channel}}}", [(x,)])
    weight = tensor_of(result.program.module, "0.weight")
    # Half a step of 8 bits, of the largest at least half of the range.
    assert torch.allclose(weight, module[0].weight, rtol=0, atol=1e-10 * 2**-7)


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
