from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import shohin
from shohin.errors import ArtifactError, SpecError
from shohin.ir.capture import capture
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Dense, Sparse, decode, encode, same_bits
from shohin.ir.program import Stage, set_tensor
from shohin.ir.serialise import save_program
from shohin.ir.ternary import Ternary

CODERS = ("plain", "huffman", "ans")
SHAPES = ((6, 10), (), (0, 3), (3, 0), (300,), (4, 2, 3, 3))


def codes_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(torch.int8)


def ternary(shape=(6, 10), scales="layer", rows=False, coder="plain", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    count = shape[0] if shape else 1
    values = torch.rand((2,) if scales == "layer" else (count, 2), generator=generator)
    factors = torch.randn(count, generator=generator).to(dtype) if rows else None
    return Ternary(codes_of(shape), Dense(values.to(dtype)), factors, coder)


def elementwise(held):
    """The dense tensor, one element after the other."""
    flat = held.codes.reshape(-1).tolist()
    row = held.codes[0].numel() if held.codes.dim() and len(held.codes) else 1
    values = held.scales.materialise().reshape(-1, 2)
    found = []
    for place, code in enumerate(flat):
        number = place // row if held.codes.dim() else 0
        pair = values[number if len(values) > 1 else 0]
        factor = torch.ones((), dtype=held.dtype) if held.rows is None else held.rows[number]
        zero = torch.zeros((), dtype=held.dtype)
        found.append({1: pair[0] * factor, -1: -(pair[1] * factor), 0: zero}[code])
    dense = torch.stack(found) if found else torch.zeros(0, dtype=held.dtype)
    return dense.reshape(held.codes.shape)


def assert_same(one, two):
    assert type(one) is type(two)
    assert same_bits(one.materialise(), two.materialise())
    assert torch.equal(one.codes, two.codes)
    assert (one.rows is None) == (two.rows is None)
    assert one.rows is None or same_bits(one.rows, two.rows)
    assert (one.describe(), one.coder) == (two.describe(), two.coder)
    assert one.stored_bytes() == two.stored_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scales", "rows"), [("layer", False), ("layer", True), ("row", True)])
def test_it_comes_back(shape, scales, rows, coder, dtype):
    held = ternary(shape, scales, rows, coder, dtype)
    again = decode(*encode(held))
    assert_same(held, again)
    assert (held.shape, held.dtype) == (shape, dtype)
    assert same_bits(held.materialise(), elementwise(held))
    assert held.stored_bytes() == sum(one.nbytes for one in encode(held)[1].values())


@given(
    st.lists(st.integers(0, 7), min_size=0, max_size=3),
    st.sampled_from(CODERS),
    st.sampled_from(["layer", "row"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_codes(shape, coder, scales, rows, seed):
    held = replace(ternary(tuple(shape), scales, rows), codes=codes_of(shape, seed), coder=coder)
    dense = held.materialise()
    assert same_bits(dense, elementwise(held))
    assert held.nonzeros() == int(torch.count_nonzero(dense))
    assert held.parameters() == dense.numel()
    share = 100 * held.nonzeros() / max(1, dense.numel())
    prefix = "" if coder == "plain" else f"{coder} "
    suffix = " by row" if rows or scales == "row" else ""
    assert held.describe() == f"{prefix}ternary {share:.1f}%{suffix}"
    tensors = encode(held)[1]
    assert held.stored_bytes() == sum(one.nbytes for one in tensors.values())
    taken = sum(one.nbytes for name, one in tensors.items() if name in ("codes", "table"))
    assert held.code_bits() == 8 * taken / max(1, dense.numel())
    assert_same(held, decode(*encode(held)))


@given(st.integers(0, 999))
def test_two_bits_an_element_before_coding(count):
    held = Ternary.of(torch.zeros(count, dtype=torch.int8), 1.0, 2.0, torch.float32)
    assert held.stored_bytes() == -(-count // 4) + 8
    by_row = replace(held, scales=Dense(torch.ones(count, 2)))
    assert by_row.stored_bytes() == -(-count // 4) + 8 * count
    assert replace(held, rows=torch.ones(count)).stored_bytes() == -(-count // 4) + 8 + 4 * count


def test_zero_is_an_exact_zero_and_signs_are_kept():
    held = Ternary.of(torch.tensor([1, 0, -1]).to(torch.int8), 0.75, 0.5, torch.float16)
    assert same_bits(held.materialise(), torch.tensor([0.75, 0.0, -0.5], dtype=torch.float16))
    negative = replace(held, rows=torch.tensor([-1.0, -2.0, -1.0]).half())
    assert same_bits(negative.materialise(), torch.tensor([-0.75, 0.0, 0.5]).half())


@pytest.mark.parametrize("coder", CODERS)
def test_other_encodings_may_hold_the_scales_and_it_may_hold_kept_elements(coder):
    inner = Codebook(torch.tensor([0.25, 0.5]), torch.tensor([[0, 1]] * 6).to(torch.uint8))
    held = Ternary(codes_of((6, 10)), inner, None, coder)
    assert_same(held, decode(*encode(held)))
    assert held.describe().endswith("% by row of codebook of 2")
    mask = torch.rand(12, 40, generator=torch.Generator().manual_seed(1)) < 0.3
    sparse = Sparse(mask, ternary((int(mask.sum()),), coder=coder), 4, coder)
    again = decode(*encode(sparse))
    assert same_bits(again.materialise(), sparse.materialise())
    assert again.stored_bytes() == sum(one.nbytes for one in encode(sparse)[1].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("scales", "rows"), [("layer", False), ("layer", True), ("row", False)])
def test_files(tmp_path, scales, rows, coder, dtype):
    held = ternary((6, 10), scales, rows, coder, dtype)
    program = capture(nn.Linear(10, 6).to(dtype), (torch.ones(2, 10, dtype=dtype),))
    set_tensor(program.module, "weight", held.materialise())
    program = replace(program, stage=Stage.ANNOTATED, encodings={"weight": held})
    save_program(program, tmp_path / "net.shohin")
    assert_same(shohin.load(tmp_path / "net.shohin").encodings["weight"], held)


def test_rows_are_multiplied():
    factors = torch.tensor([1.5, -2.0, 0.0, 1 / 3, 1.0, 1e-3], dtype=torch.float64)
    for held in (ternary(), ternary(rows=True), ternary(scales="row"), ternary((6, 1, 2), "row")):
        made = held.times_rows(factors)
        assert torch.equal(made.codes, held.codes)
        assert made.coder == held.coder
        exact = held.materialise().double() * factors.reshape(-1, *[1] * (held.codes.dim() - 1))
        # Rows are rounded, and their products with the scales; so are those in `held`.
        assert torch.allclose(made.materialise().double(), exact, rtol=4 * 2.0**-24, atol=0)
        assert_same(made, decode(*encode(made)))
    shared = ternary().times_rows(factors)
    assert same_bits(shared.rows, factors.float())
    assert shared.scales.shape == (2,)
    by_row = ternary(scales="row", rows=True).times_rows(factors)
    assert (by_row.rows, by_row.scales.shape) == (None, (6, 2))


INT8 = torch.int8


@pytest.mark.parametrize(
    ("codes", "scales", "rows", "text"),
    [
        (torch.zeros(3), torch.ones(2), None, "ternary codes: expected int8, got torch.float32"),
        (
            torch.tensor([0, 2], dtype=INT8),
            torch.ones(2),
            None,
            "ternary codes: expected -1, 0 and 1, got 0 to 2",
        ),
        (
            torch.tensor([-128, 1], dtype=INT8),
            torch.ones(2),
            None,
            "ternary codes: expected -1, 0 and 1, got -128 to 1",
        ),
        (
            torch.zeros(3, 4, dtype=INT8),
            torch.ones(3),
            None,
            "ternary scales: expected shape (2,) or (3, 2), got (3,)",
        ),
        (
            torch.zeros(3, 4, dtype=INT8),
            torch.ones(4, 2),
            None,
            "ternary scales: expected shape (2,) or (3, 2), got (4, 2)",
        ),
        (
            torch.zeros(3, dtype=INT8),
            torch.ones(2, dtype=torch.int64),
            None,
            "ternary scales: expected a floating-point type, got torch.int64",
        ),
        (
            torch.zeros(3, 4, dtype=INT8),
            torch.ones(2),
            torch.ones(4),
            "ternary rows: expected shape (3,), got (4,)",
        ),
        (
            torch.zeros(3, dtype=INT8),
            torch.ones(2),
            torch.ones(3).double(),
            "ternary rows: expected torch.float32, got torch.float64",
        ),
    ],
)
def test_what_is_refused(codes, scales, rows, text):
    with pytest.raises(SpecError) as caught:
        Ternary(codes, Dense(scales), rows)
    assert str(caught.value) == text


def test_unknown_coders_are_refused():
    with pytest.raises(SpecError) as caught:
        ternary(coder="huffmann")
    assert str(caught.value) == "coder: unknown 'huffmann'; did you mean 'huffman'?"


def without(name):
    return lambda tensors: {key: one for key, one in tensors.items() if key != name}


def having(name, tensor):
    return lambda tensors: {**tensors, name: tensor}


BYTES = torch.zeros(15, dtype=torch.uint8)
DAMAGES = {
    "no shape": ({}, dict, "expected sizes, got None"),
    "shape of text": ({"shape": "big"}, dict, "expected sizes, got 'big'"),
    "negative shape": ({"shape": [6, -10]}, dict, r"expected sizes, got \[6, -10\]"),
    "other shape": ({"shape": [6, 11]}, dict, "expected 17 bytes for 66 numbers of 2 bits"),
    "other rows": ({"shape": [10, 6]}, dict, r"ternary rows: expected shape \(10,\), got \(6,\)"),
    "unknown coder": ({"shape": [6, 10], "coder": "zip"}, dict, "unknown 'zip'"),
    "coder of no text": ({"shape": [6, 10], "coder": [1]}, dict, "unknown"),
    "no table": ({"shape": [6, 10], "coder": "ans"}, dict, "table"),
    "no codes": ({"shape": [6, 10]}, without("codes"), "codes"),
    "codes of 3": ({"shape": [6, 10]}, having("codes", BYTES + 255), "got 2 to 2"),
    "codes of numbers": (
        {"shape": [6, 10]},
        having("codes", torch.zeros(15)),
        r"expected a vector of bytes, got float32\[15\]",
    ),
    "codes of two axes": (
        {"shape": [6, 10]},
        having("codes", BYTES.reshape(3, 5)),
        r"expected a vector of bytes, got uint8\[3, 5\]",
    ),
    "table of numbers": (
        {"shape": [6, 10], "coder": "huffman"},
        having("table", torch.zeros(2)),
        r"expected a vector of bytes, got float32\[2\]",
    ),
    "rows of another type": (
        {"shape": [6, 10]},
        having("rows", torch.zeros(6, dtype=torch.int32)),
        "ternary rows: expected torch.float32, got torch.int32",
    ),
    "scales of whole numbers": (
        {"shape": [6, 10]},
        having("scales/values", torch.ones(2, dtype=torch.int32)),
        "expected a floating-point type",
    ),
    "three scales": (
        {"shape": [6, 10]},
        having("scales/values", torch.ones(3)),
        r"ternary scales: expected shape \(2,\) or \(6, 2\), got \(3,\)",
    ),
    "no scales": ({"shape": [6, 10]}, without("scales/values"), "values"),
}


@pytest.mark.parametrize(("attributes", "damage", "text"), DAMAGES.values(), ids=DAMAGES)
def test_malformed_files(attributes, damage, text):
    description, tensors = encode(ternary(rows=True))
    description["attributes"] = attributes
    with pytest.raises(ArtifactError, match=text):
        decode(description, damage(tensors))


def test_a_file_without_scales():
    description, tensors = encode(ternary())
    description["children"] = {}
    with pytest.raises(ArtifactError, match="cannot be rebuilt: 'scales'"):
        decode(description, tensors)
