"""MonarchAttention, written anew after its paper, as a rival in benchmarks.

Yaras, Xu, Abillama, Lee, Balzano, "MonarchAttention: zero-shot conversion to fast, hardware-aware structured
attention", 2025. Softmax attention is the distribution that maximizes <A, s Q K^T> + entropy(A) row by row; here A is
restricted to Monarch matrices. With N = M B positions, query (l, j) and key (k, i), l and k blocks of M, j and i
places of B:

    A[(l, j), (k, i)] = L[j][l, k] R[k][j, i],   rows of L and R on the simplex,

and the two factors are improved in turns, in closed form, each a softmax:

    R[k][j, :] = softmax_i( s <a_jk, K_ki> / c_jk ),   a_jk = sum_l L[j][l, k] Q_lj,   c_jk = sum_l L[j][l, k]
    L[j][l, :] = softmax_k( s <Q_lj, sum_i R[k][j, i] K_ki> + entropy(R[k][j, :]) ).

The start is L = identity (a_jk = Q_kj, c = 1); padding is left out of R and of the sums over l. One pass costs about
N (M + B) D. Without steps beyond the first, R attends within blocks and L mixes them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def monarch_attention(
    q: Tensor, k: Tensor, v: Tensor, *, block: int, steps: int, scale: float, mask: Tensor | None = None
) -> Tensor:
    """Attend with a Monarch matrix: q, k, v (batch, heads, length, dim), mask (batch, length) of real positions."""
    batch, heads, length, _ = q.shape
    blocks = -(-length // block)
    extra = blocks * block - length
    real = q.new_ones(batch, length, dtype=torch.bool) if mask is None else mask
    real = pad(real, (0, extra)).view(batch, 1, blocks, block)
    # (batch, heads, blocks, places, dim)
    q, k, v = (pad(x, (0, 0, 0, extra)).unflatten(2, (blocks, block)) for x in (q, k, v))
    by_place = q.transpose(2, 3)  # (batch, heads, j, l, dim)
    tall, weight = q, q.new_ones(batch, heads, blocks, block)  # a (.., k, j, dim), c (.., k, j)
    hidden = ~real.unsqueeze(-2)  # (batch, 1, k, 1, i)
    for step in range(steps):
        logits = scale * tall @ k.mT / weight.clamp_min(1e-6).unsqueeze(-1)
        right = logits.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1)  # (.., k, j, i)
        entropy = torch.special.entr(right).sum(-1)
        # A block without any real key takes no part.
        entropy = entropy.masked_fill(~real.any(-1, keepdim=True), -torch.inf)
        keys = (right @ k).transpose(2, 3)  # (.., j, k, dim)
        left = (scale * by_place @ keys.mT + entropy.transpose(2, 3).unsqueeze(-2)).softmax(-1)  # (.., j, l, k)
        if step + 1 < steps:
            seen = left * real.transpose(2, 3).unsqueeze(-1)
            weight = seen.sum(-2).transpose(2, 3)
            tall = (seen.mT @ by_place).transpose(2, 3)
    mixed = (right @ v).transpose(2, 3)  # (.., j, k, values)
    out = (left @ mixed).transpose(2, 3).flatten(2, 3)
    return out[:, :, :length]
