"""The specification of the splits of row pairs, in torch's operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference(values: Tensor, pieces: Sequence[int]) -> tuple[list[Tensor], Tensor]:
    """Split pairs of rows level by level.

    Args:
        values: (a, m, c), float64 or complex128.
        pieces: t_1 ... t_L, into how many pieces each level cuts the columns; m is divisible by 2^L, c by t_1 ... t_L.

    Returns:
        For each level the vectors (a, 2, t, m/2), a being multiplied by t and m halved from level to level; and what is
        left, (a t_1 ... t_L, m / 2^L, c / (t_1 ... t_L)).
    """
    vectors = []
    for t in pieces:
        a, m, c = values.shape
        x, y = values.reshape(a, 2, m // 2, t, c // t).movedim(-2, -3).unbind(1)  # (a, t, m/2, c/t)
        p, w = (part.abs().square().sum(-1) for part in (x, y))
        top, bottom = leading_of_two(p, w, (x * y.conj()).sum(-1))
        vectors.append(torch.stack((top, bottom), 1))
        values = (top.conj()[..., None] * x + bottom.conj()[..., None] * y).flatten(0, 1)
    return vectors, values


def leading_of_two(p: Tensor, w: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the leading eigenvectors (top, bottom) of 2 x 2 Gram matrices [[p, q], [q*, w]] in closed form.

    With e = (p - w) / 2 and h = sqrt(e^2 + |q|^2) it is (e + h, q*) for e >= 0 and (q, h - e) otherwise: sums of what
    has one sign, so nothing cancels; (1, 0) where all directions are equal. In rank 1 the Gram matrix loses nothing:
    an angle off by rounding costs its square.
    """
    half, size = (p - w) / 2, q.abs()
    large = half.abs() + torch.hypot(half, size)
    norm = torch.hypot(large, size)
    tie = norm == 0
    norm = norm.masked_fill(tie, 1.0)
    up, cross = half >= 0, q / norm
    large = (large / norm).masked_fill(tie, 1.0).to(q.dtype)
    return torch.where(up, large, cross), torch.where(up, cross.conj(), large)
