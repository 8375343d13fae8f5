from dataclasses import replace

import pytest
import torch
from ternary_networks import (
    NAMES,
    assert_stored_exactly,
    encoded,
    fixed_steps,
    make,
    remarks,
    small,
    trainer,
)
from torch import nn

import shohin
from shohin.ir.capture import capture
from shohin.ir.encodings import Dense, Sparse, same_bits
from shohin.ir.program import Fact, Stage, set_tensor, tensor_of
from shohin.passes.base import Context
from shohin.passes.pruning.candidates import find_candidates, reads_inputs
from shohin.passes.remarks import Reason
from shohin.passes.ternarising.layers import Choice, usable_layers
from shohin.passes.ternary import TrainTernary


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


def test_a_sparsity_that_takes_ties_can_leave_nothing():
    program = small()
    with torch.no_grad():
        tensor_of(program.module, "7.weight").fill_(0.5)
    result = make("ternary{sparsity=0.4}", program, train=fixed_steps)
    assert remarks(result, "linear") == [
        (Reason.NOT_APPLICABLE, "7.weight: a sparsity of 0.4 leaves no element")
    ]


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
