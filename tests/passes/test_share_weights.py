from dataclasses import replace

import pytest
import torch
from torch import nn

import shohin
from shohin.errors import PassError, ShohinWarning, SpecError
from shohin.ir.capture import capture
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.program import Fact, Stage, encoding_of, tensor_of, tied_names
from shohin.ir.sharing import codebook_of
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.pruning.obd import diagonal_hessian
from shohin.passes.remarks import Reason
from shohin.passes.share_weights import ShareWeights

NAMES = {"0.weight", "3.weight"}


def small(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5))
    return capture(network, (torch.ones(2, 2, 8, 8),), name="small")


def images(count=32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 2, 8, 8, generator=generator)
    return x, (x.mean((1, 2, 3)) > 0).long()


def share(program, text="share-weights", **options):
    return shohin.optimize(program, text, drift=False, **options)


def assert_stored_exactly(program):
    for name, encoding in program.encodings.items():
        assert same_bits(encoding.materialise(), tensor_of(program.module, name).detach())


def test_golden(apply, golden):
    program = small()
    golden("share_weights", program, apply(ShareWeights(bits=3), program).program)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_every_weight_is_one_of_a_few(apply, bits):
    program = small()
    after = apply(ShareWeights(bits=bits), program).program
    assert after.stage is Stage.ANNOTATED
    assert set(after.encodings) == NAMES
    assert_stored_exactly(after)
    for name in NAMES:
        weight = tensor_of(after.module, name)
        assert weight.unique().numel() <= 1 << bits
        lack = (weight - tensor_of(program.module, name)).abs().max()
        # Centroids start evenly spread, and the widest cluster is no wider than two steps.
        span = tensor_of(program.module, name).detach()
        assert float(lack) <= 2 * float(span.max() - span.min()) / ((1 << bits) - 1)


def test_zeros_of_a_sparse_weight_stay_zeros():
    program = share(small(), "prune{density=0.2}").program
    after = share(program, "share-weights{bits=2}").program
    for name in NAMES:
        before, now = program.encodings[name], after.encodings[name]
        assert isinstance(now, Sparse)
        assert isinstance(now.values, Codebook)
        assert torch.equal(before.mask, now.mask)
        assert now.gap_bits == before.gap_bits
    assert_stored_exactly(after)
    assert after.facts >= {Fact.PRUNED, Fact.SHARED}


def test_bits_by_kind_and_name():
    def counts(text):
        after = share(small(), text).program
        return [codebook_of(after.encodings[n]).centroids.numel() for n in sorted(NAMES)]

    assert counts("share-weights{bits=2}") == [4, 4]
    assert counts("share-weights{bits=2 conv=3}") == [8, 4]
    assert counts("share-weights{conv=3 linear=1}") == [8, 2]
    assert counts("share-weights{bits=2 conv=3 layers={0.weight: 1}}") == [2, 4]
    after = share(small(), 'share-weights{exclude=["3.*"]}').program
    assert set(after.encodings) == {"0.weight"}


def test_a_tied_weight_goes_by_each_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    program = capture(Tied(), (torch.ones(2, 64),), name="tied")
    after = share(program, "share-weights{layers={b.weight: 2}}").program
    assert codebook_of(after.encodings["a.weight"]).centroids.numel() == 4


def test_biases_are_shared_where_that_is_asked_for():
    program = small()
    after = share(program, "share-weights{bits=4 biases=1}").program
    assert set(after.encodings) == {*NAMES, "0.bias", "3.bias"}
    assert_stored_exactly(after)
    assert tensor_of(after.module, "0.bias").unique().numel() == 2
    alone = share(program, 'share-weights{biases=1 exclude=["*.weight"]}').program
    assert set(alone.encodings) == {"0.bias", "3.bias"}
    x, y = images()
    tuned = share(
        program, "share-weights{biases=1}", train=shohin.Trainer([(x, y)], learning_rate=0.05)
    ).program
    assert tensor_of(tuned.module, "0.bias").unique().numel() == 2
    assert_stored_exactly(tuned)


