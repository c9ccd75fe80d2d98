"""The native kernel for row pairs, loaded by ctypes from the package folder.

A group of rows goes through as many levels as fit in the cache, so that a matrix is read once; threads share groups.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load

_SMALL = 2**16
"""Entries up to which one thread is faster than several."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_pair_splits", what="Factorizations")
    if loaded is None:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    loaded.eke_pair_splits.argtypes = (
        ctypes.c_int, address, ctypes.c_int, number, number, number, number, address, address, address,
        ctypes.c_int,
    )  # fmt: skip
    return loaded


def available(values: Tensor) -> bool:
    """Return whether the kernel takes values on this device and of this dtype."""
    good = values.device.type == "cpu" and values.dtype in (torch.float64, torch.complex128)
    return good and library() is not None


def level() -> int:
    """Return the best instruction set of this machine: 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_pair_splits_level())


def describe() -> str:
    """Return the kernel in use, in words."""
    return ("none (torch's own operations)", "plain C++", "AVX2")[level() + 1]


def pair_splits(
    values: Tensor, pieces: Sequence[int], *, instructions: int | None = None
) -> tuple[list[Tensor], Tensor]:
    """Do what `reference` does, where `available`.

    Args:
        values: (a, m, c), contiguous.
        pieces: t_1 ... t_L.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        The vectors of each level, (a, 2, t, m/2) and so on, and what is left.

    Raises:
        ValueError: if the sizes are not divisible.
        MemoryError: if there is no memory for the rows that go through several levels.
    """
    many, rows, cols = values.shape
    plain = values.is_contiguous() and not values.is_conj() and not values.is_neg()
    if rows % 2 ** len(pieces) or cols % math.prod(pieces) or not plain or not available(values):
        raise ValueError(
            f"pair_splits needs contiguous double precision values (a, m, c) with m divisible by 2^{len(pieces)} and c "
            f"by {math.prod(pieces)}, got {tuple(values.shape)} of {values.dtype}."
        )
    vectors, a, m, c = [], many, rows, cols
    for t in pieces:
        m //= 2
        vectors.append(values.new_empty(a, 2, t, m))
        a, c = a * t, c // t
    right = values.new_empty(a, m, c)
    if right.numel() and pieces:
        loaded = library()
        assert loaded is not None  # available() says so
        addresses = (ctypes.c_void_p * len(pieces))(*(vector.data_ptr() for vector in vectors))
        failed = loaded.eke_pair_splits(
            level() if instructions is None else instructions, values.data_ptr(), values.is_complex(), many, rows, cols,
            len(pieces), (ctypes.c_int64 * len(pieces))(*pieces), addresses, right.data_ptr(),
            torch.get_num_threads() if values.numel() > _SMALL else 1,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"pair_splits found no memory for rows of {cols} entries; factorize a smaller matrix.")
    return vectors, right if pieces else values
