import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shohin.errors import ArtifactError, SpecError
from shohin.ir import Dense, Encoding, Sparse, decode, encode, register_encoding, same_bits

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A weight with any bits in it, zero outside a mask, and the mask."""
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    count = math.prod(shape)
    values = torch.tensor(draw(st.lists(FLOATS, min_size=count, max_size=count)))
    flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    mask = torch.tensor(flags, dtype=torch.bool).reshape(shape)
    return values.reshape(shape).masked_fill(~mask, 0.0), mask


@SETTINGS
@given(weights(), st.integers(1, 16))
def test_sparse_materialises_the_weight_and_survives_a_round_trip(pair, gap_bits):
    weight, mask = pair
    encoding = Sparse.from_dense(weight, mask, gap_bits)
    again = decode(*encode(encoding))
    assert same_bits(encoding.materialise(), weight)
    assert same_bits(again.materialise(), weight)
    assert isinstance(again, Sparse)
    assert torch.equal(again.mask, mask)
    assert again.gap_bits == gap_bits
    assert again.stored_bytes() == encoding.stored_bytes()


@SETTINGS
@given(weights())
def test_dense_survives_a_round_trip(pair):
    again = decode(*encode(Dense(pair[0])))
    assert same_bits(again.materialise(), pair[0])
    assert again.stored_bytes() == 4 * pair[0].numel()


def count_stored(flags: list[bool], gap_bits: int) -> int:
    """Bytes of the stored form, counted entry by entry as a writer goes along the mask."""
    entries, zeros, pending = 0, 0, 0
    for kept in flags:
        if kept:
            entries, zeros, pending = entries + pending + 1, 0, 0
        else:
            zeros += 1
            if zeros == (1 << gap_bits) - 1:
                zeros, pending = 0, pending + 1
    return 4 * sum(flags) + math.ceil(entries * gap_bits / 8)


@SETTINGS
@given(st.lists(st.sampled_from([False] * 9 + [True]), max_size=300), st.integers(1, 5))
def test_stored_bytes_count_gaps_and_fillers(flags, gap_bits):
    mask = torch.tensor(flags, dtype=torch.bool)
    encoding = Sparse.from_dense(torch.zeros(len(flags)), mask, gap_bits)
    assert encoding.stored_bytes() == count_stored(flags, gap_bits)


def test_sizes_and_descriptions():
    weight = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    encoding = Sparse.from_dense(weight, weight != 0)
    assert (encoding.shape, encoding.dtype) == ((2, 2), torch.float32)
    assert (encoding.nonzeros(), encoding.parameters(), encoding.density) == (1, 4, 0.25)
    assert encoding.describe() == "sparse 25.0%"
    assert encoding.stored_bytes() == 5
    assert Sparse(encoding.mask, encoding.values, 4).describe() == "sparse 25.0%"
    nested = Sparse(encoding.mask, Sparse.from_dense(torch.ones(1), torch.ones(1) > 0))
    assert nested.describe() == "sparse 25.0% of sparse 100.0%"


@pytest.mark.parametrize(
    ("mask", "count", "gap_bits", "text"),
    [
        (torch.ones(2), 2, 8, "sparse mask: expected bool, got torch.float32"),
        (torch.ones(2) > 0, 3, 8, "sparse values: expected shape (2,), got (3,)"),
        (torch.ones(2) > 0, 2, 17, "sparse gap_bits: expected 1 to 16, got 17"),
    ],
)
def test_impossible_sparse_encodings(mask, count, gap_bits, text):
    with pytest.raises(SpecError) as error:
        Sparse(mask, Dense(torch.ones(count)), gap_bits)
    assert str(error.value) == text


@pytest.mark.parametrize(
    ("description", "text"),
    [
        (3, "encoding: expected an object, got 3"),
        ({"kind": "sparce"}, "encoding: unknown kind 'sparce'; did you mean 'sparse'?"),
        ({"kind": "dense"}, "encoding 'dense': expected objects 'children' and 'attributes'"),
        (
            {"kind": "dense", "children": {}, "attributes": {}},
            "encoding 'dense': cannot be rebuilt: 'values'",
        ),
    ],
)
def test_malformed_descriptions(description, text):
    with pytest.raises(ArtifactError) as error:
        decode(description, {})
    assert str(error.value) == text


def test_a_kind_has_one_class():
    class Other(Encoding):
        pass

    with pytest.raises(SpecError, match="dense: this encoding is Dense already"):
        register_encoding("dense")(Other)


def test_same_bits_tells_zeros_apart():
    zero = torch.zeros(1)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, -zero)
    assert not same_bits(zero, zero.double())
    assert not same_bits(zero, torch.zeros(2))
    assert same_bits(torch.tensor(float("nan")), torch.tensor(float("nan")))


@SETTINGS
@given(weights(), st.integers(0, 30))
def test_the_stored_form_is_compared_bit_for_bit(pair, position):
    weight, mask = pair
    sparse = Sparse.from_dense(weight, mask)
    assert sparse.is_stored_form_of(weight)
    assert sparse.is_stored_form_of(weight) == same_bits(sparse.materialise(), weight)
    assert sparse.nonzeros() == int(torch.count_nonzero(weight))
    assert not sparse.is_stored_form_of(weight.double())
    assert not sparse.is_stored_form_of(weight.unsqueeze(0))
    if weight.numel():
        other = weight.clone().reshape(-1)
        other[position % other.numel()] *= -1
        other = other.reshape(weight.shape)
        assert sparse.is_stored_form_of(other) == same_bits(weight, other)
