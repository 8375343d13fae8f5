import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.errors import SpecError
from shohin.ir.coding import (
    CODERS,
    ans,
    coded_bytes,
    decode_symbols,
    encode_symbols,
    entropy_bits,
    groups,
    huffman,
)
from shohin.ir.packing import pack_bits

SKEWS = (0.0, 0.05, 0.3, 3.0)


def symbols_of(count, alphabet, skew, seed=0):
    weights = np.exp(-skew * np.arange(alphabet))
    generator = np.random.default_rng(seed)
    return generator.choice(alphabet, count, p=weights / weights.sum()).astype(np.uint8)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(CODERS),
    st.sampled_from([0, 1, 2, 7, 2047, 2048, 2049, 5000]),
    st.integers(1, 256),
    st.sampled_from(SKEWS),
    st.integers(0, 2**32),
)
def test_symbols_come_back(coder, count, alphabet, skew, seed):
    symbols = symbols_of(count, alphabet, skew, seed)
    coded = encode_symbols(symbols, alphabet, coder)
    assert np.array_equal(decode_symbols(coded, alphabet, coder, count), symbols)
    assert coded_bytes(symbols, alphabet, coder) == sum(one.numel() for one in coded.values())


@pytest.mark.parametrize("alphabet", [16, 32, 256])
@pytest.mark.parametrize("skew", [0.05, 0.1, 0.3])
def test_sizes_are_close_to_the_entropy(alphabet, skew):
    symbols = symbols_of(100_000, alphabet, skew)
    entropy = entropy_bits(np.bincount(symbols)) / 8
    table = -(-6 * alphabet // 8)
    assert entropy < coded_bytes(symbols, alphabet, "ans") < 1.003 * entropy + table
    # A Huffman code takes less than the entropy plus the largest probability plus 0.086 bits a
    # symbol (Gallager 1978).
    excess = (np.bincount(symbols).max() / symbols.size + 0.086) * symbols.size / 8
    size = coded_bytes(symbols, alphabet, "huffman")
    assert entropy < size < entropy + excess + 128 + 2 * 49


@pytest.mark.parametrize("alphabet", [2, 3, 4, 11, 16])
@pytest.mark.parametrize("rare", [0.02, 0.16])
def test_huffman_codes_are_shared_where_one_symbol_would_need_less_than_a_bit(alphabet, rare):
    generator = np.random.default_rng(0)
    chosen = generator.random(60_000) < rare
    symbols = np.where(chosen, generator.integers(1, alphabet, 60_000), 0).astype(np.uint8)
    coded = encode_symbols(symbols, alphabet, "huffman")
    size = groups.group_size(coded["table"].numel(), alphabet)
    assert size > 1
    entropy = entropy_bits(np.bincount(symbols)) / 8
    # As above, for groups, whose most frequent one has no symbol but zeros; and a chunk's size and
    # its last bits.
    excess = ((1 - rare) ** size + 0.086) * 60_000 / size / 8
    stream = coded["stream"].numel()
    assert 0.98 * entropy < stream < entropy + excess + 3 * (60_000 // 2048 + 1)
    assert stream < 0.7 * 60_000 / 8 or (alphabet, rare) != (2, 0.16)
    assert np.array_equal(decode_symbols(coded, alphabet, "huffman", 60_000), symbols)


def test_one_group_alone_is_not_coded_as_such():
    symbols = np.tile(np.array([1, 0], np.uint8), 500)
    coded = encode_symbols(symbols, 2, "huffman")
    assert np.array_equal(decode_symbols(coded, 2, "huffman", 1000), symbols)
    table = torch.from_numpy(np.eye(1, 128, 5, dtype=np.uint8)[0])
    with pytest.raises(SpecError, match="expected two groups or more"):
        decode_symbols({**coded, "table": table}, 2, "huffman", 1000)


def test_groups_of_symbols_beyond_the_alphabet_are_refused():
    lengths = np.zeros(16, np.uint8)
    lengths[[0b0001, 0b0011]] = 1
    parts = {"table": pack_bits(lengths, 4), "stream": np.array([0x40], np.uint8)}
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    assert decode_symbols(tensors, 4, "huffman", 4).tolist() == [1, 0, 3, 0]
    with pytest.raises(SpecError, match="expected symbols below 3"):
        decode_symbols(tensors, 3, "huffman", 4)
    with pytest.raises(SpecError, match="9 bytes are none of 2 symbols"):
        decode_symbols({**tensors, "table": torch.zeros(9, dtype=torch.uint8)}, 2, "huffman", 4)


def test_known_huffman_lengths():
    lengths = huffman.code_lengths(np.array([45, 13, 12, 16, 9, 5]))
    assert lengths.tolist() == [1, 3, 3, 3, 4, 4]
    codes = huffman.canonical_codes(lengths)
    assert [f"{c:0{n}b}" for c, n in zip(codes, lengths, strict=True)] == [
        "0",
        "100",
        "101",
        "110",
        "1110",
        "1111",
    ]


@given(
    st.lists(st.integers(0, 10**9), min_size=2, max_size=256).filter(
        lambda c: sum(map(bool, c)) > 1
    )
)
def test_lengths_make_a_complete_code_of_at_most_12_bits(counts):
    lengths = huffman.code_lengths(np.array(counts)).astype(int)
    assert [bool(length) for length in lengths] == [bool(count) for count in counts]
    assert lengths.max() <= 12
    assert sum(2.0**-length for length in lengths if length) == 1.0


def test_a_lone_symbol_needs_no_stream():
    symbols = np.full(1000, 3, np.uint8)
    for coder in ("huffman", "ans"):
        coded = encode_symbols(symbols, 5, coder)
        assert coded["stream"].numel() == 0
        assert np.array_equal(decode_symbols(coded, 5, coder, 1000), symbols)


@given(st.lists(st.integers(0, 63), min_size=1, max_size=256).filter(any))
def test_frequencies_fill_the_range(levels):
    found = ans.frequencies(np.array(levels, np.uint8))
    assert found.sum() == 1 << 16
    assert found.min() >= 1
    assert found.size == np.count_nonzero(levels)


def test_ans_streams_are_those_that_the_docstring_describes():
    symbols = symbols_of(500, 12, 0.3)
    levels = ans.frequency_levels(np.bincount(symbols, minlength=12))
    words = [int(word) for word in ans.encode(symbols, levels).view("<u4")]
    used = np.flatnonzero(levels)
    sums = np.concatenate([[0], np.cumsum(ans.frequencies(levels))])
    left = [int(sums[i]) * ((1 << 24) - used.size) // (1 << 16) + i for i in range(used.size)]
    left.append(1 << 24)
    state = words.pop() << 32 | words.pop()
    found = []
    for _ in symbols:
        part = state & 0xFFFFFF
        symbol = int(np.searchsorted(left, part, side="right")) - 1
        found.append(used[symbol])
        state = (state >> 24) * (left[symbol + 1] - left[symbol]) + part - left[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
    assert np.array_equal(found, symbols)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["huffman", "ans"]), st.binary(max_size=200), st.data())
def test_any_bytes_are_decoded_or_refused(coder, stream, data):
    alphabet = data.draw(st.integers(1, 40))
    width = {"huffman": 4, "ans": 6}[coder]
    size = -(-alphabet * width // 8)
    table = data.draw(st.binary(min_size=size, max_size=size))
    parts = {
        "stream": torch.tensor(list(stream), dtype=torch.uint8),
        "table": torch.tensor(list(table), dtype=torch.uint8),
    }
    count = data.draw(st.integers(0, 5000))
    try:
        found = decode_symbols(parts, alphabet, coder, count)
    except SpecError:
        return
    assert found.shape == (count,)
    assert count == 0 or found.max() < alphabet


def test_every_flipped_bit_of_a_table_is_survived():
    symbols = symbols_of(3000, 30, 0.2)
    for coder in ("huffman", "ans"):
        coded = encode_symbols(symbols, 30, coder)
        for place in range(coded["table"].numel()):
            for bit in range(8):
                table = coded["table"].clone()
                table[place] ^= 1 << bit
                try:
                    found = decode_symbols({**coded, "table": table}, 30, coder, 3000)
                except SpecError:
                    continue
                assert found.shape == (3000,)


def test_an_unknown_coder_is_refused():
    with pytest.raises(SpecError, match="expected plain, huffman, ans, got 'zip'"):
        decode_symbols({"stream": torch.zeros(0, dtype=torch.uint8)}, 4, "zip", 0)
