"""Whole numbers of 1 to 8 bits, packed tightly into bytes.

Code i occupies the bits [i*bits, (i+1)*bits) of one little-endian stream, so `count` codes take
ceil(count * bits / 8) bytes. Eight codes fill exactly `bits` bytes; they are gathered in one 64-bit word, which makes
both directions a handful of vectorised shifts for every width. Cost: O(count), one byte of workspace a code.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that `count` codes of `bits` bits take: ceil(count * bits / 8)."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape; every value below 2**bits. Read in row-major order.
        bits: Bits a code, 1 to 8.

    Returns:
        uint8 (ceil(count * bits / 8),) on the device of `codes`; unused high bits of the last byte are 0.

    Raises:
        TypeError: if codes are not uint8.
        ValueError: if a code does not fit or bits is not in 1..8.
    """
    _check_bits(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack needs uint8 codes, got {codes.dtype}; shift signed codes to 0..2**bits-1 first.")
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >> bits:
        raise ValueError(f"pack got the code {int(flat.max())}, which needs more than bits={bits}.")
    if bits == 8:
        return flat.clone()
    count = flat.numel()
    eights = torch.nn.functional.pad(flat, (0, -count % 8)).view(-1, 8)
    words = torch.zeros(eights.shape[0], dtype=torch.int64, device=codes.device)
    for position in range(8):
        words |= eights[:, position].to(torch.int64) << (bits * position)
    packed = torch.empty(eights.shape[0], bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        packed[:, byte] = (words >> (8 * byte)) & 255
    return packed.reshape(-1)[: packed_bytes(count, bits)].clone()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Invert `pack`.

    Args:
        packed: uint8 (ceil(count * bits / 8),).
        bits: Bits a code, 1 to 8.
        count: Number of codes.

    Returns:
        uint8 codes (count,).

    Raises:
        TypeError: if packed is not uint8.
        ValueError: if its length does not fit count and bits.
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"unpack needs uint8 bytes, got {packed.dtype}.")
    needed = packed_bytes(count, bits)
    if packed.numel() != needed:
        raise ValueError(
            f"{count} codes of {bits} bits take {needed} bytes, got {packed.numel()}; is the file complete?"
        )
    if bits == 8:
        return packed.reshape(-1).clone()
    blocks = torch.nn.functional.pad(packed.reshape(-1), (0, -needed % bits)).view(-1, bits)
    words = torch.zeros(blocks.shape[0], dtype=torch.int64, device=packed.device)
    for byte in range(bits):
        words |= blocks[:, byte].to(torch.int64) << (8 * byte)
    codes = torch.empty(blocks.shape[0], 8, dtype=torch.uint8, device=packed.device)
    for position in range(8):
        codes[:, position] = (words >> (bits * position)) & ((1 << bits) - 1)
    return codes.reshape(-1)[:count].clone()


def _check_bits(bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"bits must be a whole number from 1 to 8, got {bits!r}.")
