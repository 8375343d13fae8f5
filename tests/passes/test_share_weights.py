from dataclasses import replace

import pytest
import torch
from torch import nn

import shohin
from shohin.errors import PassError, ShohinWarning, SpecError
from shohin.ir.capture import capture
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Sparse, same_bits
from shohin.ir.program import Fact, Stage, encoding_of, tensor_of
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


@pytest.mark.parametrize("before", ["", "prune{density=0.7}, "])
@pytest.mark.parametrize("most", [500, 700, 1200])
def test_a_target_in_bytes_is_met_and_used(before, most):
    text = f"{before}share-weights{{target_bytes={most}}}, entropy-code{{coder=ans}}"
    after = share(small(), text)
    stored = sum(encoding.stored_bytes() for encoding in after.program.encodings.values())
    tables = 2 * (256 * 6 // 8 + 8)
    assert 0.6 * most <= stored <= most + tables


def test_a_target_that_cannot_be_met():
    with pytest.raises(PassError, match=r"expected at most 10 bytes, got .* at the fewest bits"):
        share(small(), "share-weights{target_bytes=10}")


def test_a_target_drop_takes_the_fewest_bits_that_hold_it():
    program = small()
    x, _ = images(256)
    with torch.no_grad():
        wanted = program.module(x)

    def closeness(module):
        with torch.no_grad():
            return -float((module(x) - wanted).square().mean() / wanted.square().mean())

    sizes = {}
    for drop in (1e-4, 1e-2):
        result = share(program, f"share-weights{{target_drop={drop}}}", evaluate=closeness)
        assert closeness(result.program.module) >= -drop
        sizes[drop] = sum(one.stored_bytes() for one in result.program.encodings.values())
    assert sizes[1e-2] < sizes[1e-4]


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
    chosen = ShareWeights(bits=4, conv=6, layers={"a": 2}, start="density", target_drop=0.5)
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
