"""Sequences of different lengths, packed one after the other: into padded batches of similar lengths and back."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor


def check_packed(cu_seqlens: Tensor, batch: int, length: int) -> list[int]:
    """Return the borders of packed sequences.

    Args:
        cu_seqlens: 0, the ends of all sequences but the last, `length`; integers that never fall.
        batch: Must be 1.
        length: Positions of all sequences together.

    Raises:
        ValueError: if they are no such borders.
    """
    if cu_seqlens.ndim != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens is a vector of at least two integers, got {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}."
        )
    if batch != 1:
        raise ValueError(f"With cu_seqlens all sequences lie in one row: the batch must be 1, got {batch}.")
    borders: list[int] = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != length or any(b < a for a, b in itertools.pairwise(borders)):
        raise ValueError(f"cu_seqlens must rise from 0 to the length {length}, got {borders[:4]} ... {borders[-1]}.")
    return borders


def groups(borders: list[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield sequences of lengths within a factor of two: their numbers, positions and what of it is no padding.

    Args:
        borders: See `check_packed`.

    Yields:
        Numbers of sequences, positions (sequences, longest) in the packed row, whether they are real.
    """
    by_size: dict[int, list[int]] = {}
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        by_size.setdefault((end - start).bit_length(), []).append(number)
    for numbers in by_size.values():
        starts = torch.tensor([borders[n] for n in numbers])
        lengths = torch.tensor([borders[n + 1] - borders[n] for n in numbers])
        offsets = torch.arange(int(lengths.max()))
        real = offsets < lengths.unsqueeze(1)
        yield numbers, torch.where(real, starts.unsqueeze(1) + offsets, 0), real
