"""The native kernel of clustered attention, loaded by ctypes from the package folder."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiled import load

_LEVELS = ("plain C++", "AVX2", "AVX-512")
_JOBS = {"attend": 0, "lloyd": 1, "hashes": 2, "means": 3, "metric": 4}
_Number, _Address = ctypes.c_int64, ctypes.c_void_p


class _Rows(ctypes.Structure):
    _fields_ = (("at", _Address), ("batch", _Number), ("head", _Number), ("time", _Number))

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        """Return a (batch, heads, length, size) tensor whose last dimension is contiguous."""
        return cls(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, _Number) for name in (
            "threads", "batch", "heads", "length", "keys", "dim", "values", "clusters", "iterations", "sphere",
            "key",
        )),
        ("scale", ctypes.c_float),
        ("q", _Rows), ("k", _Rows), ("v", _Rows),
        *((name, _Address) for name in (
            "used", "topk", "mask", "query_mask", "centres", "groups", "out", "lse", "metric", "planes", "thresholds",
            "starts", "first", "scratch",
        )),
    )  # fmt: skip
    held: tuple[Any, ...]
    """What must live as long as the call."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Load the kernel once.

    Returns:
        The library, or None where it was not compiled (said once in the log).
    """
    loaded = load(Path(__file__).parent, "eke_clusters", what="Clusters of queries")
    if loaded is not None:
        loaded.eke_clusters.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Call))
    return loaded


@functools.cache
def level() -> int:
    """Return the best instruction set of this machine: 2 AVX-512, 1 AVX2, 0 plain C++, -1 without the library."""
    loaded = library()
    return -1 if loaded is None else int(loaded.eke_clustered_level())


def available() -> bool:
    """Return whether the compiled kernel can be used."""
    return level() >= 0


def describe() -> str:
    """Return the kernel in use, in words."""
    return _LEVELS[level()] if available() else "none (torch's own operations)"


def serves(*tensors: Tensor) -> bool:
    """Return whether the kernel computes on these tensors: float32 on the CPU."""
    return all(x.is_cpu and x.dtype == torch.float32 for x in tensors) and available()


def attend(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    groups: Tensor,
    *,
    topk: Sequence[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
    instructions: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; see `gathered.attend`.

    Args:
        inputs: q, k, v and centres, (batch, heads, ..., size), float32.
        groups: (batch, heads, length) of int64, below the number of centres.
        topk: For each head.
        mask: Which keys are real, (batch, keys), or None.
        scale: Of the logits.
        key: Whether the rest is one key.
        instructions: Level of instructions, at most `level()`; None for the best.

    Returns:
        Outputs (batch, heads, length, values), whose memory goes by length before heads; logarithms of sums.

    Raises:
        ValueError: if the tensors do not fit: the kernel would read past their ends.
        MemoryError: if there is no memory for scratch space.
    """  # noqa: DOC502
    q, k, v = (_last(x) for x in inputs[:3])
    centres = inputs[3].contiguous()
    batch, heads, length, dim = q.shape
    shapes = k.shape == (batch, heads, k.shape[2], dim), v.shape[:3] == k.shape[:3], groups.shape == q.shape[:3]
    if not all(shapes) or centres.shape[:2] != q.shape[:2] or centres.shape[3] != dim or len(topk) != heads:
        raise ValueError(f"The kernel takes tensors of one attention, got {[tuple(x.shape) for x in inputs]}.")
    out, lse = q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(batch, heads, length)
    groups = groups.contiguous()
    if groups.numel() and not -1 <= int(groups.min()) <= int(groups.max()) < centres.shape[2]:
        raise ValueError(f"groups must lie in -1 to {centres.shape[2] - 1}, got {int(groups.min())} to "
                         f"{int(groups.max())}.")  # fmt: skip
    call = _call(q, heads, [centres.shape[2]] * heads, mask=mask)
    call.keys, call.values, call.clusters, call.scale = k.shape[2], v.shape[3], centres.shape[2], scale
    call.key = int(key)
    call.k, call.v, call.centres, call.groups = _Rows.of(k), _Rows.of(v), centres.data_ptr(), groups.data_ptr()
    tops = _numbers(topk)
    call.topk, call.out, call.lse = ctypes.addressof(tops), out.data_ptr(), lse.data_ptr()
    _run(call, "attend", instructions)
    return out.transpose(1, 2), lse


