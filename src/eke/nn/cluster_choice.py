"""The cheapest clusters of each head whose rows stay within a tolerance.

For a number of clusters C, the clustered rows' distance from the exact rows bounds that of the improved rows for every
k (see ops/clustered_attention/reference.py), and the distance never grows with k. One sort of the centres' logits gives
it for all k at once: with keys in that order, m and M the sums of the shared and of the exact row over the first k,

    distance(k) = |m - M| + sum over the later keys of |A^c - A|.

So the least k within the tolerance is found exactly, for each C. Cost: all pairs, as often as C is tried. Where the
rest is one key (`rest="key"`) neither holds: powers of two are tried for k, and the least that was measured within
the tolerance is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ops.clustered_attention import Asked, Clusterer, KMeans, gathered, reference
from .clustered_attention import Clustering

CLUSTERS = (8, 16, 25, 50, 100, 200)


@dataclass(frozen=True)
class HeadChoice:
    """What was chosen for one head.

    Args:
        clusters: C; 0 for exact attention, where nothing cheaper stays within the tolerance.
        topk: k.
        error: Mean L1 distance of the rows from the exact ones; 0 for an exact head.
        bound: The same of clustered rows, k = 0: no k gives more where the rest is shared. 0 for an exact head.
    """

    clusters: int
    topk: int
    error: float
    bound: float


def row_errors(q: Tensor, k: Tensor, groups: Tensor, *, clusters: int, mask: Tensor | None, scale: float) -> Tensor:
    """Return the L1 distance of every row from the exact one for each k, (batch, heads, length, keys + 1).

    Args:
        q: (batch, heads, length, D).
        k: (batch, heads, keys, D).
        groups: Cluster of each query, (batch, heads, length); rows of -1 are zero.
        clusters: How many there are.
        mask: Which keys are real, (batch, keys), or None.
        scale: Of the logits.
    """
    real = None if mask is None else mask[:, None, None, :]
    logits = scale * gathered.means(q, groups, clusters) @ k.mT
    if real is not None:
        logits = logits.masked_fill(~real, -torch.inf)
    order = logits.argsort(dim=-1, descending=True, stable=True)
    shared = reference.softmax(logits, real).gather(-1, order)
    rows = groups.clamp_min(0).unsqueeze(-1).expand(*groups.shape, k.shape[2])
    mine = shared.gather(2, rows)
    exact = reference.exact(q, k, mask=mask, scale=scale).gather(-1, order.gather(2, rows))
    difference = mine - exact
    heads = torch.nn.functional.pad(difference.cumsum(-1), (1, 0))
    tails = torch.nn.functional.pad(difference.abs().flip(-1).cumsum(-1).flip(-1), (0, 1))
    return (heads.abs() + tails) * (groups >= 0).unsqueeze(-1)


@torch.no_grad()
def choose_clusters(
    q: Tensor,
    k: Tensor,
    *,
    tolerance: float,
    clusters: Sequence[int] = CLUSTERS,
    clusterer: Clusterer | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    rest: Literal["shared", "key"] = "shared",
) -> tuple[Clustering, list[HeadChoice]]:
    """Choose C and k for each head of one attention from its queries and keys on a few samples.

    Args:
        q: Queries, (batch, length, heads, dim), of a length as in use.
        k: Keys, (batch, keys, heads, dim).
        tolerance: Largest mean L1 distance of a row from the exact one, 0 to 2; over the rows of all samples.
        clusters: Numbers to try; those above the length are left out.
        clusterer: `KMeans()` if None.
        mask: Which positions are real, (batch, keys), bool; of the queries too where they are as many.
        scale: Of the logits; None for 1 / sqrt(dim).
        rest: As of `Clustering`; errors are those of the rule that is asked for.

    Returns:
        The setting, which clusters at any length, and the choice a head with its errors.

    Raises:
        ValueError: if the tolerance is out of range, no number of clusters is left or rest is unknown.
    """
    if rest not in {"shared", "key"}:
        raise ValueError(f"rest is 'shared' or 'key', got {rest!r}.")
    if not 0 <= tolerance <= 2:
        raise ValueError(f"tolerance is an L1 distance of two rows that sum to one, 0 to 2, got {tolerance!r}.")
    batch, length, heads, dim = q.shape
    tried = sorted({c for c in clusters if 1 <= c <= length})
    if not tried:
        raise ValueError(f"clusters must hold a number from 1 to the length {length}, got {list(clusters)}.")
    clusterer, scale = KMeans() if clusterer is None else clusterer, dim**-0.5 if scale is None else scale
    queries, keys = (x.transpose(1, 2) if x.dtype == torch.float64 else x.transpose(1, 2).float() for x in (q, k))
    query_mask = mask if length == k.shape[1] else None
    rows = batch * length if query_mask is None else int(query_mask.sum())
    best = [HeadChoice(0, 0, 0.0, 0.0)] * heads
    least = [float(length * k.shape[1])] * heads
    keys_tried = list(range(k.shape[1] + 1))
    if rest == "key":
        keys_tried = [0, *(2**n for n in range(k.shape[1].bit_length()) if 2**n < k.shape[1]), k.shape[1]]
    for count in tried:
        groups = clusterer(Asked(queries, keys, [count] * heads, mask, query_mask))
        # One sample at a time: rows of all pairs are held.
        totals = sum(
            _errors(
                (queries[b : b + 1], keys[b : b + 1]), groups[b : b + 1], clusters=count, topk=keys_tried, rest=rest,
                mask=None if mask is None else mask[b : b + 1], scale=scale,
            ).double().sum((0, 2)) for b in range(batch)
        ) / rows  # fmt: skip
        assert isinstance(totals, Tensor)
        for head in range(heads):
            within = (totals[head] <= tolerance).nonzero()
            if not len(within):
                continue
            at = int(within[0])
            cost = float(count * (k.shape[1] + length) + length * keys_tried[at])
            if cost < least[head]:
                least[head] = cost
                best[head] = HeadChoice(count, keys_tried[at], float(totals[head, at]), float(totals[head, 0]))
    setting = Clustering(
        clusters=tuple(choice.clusters for choice in best), topk=tuple(choice.topk for choice in best),
        clusterer=clusterer, exact_below=0, rest=rest,
    )  # fmt: skip
    return setting, best


def _errors(
    inputs: tuple[Tensor, Tensor],
    groups: Tensor,
    *,
    clusters: int,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    rest: str,
) -> Tensor:
    """Return the L1 distance of every row from the exact one for each k tried, (batch, heads, length, tries)."""
    q, k = inputs
    if rest == "shared":
        return row_errors(q, k, groups, clusters=clusters, mask=mask, scale=scale)
    exact = reference.exact(q, k, mask=mask, scale=scale) * (groups >= 0).unsqueeze(-1)
    parts = q, k, gathered.means(q, groups, clusters)
    found = (
        reference.weights(parts, groups, topk=[top] * q.shape[1], mask=mask, scale=scale, key=True) for top in topk
    )
    return torch.stack([(rows - exact).abs().sum(-1) for rows in found], -1)
