import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shohin.errors import SpecError
from shohin.ir.container.tensors import decode_tensors, encode_tensors
from shohin.ir.encodings import same_bits

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


def content(ordinal, tensors):
    return b"".join(bytes(part) for part in encode_tensors(ordinal, tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)])
def test_tensors_come_back(dtype, shape):
    numbers = torch.arange(24)[: max(0, torch.empty(shape).numel())].reshape(shape)
    tensor = (numbers % 2 if dtype == torch.bool else numbers).to(dtype)
    ordinal, found = decode_tensors(content(7, {"values": tensor, "own name": tensor}))
    assert ordinal == 7
    assert [*found] == ["values", "own name"]
    assert all(same_bits(one, tensor) for one in found.values())


def test_the_bytes_are_those_of_the_format():
    tensors = {"values/indices": torch.tensor([[1, 2, 3]], dtype=torch.uint8)}
    assert content(300, tensors) == b"\xac\x02" + bytes([7, 4, 2, 1, 3, 1, 2, 3])
    assert content(0, {"x": torch.tensor(1.0)}) == b"\x00\xff\x01x\x00\x00" + b"\x00\x00\x80?"


def test_views_are_stored_as_they_look():
    base = torch.arange(12.0).reshape(3, 4)
    _, found = decode_tensors(content(0, {"values": base.T[1:]}))
    assert torch.equal(found["values"], base.T[1:])


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\x00\x00\x63\x00", "unknown element type 99"),
        (b"\x00\x00\x00\x41", "or 65 axes"),
        (b"\x00\x63\x00\x00", "unknown name 99"),
        (b"\x00\xff\x02\xff\xff", "a name is no text"),
        (b"\x00\x00\x09\x01\x01\x02", "a truth value is neither 0 nor 1"),
        (b"\x00\x00\x00\x01\x80\x80\x80\x80\x80\x80\x80\x80\x01", "more bytes, found"),
        (b"\x00" + 2 * b"\x00\x04\x01\x00", "two are named 'values'"),
    ],
)
def test_malformed_contents(data, problem):
    with pytest.raises(SpecError, match=problem):
        decode_tensors(data)


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data):
    try:
        ordinal, found = decode_tensors(data)
    except SpecError:
        return
    assert ordinal >= 0
    assert sum(tensor.nbytes for tensor in found.values()) <= len(data)


def test_element_types_that_no_file_holds():
    quantised = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(
        SpecError, match=r"tensor 'values': a file cannot hold elements of torch\.qi"
    ):
        content(0, {"values": quantised})