def test_what_would_not_get_smaller_is_left_alone():
    result = share(small(), "share-weights{biases=4}")
    assert "3.bias" not in result.program.encodings
    details = [one.detail for one in result.report.remarks if one.reason == Reason.TOO_SMALL]
    assert "3.bias would take 22 bytes, and takes 20" in details


def test_weights_that_have_nothing_left():
    program = small()
    weight = tensor_of(program.module, "3.weight")
    with torch.no_grad():
        weight.zero_()
    empty = Sparse.from_dense(weight, weight != 0)
    program = replace(program, stage=Stage.ANNOTATED, encodings={"3.weight": empty})
    result = share(program)
    assert set(result.program.encodings) == NAMES
    (remark,) = (one for one in result.report.remarks if one.node == "linear")
    assert (remark.reason, remark.detail) == (
        Reason.TOO_SMALL,
        "3.weight has no elements left",
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_left_alone(bad):
    program = small()
    with torch.no_grad():
        tensor_of(program.module, "3.weight")[2, 7] = bad
    result = share(program)
    assert set(result.program.encodings) == {"0.weight"}
    (remark,) = (one for one in result.report.remarks if one.node == "linear")
    assert (remark.reason, remark.detail) == (
        Reason.NOT_FINITE,
        "3.weight has 1 elements that are NaN or infinite",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("before", ["", "prune{density=0.5}, "])
def test_other_floating_point_types(tmp_path, dtype, before):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)).to(dtype)
    x, y = torch.randn(16, 64, dtype=dtype), torch.arange(16) % 10
    program = capture(network, (x,), name="typed")
    text = f"{before}share-weights{{bits=3 biases=3}}, entropy-code"
    plain = share(program, text).program
    tuned = share(program, text, train=shohin.Trainer([(x, y)], learning_rate=0.05)).program
    for found in (plain, tuned):
        assert {"0.weight", "2.weight"} <= set(found.encodings)
        assert {one.dtype for one in found.encodings.values()} == {dtype}
        assert_stored_exactly(found)
    again = shohin.load(share(program, text).save(tmp_path / "typed.shohin"))
    assert torch.equal(again.module(x), plain.module(x))
    weight, kept = tensor_of(plain.module, "0.weight"), tensor_of(program.module, "0.weight")
    lack = (weight - kept)[weight != 0].abs().max()
    assert float(lack.detach()) <= 2 * 0.25 / 7 + 0.25 * torch.finfo(dtype).eps


def test_centroids_that_a_narrow_type_cannot_tell_apart():
    weight = (1 + torch.arange(2000).remainder(5) * 2**-7).reshape(20, 100).to(torch.bfloat16)
    program = capture(nn.Linear(100, 20, bias=False).to(torch.bfloat16), (weight[:2],))
    with torch.no_grad():
        tensor_of(program.module, "weight").copy_(weight)
    after = share(program, "share-weights{bits=5}").program
    assert after.encodings["weight"].centroids.tolist() == [1 + i * 2**-7 for i in range(5)]
    after = share(program, "share-weights{bits=2}").program
    centroids = after.encodings["weight"].centroids
    assert centroids.unique().numel() == centroids.numel() <= 4
    assert_stored_exactly(after)


def test_elements_beyond_single_precision():
    program = capture(nn.Linear(64, 64).double(), (torch.ones(1, 64).double(),))
    with torch.no_grad():
        tensor_of(program.module, "weight")[0, 0] = 1e300
    result = share(program)
    (remark,) = result.report.skipped()
    assert remark.detail == "weight has elements beyond single precision"


