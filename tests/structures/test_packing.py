"""Packing: bytes are as few as possible and every code comes back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eke.structures import pack, unpack
from eke.structures.packing import packed_bytes


@given(bits=st.integers(1, 8), values=st.lists(st.integers(0, 255), max_size=70))
def test_unpack_inverts_pack(bits, values):
    codes = torch.tensor([value % 2**bits for value in values], dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() == -(-codes.numel() * bits // 8)
    assert torch.equal(unpack(packed, bits, codes.numel()), codes)


@given(bits=st.integers(1, 8), values=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_bytes_are_one_little_endian_stream(bits, values):
    codes = [value % 2**bits for value in values]
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    expected = stream.to_bytes(packed_bytes(len(codes), bits), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist()) == expected


def test_pack_refuses_codes_that_do_not_fit():
    with pytest.raises(ValueError, match="code 8, which needs more than bits=3"):
        pack(torch.tensor([1, 8], dtype=torch.uint8), 3)
    with pytest.raises(TypeError, match=r"uint8 codes, got torch.int8"):
        pack(torch.zeros(3, dtype=torch.int8), 3)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"):
        pack(torch.zeros(3, dtype=torch.uint8), 9)


def test_unpack_refuses_truncated_bytes():
    with pytest.raises(ValueError, match="10 codes of 3 bits take 4 bytes, got 3"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 10)
    with pytest.raises(TypeError, match="uint8 bytes, got"):
        unpack(torch.zeros(3), 3, 8)