def lloyd(
    points: Tensor,
    centres: Tensor,
    real: Tensor | None,
    *,
    clusters: Sequence[int],
    iterations: int,
    sphere: bool,
    metric: Tensor | None,
    instructions: int | None = None,
) -> Tensor:
    """Group points; see `lloyd.assign`.

    Args:
        points: (batch, heads, length, D), float32.
        centres: Where to start, (batch, heads, largest of clusters, D).
        real: (batch, length), or None.
        clusters: For each head.
        iterations: Times that points are assigned.
        sphere: Whether by the cosine.
        metric: (batch, heads, D, D), or None.
        instructions: See `attend`.

    Returns:
        (batch, heads, length).

    Raises:
        MemoryError: if there is no memory for scratch space.
    """  # noqa: DOC502
    points = _last(points)
    moving = centres.to(torch.float32).contiguous().clone()
    groups = torch.empty(points.shape[:3], dtype=torch.int64)
    call = _call(points, points.shape[1], clusters, query_mask=real)
    call.clusters, call.iterations, call.sphere = moving.shape[2], iterations, sphere
    call.centres, call.groups = moving.data_ptr(), groups.data_ptr()
    metric = None if metric is None else metric.contiguous()
    call.metric = None if metric is None else metric.data_ptr()
    _run(call, "lloyd", instructions)
    return groups


def hashed(
    q: Tensor,
    planes: tuple[Tensor, Tensor],
    starts: Tensor,
    real: Tensor | None,
    *,
    clusters: Sequence[int],
    iterations: int,
    instructions: int | None = None,
) -> Tensor:
    """Hash queries and group the hashes.

    Args:
        q: (batch, heads, length, D), float32.
        planes: W (bits, D) and t (bits,).
        starts: Positions of the queries to start from, (batch, heads, largest of clusters) of int64; or hashes
            to start from, as many and of uint64.
        real: (batch, length), or None.
        clusters: For each head.
        iterations: Times that hashes are assigned.
        instructions: See `attend`.

    Returns:
        (batch, heads, length).

    Raises:
        MemoryError: if there is no memory for scratch space.
    """  # noqa: DOC502
    q = _last(q)
    bits, dim = planes[0].shape
    w, t = torch.zeros(64, dim), torch.full((64,), torch.inf)
    w[:bits], t[:bits] = planes
    groups, starts = torch.empty(q.shape[:3], dtype=torch.int64), starts.contiguous()
    call = _call(q, q.shape[1], clusters, query_mask=real)
    call.clusters, call.iterations, call.groups = starts.shape[2], iterations, groups.data_ptr()
    call.planes, call.thresholds = w.data_ptr(), t.data_ptr()
    if starts.dtype == torch.uint64:
        call.starts = starts.data_ptr()
    else:
        call.first = starts.data_ptr()
    _run(call, "hashes", instructions)
    return groups


def means(q: Tensor, groups: Tensor, clusters: int, *, instructions: int | None = None) -> Tensor:
    """Return the mean of the queries of each cluster; see `gathered.means`.

    Args:
        q: (batch, heads, length, D), float32.
        groups: (batch, heads, length) of int64.
        clusters: How many.
        instructions: See `attend`.
    """
    q, groups = _last(q), groups.contiguous()
    centres = q.new_empty(q.shape[0], q.shape[1], clusters, q.shape[3])
    call = _call(q, q.shape[1], [clusters] * q.shape[1])
    call.clusters, call.centres, call.groups = clusters, centres.data_ptr(), groups.data_ptr()
    _run(call, "means", instructions)
    return centres


def metric(k: Tensor, mask: Tensor | None, *, instructions: int | None = None) -> Tensor:
    """Return the covariance of the keys, (batch, heads, D, D).

    Args:
        k: (batch, heads, keys, D), float32.
        mask: Which are real, (batch, keys), or None.
        instructions: See `attend`.
    """
    k = _last(k)
    found = k.new_empty(*k.shape[:2], k.shape[3], k.shape[3])
    call = _call(k, k.shape[1], [1] * k.shape[1], mask=mask)
    call.k, call.keys, call.metric = _Rows.of(k), k.shape[2], found.data_ptr()
    _run(call, "metric", instructions)
    return found


def _last(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension is contiguous, the same one where it is already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _call(
    q: Tensor, heads: int, clusters: Sequence[int], *, mask: Tensor | None = None, query_mask: Tensor | None = None
) -> _Call:
    call = _Call(threads=torch.get_num_threads(), batch=q.shape[0], heads=heads, length=q.shape[2], dim=q.shape[3])
    numbers, masks = _numbers(clusters), [None if x is None else x.contiguous() for x in (mask, query_mask)]
    call.q, call.used = _Rows.of(q), ctypes.addressof(numbers)
    call.mask, call.query_mask = (None if x is None else x.data_ptr() for x in masks)
    call.held = numbers, masks
    return call


def _run(call: _Call, job: str, instructions: int | None) -> None:
    loaded = library()
    assert loaded is not None  # callers ask available() first
    wanted = level() if instructions is None else instructions
    if loaded.eke_clusters(wanted, _JOBS[job], ctypes.byref(call)):
        raise MemoryError("The kernel of clustered attention found no memory for its scratch space.")
