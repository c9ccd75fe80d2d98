"""What clustered attention is: the weights of every query, written out in full.

    clustered:  A^c_j = softmax(s c_j K^T),                row i = A^c_g(i)
    improved:   T_j = the k keys with the largest c_j . k, m_j = sum of A^c_j over T_j
                row i = m_j exp(s q_i . k_l) / (sum over T_j of exp(s q_i . k_r)) for l in T_j, else A^c_jl;  j = g(i)

c_j is the mean of the queries of cluster j (or any vector), g(i) the cluster of query i, s a scale. Rows sum to one.
    rest as a key (eke's own, not the paper's): t_j = A^c_j outside of T_j, made to sum to one; z_j = log of the sum of
                exp(s c_j . k_l) over l not in T_j; b_j = sum of t_jl k_l
                row i = softmax of s q_i . k_l for l in T_j and of z_j + s (q_i - c_j) . b_j, whose weight t_j shares
Guarantee: the improved row is never further from the exact one in the L1 norm than the clustered row, and never comes
further away as k grows: on T_j it is proportional to the exact row. Both hold for any clusters and any c.
Source: Vyas, Katharopoulos, Fleuret, "Fast transformers with clustered attention", 2020. Cost here: all pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def means(q: Tensor, groups: Tensor, clusters: int) -> Tensor:
    """Return the mean of the queries of each cluster, (batch, heads, clusters, D); zeros for an empty one.

    Args:
        q: (batch, heads, length, D).
        groups: Cluster of each query, (batch, heads, length); -1 for none.
        clusters: How many.
    """
    member = torch.nn.functional.one_hot(groups + 1, clusters + 1)[..., 1:].to(q.dtype)
    return member.mT @ q / member.sum(-2).clamp_min(1).unsqueeze(-1)


def softmax(logits: Tensor, real: Tensor | None) -> Tensor:
    """Return the softmax over what is real; zeros where nothing is.

    Args:
        logits: (..., keys).
        real: bool that broadcasts to them, or None for all.
    """
    if real is None:
        return logits.softmax(-1)
    # Not the infinite: rows without any key would have derivatives that are not numbers.
    return logits.masked_fill(~real, torch.finfo(logits.dtype).min / 2).softmax(-1) * real


def weights(
    inputs: tuple[Tensor, Tensor, Tensor],
    groups: Tensor,
    *,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
) -> Tensor:
    """Return the weight of every key in every output.

    Args:
        inputs: q (batch, heads, length, D), k (batch, heads, keys, D), c (batch, heads, clusters, D).
        groups: Cluster of each query, (batch, heads, length); -1 for queries that attend to nothing.
        topk: Keys of a cluster that every query weighs itself, for each head; 0 for plain clustered attention.
        mask: Which keys are real, (batch, keys), or None.
        scale: s.
        key: Whether the keys that were not chosen are one key, rather than shared by the cluster.

    Returns:
        (batch, heads, length, keys).
    """
    q, k, centres = inputs
    real = None if mask is None else mask[:, None, None, :]
    logits = scale * centres @ k.mT
    shared = softmax(logits, real)
    ranked = logits if real is None else logits.masked_fill(~real, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    wanted = torch.tensor(topk, device=q.device).view(1, -1, 1, 1)
    first = (torch.arange(k.shape[-2], device=q.device) < wanted).expand_as(order)
    chosen = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, first)
    rows = groups.clamp_min(0).unsqueeze(-1).expand(*groups.shape, k.shape[-2])
    mine, shared_row = chosen.gather(2, rows), shared.gather(2, rows)
    if key:
        choice = (mine, ~mine) if real is None else (mine & real, ~mine & real)
        found = _with_the_rest_as_a_key((q, k, centres), rows, choice, shared_row, scale)
        return found * (groups >= 0).unsqueeze(-1)
    mass = (shared_row * mine).sum(-1, keepdim=True)
    own = softmax(scale * q @ k.mT, mine if real is None else mine & real)
    return torch.where(mine, mass * own, shared_row) * (groups >= 0).unsqueeze(-1)


def _with_the_rest_as_a_key(
    inputs: tuple[Tensor, Tensor, Tensor], rows: Tensor, choice: tuple[Tensor, Tensor], shared: Tensor, scale: float
) -> Tensor:
    """Return rows in which the keys that are left weigh together what a key at their mean weighs."""
    (q, k, centres), (mine, left) = inputs, choice
    centre = centres.gather(2, rows[..., :1].expand(*rows.shape[:3], k.shape[-1]))
    logits = (scale * centre @ k.mT).masked_fill(~left, -torch.inf)
    tail = shared * left
    tail = tail / tail.sum(-1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    of_rest = logits.logsumexp(-1) + scale * ((q - centre) * (tail @ k)).sum(-1)
    of_keys = (scale * q @ k.mT).masked_fill(~mine, -torch.inf)
    together = torch.cat([of_keys, of_rest.unsqueeze(-1)], -1)
    some = (together > -torch.inf).any(-1, keepdim=True)
    row = together.where(some, 0).softmax(-1) * some
    return row[..., :-1] + row[..., -1:] * tail


def exact(q: Tensor, k: Tensor, *, mask: Tensor | None, scale: float) -> Tensor:
    """Return the weights of softmax attention, (batch, heads, length, keys)."""
    return softmax(scale * q @ k.mT, None if mask is None else mask[:, None, None, :])
