import pytest
from ternary_networks import NAMES, encoded, fixed_steps, make, small

from shohin.errors import SpecError
from shohin.ir.program import encoding_of
from shohin.ir.ternary import Ternary
from shohin.ir.verifier import verify
from shohin.passes.base import Context
from shohin.passes.pipeline import format_pass, parse_pipeline
from shohin.passes.ternary import TrainTernary


def test_golden(golden):
    program = small()
    context = Context(train=fixed_steps)
    result = TrainTernary().run(program.copy(), context)
    verify(result.program)
    golden("ternary", program, result.program)
    assert result.modified


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
        (
            "ternary{start=fitted sparsity=0.4}",
            "ternary sparsity: does not go together with 'start=fitted'; give one of the two",
        ),
        (
            "ternary{threshold=0.1 sparsity=0.4}",
            "ternary threshold: does not go together with 'sparsity'; give one of the two",
        ),
        (
            "ternary{thresholds={4.weight: 0.1} sparsity=0.4}",
            "ternary thresholds: does not go together with 'sparsity'; give one of the two",
        ),
        ("ternary{sparsity=1.0}", "expected from 0 to below 1, got 1.0"),
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


def test_encodings_name_what_is_read():
    after = make("ternary{keep_first=false keep_last=false}").program
    assert encoded(after) == set(NAMES)
    assert all(isinstance(encoding_of(after, name), Ternary) for name in NAMES)