def mixed():
    """A layer for which neither compensation nor the mean square of inputs has a rule."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(4, 32, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(224, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    )
    x = torch.randn(64, 4, 9, generator=torch.Generator().manual_seed(0))
    return capture(network, (x[:2],), name="mixed"), x


def test_layers_without_compensation_are_shared_plainly():
    program, x = mixed()
    plain = share(program, "share-weights{bits=2}").program
    result = share(program, "share-weights{bits=2 compensate=true}", calibration=[(x,)])
    assert result.program.encodings.keys() == {"0.weight", "3.weight", "5.weight"}
    assert_stored_exactly(result.program)
    one, two = (found.encodings["0.weight"] for found in (plain, result.program))
    assert same_bits(one.materialise(), two.materialise())
    (note,) = result.report.notes()
    assert note.detail == (
        "0.weight is read by aten.conv1d.default, expected conv2d or linear; "
        "it is shared without compensation"
    )
    with torch.no_grad():
        wanted = program.module(x)
        errors = [
            float((found.module(x) - wanted).square().mean()) for found in (plain, result.program)
        ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("target", ["bits=2", "target_bytes=2500"])
def test_layers_without_importance_count_alike(target):
    program, x = mixed()
    text = f"share-weights{{{target} importance=activations}}"
    result = share(program, text, calibration=[(x,)])
    assert result.program.encodings.keys() == {"0.weight", "3.weight", "5.weight"}
    (note,) = result.report.notes()
    assert (note.reason, note.detail) == (
        "importance",
        "all errors of 0.weight count alike: it is read by aten.conv1d.default, "
        "expected conv2d or linear",
    )


def test_layers_without_second_derivatives_count_alike():
    class Sorted(nn.Module):
        """No rule leads through the sorting."""

        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(20, 40), nn.Linear(40, 10)

        def forward(self, x):
            return self.two(self.one(x).cumsum(1))

    torch.manual_seed(0)
    x = torch.randn(8, 20)
    program = capture(Sorted(), (x,), name="sorted")
    result = share(program, "share-weights{bits=2 importance=hessian}", calibration=[(x,)])
    assert result.program.encodings.keys() == {"one.weight", "two.weight"}
    (note,) = result.report.notes()
    assert note.detail.startswith("all errors of one.weight count alike: ")
    plain = share(program, "share-weights{bits=2}").program
    one, two = (
        [found.encodings[name].materialise() for name in ("one.weight", "two.weight")]
        for found in (plain, result.program)
    )
    assert same_bits(one[0], two[0])
    assert not same_bits(one[1], two[1])


def test_a_remark_says_what_was_done():
    result = share(small(), 'share-weights{bits=2 exclude=["0.weight"]}')
    linear, conv = (
        next(one for one in result.report.remarks if one.node == node)
        for node in ("linear", "conv2d")
    )
    assert linear.detail == "3.weight: 1440 weights share 4 values"
    assert linear.before.stored_bytes - linear.after.stored_bytes == 4 * 1440 - 360 - 16
    assert (conv.reason, conv.detail) == (
        Reason.EXCLUDED_BY_OPTION,
        "0.weight matches the option 'exclude'",
    )


def test_what_is_shared_already_is_left_alone():
    once = share(small()).program
    result = share(once)
    assert {one.reason for one in result.report.remarks} == {Reason.ALREADY_ENCODED}
    assert result.program.encodings.keys() == once.encodings.keys()


@pytest.mark.parametrize("importance", ["hessian", "activations"])
def test_what_matters_more_is_kept_closer(importance):
    program, (x, _) = small(), images()
    batches = [(part,) for part in x.split(8)]
    text = f"share-weights{{bits=2 importance={importance}}}"
    plain = share(program, "share-weights{bits=2}").program
    weighted = share(program, text, calibration=batches).program
    if importance == "hessian":
        counts = diagonal_hessian(program, ["3.weight"], batches)["3.weight"]
    else:
        with torch.no_grad():
            parts = dict(program.module.named_parameters())
            hidden = torch.relu(nn.functional.conv2d(x, parts["0.weight"], parts["0.bias"]))
        counts = hidden.flatten(1).square().mean(0).expand(5, -1)

    def error(found):
        lack = tensor_of(found.module, "3.weight") - tensor_of(program.module, "3.weight")
        return float((counts * lack.square()).sum().detach())

    assert error(weighted) < error(plain)


def test_centroids_are_trained_and_assignments_are_not():
    program, (x, y) = share(small(), "prune{density=0.3}").program, images()
    train = shohin.Trainer([(x, y)], epochs=20, learning_rate=0.05)
    plain = share(program, "share-weights{bits=2}").program
    tuned = share(program, "share-weights{bits=2}", train=train).program
    for name in NAMES:
        one, two = (codebook_of(found.encodings[name]) for found in (plain, tuned))
        assert torch.equal(one.indices, two.indices)
        assert not torch.equal(one.centroids, two.centroids)
    assert_stored_exactly(tuned)

    def loss(found):
        with torch.no_grad():
            return float(nn.functional.cross_entropy(found.module(x), y))

    assert loss(tuned) < loss(plain)
    untuned = share(program, "share-weights{bits=2 tune=none}", train=train).program
    assert same_bits(tensor_of(untuned.module, "0.weight"), tensor_of(plain.module, "0.weight"))


def test_weights_that_may_move_lose_less_with_few_bits():
    program, (x, y) = share(small(), "prune{density=0.3}").program, images()
    train = shohin.Trainer([(x, y)], epochs=60, learning_rate=0.05)
    losses = {}
    for assignments in ("fixed", "trained"):
        text = f"share-weights{{bits=1 assignments={assignments}}}"
        after = share(program, text, train=train).program
        assert_stored_exactly(after)
        for name in NAMES:
            kept = after.encodings[name]
            assert torch.equal(kept.mask, program.encodings[name].mask)
            assert codebook_of(kept).centroids.numel() <= 2
        with torch.no_grad():
            losses[assignments] = float(nn.functional.cross_entropy(after.module(x), y))
        again = share(program, text, train=train).program
        assert same_bits(*(tensor_of(one.module, "0.weight").detach() for one in (after, again)))
    assert losses["trained"] < 0.8 * losses["fixed"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_centroids_may_be_trained_on_another_device():
    program, (x, y) = share(small(), "prune{density=0.3}").program, images()

    def train(module):
        module.to("cuda")
        shohin.Trainer([(x.to("cuda"), y.to("cuda"))], learning_rate=0.05)(module)

    after = share(program, "share-weights{bits=2}", train=train).program
    assert_stored_exactly(after)
    assert {one.device.type for one in after.module.state_dict().values()} == {"cpu"}


def test_training_that_diverges_is_undone():
    program, (x, y) = small(), images()
    train = shohin.Trainer([(x * float("nan"), y)])
    plain = share(program).program
    with pytest.warns(ShohinWarning, match="the centroids are those before the training"):
        result = share(program, train=train)
    for name in NAMES:
        one, two = (tensor_of(p.module, name) for p in (plain, result.program))
        assert same_bits(one.detach(), two.detach())
    assert any(one.reason == "diverged" for one in result.report.remarks)


def stored_bytes(program):
    """Bytes of all weights of a program, tied ones once."""
    return sum(encoding_of(program, tied[0]).stored_bytes() for tied in tied_names(program))


@pytest.mark.parametrize("before", ["", "prune{density=0.7}, "])
@pytest.mark.parametrize("most", [400, 500, 700, 1200])
def test_a_target_in_bytes_is_met_and_used(before, most):
    text = f"{before}share-weights{{target_bytes={most}}}, entropy-code"
    after = share(small(), text)
    assert 0.85 * most <= stored_bytes(after.program) <= most


def layers(count=12):
    """Layers so small that tables and biases take a large part of them."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(count)))
    return capture(network, (torch.ones(2, 8, 32, 32),), name="layers")


