"""The native kernel of sparse recovery, loaded by ctypes from the package folder; threads share samples."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load
from .reference import Range, most, reference

_FEW = 4
"""Samples up to which one thread is faster than several."""
_LANES = 16
"""Rows of the projection begin at multiples of so many entries."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_sparse_recovery", what="Sparse problems without noise")
    if loaded is None:
        return None
    whole, number, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    loaded.eke_sparse_recovery.argtypes = (
        whole, whole, address, address, address, address, number, address, address, address, address, whole,
    )  # fmt: skip
    return loaded


def available(like: Tensor) -> bool:
    """Return whether the kernel takes tensors on this device and of this dtype."""
    return like.device.type == "cpu" and like.dtype in (torch.float32, torch.float64) and library() is not None


def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_sparse_recovery_level())


def describe() -> str:
    """Return the kernel in use, in words."""
    return ("none (torch's own operations)", "plain C++", "AVX2", "AVX-512")[level() + 1]


class Plan:
    """A projection in the kernel's layout: in its own precision, and in single precision to guide the search.

    Args:
        space: P (n, n), real, on the CPU, its rank and the rules.

    Raises:
        ValueError: if P is no such matrix.
    """

    def __init__(self, space: Range) -> None:
        projection = space.projection
        if projection.ndim != 2 or projection.shape[0] != projection.shape[1] or not available(projection):
            raise ValueError(
                f"The kernel needs a projection (n, n) of float32 or float64 on the CPU, got "
                f"{tuple(projection.shape)} {projection.dtype} on {projection.device}."
            )
        n = len(projection)
        self.space = space
        self.exact = projection.new_zeros(n, -(-n // _LANES) * _LANES)
        self.exact[:, :n] = projection
        self.guiding = self.exact.float()
        rules = space.rules
        eps = torch.finfo(projection.dtype).eps
        numbers = (rules.density, rules.share, rules.doubt, rules.rounding * eps, rules.pivot, rules.longest)
        self.numbers = (ctypes.c_double * len(numbers))(*numbers)


def sparse_recovery(
    plan: Plan, y: Tensor, *, iterations: int, instructions: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what `reference` does, natively.

    Args:
        plan: Of the projection.
        y: A^+ b, (batch, n).
        iterations: Most steps.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        x (batch, n), which rows of it are exact (batch,), and steps taken (batch,).

    Raises:
        ValueError: if y does not fit: the kernel would read past its end.
        MemoryError: if scratch memory could not be had.
    """
    n = len(plan.exact)
    if y.ndim != 2 or y.shape[1] != n or y.dtype != plan.exact.dtype or y.device.type != "cpu":
        raise ValueError(
            f"sparse_recovery needs y (batch, {n}) of {plan.exact.dtype} on the CPU, got {tuple(y.shape)} {y.dtype} on "
            f"{y.device}."
        )
    loaded = library()
    if loaded is None:
        return reference(plan.space, y, iterations=iterations)
    y = y.detach().contiguous()
    batch, rank = len(y), plan.space.rank
    x, found = torch.empty_like(y), torch.empty(batch, dtype=torch.bool)
    steps = torch.empty(batch, dtype=torch.int64)
    sizes = (ctypes.c_int64 * 5)(n, plan.exact.shape[1], rank, iterations, most(rank, n))
    status = loaded.eke_sparse_recovery(
        level() if instructions is None else instructions, y.dtype == torch.float64, sizes, plan.numbers,
        plan.guiding.data_ptr(), plan.exact.data_ptr(), batch, y.data_ptr(), x.data_ptr(), steps.data_ptr(),
        found.data_ptr(), torch.get_num_threads() if batch > _FEW else 1,
    )  # fmt: skip
    if status:
        raise MemoryError(f"The kernel of sparse_recovery found no memory for supports of {most(rank, n)} entries.")
    return x, found, steps
