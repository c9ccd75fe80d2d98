"""Clustered attention in torch's own operations, in memory clusters x keys + a block of queries x topk.

The keys that every query of a cluster weighs itself are gathered once a cluster, then once a query of a block. This
runs where there is no native kernel, on other types and devices, and for derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import softmax

BLOCK = 256
"""Queries at a time."""
Shared = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of each cluster: chosen keys and values, which of them count, their mass, the others' output, log sum of exp, and
what is added to the logits of the chosen keys."""


def shared(
    k: Tensor,
    v: Tensor,
    centres: Tensor,
    *,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
) -> Shared:
    """Attend with the centres.

    Args:
        k: (batch, heads, keys, D).
        v: (batch, heads, keys, M).
        centres: (batch, heads, clusters, D).
        topk: For each head.
        mask: Which keys are real, (batch, keys), or None.
        scale: Of the logits.
        key: Whether the rest is one more key: the last of the chosen ones, after which no others are left.

    Returns:
        See `Shared`: (batch, heads, clusters, ...).
    """
    real = None if mask is None else mask[:, None, None, :]
    logits = scale * centres @ k.mT
    a = softmax(logits, real)
    ranked = logits.detach()
    if real is not None:
        ranked = ranked.masked_fill(~real, -torch.inf)
    most = min(max(topk), k.shape[2])
    top, chosen = ranked.topk(most, dim=-1)
    counts = torch.arange(most, device=k.device) < torch.tensor(topk, device=k.device).view(-1, 1, 1)
    counts = counts & (top > -torch.inf)
    if key:
        return _rest_as_a_key((k, v, centres), logits, (chosen, counts), real, scale)
    weight = a.gather(-1, chosen)
    mass = (weight * counts).sum(-1)
    rest = a.scatter(-1, chosen, weight * ~counts) @ v
    lse = logits if real is None else logits.masked_fill(~real, -torch.inf)
    none = logits.new_zeros(counts.shape)
    return _rows(k, chosen), _rows(v, chosen), counts, mass, rest, lse.logsumexp(-1), none


def _rest_as_a_key(
    inputs: tuple[Tensor, Tensor, Tensor],
    logits: Tensor,
    choice: tuple[Tensor, Tensor],
    real: Tensor | None,
    scale: float,
) -> Shared:
    """Return the chosen keys and, as one more, the mean of the others by the centre's weights."""
    (k, v, centres), (chosen, counts) = inputs, choice
    left = torch.ones_like(logits, dtype=torch.bool).scatter(-1, chosen, ~counts)
    if real is not None:
        left = left & real
    some = left.any(-1, keepdim=True)
    weight = softmax(logits, left)
    mean, value = weight @ k, weight @ v
    # Where nothing is left the sum is of no use, but must have derivatives.
    total = logits.masked_fill(~left & some, -torch.inf).logsumexp(-1, keepdim=True)
    bias = total - scale * (centres * mean).sum(-1, keepdim=True)
    keys, values = (torch.cat([_rows(x, chosen), one.unsqueeze(-2)], -2) for x, one in ((k, mean), (v, value)))
    counts = torch.cat([counts.expand_as(chosen), some], -1)
    lse = logits if real is None else logits.masked_fill(~real, -torch.inf)
    biases = torch.cat([torch.zeros_like(chosen, dtype=bias.dtype), bias], -1)
    return keys, values, counts, counts.any(-1).to(v.dtype), torch.zeros_like(value), lse.logsumexp(-1), biases


