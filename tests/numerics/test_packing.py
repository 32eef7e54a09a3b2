from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.errors import NumericalError, ShapeError
from qtool.numerics.packing import pack_codes, packed_size, unpack_codes

BITS = range(1, 9)


def random_codes(rows: int, n: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, (rows, n), generator=generator).to(torch.uint8)


@settings(deadline=None, max_examples=60)
@given(bits=st.integers(1, 8), rows=st.integers(1, 3), n=st.integers(1, 70), seed=st.integers(0, 9))
def test_unpack_undoes_pack(bits: int, rows: int, n: int, seed: int) -> None:
    codes = random_codes(rows, n, bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, -(-n * bits // 8))
    assert torch.equal(unpack_codes(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_stream_is_little_endian(bits: int) -> None:
    """A row, read as one little-endian number, is the sum of ``code_i * 2^(i * bits)``."""
    codes = random_codes(2, 37, bits)
    for row, packed in zip(codes.tolist(), pack_codes(codes, bits).tolist(), strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(code << (i * bits) for i, code in enumerate(row))


def test_the_even_value_of_four_bits_is_in_the_low_nibble() -> None:
    assert pack_codes(torch.tensor([[0x1, 0xA, 0xF]], dtype=torch.uint8), 4).tolist() == [[0xA1, 0x0F]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_words_are_those_of_compressed_tensors(bits: int) -> None:
    codes = random_codes(5, 64, bits)
    signed = (codes.int() - (1 << (bits - 1))).to(torch.int8)
    words = pack_codes(codes, bits).view(torch.int32)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, codes.shape), signed)


@pytest.mark.parametrize("bits", BITS)
def test_the_input_is_not_shared(bits: int) -> None:
    codes = random_codes(2, 16, bits)
    before = codes.clone()
    pack_codes(codes, bits).fill_(0)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", BITS)
def test_strides_do_not_matter(bits: int) -> None:
    """A column has strides of 1, and counts as contiguous when it is one of one row."""
    for codes in (random_codes(16, 1, bits).T, random_codes(24, 16, bits).T, random_codes(3, 32, bits)[:, ::2]):
        packed = pack_codes(codes, bits)
        assert torch.equal(packed, pack_codes(codes.clone(memory_format=torch.contiguous_format), bits))
        strided = packed.T.contiguous().T
        assert torch.equal(unpack_codes(strided, bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_that_does_not_fit_is_refused(bits: int) -> None:
    with pytest.raises(NumericalError, match=f"does not fit {bits} bits"):
        pack_codes(torch.tensor([[0, 1 << bits]], dtype=torch.uint8), bits)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ShapeError, match="wrong size"):
        unpack_codes(torch.zeros(2, 5, dtype=torch.uint8), 3, 16)
    with pytest.raises(ShapeError, match="1 to 8"):
        packed_size(8, 9)
