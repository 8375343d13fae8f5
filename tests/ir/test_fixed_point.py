import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from shohin.errors import SpecError
from shohin.ir.encodings import decode, encode, same_bits
from shohin.ir.fixed_ops import (
    fixed_add,
    fixed_average_pool2d,
    fixed_conv2d,
    fixed_linear,
    fixed_multiply,
    fixed_quantize,
    unrounded,
)
from shohin.ir.fixed_point import (
    FixedPoint,
    check_rounding,
    integers,
    is_on_grid,
    largest_sums,
    limits,
    quantize,
)


def on_grid(shape, bits, fraction, seed=0, symmetric=False):
    low, high = limits(bits)
    generator = torch.Generator().manual_seed(seed)
    low = -high if symmetric else low
    return torch.randint(low, high + 1, shape, generator=generator).float() * 2.0**-fraction


@pytest.mark.parametrize(
    ("value", "nearest", "lower"),
    [
        (0.5, 0, 0), (1.5, 2, 1), (2.5, 2, 2), (-0.5, 0, -1), (-1.5, -2, -2), (-2.5, -2, -3),
        (126.5, 126, 126), (127.5, 127, 127), (200.0, 127, 127), (-128.5, -128, -128),
        (-1e30, -128, -128), (math.inf, 127, 127), (-math.inf, -128, -128), (math.nan, 0, 0),
    ],
)  # fmt: skip
def test_rounding_and_saturation(value, nearest, lower):
    given_value = torch.tensor([value])
    assert float(quantize(given_value, 8, 0)) == nearest
    assert float(quantize(given_value, 8, 0, "truncate")) == lower
    assert float(quantize(given_value / 16, 8, 4)) == nearest / 16
    assert float(quantize(given_value * 16, 8, -4)) == nearest * 16


def test_symmetric_integers_have_their_negatives():
    assert float(quantize(torch.tensor([-200.0]), 8, 0, symmetric=True)) == -127
    assert float(quantize(torch.tensor([-3.0]), 2, 0, symmetric=True)) == -1


def test_there_is_but_one_zero():
    found = quantize(torch.tensor([-0.0, -0.1, 0.1]), 8, 0)
    assert not torch.signbit(found).any()


@given(
    st.integers(2, 16),
    st.integers(-10, 20),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
)
def test_what_is_rounded_lies_on_the_grid_and_is_the_nearest(bits, fraction, numbers):
    values = torch.tensor(numbers, dtype=torch.float64)
    found = quantize(values, bits, fraction)
    assert is_on_grid(found, bits, fraction)
    low, high = (limit * 2.0**-fraction for limit in limits(bits))
    inside = (values >= low) & (values <= high)
    assert ((found - values).abs() <= 2.0**-fraction / 2)[inside].all()
    assert torch.equal(quantize(found, bits, fraction), found)
    assert torch.equal(integers(found, fraction).double() * 2.0**-fraction, found)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8, 11, 16])
@pytest.mark.parametrize("coder", ["plain", "huffman", "ans"])
def test_an_encoding_comes_back(bits, coder):
    if coder != "plain" and bits > 8:
        pytest.skip("integers of more than 8 bits are not coded")
    values = on_grid((6, 5, 3), bits, 3, symmetric=True)
    plain = FixedPoint.from_values(values, bits, (3,))
    one = FixedPoint(plain.codes, bits, (3,), coder=coder)
    again = decode(*encode(one))
    assert isinstance(again, FixedPoint)
    assert same_bits(again.materialise(), values)
    assert (again.bits, again.fractions, again.coder) == (bits, (3,), coder)
    assert plain.stored_bytes() == -(-90 * bits // 8)
    assert one.nonzeros() == int(torch.count_nonzero(values))


def test_a_fraction_for_every_row():
    scales = torch.tensor([1.0, 2.0, 0.5]).reshape(-1, 1)
    values = on_grid((3, 4), 6, 0) * scales
    one = FixedPoint.from_values(values, 6, (0, -1, 1))
    assert same_bits(one.materialise(), values)
    assert one.describe() == "6-bit fixed point /-1..1"
    assert same_bits(decode(*encode(one)).materialise(), values)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bits": 1}, "fixed-point bits: expected 2 to 16, got 1"),
        ({"bits": 17}, "fixed-point bits: expected 2 to 16, got 17"),
        ({"fractions": (1, 2)}, "expected 1 fractional length or 3, got 2"),
        ({"fractions": (99,)}, "expected -64 to 64, got 99"),
        ({"bits": 3}, "fixed-point codes: expected -4 to 3, got -5 to 5"),
        ({"bits": 9, "coder": "ans"}, "expected at most 8 bits to code, got 9"),
        ({"codes": torch.zeros(3)}, "fixed-point codes: expected int16, got torch.float32"),
    ],
)
def test_encodings_that_are_refused(changes, text):
    given_parts = {"codes": torch.tensor([-5, 0, 5]).short(), "bits": 8, "fractions": (2,)}
    with pytest.raises(SpecError, match=text):
        FixedPoint(**{**given_parts, **changes})


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 40), ("bits", "8"), ("fractions", 3), ("fractions", ["a"]), ("dtype", "int8"),
     ("dtype", "nothing"), ("coder", "zip")],
)  # fmt: skip
def test_descriptions_that_are_refused(key, value):
    description, tensors = encode(FixedPoint(torch.tensor([1, 2]).short(), 8, (2,)))
    description["attributes"][key] = value
    with pytest.raises(shohin_errors()):
        decode(description, tensors)


