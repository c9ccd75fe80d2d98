"""Products with a sparse matrix whose entries lie anywhere: y = x W^T + bias.

    y = ops.sparse_matmul(x, values, columns, starts)              # rows of any number of entries
    y = ops.sparse_matmul(x, values, columns)                      # (rows, k): k entries in every row
    y = ops.sparse_matmul(x, values, columns, starts)              # values (entries, r): r rows share their columns

The kernel turns a tile of the batch so that the samples of a column lie side by side: an entry is then one value spread
over a vector, whatever its column, and zeros cost nothing. Cost: 2 entries operations a sample; bound by how fast
turned inputs come from the cache.
Source: Gale, Zaharia, Young, Elsen, "Sparse GPU kernels for deep learning", 2020 (rows of W times tiles of the batch).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators
from .native import available, describe
from .reference import dense

__all__ = ["available", "dense", "describe", "sparse_matmul"]

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sparse_matmul(
    x: Tensor, values: Tensor, columns: Tensor, starts: Tensor | None = None, *, bias: Tensor | None = None
) -> Tensor:
    """Multiply the last dimension of x by a sparse matrix W: y = x W^T + bias.

    Args:
        x: Inputs, (..., inputs).
        values: Kept entries, row after row: (entries,), or (entries, r) where r rows below each other share their
            columns, or (rows, k) with columns (rows, k).
        columns: Column of each entry, int32, (entries,) or (rows, k), best in ascending order within a row. Entries
            that name a column twice are added.
        starts: Number of entries before each row, or group of r rows, and of all at the end: int64, (groups + 1,). None
            for k entries in every row.
        bias: Added to the outputs, (rows,).

    Returns:
        Outputs, (..., rows), of the type of x. Differentiable in x, values and bias, twice; entries that are not kept
        have no gradient. float32 on the CPU runs in the native kernel (r = 1, 2 or 4), everything else as a dense
        product. Shapes, types or columns that do not fit are a ValueError.
    """
    if starts is None:
        rows, k = _rows_of(values, columns)
        starts = torch.arange(0, rows * k + 1, max(k, 1), dtype=torch.int64, device=x.device)
        if not k:
            starts = starts.new_zeros(rows + 1)
        values, columns = values.reshape(-1, 1), columns.reshape(-1)
    elif values.dim() == 1:
        values = values.unsqueeze(1)
    _check(x, values, columns, starts, bias)
    if x.dim() == 2:
        return operators.matmul(x, values, columns, starts, bias)
    y = operators.matmul(x.reshape(-1, x.shape[-1]), values, columns, starts, bias)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def _rows_of(values: Tensor, columns: Tensor) -> tuple[int, int]:
    if values.dim() != 2 or values.shape != columns.shape:
        raise ValueError(
            "sparse_matmul without starts needs values and columns of one shape (rows, k), got "
            f"{tuple(values.shape)} and {tuple(columns.shape)}; give starts for rows of different lengths."
        )
    return values.shape[0], values.shape[1]


def _check(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> None:
    if values.dim() != 2 or columns.dim() != 1 or columns.shape[0] != values.shape[0] or values.shape[1] < 1:
        raise ValueError(
            "sparse_matmul needs values (entries,) or (entries, r) and columns (entries,), got "
            f"{tuple(values.shape)} and {tuple(columns.shape)}."
        )
    if starts.dim() != 1 or starts.shape[0] < 1 or starts.dtype != torch.int64 or columns.dtype != torch.int32:
        raise ValueError(
            f"sparse_matmul needs starts (groups + 1,) of int64 and columns of int32, got {tuple(starts.shape)} of "
            f"{starts.dtype} and {columns.dtype}."
        )
    if x.dim() < 1:
        raise ValueError(f"sparse_matmul needs x of shape (..., inputs), got {tuple(x.shape)}.")
    kinds = {x.dtype, values.dtype} | (set() if bias is None else {bias.dtype})
    if len(kinds) > 1 or x.dtype not in _TYPES:
        raise ValueError(
            "sparse_matmul needs x, values and bias of one floating-point type (float16, bfloat16, float32 or "
            f"float64), got {', '.join(sorted(map(str, kinds)))}; convert with .to()."
        )
    rows = (starts.shape[0] - 1) * values.shape[1]
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"sparse_matmul needs a bias of shape ({rows},), got {tuple(bias.shape)}.")
    places = {t.device for t in (x, values, columns, starts, bias) if t is not None}
    if len(places) > 1:
        raise ValueError(f"sparse_matmul needs all tensors on one device, got {', '.join(sorted(map(str, places)))}.")
