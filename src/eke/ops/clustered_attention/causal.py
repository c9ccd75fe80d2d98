"""Causal clustered attention by blocks: exact within a block, clustered over everything before it.

A cluster that held later queries would let them be seen. So the centres of a block are learned from the blocks before
it (each block's steps start where the last block's ended), and its queries only choose among them: output t depends on
positions up to t alone. The two parts are joined by their sums of exponentials; the clustered one is estimated from the
chosen keys and their mass. Cost: length x (block + clusters x length / block), least at block = sqrt(clusters length).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..calls import direct
from . import grouping, operators
from .clusterers import Asked, Clusterer


def attend_causally(
    inputs: tuple[Tensor, Tensor, Tensor],
    *,
    clusters: list[int],
    topk: list[int],
    clusterer: Clusterer,
    scale: float,
    generator: torch.Generator | None = None,
    block: int | None = None,
    start: Tensor | None = None,
    key: bool = False,
) -> Tensor:
    """Attend to the past.

    Args:
        inputs: q, k and v, (batch, heads, length, ...).
        clusters: For each head.
        topk: For each head.
        clusterer: Groups the queries of earlier blocks.
        scale: Of the logits.
        generator: Of the clusterer's draws.
        block: Positions of a block, or None.
        start: Centres to start from, or None.
        key: Whether the keys before the block that were not chosen are one key.

    Returns:
        (batch, heads, length, values).
    """
    q, k, v = inputs
    length, most = q.shape[2], max(clusters)
    size = max(most, math.isqrt(most * length)) if block is None else block
    outputs: list[Tensor] = []
    for begin in range(0, length, size):
        now = slice(begin, begin + size)
        near, near_sum = _exact(q[:, :, now], k[:, :, now], v[:, :, now], scale)
        if begin:
            before = slice(0, begin)
            past = q[:, :, begin - size : begin].detach()
            groups = clusterer(Asked(past, k[:, :, before].detach(), clusters, generator=generator, start=start))
            start = grouping.means(past, groups, most)
            nearest = grouping.points(
                q[:, :, now].detach(), start, None, metric=None, clusters=clusters, iterations=1, sphere=False
            )
            far, far_sum = operators.attend(
                (q[:, :, now], k[:, :, before], v[:, :, before], start), nearest, topk=topk, mask=None, scale=scale,
                key=key,
            )  # fmt: skip
            share = torch.sigmoid(far_sum - near_sum).unsqueeze(-1)
            near = near + share * (far - near)
        outputs.append(near)
    return torch.cat(outputs, 2) if outputs else v.new_zeros(v.shape)


def _exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return causal attention within a block and its logarithms of sums of exponentials."""
    if q.shape == v.shape and direct(q, k, v):
        # The fused operation gives both for values as wide as keys, but no derivatives of the second.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
        return out, lse
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (scale * q @ k.mT).masked_fill(later, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)
