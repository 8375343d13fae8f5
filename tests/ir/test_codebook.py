from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import ArtifactError, SpecError
from shohin.ir.codebook import Codebook
from shohin.ir.encodings import Sparse, decode, encode

CODERS = ("plain", "huffman", "ans")


def codebook(shape=(6, 10), count=5, coder="plain", dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, count, shape, generator=generator).to(torch.uint8)
    return Codebook(torch.randn(count, generator=generator).to(dtype), indices, coder)


def assert_same(one, two):
    assert type(one) is type(two)
    assert torch.equal(one.materialise(), two.materialise())
    assert one.materialise().dtype == two.materialise().dtype
    assert one.describe() == two.describe()
    assert one.stored_bytes() == two.stored_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(("shape", "count"), [((6, 10), 5), ((), 1), ((0, 3), 2), ((300,), 256)])
def test_it_comes_back(shape, count, coder, dtype):
    held = codebook(shape, count, coder, dtype)
    again = decode(*encode(held))
    assert_same(held, again)
    assert torch.equal(again.indices, held.indices)
    assert torch.equal(again.centroids, held.centroids)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("gap_bits", [1, 4, 8])
def test_a_sparse_codebook_comes_back(coder, gap_bits):
    mask = torch.rand(12, 40, generator=torch.Generator().manual_seed(1)) < 0.1
    inner = codebook((int(mask.sum()),), 4, coder)
    held = Sparse(mask, inner, gap_bits, coder)
    again = decode(*encode(held))
    assert_same(held, again)
    assert torch.equal(again.mask, mask)
    assert not held.materialise()[~mask].any()
    assert torch.equal(held.materialise()[mask], inner.materialise())
    tensors = encode(held)[1].values()
    assert held.stored_bytes() == sum(one.nbytes for one in tensors)


@given(st.integers(1, 256), st.integers(0, 500))
def test_sizes_before_coding(count, elements):
    held = Codebook(torch.arange(count).float() / 3, torch.zeros(elements, dtype=torch.uint8))
    bits = max(1, (count - 1).bit_length())
    width = 2 if torch.equal(held.centroids.half().float(), held.centroids) else 4
    assert held.stored_bytes() == width * count + -(-elements * bits // 8)


def test_centroids_are_stored_in_half_precision_where_that_loses_nothing():
    held = codebook()
    assert held.tensors()["centroids"].dtype == torch.float32
    rounded = replace(held, centroids=held.centroids.half().float())
    assert rounded.tensors()["centroids"].dtype == torch.float16
    assert rounded.stored_bytes() == held.stored_bytes() - 2 * 5
    assert_same(rounded, decode(*encode(rounded)))


def test_non_zeros_are_counted_by_centroid():
    centroids = torch.tensor([-1.0, 0.0, 2.0])
    assert Codebook(centroids, torch.tensor([0, 1, 1, 2, 2], dtype=torch.uint8)).nonzeros() == 3


def test_what_it_says_of_itself():
    assert codebook().describe() == "codebook of 5"
    assert codebook(coder="huffman").describe() == "huffman codebook of 5"


@pytest.mark.parametrize(
    ("centroids", "indices", "text"),
    [
        (torch.zeros(0), torch.zeros(2, dtype=torch.uint8), "1 to 256 centroids, got [0]"),
        (torch.zeros(257), torch.zeros(2, dtype=torch.uint8), "1 to 256 centroids, got [257]"),
        (torch.zeros(2), torch.zeros(2), "codebook indices: expected uint8, got torch.float32"),
        (
            torch.zeros(2),
            torch.full((2,), 2, dtype=torch.uint8),
            "codebook indices: expected below 2, got 2",
        ),
    ],
)
def test_what_is_refused(centroids, indices, text):
    with pytest.raises(SpecError) as caught:
        Codebook(centroids, indices)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"shape": [6, 10], "dtype": "int32"}, "expected a floating-point type"),
        ({"shape": [6, 11], "dtype": "float32"}, "expected 25 bytes for 66 numbers of 3 bits"),
        ({"shape": "big", "dtype": "float32"}, "expected sizes, got 'big'"),
        ({"shape": [6, -10], "dtype": "float32"}, r"expected sizes, got \[6, -10\]"),
        ({"shape": [6, 10], "dtype": "float32", "coder": "huffmann"}, "did you mean 'huffman'"),
        ({"shape": [6, 10], "dtype": "float32", "coder": "ans"}, "table"),
    ],
)
def test_malformed_files(attributes, text):
    description, tensors = encode(codebook())
    description["attributes"] = attributes
    with pytest.raises(ArtifactError, match=text):
        decode(description, tensors)
