"""The recurrence in chunks: matrix products inside of a chunk, one step of the state from chunk to chunk.

With G the running sum of log a inside of a chunk, A_ij = sum_d q_id k_jd exp(G_i - G_j)_d for j <= i, S the state
before the chunk:
    O = A U + (q exp(G)) S,   S' = exp(G_end) S + (k exp(G_end - G))^T U
    U = V,  or with the delta rule  U = T (b V) - T (b k exp(G)) S  with T = (I + strictly lower(b k k^T exp))^-1
Exponents are never above zero: nothing overflows. Derivatives recompute a segment of chunks from the state before it:
memory O(length (D + M)) and one state a segment, whatever the length. Cost: length * chunk * (D + M) + length * D * M.
Sources: Hua and others, 2022; Yang and others, "Parallelizing linear transformers with the delta rule", 2024.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference

Parts = tuple[Tensor | None, ...]
"""q, k, v, log decay or None, beta or None: (batch, heads, length, ...)."""
_SEGMENT = 1024
"""Positions whose products are recomputed together for derivatives."""


def _pairs(q: Tensor, k: Tensor, running: Tensor | None) -> Tensor:
    """Return sum_d q_id k_jd exp(G_i - G_j)_d for all i and j of a chunk; meaningless above the diagonal."""
    if running is None:
        return q @ k.mT
    if running.shape[-1] == 1:
        return (q @ k.mT) * (running - running.mT).clamp_(max=0).exp()
    between = (running.unsqueeze(-2) - running.unsqueeze(-3)).clamp_(max=0).exp()
    return torch.einsum("...id,...jd,...ijd->...ij", q, k, between)


def _split(x: Tensor, chunk: int) -> Tensor:
    """Return (batch, heads, chunks, chunk, ...), padded with zeros."""
    missing = -x.shape[2] % chunk
    if missing:
        x = torch.nn.functional.pad(x, (*(0, 0) * (x.ndim - 3), 0, missing))
    return x.reshape(*x.shape[:2], -1, chunk, *x.shape[3:])


def _delta(k: Tensor, v: Tensor, running: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return T (b V) and T (b k exp(G))."""
    size = k.shape[-2]
    weighted = beta.unsqueeze(-1) * k
    lower = _pairs(weighted, k, running).tril(-1)
    whole = lower + torch.eye(size, dtype=k.dtype, device=k.device)
    right = torch.cat([beta.unsqueeze(-1) * v, weighted if running is None else weighted * running.exp()], -1)
    solved = torch.linalg.solve_triangular(whole, right, upper=False, unitriangular=True)
    return solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]


