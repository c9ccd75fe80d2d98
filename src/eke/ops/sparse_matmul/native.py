"""The native kernel of sparse products, loaded by ctypes from the package folder."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..compiled import load
from . import reference

BLOCKS = (1, 2, 4)
"""Rows that may share their columns in the kernel."""
_LEVELS = ("plain C++", "AVX2", "AVX-512")
_NOT_LEGAL, _NO_MEMORY = 1, 2


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_sparse_forward", what="Sparse products")
    if loaded is None:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    # level, threads; batch, inputs, groups, block, entries
    head = (ctypes.c_int, ctypes.c_int, number, number, number, number, number)
    loaded.eke_sparse_forward.argtypes = (
        *head, address, number, address, address, address, address, address, number,
    )  # fmt: skip
    loaded.eke_sparse_backward.argtypes = (*head, address, number, address, address, address, address, number)
    loaded.eke_sparse_gradient.argtypes = (*head, address, number, address, number, address, address, address)
    return loaded


@functools.cache
def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_sparse_level())


def available() -> bool:
    """Return whether the compiled kernel can be used."""
    return level() >= 0


def describe() -> str:
    """Return the kernel in use, in words."""
    return _LEVELS[level()] if available() else "none (torch's own operations)"


def supports(x: Tensor, block: int) -> bool:
    """Return whether the kernel takes inputs like x and groups of `block` rows."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and block in BLOCKS and available()


def _rows(x: Tensor) -> Tensor:
    """Return a matrix whose rows are contiguous, the same one where they are already."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def forward(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    *,
    bias: Tensor | None = None,
    instructions: int | None = None,
) -> Tensor:
    """Return x W^T + bias.

    Args:
        x: Inputs, (batch, inputs), float32.
        values: Kept entries, (entries, r), float32.
        columns: Column of each entry, (entries,), int32.
        starts: Entries before each group of r rows, (groups + 1,), int64.
        bias: (groups * r,), float32.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        (batch, groups * r).
    """
    loaded = library()
    assert loaded is not None  # callers ask supports() first
    x, values, columns, starts = _rows(x), values.contiguous(), columns.contiguous(), starts.contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, inputs = x.shape
    groups, block = starts.shape[0] - 1, values.shape[1]
    y = x.new_empty(batch, groups * block)
    if y.numel():
        status = loaded.eke_sparse_forward(
            level() if instructions is None else instructions, torch.get_num_threads(), batch, inputs, groups, block,
            columns.shape[0], x.data_ptr(), x.stride(0), values.data_ptr(), columns.data_ptr(), starts.data_ptr(),
            None if bias is None else bias.data_ptr(), y.data_ptr(), groups * block,
        )  # fmt: skip
        _succeeded(status, columns, starts, inputs)
    return y


def bound(
    values: Tensor, columns: Tensor, starts: Tensor, *, inputs: int, bias: Tensor | None
) -> Callable[[Tensor], Tensor]:
    """Return `forward` for one matrix whose tensors stay where they are: a call then costs some microseconds less.

    Args:
        values: Kept entries, (entries, r), float32, contiguous; changes of the numbers are seen.
        columns: Column of each entry, (entries,), int32, contiguous.
        starts: Entries before each group of r rows, (groups + 1,), int64, contiguous.
        inputs: Columns of the matrix.
        bias: (groups * r,), float32, contiguous.

    Returns:
        The product, of x (batch, inputs) of float32.
    """
    loaded = library()
    assert loaded is not None  # callers ask supports() first
    run, best, threads = loaded.eke_sparse_forward, level(), torch.get_num_threads
    groups, block = starts.shape[0] - 1, values.shape[1]
    rows, entries = groups * block, columns.shape[0]
    where = (values.data_ptr(), columns.data_ptr(), starts.data_ptr(), None if bias is None else bias.data_ptr())

    def product(x: Tensor) -> Tensor:
        x = x if x.is_contiguous() else x.contiguous()
        batch = x.shape[0]
        y = x.new_empty(batch, rows)
        status = run(
            best, threads(), batch, inputs, groups, block, entries, x.data_ptr(), inputs, *where, y.data_ptr(), rows
        )
        if status:
            _succeeded(status, columns, starts, inputs)
        return y

    product.tensors = (values, columns, starts, bias)  # type: ignore[attr-defined]  # alive as long as the product is
    return product


def to_inputs(
    grad: Tensor, values: Tensor, columns: Tensor, starts: Tensor, inputs: int, *, instructions: int | None = None
) -> Tensor:
    """Return grad W.

    Args:
        grad: (batch, groups * r), float32.
        values: Kept entries, (entries, r), float32.
        columns: Column of each entry, (entries,), int32.
        starts: Entries before each group of r rows, (groups + 1,), int64.
        inputs: Columns of W.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        (batch, inputs).
    """
    loaded = library()
    assert loaded is not None  # callers ask supports() first
    grad, values, columns, starts = _rows(grad), values.contiguous(), columns.contiguous(), starts.contiguous()
    batch, out = grad.shape[0], grad.new_empty(grad.shape[0], inputs)
    if out.numel():
        status = loaded.eke_sparse_backward(
            level() if instructions is None else instructions, torch.get_num_threads(), batch, inputs,
            starts.shape[0] - 1, values.shape[1], columns.shape[0], grad.data_ptr(), grad.stride(0), values.data_ptr(),
            columns.data_ptr(), starts.data_ptr(), out.data_ptr(), inputs,
        )  # fmt: skip
        _succeeded(status, columns, starts, inputs)
    return out


def to_values(
    x: Tensor, grad: Tensor, columns: Tensor, starts: Tensor, block: int, *, instructions: int | None = None
) -> Tensor:
    """Return the derivative of each kept entry.

    Args:
        x: Inputs, (batch, inputs), float32.
        grad: Gradient of the outputs, (batch, groups * block), float32.
        columns: Column of each entry, (entries,), int32.
        starts: Entries before each group, (groups + 1,), int64.
        block: Rows of a group.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        (entries, block).
    """
    loaded = library()
    assert loaded is not None  # callers ask supports() first
    x, grad, columns, starts = _rows(x), _rows(grad), columns.contiguous(), starts.contiguous()
    out = x.new_zeros(columns.shape[0], block)
    if out.numel() and x.shape[0]:
        status = loaded.eke_sparse_gradient(
            level() if instructions is None else instructions, torch.get_num_threads(), x.shape[0], x.shape[1],
            starts.shape[0] - 1, block, columns.shape[0], x.data_ptr(), x.stride(0), grad.data_ptr(), grad.stride(0),
            columns.data_ptr(), starts.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        _succeeded(status, columns, starts, x.shape[1])
    return out


def _succeeded(status: int, columns: Tensor, starts: Tensor, inputs: int) -> None:
    if status == _NOT_LEGAL:
        reference.check_pattern(columns, starts, inputs=inputs)
    if status:
        what = "found no memory for a turned tile of the batch" if status == _NO_MEMORY else "refused a call"
        raise MemoryError(f"The kernel of sparse products {what} (status {status}, {inputs} inputs).")
