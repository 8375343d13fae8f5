import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shohin.errors import SpecError
from shohin.ir.packing import pack_bits, unpack_bits


@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32))
def test_numbers_come_back(bits, count, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint16)
    packed = pack_bits(numbers, bits)
    assert packed.size == -(-count * bits // 8)
    assert np.array_equal(unpack_bits(packed, bits, count), numbers)


def test_the_lowest_bit_comes_first():
    assert pack_bits(np.array([1, 2, 3], np.uint8), 2).tolist() == [0b111001]
    assert pack_bits(np.array([0x123, 0xABC], np.uint16), 12).tolist() == [0x23, 0xC1, 0xAB]


def test_many_numbers_are_packed_in_pieces():
    numbers = (np.arange((1 << 20) + 77) % 29).astype(np.uint8)
    packed = pack_bits(numbers, 5)
    assert np.array_equal(unpack_bits(packed, 5, numbers.size), numbers)
    assert np.array_equal(pack_bits(numbers[1 << 20 :], 5), packed[5 << 17 :])


@pytest.mark.parametrize("count", [9, 17])
def test_the_bytes_must_fit(count):
    with pytest.raises(SpecError) as caught:
        unpack_bits(np.zeros(5, np.uint8), 3, count)
    needed = -(-count * 3 // 8)
    assert str(caught.value) == (
        f"packed numbers: expected {needed} bytes for {count} numbers of 3 bits, found 5"
    )
