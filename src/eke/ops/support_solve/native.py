"""The native kernel of least squares on supports, loaded by ctypes from the package folder; threads share samples."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load
from .reference import reference

_SMALL = 2**18
"""Multiplications up to which one thread is faster than several."""
_ROUNDING = 10
"""Pivots below so many units of rounding of the largest go to the reference, which regularises."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_support_solve", what="Exact sparse solvers")
    if loaded is None:
        return None
    whole, number, address = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    numbers = (number, number, number)
    loaded.eke_support_solve.argtypes = (
        whole, whole, *numbers, address, address, address, address, address, ctypes.c_double, whole,
    )  # fmt: skip
    return loaded


def available(gram: Tensor) -> bool:
    """Return whether the kernel takes a Gram matrix on this device and of this dtype."""
    return gram.device.type == "cpu" and gram.dtype in (torch.float32, torch.float64) and library() is not None


def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_support_solve_level())


def describe() -> str:
    """Return the kernel in use, in words."""
    return ("none (torch's own operations)", "plain C++", "AVX2", "AVX-512")[level() + 1]


def support_solve(gram: Tensor, support: Tensor, right: Tensor, *, instructions: int | None = None) -> Tensor:
    """Do what `reference` does, natively where `available`.

    Args:
        gram: G = A^H A, (n, n).
        support: Indices of each sample, (batch, k), each once a row.
        right: c = A^H b, (batch, n).
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        (batch, n), zero off the support.

    Raises:
        ValueError: if shapes or dtypes do not fit, or an index is out of range: the kernel would read past the end.
        MemoryError: if scratch memory could not be had.
    """
    batch, n = right.shape
    k = support.shape[-1]
    if gram.shape != (n, n) or support.shape != (batch, k) or gram.dtype != right.dtype or support.dtype != torch.int64:
        raise ValueError(
            f"support_solve needs gram (n, n), support (batch, k) of int64 and right (batch, n) of gram's dtype, got "
            f"{tuple(gram.shape)} {gram.dtype}, {tuple(support.shape)} {support.dtype}, {tuple(right.shape)} "
            f"{right.dtype}."
        )
    needs_gradient = torch.is_grad_enabled() and (gram.requires_grad or right.requires_grad)
    if not available(gram) or right.device.type != "cpu" or needs_gradient or not support.numel():
        return reference(gram, support, right)
    if bool((support < 0).any()) or bool((support >= n).any()):
        low, high = int(support.min()), int(support.max())
        raise ValueError(f"Indices of a support must be from 0 to {n - 1}, got {low} to {high}.")
    loaded = library()
    assert loaded is not None  # available() was asked
    gram, support, right = (part.detach().contiguous() for part in (gram, support, right))
    x, failed = torch.zeros_like(right), torch.empty(batch, dtype=torch.bool)
    threads = torch.get_num_threads() if batch * k**3 > _SMALL else 1
    status = loaded.eke_support_solve(
        level() if instructions is None else instructions, gram.dtype == torch.float64, batch, n, k, gram.data_ptr(),
        support.data_ptr(), right.data_ptr(), x.data_ptr(), failed.data_ptr(),
        _ROUNDING * torch.finfo(gram.dtype).eps, threads,
    )  # fmt: skip
    if status:
        raise MemoryError(f"The kernel of support_solve found no memory for {k} x {k} numbers a thread.")
    if bool(failed.any()):
        x[failed] = reference(gram, support[failed], right[failed])
    return x