@pytest.mark.parametrize("most", [2000, 3000, 6000])
@pytest.mark.parametrize(
    ("before", "options"),
    [
        ("", ""),
        ("", " biases=2"),
        ("", ' exclude=["1.weight"]'),
        ("", " compensate=true biases=3"),
        ("prune{density=0.3}, ", " compensate=true"),
    ],
)
def test_a_target_in_bytes_counts_all_that_is_stored(before, options, most):
    if "exclude" in options:
        most += 576 * 4
    text = f"{before}share-weights{{target_bytes={most}{options}}}, entropy-code"
    program, batch = layers(), torch.randn(4, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    after = share(program, text, calibration=[(batch,)]).program
    assert 0.8 * most <= stored_bytes(after) <= most
    assert_stored_exactly(after)


def test_a_target_in_bytes_holds_after_training():
    program, (x, y) = small(), images()
    with torch.no_grad():
        weight = tensor_of(program.module, "3.weight")
        weight.copy_((weight * 50).round() / 8)  # Centroids that half precision has.
    text = "share-weights{target_bytes=700}, entropy-code"
    after = share(program, text, train=shohin.Trainer([(x, y)], learning_rate=0.05)).program
    assert stored_bytes(after) <= 700


@pytest.mark.parametrize(
    ("text", "least", "rest"),
    [
        ("target_bytes=10", 266, 52),
        ('target_bytes=1000 exclude=["3.weight"]', 5838, 5812),
        ('target_bytes=1000 exclude=["*"]', 6388, 6388),
        ("target_bytes=1000 linear=8", 2542, 52),
    ],
)
def test_a_target_that_cannot_be_met(text, least, rest):
    with pytest.raises(PassError) as caught:
        share(small(), f"share-weights{{{text}}}")
    most = text.split()[0].removeprefix("target_bytes=")
    assert (
        f"share-weights target_bytes: expected at most {int(most):,} bytes, got {least:,} at the "
        f"fewest bits, {rest:,} of them of what is not shared; prune first, or choose more"
    ) in str(caught.value)


def test_a_target_that_is_met_already():
    result = share(small(), 'share-weights{target_bytes=7000 exclude=["*"]}')
    assert not result.program.encodings


def test_bits_of_a_kind_or_a_layer_hold_under_a_target():
    def counts(text):
        after = share(small(), f"share-weights{{target_bytes=2600 {text}}}").program
        books = {name: codebook_of(one) for name, one in after.encodings.items()}
        return {name: book.centroids.numel() for name, book in books.items()}

    assert counts("linear=2")["3.weight"] == 4
    assert counts("conv=1")["0.weight"] == 2
    assert counts("conv=1 layers={0.weight: 3}")["0.weight"] == 8
    found = share(
        small(), "share-weights{conv=1 target_drop=0.5}", evaluate=lambda module: 1.0
    ).program
    assert codebook_of(found.encodings["0.weight"]).centroids.numel() == 2


def closeness_to(program, x):
    """An evaluation: the relative squared difference of outputs, below zero."""
    with torch.no_grad():
        wanted = program.module(x)

    def evaluate(module):
        with torch.no_grad():
            return -float((module(x) - wanted).square().mean() / wanted.square().mean())

    return evaluate


def test_a_target_drop_takes_the_fewest_bits_that_hold_it():
    program = small()
    closeness = closeness_to(program, images(256)[0])
    sizes = {}
    for drop in (1e-4, 1e-2):
        result = share(program, f"share-weights{{target_drop={drop}}}", evaluate=closeness)
        assert closeness(result.program.module) >= -drop
        sizes[drop] = sum(one.stored_bytes() for one in result.program.encodings.values())
    assert sizes[1e-2] < sizes[1e-4]
    (note,) = result.report.notes()
    assert note.reason == "evaluation"
    assert note.extra["after"] == closeness(result.program.module)


def large_biases():
    """Biases that matter far more than weights."""
    program = small()
    with torch.no_grad():
        for name in ("0.bias", "3.bias"):
            bias = tensor_of(program.module, name)
            bias.copy_(torch.linspace(-3, 3, bias.numel()).pow(3))
    return program


@pytest.mark.parametrize("options", ["biases=2", "compensate=true biases=2"])
@pytest.mark.parametrize("drop", [0.01, 0.1])
def test_a_target_drop_holds_for_what_is_made(options, drop):
    program, (x, _) = large_biases(), images(64)
    evaluate = closeness_to(program, x)
    text = f"share-weights{{target_drop={drop} {options}}}"
    found = share(program, text, evaluate=evaluate, calibration=[(x,)]).program
    assert {"0.bias", "3.bias"} <= found.encodings.keys()
    assert evaluate(found.module) >= -drop


def test_shared_biases_can_make_a_target_drop_impossible():
    program, (x, _) = large_biases(), images(64)
    with pytest.raises(
        PassError, match=r"evaluation of at least -0\.1, got -0\.49.* the most bits"
    ):
        share(
            program,
            "share-weights{target_drop=0.1 biases=1}",
            evaluate=closeness_to(program, x),
        )


def test_target_drop_errors():
    def share_with(evaluate, text="share-weights{target_drop=0.1}"):
        with pytest.raises(PassError) as caught:
            share(small(), text, evaluate=evaluate)
        return str(caught.value)

    found = share_with(lambda module: float("nan"))
    assert "target_drop: expected a finite number from the evaluate function, got nan" in found
    before = tensor_of(small().module, "3.weight")

    def same(module):
        return 0.9 if torch.equal(module.get_parameter("3.weight"), before) else 0.25

    assert (
        "share-weights target_drop: expected an evaluation of at least 0.8, got 0.25 with the "
        "most bits; choose a larger drop, or exclude the most sensitive weights"
    ) in share_with(same)
    # For the report, before, with the only bits there are, and of what comes of it.
    falling = iter([0.9, 0.9, 0.9, 0.5])
    assert "at least 0.8 again, got 0.5; let the evaluate function give the same" in share_with(
        lambda module: next(falling), "share-weights{target_drop=0.1 conv=2 linear=2}"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("share-weights{bits=0}", "share-weights bits: expected 1 to 8 bits, got 0"),
        ("share-weights{biases=0}", "share-weights biases: expected 1 to 8 bits, got 0"),
        ("share-weights{conv=9}", "share-weights conv: expected 1 to 8 bits, got 9"),
        (
            'share-weights{layers={"3.*": 12}}',
            "share-weights layers '3.*': expected 1 to 8 bits, got 12",
        ),
        ("share-weights{target_bytes=0}", "expected 1 or more, got 0"),
        ("share-weights{target_drop=-1.0}", "expected 0 or more, got -1.0"),
        (
            "share-weights{bits=4 target_bytes=500}",
            "share-weights bits: does not go together with 'target_bytes'; fix those of some "
            "weights by 'conv', 'linear' or 'layers'",
        ),
        (
            "share-weights{bits=4 target_drop=0.1}",
            "share-weights bits: does not go together with 'target_drop'",
        ),
        (
            "share-weights{target_bytes=5 target_drop=0.1}",
            "share-weights target_bytes: does not go together with 'target_drop'",
        ),
        (
            "share-weights{importance=hessian}",
            "share-weights importance: 'hessian' needs calibration batches, got none",
        ),
        ("share-weights{target_drop=0.1}", "target_drop: needs an evaluate function"),
        ("share-weights{tune=all}", "share-weights tune: 'all' needs a train function, got none"),
        (
            "share-weights{assignments=trained}",
            "share-weights assignments: 'trained' needs a train function, got none",
        ),
        ("share-weights{assignments=trained tune=none}", "does not go together with 'tune=none'"),
        (
            "share-weights{assignments=trained target_bytes=500}",
            "does not go together with 'target_bytes'; weights that move take other bytes",
        ),
        (
            'share-weights{exclude=["3.weigth"]}',
            "expected a convolution or linear weight, got no match; did you mean '3.weight' or ",
        ),
    ],
)
def test_errors(text, problem):
    with pytest.raises((SpecError, PassError)) as caught:
        share(small(), text)
    assert problem in str(caught.value)


def test_text_comes_back():
    chosen = ShareWeights(conv=6, layers={"a": 2}, start="density", target_drop=0.5)
    (again,) = parse_pipeline(format_pass(chosen))
    assert again == chosen


def test_a_program_that_has_no_weights_to_share():
    program = capture(nn.ReLU(), (torch.ones(2, 3),))
    result = share(program)
    assert not result.program.encodings


def test_outputs_are_those_of_the_shared_weights():
    program = share(small(), "prune{density=0.5}, share-weights{bits=3}").program
    x, _ = images()
    parts = {n: encoding_of(program, n).materialise() for n in NAMES}
    rest = dict(program.module.named_parameters())
    hidden = torch.relu(nn.functional.conv2d(x, parts["0.weight"], rest["0.bias"])).flatten(1)
    expected = hidden @ parts["3.weight"].T + rest["3.bias"]
    assert torch.allclose(program.module(x), expected, atol=1e-5)
