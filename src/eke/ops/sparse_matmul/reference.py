"""What the kernel must agree with: the dense matrix, filled in and multiplied by torch, on any device, in any type."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(values: Tensor, columns: Tensor, starts: Tensor, *, inputs: int) -> Tensor:
    """Return the whole matrix W.

    Args:
        values: Kept entries, (entries, r).
        columns: Column of each entry, (entries,).
        starts: Entries before each group of r rows, (groups + 1,).
        inputs: Columns of W.

    Returns:
        (groups * r, inputs), differentiable in the values. A column or start outside is a ValueError.
    """
    groups, r = starts.shape[0] - 1, values.shape[1]
    check_pattern(columns, starts, inputs=inputs)
    first, last = int(starts[0]), int(starts[-1])
    rows = _group_of(starts)[:, None] * r + torch.arange(r, device=starts.device)
    whole = values.new_zeros(groups * r, inputs)
    where = (rows, columns[first:last, None].long().expand(-1, r))
    return whole.index_put(where, values[first:last], accumulate=True)


def check_pattern(columns: Tensor, starts: Tensor, *, inputs: int) -> None:
    """Refuse a pattern that leaves its arrays.

    Args:
        columns: Column of each entry.
        starts: Entries before each group.
        inputs: Columns of the matrix.

    Raises:
        ValueError: if it does.
    """
    falls = bool((starts.diff() < 0).any())
    if falls or int(starts[0]) < 0 or int(starts[-1]) > columns.shape[0]:
        raise ValueError(
            f"starts must rise from 0 or more to at most {columns.shape[0]} entries, got {int(starts.min())} to "
            f"{int(starts.max())}{', falling in between' if falls else ''}."
        )
    used = columns[int(starts[0]) : int(starts[-1])]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= inputs):
        raise ValueError(
            f"columns must be from 0 to {inputs - 1} for x of {inputs} features, got {int(used.min())} to "
            f"{int(used.max())}."
        )


def matmul(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias for x (batch, inputs)."""
    return torch.nn.functional.linear(x, dense(values, columns, starts, inputs=x.shape[1]), bias)


def to_inputs(grad: Tensor, values: Tensor, columns: Tensor, starts: Tensor, inputs: int) -> Tensor:
    """Return grad W for grad (batch, rows)."""
    return grad @ dense(values, columns, starts, inputs=inputs)


def to_values(x: Tensor, grad: Tensor, columns: Tensor, starts: Tensor, block: int) -> Tensor:
    """Return the derivative of each value, (entries, block), for x (batch, inputs) and grad (batch, rows)."""
    check_pattern(columns, starts, inputs=x.shape[1])
    first, last = int(starts[0]), int(starts[-1])
    whole = (grad.t() @ x).reshape(starts.shape[0] - 1, block, x.shape[1])
    found = x.new_zeros(columns.shape[0], block)
    found[first:last] = whole[_group_of(starts), :, columns[first:last].long()]
    return found


def _group_of(starts: Tensor) -> Tensor:
    """Return the group that each entry belongs to."""
    return torch.repeat_interleave(torch.arange(starts.shape[0] - 1, device=starts.device), starts.diff())
