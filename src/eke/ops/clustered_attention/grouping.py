"""The operators that group queries: torch.ops.eke.cluster_points, cluster_hashes, cluster_means and key_covariance.

On the native kernel for float32 on the CPU, else on torch's own operations. Groups have no derivatives; means do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..calls import direct, transformed
from . import gathered, lloyd, native

_LIBRARY = torch.library.Library("eke", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "cluster_points(Tensor points, Tensor centres, Tensor? real, Tensor? metric, int[] clusters, int iterations, "
    "bool sphere) -> Tensor",
    "cluster_hashes(Tensor q, Tensor planes, Tensor thresholds, Tensor places, Tensor? start, Tensor? real, "
    "int[] clusters, int iterations) -> Tensor",
    "cluster_means(Tensor q, Tensor groups, int clusters) -> Tensor",
    "key_covariance(Tensor k, Tensor? mask) -> Tensor",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def points(
    x: Tensor,
    centres: Tensor,
    real: Tensor | None,
    *,
    metric: Tensor | None,
    clusters: Sequence[int],
    iterations: int,
    sphere: bool,
) -> Tensor:
    """Return the cluster of each point, (batch, heads, length); see `lloyd.assign`.

    Args:
        x: (batch, heads, length, D).
        centres: Where to start, (batch, heads, largest of clusters, D).
        real: (batch, length), or None.
        metric: Of squared distances, (batch, heads, D, D), or None.
        clusters: For each head.
        iterations: Times that points are assigned.
        sphere: Whether by the cosine.
    """
    arguments = x, centres, real, metric, list(clusters), iterations, sphere
    if direct(x, centres):
        return _points(*arguments)
    found: Tensor = torch.ops.eke.cluster_points(*arguments)
    return found


def hashes(
    q: Tensor,
    planes: tuple[Tensor, Tensor],
    places: Tensor,
    *,
    start: Tensor | None,
    real: Tensor | None,
    clusters: Sequence[int],
    iterations: int,
) -> Tensor:
    """Return the cluster of each query by its hash, (batch, heads, length); see `lloyd.assign_hashes`.

    Args:
        q: (batch, heads, length, D).
        planes: W (bits, D) and t (bits,).
        places: Positions of the queries to start from, (batch, heads, largest of clusters).
        start: Centres to start from instead, (batch, heads, largest of clusters, D), or None.
        real: (batch, length), or None.
        clusters: For each head.
        iterations: Times that hashes are assigned.
    """
    arguments = q, *planes, places, start, real, list(clusters), iterations
    if direct(q):
        return _hashes(*arguments)
    found: Tensor = torch.ops.eke.cluster_hashes(*arguments)
    return found


def means(q: Tensor, groups: Tensor, clusters: int) -> Tensor:
    """Return the mean of the queries of each cluster, (batch, heads, clusters, D); zeros for an empty one.

    Args:
        q: (batch, heads, length, D).
        groups: (batch, heads, length) of int64; -1 for none.
        clusters: How many.
    """
    if transformed():
        return gathered.means(q, groups, clusters)
    if direct(q, groups):
        return _means(q, groups, clusters)
    found: Tensor = torch.ops.eke.cluster_means(q, groups, clusters)
    return found


def covariance(k: Tensor, mask: Tensor | None) -> Tensor:
    """Return the covariance of the keys, (batch, heads, D, D).

    Args:
        k: (batch, heads, keys, D).
        mask: Which keys are real, (batch, keys), or None.
    """
    if direct(k):
        return _covariance(k, mask)
    found: Tensor = torch.ops.eke.key_covariance(k, mask)
    return found


def _points(
    x: Tensor,
    centres: Tensor,
    real: Tensor | None,
    metric: Tensor | None,
    clusters: list[int],
    iterations: int,
    sphere: bool,
) -> Tensor:
    way = native.lloyd if native.serves(x) else lloyd.assign
    return way(x, centres, real, clusters=clusters, iterations=iterations, sphere=sphere, metric=metric)


def _hashes(q: Tensor, w: Tensor, t: Tensor, places: Tensor, start: Tensor | None, *options: Any) -> Tensor:
    real, clusters, iterations = options
    centres = None if start is None else lloyd.pack(start.to(w) @ w.T > t)
    if native.serves(q):
        return native.hashed(
            q, (w, t), places if centres is None else centres.view(torch.uint64), real, clusters=clusters,
            iterations=iterations,
        )  # fmt: skip
    hashed = lloyd.pack(q @ w.T > t)
    centres = hashed.gather(2, places) if centres is None else centres
    return lloyd.assign_hashes(hashed, centres, real, clusters=clusters, iterations=iterations, bits=len(t))


def _means(q: Tensor, groups: Tensor, clusters: int) -> Tensor:
    return (native.means if native.serves(q) else gathered.means)(q, groups, clusters)


def _covariance(k: Tensor, mask: Tensor | None) -> Tensor:
    return (native.metric if native.serves(k) else lloyd.covariance)(k, mask)


def _fake_groups(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:3], dtype=torch.int64)


def _fake_means(q: Tensor, groups: Tensor, clusters: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], clusters, q.shape[3])


def _fake_covariance(k: Tensor, mask: Tensor | None) -> Tensor:
    return k.new_empty(k.shape[0], k.shape[1], k.shape[3], k.shape[3])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.clusters = inputs[2]


def _derive(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (groups,) = ctx.saved_tensors
    mine = groups.clamp_min(0)
    # A last entry counts what is in no cluster.
    counts = grad.new_zeros(*grad.shape[:2], ctx.clusters + 1)
    counts = counts.scatter_add(2, groups.where(groups >= 0, ctx.clusters), torch.ones_like(groups, dtype=grad.dtype))
    share = (grad / counts[..., :-1].clamp_min(1).unsqueeze(-1)).gather(
        2, mine.unsqueeze(-1).expand(*mine.shape, grad.shape[-1])
    )
    return share * (groups >= 0).unsqueeze(-1), None, None


for _name, _function, _fake in (
    ("cluster_points", _points, _fake_groups),
    ("cluster_hashes", _hashes, _fake_groups),
    ("cluster_means", _means, _fake_means),
    ("key_covariance", _covariance, _fake_covariance),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"eke::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("eke::cluster_means", _derive, setup_context=_save, lib=_LIBRARY)