def _scan(added: Tensor, end: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk, (batch, heads, chunks, ...), and after the last one."""
    if end is None:
        total = torch.cat([state.unsqueeze(2), added], 2).cumsum(2)
        # A copy: a view would keep all states.
        return total[:, :, :-1], total[:, :, -1].clone()
    before = []
    for t in range(added.shape[2]):
        before.append(state)
        state = end[:, :, t] * state + added[:, :, t]
    return torch.stack(before, 2), state


def segment(parts: Parts, state: Tensor, sums: Tensor, *, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go through some chunks at once.

    Args:
        parts: See `Parts`.
        state: S before, (batch, heads, D, M).
        sums: z before, (batch, heads, D).
        chunk: Positions of a chunk.

    Returns:
        As `reference.recurrent`.
    """
    length = parts[0].shape[2]  # type: ignore[union-attr]
    q, k, v, log_decay, beta = [None if part is None else _split(part, chunk) for part in parts]
    assert q is not None
    assert k is not None
    assert v is not None
    running = None if log_decay is None else log_decay.cumsum(-2)
    inside = _pairs(q, k, running).tril()
    end = None if running is None else running[..., -1:, :]
    ahead = k if running is None or end is None else k * (end - running).exp()
    reach = q if running is None else q * running.exp()
    factor = None if end is None else end.exp()
    if beta is None:
        before, state = _scan(ahead.mT @ v, None if factor is None else factor.mT, state)
        values = v
    else:
        fresh, known = _delta(k, v, running, beta)
        states, updates = [], []
        for t in range(q.shape[2]):
            states.append(state)
            updates.append(fresh[:, :, t] - known[:, :, t] @ state)
            kept = state if factor is None else factor[:, :, t].mT * state
            state = kept + ahead[:, :, t].mT @ updates[-1]
        before, values = torch.stack(states, 2), torch.stack(updates, 2)
    summed, sums = _scan(ahead.sum(-2), None if factor is None else factor.squeeze(-2), sums)
    top = inside @ values + reach @ before
    bottom = inside.sum(-1) + (reach @ summed.unsqueeze(-1)).squeeze(-1)
    return top.flatten(2, 3)[:, :, :length], bottom.flatten(2, 3)[:, :, :length], state, sums


class _Segments(torch.autograd.Function):
    """All segments, each recomputed for its derivatives."""

    @staticmethod
    def forward(ctx: Any, chunk: int, size: int, state: Tensor, sums: Tensor, *parts: Tensor | None) -> Any:
        """Return numerators, denominators and the last state."""
        tops, bottoms, states = [], [], [(state, sums)]
        for start in range(0, parts[0].shape[2], size):  # type: ignore[union-attr]
            some = tuple(None if p is None else p[:, :, start : start + size] for p in parts)
            top, bottom, state, sums = segment(some, state, sums, chunk=chunk)
            tops.append(top)
            bottoms.append(bottom)
            states.append((state, sums))
        ctx.chunk, ctx.size, ctx.given = chunk, size, [p is not None for p in parts]
        ctx.save_for_backward(*(p for p in parts if p is not None), *(t for pair in states[:-1] for t in pair))
        return torch.cat(tops, 2), torch.cat(bottoms, 2), state, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Return derivatives, from the last segment to the first."""
        top, bottom, last, sums = grads
        count = sum(ctx.given)
        saved = iter(ctx.saved_tensors[:count])
        parts = [next(saved) if given else None for given in ctx.given]
        states = ctx.saved_tensors[count:]
        found: list[Tensor | None] = [None if p is None else torch.empty_like(p) for p in parts]
        for index in reversed(range(len(states) // 2)):
            here = slice(index * ctx.size, (index + 1) * ctx.size)
            with torch.enable_grad():
                inputs = [None if p is None else p[:, :, here].detach().requires_grad_() for p in parts]
                before = [states[2 * index + i].detach().requires_grad_() for i in (0, 1)]
                outputs = segment(tuple(inputs), *before, chunk=ctx.chunk)
            wanted = [*(p for p in inputs if p is not None), *before]
            got = torch.autograd.grad(
                outputs, wanted, (top[:, :, here], bottom[:, :, here], last, sums), allow_unused=True
            )
            mine = iter(got)
            for whole, part in zip(found, inputs):
                if whole is not None and part is not None:
                    value = next(mine)
                    whole[:, :, here] = 0 if value is None else value
            last, sums = (next(mine) for _ in range(2))
        return None, None, last, sums, *found


def chunked(parts: Parts, state: Tensor, sums: Tensor, *, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go through a sequence in chunks.

    Args:
        parts: See `Parts`.
        state: S before, (batch, heads, D, M).
        sums: z before, (batch, heads, D).
        chunk: Positions of a chunk.

    Returns:
        As `reference.recurrent`.
    """
    q, k, v = parts[:3]
    assert q is not None
    if not q.shape[2]:
        return reference.recurrent((q, k, v), None, None, state, sums)  # type: ignore[arg-type]
    size = max(1, _SEGMENT // chunk) * chunk
    if q.shape[2] <= size or torch.compiler.is_compiling():
        return segment(parts, state, sums, chunk=chunk)
    out: tuple[Tensor, Tensor, Tensor, Tensor] = _Segments.apply(chunk, size, state, sums, *parts)
    return out
