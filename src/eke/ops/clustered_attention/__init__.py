"""Clustered attention: queries that are alike share the attention of their mean; the keys that matter are weighed anew.

    out = clustered_attention(q, k, v, clusters=100, topk=32)     # (batch, length, heads, dim)

Near to softmax attention without any training, in time and memory linear in the length for a fixed number of clusters.
With topk=0 it is plain clustered attention, with topk = keys it is exact. Masks of padding; causal by blocks.
Source: Vyas, Katharopoulos, Fleuret, "Fast transformers with clustered attention", 2020; see reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import grouping, operators
from .causal import attend_causally
from .clusterers import Asked, Clusterer, Hamming, KMeans, Spherical

__all__ = ["Asked", "Clusterer", "Hamming", "KMeans", "Spherical", "clustered_attention"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_DEFAULT = KMeans()  # made once: torch.compile of torch 2.14 cannot call what it has seen being made


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    clusters: int | Sequence[int],
    topk: int | Sequence[int],
    groups: Tensor | None = None,
    generator: torch.Generator | None = None,
    clusterer: Clusterer | None = None,
    start: Tensor | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    block: int | None = None,
    rest: Literal["shared", "key"] = "shared",
) -> Tensor:
    """Attend with clusters of queries.

    Args:
        q: Queries, (batch, length, heads, dim).
        k: Keys, (batch, keys, heads, dim).
        v: Values, (batch, keys, heads, values).
        clusters: C, for all heads or for each: 1 to length.
        topk: k, the keys of a cluster that each of its queries weighs itself, for all heads or for each; 0 for none.
        groups: Cluster of each query, (batch, length, heads), integers below C, -1 for queries that attend to nothing;
            None to let the clusterer find them.
        generator: Of the clusterer's draws; None for the same draw in every call.
        clusterer: `KMeans()` if None; `Spherical()`, `Hamming()` or your own.
        start: Centres from which the clusterer starts, (1 or batch, heads, C, dim): of an earlier call or layer.
        mask: Which keys are real, (batch, keys), bool. Others get the weight 0; without any the output is 0.
        query_mask: Which queries are real, (batch, length), bool. Others join no cluster and give 0.
        scale: Of the logits; None for 1 / sqrt(dim).
        causal: Whether position i sees positions up to i alone: exact within blocks and clustered before them, with
            centres that come from earlier blocks. Self-attention without masks and groups.
        block: Positions of a block if causal; None for about sqrt(clusters * length).
        rest: How keys count that were not chosen: "shared" for the centre's weights (the paper's rule and its
            guarantee), "key" for one more key, their mean by the centre's weights, whose weight each query finds
            itself (eke's own: nearer in trained networks, but not on every row).

    Returns:
        (batch, length, heads, values) of the type of v; zeros for queries without cluster or keys. Differentiable in q,
        k and v, once; clusters and chosen keys are held fixed. Half precision is computed in single precision.

    Raises:
        ValueError: if shapes, types or numbers do not fit.
    """
    _check(q, k, v, mask=mask, query_mask=query_mask)
    heads, length, keys = q.shape[2], q.shape[1], k.shape[1]
    counts = _each(clusters, heads, "clusters", 1, max(length, 1), "queries")
    tops = [min(top, keys) for top in _each(topk, heads, "topk", 0, None, "")]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    _check_start(start, q, max(counts))
    if rest not in {"shared", "key"}:
        raise ValueError(f"rest is 'shared' or 'key', got {rest!r}.")
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    by_head = [x.to(exact).transpose(1, 2) for x in (q, k, v)]
    parts = by_head[0], by_head[1], by_head[2]
    clusterer = _DEFAULT if clusterer is None else clusterer
    if causal:
        _check_causal(q, k, block, max(counts), groups is not None or mask is not None or query_mask is not None)
        out = attend_causally(
            parts, clusters=counts, topk=tops, clusterer=clusterer, generator=generator,
            scale=scale, block=block, start=start, key=rest == "key",
        )  # fmt: skip
        return out.transpose(1, 2).to(v.dtype)
    if groups is None:
        found = clusterer(Asked(parts[0].detach(), parts[1].detach(), counts, mask, query_mask, generator, start))
    else:
        found = _given(groups, q, counts)
        if query_mask is not None:
            found = found.masked_fill(~query_mask[:, None, :], -1)
    centres = grouping.means(parts[0], found, max(counts))
    out, _ = operators.attend((*parts, centres), found, topk=tops, mask=mask, scale=scale, key=rest == "key")
    return out.transpose(1, 2).to(v.dtype)


def _each(value: int | Sequence[int], heads: int, name: str, least: int, most: int | None, what: str) -> list[int]:
    """Return one number a head.

    Raises:
        ValueError: if there are not as many as heads or one is out of range.
    """
    found = list(value) if isinstance(value, Sequence) else [value] * heads
    if len(found) != heads:
        raise ValueError(f"{name} needs one number or one for each of {heads} heads, got {len(found)}: {found}.")
    bad = [x for x in found if not isinstance(x, int) or x < least or (most is not None and x > most)]
    if bad:
        limit = f"at least {least}" if most is None else f"from {least} to the number of {what}, {most}"
        raise ValueError(f"{name} must be an integer {limit}, got {bad[0]!r}.")
    return found


def _given(groups: Tensor, q: Tensor, counts: list[int]) -> Tensor:
    """Return given groups by head, (batch, heads, length).

    Raises:
        ValueError: if they do not fit.
    """
    if groups.shape != q.shape[:3] or groups.is_floating_point() or groups.dtype == torch.bool:
        raise ValueError(
            f"groups must be integers (batch, length, heads) = {tuple(q.shape[:3])}, got {groups.dtype} of "
            f"{tuple(groups.shape)}."
        )
    if not torch.compiler.is_compiling() and groups.numel():
        high = groups.amax((0, 1)).tolist()
        bad = [h for h, most in enumerate(high) if most >= counts[h]]
        if bad or int(groups.min()) < -1:
            h = bad[0] if bad else int(groups.amin((0, 1)).argmin())
            raise ValueError(
                f"groups of head {h} must lie in -1 to {counts[h] - 1} (clusters={counts[h]}), got values from "
                f"{int(groups[..., h].min())} to {int(groups[..., h].max())}."
            )
    return groups.long().transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, query_mask: Tensor | None) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: naming what was given.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4) or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"clustered_attention needs q, k, v of shape (batch, length, heads, dim), got {shapes}.")
    if q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k need the same heads and dim, got {shapes}.")
    if not k.shape[1]:
        raise ValueError(f"clustered_attention needs at least one key, got {shapes}.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or v.dtype not in _FLOATS:
        raise ValueError(f"q, k and v need one floating-point type, got {q.dtype}, {k.dtype} and {v.dtype}.")
    for name, given, size in (("mask", mask, k.shape[1]), ("query_mask", query_mask, q.shape[1])):
        if given is not None and (given.dtype != torch.bool or given.shape != (q.shape[0], size)):
            raise ValueError(
                f"{name} says which positions are real: bool of shape {(q.shape[0], size)}, got {given.dtype} of "
                f"{tuple(given.shape)}. Masks of pairs of positions do not exist for clusters of queries; causal=True "
                "gives the causal one."
            )


def _check_start(start: Tensor | None, q: Tensor, most: int) -> None:
    """Refuse centres of another shape.

    Raises:
        ValueError: naming what was given.
    """
    if start is None:
        return
    wanted = (q.shape[2], most, q.shape[3])
    if start.ndim != 4 or start.shape[0] not in {1, q.shape[0]} or start.shape[1:] != wanted:
        raise ValueError(
            f"start must be centres (1 or {q.shape[0]}, heads, clusters, dim) = (..., {wanted[0]}, {most}, "
            f"{wanted[2]}), got {tuple(start.shape)}."
        )


def _check_causal(q: Tensor, k: Tensor, block: int | None, most: int, masked: bool) -> None:
    """Refuse what a causal call cannot have.

    Raises:
        ValueError: naming what was given.
    """
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"Causal attention needs as many keys as queries, got {k.shape[1]} and {q.shape[1]}.")
    if block is not None and block < most:
        raise ValueError(f"block must hold at least as many positions as there are clusters, {most}, got {block!r}.")
    if masked:
        raise ValueError("causal=True takes no groups, mask or query_mask: put padding after the real positions.")