def shohin_errors():
    from shohin.errors import ArtifactError

    return ArtifactError


def test_unknown_roundings():
    assert check_rounding("truncate") == "truncate"
    with pytest.raises(SpecError, match="unknown mode 'truncat'; did you mean 'truncate'"):
        check_rounding("truncat")


@pytest.mark.parametrize("large", [False, True])
def test_convolutions_are_exact(large):
    """In single precision where that holds every sum, else in double."""
    bits, channels = (16, 64) if large else (8, 6)
    x, w = on_grid((2, channels, 7, 8), bits, 5), on_grid((4, channels, 3, 3), bits, 9, 1)
    b = on_grid((4,), 24, 14, 2)
    options = ([2, 1], [1, 0, 2, 1], [1, 2], 1)
    found = fixed_conv2d(x, w, b, *options, [9], 5, bits=8, fraction=2)
    wide = np.zeros((2, channels, 8, 11), np.int64)
    wide[:, :, 1:, 2:10] = integers(x, 5).numpy()
    sums = functional.conv2d(
        torch.from_numpy(wide).double(), integers(w, 9).double(), integers(b, 14).double(),
        [2, 1], 0, [1, 2],
    ).long()  # fmt: skip
    half, shift = 1 << 11, 12
    whole, rest = sums >> shift, sums & ((1 << shift) - 1)
    whole += ((rest > half) | ((rest == half) & (whole % 2 != 0))).long()
    assert torch.equal(integers(found, 2), whole.clamp(-128, 127))


def test_grouped_convolutions_and_channels_of_their_own():
    x, w = on_grid((1, 4, 5, 5), 8, 4), on_grid((4, 2, 3, 3), 8, 0)
    fractions = [4, 5, 6, 7]
    w = w * 2.0 ** -torch.tensor(fractions).reshape(-1, 1, 1, 1)
    found = fixed_conv2d(x, w, None, [1, 1], [0] * 4, [1, 1], 2, fractions, 4, bits=8, fraction=1)
    expected = quantize(functional.conv2d(x.double(), w.double(), groups=2), 8, 1)
    assert torch.equal(found.double(), expected)


def test_linear_maps_sums_products_and_averages():
    x, y = on_grid((3, 6), 8, 3), on_grid((3, 6), 8, 5, 1)
    w, b = on_grid((2, 6), 4, 2, 2), on_grid((2,), 16, 5, 3)
    exact = {
        "linear": x.double() @ w.double().T + b.double(),
        "add": x.double() + y.double(),
        "multiply": x.double() * y.double(),
    }
    found = {
        "linear": fixed_linear(x, w, b, [2], 3, bits=8, fraction=1, rounding="truncate"),
        "add": fixed_add(x, y, bits=8, fraction=2, rounding="truncate"),
        "multiply": fixed_multiply(x, y, bits=16, fraction=4, rounding="truncate"),
    }
    formats = {"linear": (8, 1), "add": (8, 2), "multiply": (16, 4)}
    for name, value in found.items():
        bits, fraction = formats[name]
        assert torch.equal(value.double(), quantize(exact[name], bits, fraction, "truncate"))
    image = on_grid((2, 3, 6, 6), 8, 4)
    averaged = fixed_average_pool2d(image, [3, 3], [3, 3], [0] * 4, 7282, 16, bits=8, fraction=4)
    sums = functional.avg_pool2d(image.double(), 3, divisor_override=1)
    assert torch.equal(averaged.double(), quantize(sums * 7282 * 2.0**-16, 8, 4))
    # 7282 / 2^16 stands for a ninth: the result is off by less than one step.
    assert (averaged - functional.avg_pool2d(image, 3)).abs().max() <= 2.0**-4


def test_padding_of_averages_counts():
    image = torch.ones(1, 1, 2, 2)
    found = fixed_average_pool2d(image, [2, 2], [2, 2], [1, 1, 1, 1], 1, 2, bits=8, fraction=4)
    assert torch.equal(found, torch.full((1, 1, 2, 2), 0.25))


def test_gradients_pass_but_where_results_are_saturated():
    x = torch.tensor([[0.3, 0.4]], requires_grad=True)
    w = torch.tensor([[0.5, 0.25], [100.0, 100.0]], requires_grad=True)
    y = fixed_linear(x, w, None, [2], 3, bits=8, fraction=4)
    y.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[0.5, 0.25]]))
    assert torch.allclose(w.grad, torch.tensor([[0.3, 0.4], [0.0, 0.0]]))
    z = torch.tensor([1.26, 900.0, -900.0], requires_grad=True)
    fixed_quantize(z, bits=8, fraction=2).sum().backward()
    assert z.grad.tolist() == [1.0, 0.0, 0.0]


def test_operators_work_on_fake_tensors_and_in_their_registration():
    x, w = on_grid((2, 4), 8, 3), on_grid((3, 4), 8, 3)
    cases = {
        fixed_linear: (x, w, None, [3], 3, 8, 3),
        fixed_add: (x, x, 8, 3),
        fixed_quantize: (x, 8, 3),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_results_before_they_are_rounded():
    x = torch.tensor([0.123456789])
    assert unrounded(fixed_quantize, [x]).dtype == torch.float64
    assert float(unrounded(fixed_add, [x, x])) == 2 * float(x)


def test_the_largest_sums():
    weights = torch.tensor([[1, -2, 3], [0, 0, 0]])
    assert largest_sums(weights, None, 8).tolist() == [768, 0]
    assert largest_sums(weights, torch.tensor([-5, 7]), 8).tolist() == [773, 7]
