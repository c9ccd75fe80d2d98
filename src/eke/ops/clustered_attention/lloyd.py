"""Lloyd's steps for a batch of heads: assign to the nearest centre, move the centres, and so on.

`assign` for points, by a distance or the cosine; `assign_hashes` for up to 63 bits in an int64, by popcounts and
majorities. This is torch's own way; the native kernel has the same two and agrees with them up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize


def assign(
    points: Tensor,
    centres: Tensor,
    real: Tensor | None,
    *,
    clusters: Sequence[int],
    iterations: int,
    sphere: bool,
    metric: Tensor | None = None,
) -> Tensor:
    """Return the cluster of each point, (batch, heads, length); -1 for points that are not real.

    Args:
        points: (batch, heads, length, D).
        centres: Where to start, (batch, heads, largest of clusters, D).
        real: (batch, length), or None.
        clusters: Centres that count, for each head.
        iterations: Times that points are assigned.
        sphere: Whether the largest product decides and centres have norm one.
        metric: A, (batch, heads, D, D), of squared distances x^T A x; None for the identity.
    """
    used = _used(clusters, centres.shape[2], points.device)
    for step in range(iterations):
        right = centres if metric is None else centres @ metric
        half = torch.zeros_like(centres[..., 0]) if sphere else (centres * right).sum(-1) / 2
        distance = half.masked_fill(~used, torch.inf).unsqueeze(-2) - points @ right.mT
        groups = distance.argmin(-1)
        if real is not None:
            groups = groups.masked_fill(~real[:, None, :], -1)
        if step + 1 < iterations:
            sums, counts = _sums(points, groups, centres.shape[2])
            moved = normalize(sums, dim=-1) if sphere else sums / counts.clamp_min(1).unsqueeze(-1)
            centres = torch.where((counts > 0).unsqueeze(-1), moved, centres)
    return groups


def assign_hashes(
    hashes: Tensor, centres: Tensor, real: Tensor | None, *, clusters: Sequence[int], iterations: int, bits: int
) -> Tensor:
    """Return the cluster of each hash, (batch, heads, length); -1 for those that are not real.

    Args:
        hashes: (batch, heads, length) of int64.
        centres: Where to start, (batch, heads, largest of clusters).
        real: (batch, length), or None.
        clusters: Centres that count, for each head.
        iterations: Times that hashes are assigned.
        bits: In use.
    """
    used = _used(clusters, centres.shape[2], hashes.device)
    apart = 2 * unpack(hashes, bits).float() - 1
    for step in range(iterations):
        # Bits that agree minus bits that do not.
        alike = apart @ (2 * unpack(centres, bits).float() - 1).mT
        groups = alike.masked_fill(~used.unsqueeze(-2), -torch.inf).argmax(-1)
        if real is not None:
            groups = groups.masked_fill(~real[:, None, :], -1)
        if step + 1 < iterations:
            votes, counts = _sums(apart, groups, centres.shape[2])
            centres = torch.where(counts > 0, pack(votes > 0), centres)
    return groups


def covariance(k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the covariance of the keys, (batch, heads, D, D).

    Args:
        k: (batch, heads, keys, D).
        mask: Which keys are real, (batch, keys), or None.
    """
    real = k.new_ones(1, 1, k.shape[2], 1) if mask is None else mask[:, None, :, None].to(k.dtype)
    count = real.sum(-2, keepdim=True).clamp_min(1)
    centred = (k - (k * real).sum(-2, keepdim=True) / count) * real
    return centred.mT @ centred / count


def pack(signs: Tensor) -> Tensor:
    """Return bools (..., bits) as int64 (...,), the first in the lowest bit."""
    powers = torch.ones(signs.shape[-1], dtype=torch.int64, device=signs.device) << torch.arange(
        signs.shape[-1], device=signs.device
    )
    return (signs * powers).sum(-1)


def unpack(hashes: Tensor, bits: int) -> Tensor:
    """Return int64 (...,) as 0 and 1, (..., bits)."""
    return (hashes.unsqueeze(-1) >> torch.arange(bits, device=hashes.device)) & 1


def _used(clusters: Sequence[int], most: int, device: torch.device) -> Tensor:
    return torch.arange(most, device=device) < torch.tensor(clusters, device=device).view(-1, 1)


def _sums(points: Tensor, groups: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Return the sums (batch, heads, clusters, D) and counts of the points of each cluster."""
    batch, heads, _, dim = points.shape
    # A last row takes what is in no cluster.
    row = groups.where(groups >= 0, clusters)
    index = row.unsqueeze(-1).expand_as(points)
    sums = points.new_zeros(batch, heads, clusters + 1, dim).scatter_add_(2, index, points)
    counts = points.new_zeros(batch, heads, clusters + 1).scatter_add_(2, row, torch.ones_like(points[..., 0]))
    return sums[:, :, :-1], counts[:, :, :-1]
