from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qpipe.packing import pack, packed_bytes, unpack


@settings(max_examples=60, deadline=None)
@given(num_bits=st.integers(1, 16), num_codes=st.integers(0, 50), seed=st.integers(0, 2**31))
def test_unpacking_gives_back_what_was_packed(num_bits: int, num_codes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (num_codes,), generator=generator)
    packed = pack(codes, num_bits)
    assert packed.dtype is torch.uint8
    assert packed.numel() == packed_bytes(num_codes, num_bits)
    assert torch.equal(unpack(packed, num_bits, num_codes), codes)


def test_the_first_code_stands_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3]), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 0, 1, 1]), 1).tolist() == [0b1101]


def test_three_bits_match_one_long_integer() -> None:
    codes = torch.arange(16) % 8
    whole = sum(int(code) << 3 * i for i, code in enumerate(codes))
    assert bytes(pack(codes, 3).tolist()) == whole.to_bytes(6, "little")


@pytest.mark.parametrize(
    ("num_bits", "expected"), [(1, 2), (2, 3), (3, 4), (4, 5), (8, 9), (12, 14), (16, 18)]
)
def test_nine_codes_take_the_bytes_their_bits_fill(num_bits: int, expected: int) -> None:
    assert packed_bytes(9, num_bits) == expected
