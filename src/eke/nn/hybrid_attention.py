"""Attention that is a softmax among near positions and linear among far ones, with one denominator for both.

For query i, near keys N(i) = {j : |i - j| < window} and far keys F(i), each within what the query may see:

    y_i = [sum_N e^(s_ij - m_i) v_j + b sum_F f(q_i) . g(k_j) v_j] / [the same without v_j, + 1e-6]

with s_ij = scale q_i . k_j, m_i the largest s_ij in N(i), b a learned number a head, f and g feature maps. With
window = 0 all keys are far and b = 1. Where the window holds all positions it is softmax attention itself. Causal
attention goes on from a state: S, z of the far keys and the last `window` keys and values.
Sources: Zhang and others, "LoLCATs: on low-rank linearizing of large language models", 2024, for the shared
denominator [recalled]; Arora and others, "Simple linear attention language models", 2024, for the window.
Cost: O(L (D F + window D)) time for F features, O(L (D + F + window)) memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import suggest
from ..ops.linear_attention import linear_attention
from ..ops.linear_attention.features import elu
from .feature_maps import FAVOR, T2R, Hedgehog

EPSILON = 1e-6
"""Added to every denominator."""

MapName = Literal["hedgehog", "t2r", "favor", "elu", "relu"]
MapRule = Callable[[int, int], nn.Module]
"""`rule(heads, dim)`: a feature map on (..., heads, dim)."""


class _Elu(nn.Module):
    """elu + 1, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the same shape."""
        return elu(x)


_MAPS: dict[str, MapRule] = {
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "favor": lambda heads, dim: FAVOR(dim),
    "elu": lambda heads, dim: _Elu(),
    "relu": lambda heads, dim: nn.ReLU(),
}


class HybridState(NamedTuple):
    """A sequence so far: far keys as S (batch, heads, F, M) and z (batch, heads, F), and the last `window` positions:
    keys and values (batch, heads, window, ...) and which of them are real (batch, window).
    """  # noqa: D205

    memory: Tensor
    keys: Tensor
    near_keys: Tensor
    near_values: Tensor
    real: Tensor

    def reordered(self, index: Tensor) -> HybridState:
        """Return the state of some sequences of the batch, in another order or several times."""
        return HybridState(*(part.index_select(0, index.to(part.device)) for part in self))


class HybridAttention(nn.Module):
    """Softmax attention within a window and linear attention beyond it, between given queries, keys and values.

    Args:
        heads: Heads of queries, keys and values.
        dim: Size of queries and keys a head.
        window: Positions on either side, itself included, that a query sees through the softmax; 0 for none.
        feature_map: "hedgehog", "t2r", "favor", "elu", "relu" or `rule(heads, dim)` that makes a module; queries and
            keys get one each, FAVOR's are the same.

    Raises:
        ValueError: if window is negative or the name is unknown.
    """

    def __init__(self, heads: int, dim: int, *, window: int = 0, feature_map: MapName | MapRule = "hedgehog") -> None:
        super().__init__()
        if window < 0:
            raise ValueError(f"window is a number of positions, 0 for linear attention alone, got {window!r}.")
        if isinstance(feature_map, str) and feature_map not in _MAPS:
            raise ValueError(
                f"feature_map is a name or a callable (heads, dim) -> module, got {feature_map!r}."
                f"{suggest(feature_map, _MAPS)}"
            )
        rule = _MAPS[feature_map] if isinstance(feature_map, str) else feature_map
        self.heads, self.dim, self.window = heads, dim, window
        self.query_map = rule(heads, dim)
        # Products of two different sets of random features estimate nothing.
        self.key_map = self.query_map if isinstance(self.query_map, FAVOR) else rule(heads, dim)
        self.balance = nn.Parameter(self._even()) if window else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        real: Tensor | None = None,
        scale: float | None = None,
        state: HybridState | None = None,
    ) -> tuple[Tensor, HybridState | None]:
        """Attend.

        Args:
            q: (batch, heads, length, dim).
            k: (batch, heads, keys, dim). Causal with more keys than queries: the queries are the last positions.
            v: (batch, heads, keys, values).
            causal: Whether a position sees itself and the past alone.
            real: Which keys are real, (batch, keys), bool; None for all.
            scale: Of q . k in the softmax; None for 1 / sqrt(dim).
            state: What an earlier call returned, to go on from; causal, with as many keys as queries.

        Returns:
            (batch, heads, length, values) in the type of v, and the state after the last position (None if not causal).

        Raises:
            ValueError: if shapes do not fit, or a state comes without causal.
        """  # noqa: DOC502
        self._check(q, k, v, causal=causal, real=real, state=state)
        exact = torch.float64 if v.dtype == torch.float64 else torch.float32
        scale = self.dim**-0.5 if scale is None else scale
        dtype, (q, k, v) = v.dtype, (x.to(exact) for x in (q, k, v))
        if not causal:
            return self._whole((q, k, v), real, scale).to(dtype), None
        before = k.shape[2] - q.shape[2]
        if before:
            # Positions that were read earlier and whose state nobody kept.
            past = None if real is None else real[:, :before]
            state = self._ahead(k[:, :, :before], v[:, :, :before], past, scale, state)
            k, v, real = k[:, :, before:], v[:, :, before:], None if real is None else real[:, before:]
        out, state = self._causal((q, k, v), real, scale, state)
        return out.to(dtype), state

    def widen_(self, window: int) -> int:
        """Set the window in place, keeping what was learned.

        Args:
            window: Positions on either side.

        Returns:
            The window.
        """
        self.window = window
        if window and self.balance is None:
            like = next(self.parameters(), torch.empty(0))
            self.balance = nn.Parameter(self._even().to(like.device))
        return window

    @torch.no_grad()
    def _even(self) -> Tensor:
        """Return balances with which far keys weigh about as much as near ones: log 1 / mean f(q) . g(k)."""
        like = next(self.parameters(), torch.empty(0))
        q, k = torch.randn(2, 64, self.heads, self.dim, device=like.device, dtype=like.dtype)
        products = torch.einsum("qhf,khf->hqk", self.query_map(q), self.key_map(k))
        return -products.mean((1, 2)).clamp_min(EPSILON).log().float()

    def weights(
        self, q: Tensor, k: Tensor, *, causal: bool, real: Tensor | None = None, scale: float | None = None
    ) -> Tensor:
        """Return the weights (batch, heads, length, keys) that `forward` sums values with: rows sum to one.

        All pairs of positions are met: for training by weights, reports and tests.

        Args:
            q: (batch, heads, length, dim).
            k: (batch, heads, keys, dim).
            causal: As for `forward`.
            real: As for `forward`.
            scale: As for `forward`.
        """
        scale = self.dim**-0.5 if scale is None else scale
        far = self._features(self.query_map, q, scale).transpose(1, 2) @ self._features(self.key_map, k, scale).permute(
            0, 2, 3, 1
        )
        i = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2] if causal else 0)
        j = torch.arange(k.shape[2], device=q.device)
        seen = j <= i if causal else torch.ones_like(j <= i)
        seen = seen.expand(q.shape[0], 1, *seen.shape) if real is None else seen & real[:, None, None]
        near = ((i - j).abs() < self.window) & seen
        found = self._gain() * far * (seen & ~near)
        if self.window:
            found = found + _exponentials(scale * (q @ k.mT), near)[0]
        return found / (found.sum(-1, keepdim=True) + EPSILON)

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        return f"{self.heads}, {self.dim}, window={self.window}"

    def _check(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, real: Tensor | None, state: HybridState | None
    ) -> None:
        """Refuse what does not fit.

        Raises:
            ValueError: naming what was given.
        """
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        wanted = (q.shape[0], self.heads)
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or any(x.shape[:2] != wanted for x in (q, k, v)):
            raise ValueError(f"HybridAttention takes (batch, {self.heads} heads, length, dim), got {shapes}.")
        if q.shape[3] != self.dim or k.shape[3] != self.dim or k.shape[2] != v.shape[2]:
            raise ValueError(f"Queries and keys need dim {self.dim} and keys as many values, got {shapes}.")
        if causal and k.shape[2] < q.shape[2]:
            raise ValueError(f"Causal attention needs at least as many keys as queries, got {shapes}.")
        if not causal and self.window and k.shape[2] != q.shape[2]:
            raise ValueError(
                f"A window of {self.window} positions needs keys at the positions of the queries, got {shapes}: use "
                "window=0 for attention to another sequence."
            )
        if real is not None and (real.dtype != torch.bool or real.shape != (k.shape[0], k.shape[2])):
            raise ValueError(
                f"real must be bool of shape (batch, keys) = {(k.shape[0], k.shape[2])}, got {real.dtype} of "
                f"{tuple(real.shape)}."
            )
        if state is not None and (not causal or state.memory.shape[0] != q.shape[0]):
            raise ValueError(
                f"A state of batch {state.memory.shape[0]} goes on with causal=True and the same batch, got causal="
                f"{causal} and batch {q.shape[0]}."
            )

    def _features(self, f: nn.Module, x: Tensor, scale: float) -> Tensor:
        """Return the features of (batch, heads, length, dim) as (batch, length, heads, F)."""
        factor = (scale * math.sqrt(self.dim)) ** 0.5
        # A model may have been moved to another type since.
        held = (part.dtype for part in itertools.chain(f.parameters(), f.buffers()) if part.is_floating_point())
        features: Tensor = f((x if abs(factor - 1) < 1e-6 else x * factor).to(next(held, x.dtype)).transpose(1, 2))
        return features.to(x.dtype)

    def _gain(self) -> Tensor | float:
        return 1.0 if self.balance is None else self.balance.exp()[:, None, None]

    def _begin(self, k: Tensor, v: Tensor, scale: float) -> HybridState:
        """Return the state of nothing."""
        batch, heads = k.shape[:2]
        features = self._features(self.key_map, k[:1, :, :1], scale).shape[-1]
        return HybridState(
            k.new_zeros(batch, heads, features, v.shape[3]), k.new_zeros(batch, heads, features),
            k.new_zeros(batch, heads, self.window, self.dim), v.new_zeros(batch, heads, self.window, v.shape[3]),
            torch.zeros(batch, self.window, dtype=torch.bool, device=k.device),
        )  # fmt: skip

    def _ahead(self, k: Tensor, v: Tensor, real: Tensor | None, scale: float, state: HybridState | None) -> HybridState:
        """Return the state after positions of which nothing is asked."""
        old = self._begin(k, v, scale) if state is None else state
        keys, values = torch.cat([old.near_keys, k], 2), torch.cat([old.near_values, v], 2)
        kept = torch.cat([old.real, old.real.new_ones(k.shape[0], k.shape[2]) if real is None else real], 1)
        n = k.shape[2]
        features = self._features(self.key_map, keys[:, :, :n], scale) * kept[:, :n, None, None]
        memory = old.memory + torch.einsum("blhf,bhlm->bhfm", features, values[:, :, :n])
        return HybridState(memory, old.keys + features.sum(1), keys[:, :, n:], values[:, :, n:], kept[:, n:])

    def _causal(
        self, qkv: tuple[Tensor, Tensor, Tensor], real: Tensor | None, scale: float, state: HybridState | None
    ) -> tuple[Tensor, HybridState]:
        """Attend to the past.

        With the last `window` positions in front, query t sees positions t + 1 ... t + window as near and 0 ... t as
        far: far keys and queries stand side by side.

        Returns:
            Outputs and the state after.
        """
        q, k, v = qkv
        old = self._begin(k, v, scale) if state is None else state
        n, w = q.shape[2], self.window
        keys, values = (torch.cat(pair, 2) if w else pair[1] for pair in ((old.near_keys, k), (old.near_values, v)))
        kept = None
        if real is not None or w:
            kept = torch.cat([old.real, old.real.new_ones(k.shape[0], n) if real is None else real], 1)
        fq, fk = self._features(self.query_map, q, scale), self._features(self.key_map, keys[:, :, :n], scale)
        if kept is not None:
            fk = fk * kept[:, :n, None, None]
        if n == 1:
            memory = old.memory + fk[:, 0, :, :, None] * values[:, :, :1]
            sums = old.keys + fk[:, 0]
            top, bottom = fq.transpose(1, 2) @ memory, (fq[:, 0] * sums).sum(-1)[..., None]
        else:
            top, (memory, sums) = linear_attention(
                fq, fk, values[:, :, :n].transpose(1, 2), causal=True, feature_map=None, normalize=False,
                initial_state=(old.memory, old.keys),
            )  # fmt: skip
            top = top.transpose(1, 2)
            bottom = (fq * (old.keys[:, None] + fk.cumsum(1))).sum(-1).transpose(1, 2)
        state = HybridState(memory, sums, keys[:, :, n:], values[:, :, n:], old.real if kept is None else kept[:, n:])
        if not w:
            return top / (bottom[..., None] + EPSILON), state
        assert kept is not None
        if n == 1:
            seen = kept[:, None, None, 1:]
            e, total = _exponentials(scale * (q @ keys[:, :, 1:].mT), seen)
            near = e @ values[:, :, 1:]
        else:
            near, total = self._band((q, keys, values), kept, scale)
        gain = self._gain()
        return (near + gain * top) / (total[..., None] + gain * bottom[..., None] + EPSILON), state

    def _band(self, qkv: tuple[Tensor, Tensor, Tensor], kept: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return sum of e^(s - m) v and of e^(s - m) over t + 1 ... t + window of the keys, for queries t."""
        (q, k, v), w = qkv, self.window
        n = q.shape[2]
        blocks = -(-n // w)
        rest = blocks * w - n
        q = _blocks(q, blocks, w)
        k, v = (F.pad(x, (0, 0, 0, rest)).unfold(2, 2 * w, w).mT for x in (k, v))  # (batch, heads, blocks, 2 w, ...)
        kept = F.pad(kept, (0, rest)).unfold(1, 2 * w, w)[:, None, :, None]
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(2 * w, device=q.device)
        e, total = _exponentials(scale * (q @ k.mT), (i < j) & (j <= i + w) & kept)
        return (e @ v).flatten(2, 3)[:, :, :n], total.flatten(2, 3)[:, :, :n]

    def _whole(self, qkv: tuple[Tensor, Tensor, Tensor], real: Tensor | None, scale: float) -> Tensor:
        """Return attention to both sides: all keys linearly, less what the window's gave so, plus their softmax."""
        q, k, v = qkv
        fq, fk = (
            self._features(self.query_map, q, scale).transpose(1, 2),
            self._features(self.key_map, k, scale).transpose(1, 2),
        )
        if real is not None:
            fk = fk * real[:, None, :, None]
        top, bottom = fq @ (fk.mT @ v), fq @ fk.sum(2)[..., None]
        if not self.window:
            return top / (bottom + EPSILON)
        w, n = self.window, q.shape[2]
        blocks = -(-n // w)
        rest = blocks * w - n
        q, fq = _blocks(q, blocks, w), _blocks(fq, blocks, w)
        k, fk, v = (F.pad(x, (0, 0, w, w + rest)).unfold(2, 3 * w, w).mT for x in (k, fk, v))
        inside = q.new_ones(q.shape[0], n, dtype=torch.bool) if real is None else real
        inside = F.pad(inside, (w, w + rest)).unfold(1, 3 * w, w)[:, None, :, None]
        i, j = torch.arange(w, device=q.device)[:, None], torch.arange(3 * w, device=q.device)
        near = ((i + w - j).abs() < w) & inside
        e, total = _exponentials(scale * (q @ k.mT), near)
        instead = (fq @ fk.mT) * near
        gain = self._gain()
        blocked = gain if isinstance(gain, float) else gain[..., None]
        mixed = e - blocked * instead
        difference = mixed @ v, (total - (blocked * instead).sum(-1))[..., None]
        near_top, near_bottom = (x.flatten(2, 3)[:, :, :n] for x in difference)
        return (near_top + gain * top) / (near_bottom + gain * bottom + EPSILON)


def _blocks(x: Tensor, blocks: int, size: int) -> Tensor:
    """Return (batch, heads, length, dim) as (batch, heads, blocks, size, dim), filled up with zeros."""
    return F.pad(x, (0, 0, 0, blocks * size - x.shape[2])).reshape(*x.shape[:2], blocks, size, x.shape[3])


def _exponentials(s: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Return e^(s - largest seen s) where seen, else 0, and their sums over keys."""
    s = s.masked_fill(~seen, -torch.inf)
    most = s.amax(-1, keepdim=True)
    e = torch.exp(s - most.masked_fill(most == -torch.inf, 0))
    return e, e.sum(-1)