def block(q: Tensor, groups: Tensor, of: Shared, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attend with some queries.

    Args:
        q: (batch, heads, n, D).
        groups: (batch, heads, n); -1 for queries that attend to nothing.
        of: The clusters.
        scale: Of the logits.

    Returns:
        Outputs (batch, heads, n, M), zeros for group -1; logarithms of the sums of exponentials over all keys, as
        estimated from the chosen ones and their mass (from the centre where there are none), (batch, heads, n).
    """
    keys, values, counts, mass, rest, lse, biases = of
    mine = groups.clamp_min(0)
    picked = _rows(counts.to(torch.int8), mine).bool()
    heavy = _pick(mass, mine)
    logits = scale * (_rows(keys.flatten(3), mine).view(*mine.shape, *keys.shape[3:]) @ q.unsqueeze(-1)).squeeze(-1)
    logits = logits + _rows(biases, mine)
    own = softmax(logits, picked)
    chosen = (own.unsqueeze(-2) @ _rows(values.flatten(3), mine).view(*mine.shape, *values.shape[3:])).squeeze(-2)
    out = heavy.unsqueeze(-1) * chosen + _rows(rest, mine)
    tiny = torch.finfo(q.dtype).tiny
    mine_too = logits.masked_fill(~picked, -torch.inf).logsumexp(-1) - heavy.clamp_min(tiny).log()
    total = torch.where(heavy > 0, mine_too, _pick(lse, mine))
    real = groups >= 0
    return out * real.unsqueeze(-1), total.masked_fill(~real, -torch.inf)


def attend(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    groups: Tensor,
    *,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend with all queries.

    Args:
        inputs: q (batch, heads, length, D), k and v (batch, heads, keys, ...), centres (batch, heads, clusters, D).
        groups: (batch, heads, length).
        topk: For each head.
        mask: Which keys are real, (batch, keys), or None.
        scale: Of the logits.
        key: Whether the rest is one key.

    Returns:
        As of `block`.
    """
    q, k, v, centres = inputs
    of = shared(k, v, centres, topk=topk, mask=mask, scale=scale, key=key)
    found = [block(q[:, :, t : t + BLOCK], groups[:, :, t : t + BLOCK], of, scale=scale) for t in _starts(q)]
    return torch.cat([out for out, _ in found], 2), torch.cat([lse for _, lse in found], 2)


def differentiate(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    groups: Tensor,
    grads: tuple[Tensor, Tensor],
    *,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `attend`, block by block; the clusters and the choice of keys are held fixed.

    Args:
        inputs: As there.
        groups: As there.
        grads: Derivatives of outputs and of the logarithms.
        topk: As there.
        mask: As there.
        scale: As there.
        key: As there.

    Returns:
        Derivatives of q, k, v and the centres.
    """
    with torch.enable_grad():
        q, k, v, centres = (x.detach().requires_grad_() for x in inputs)
        of = shared(k, v, centres, topk=topk, mask=mask, scale=scale, key=key)
        cut = [part.detach() for part in of]
        moving = [i for i, part in enumerate(of) if part.requires_grad]
        leaves = [cut[i].requires_grad_() for i in moving]
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        of_queries = []
        for t in _starts(q):
            part = q.detach()[:, :, t : t + BLOCK].requires_grad_()
            now = (cut[0], cut[1], cut[2], cut[3], cut[4], cut[5], cut[6])
            results = block(part, groups[:, :, t : t + BLOCK], now, scale=scale)
            wanted = [g[:, :, t : t + BLOCK] for g in grads]
            mine, *found = torch.autograd.grad(results, (part, *leaves), wanted)
            of_queries.append(mine)
            sums = [total + more for total, more in zip(sums, found)]
        outputs = [of[i] for i in moving]
        rest = torch.autograd.grad(outputs, (k, v, centres), sums)
    return torch.cat(of_queries, 2), rest[0], rest[1], rest[2]


def means(q: Tensor, groups: Tensor, clusters: int) -> Tensor:
    """Return the mean of the queries of each cluster, (batch, heads, clusters, D); zeros for an empty one.

    Args:
        q: (batch, heads, length, D).
        groups: (batch, heads, length); -1 for none.
        clusters: How many.
    """
    row = groups.where(groups >= 0, clusters)
    shape = (*q.shape[:2], clusters + 1, q.shape[3])
    sums = q.new_zeros(shape).scatter_add(2, row.unsqueeze(-1).expand_as(q), q)
    counts = q.new_zeros(shape[:3]).scatter_add(2, row, torch.ones_like(q[..., 0]))
    return (sums / counts.clamp_min(1).unsqueeze(-1))[:, :, :-1]


def _starts(q: Tensor) -> range:
    return range(0, max(1, q.shape[2]), BLOCK)


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(2, rows)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of x (batch, heads, n, size): (batch, heads, ..., size) for rows (batch, heads, ...)."""
    flat = rows.flatten(2)
    found = x.gather(2, flat.unsqueeze(-1).expand(*flat.shape, x.shape[-1]))
    return found.view(*rows.shape, x.shape[-1])
