"""A layer of linear attention with its projections, which continues as a recurrent network.

    layer = LinearAttention(256, 8, causal=True)
    out, state = layer(x)                      # (batch, length, 256): trains in time linear in the length
    out, state = layer(token, state=state)     # (batch, 1, 256): the next position, in constant time and memory

decay="retention" shrinks the state by 1 - 2^(-5 - h) in head h; "scalar" and "vector" by learned gates sigmoid(W x) ^
(1 / 16) a head or a feature; delta=True corrects what the state holds for a key instead of adding to it. Without a
denominator each head's output is normalized.
Sources: Katharopoulos and others, 2020; Sun and others, 2023; Yang and others, 2024 and 2025.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, normalize, silu

from ..ops.linear_attention import LinearAttentionState, linear_attention
from ..ops.linear_attention.features import FeatureMap

Decay = Literal["retention", "scalar", "vector"]
_SLOW = 16
"""Root taken of gates, so that they begin near one."""


class LinearAttention(nn.Module):
    """Linear attention over (batch, length, embed_dim).

    Args:
        embed_dim: Size of inputs and outputs, a multiple of num_heads.
        num_heads: Heads.
        causal: Whether a position sees itself and the past alone; needed for states that go on.
        feature_map: "elu", "relu", "identity", or a callable or module on (..., heads, dim) such as `Hedgehog`. None:
            "elu", and "identity" with decay or delta.
        decay: None, "retention", "scalar" or "vector".
        delta: Whether to use the delta rule; queries and keys then have norm 1.
        bias: Whether the projections have biases.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: if the sizes do not fit, decay is unknown, or decay or delta come without causal.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        feature_map: str | FeatureMap | nn.Module | None = None,
        decay: Decay | None = None,
        delta: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}.")
        if decay not in {None, "retention", "scalar", "vector"}:
            raise ValueError(f"decay is None, 'retention', 'scalar' or 'vector', got {decay!r}.")
        if not causal and (decay is not None or delta):
            raise ValueError(f"decay={decay!r} and delta={delta!r} have a meaning in time alone: use causal=True.")
        self.embed_dim, self.num_heads, self.causal, self.decay, self.delta = embed_dim, num_heads, causal, decay, delta
        plain = decay is None and not delta
        self.feature_map = feature_map if feature_map is not None else "elu" if plain else "identity"
        self.projections = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        size = embed_dim // num_heads
        self.norm = None if plain else nn.RMSNorm(size, eps=1e-5, device=device, dtype=dtype)
        gates = num_heads if decay == "scalar" else embed_dim if decay == "vector" else 0
        self.gate = nn.Linear(embed_dim, gates, device=device, dtype=dtype) if gates else None
        self.rate = nn.Linear(embed_dim, num_heads, device=device, dtype=dtype) if delta else None
        self.register_buffer("retention", None)
        if decay == "retention":
            self.retention = 1 - 2.0 ** -(5 + torch.arange(num_heads, device=device, dtype=torch.float32))

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        state: LinearAttentionState | tuple[Tensor, Tensor] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LinearAttentionState]:
        """Attend.

        Args:
            x: (batch, length, embed_dim).
            context: Where keys and values come from, (batch, keys, embed_dim); None for x. Not for causal layers.
            mask: Which keys are real, (batch, keys), bool: False for padding, left or right.
            state: What an earlier call returned, to go on from there; of the same batch.
            cu_seqlens: Borders of sequences packed in one row.

        Returns:
            Outputs (batch, length, embed_dim), and the state after the last position.

        Raises:
            ValueError: if a causal layer gets a context, or shapes do not fit.
        """
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"LinearAttention takes (batch, length, {self.embed_dim}), got {tuple(x.shape)}.")
        if context is not None and self.causal:
            raise ValueError(
                f"A causal layer attends to its own past: it takes no context, got {tuple(context.shape)}."
            )
        if context is None:
            q, k, v = self.projections(x).chunk(3, -1)
        else:
            weight, bias = self.projections.weight, self.projections.bias
            size = self.embed_dim
            q = nn.functional.linear(x, weight[:size], None if bias is None else bias[:size])
            k, v = nn.functional.linear(context, weight[size:], None if bias is None else bias[size:]).chunk(2, -1)
        q, k, v = (self._by_head(part) for part in (q, k, v))
        if self.delta:
            q, k = normalize(silu(q), dim=-1), normalize(silu(k), dim=-1)
        out, state = linear_attention(
            q, k, v, causal=self.causal, feature_map=self.feature_map, decay=self._decay(x),
            beta=None if self.rate is None else torch.sigmoid(self.rate(x)), initial_state=state,
            cu_seqlens=cu_seqlens, mask=mask,
        )  # fmt: skip
        if self.norm is not None:
            out = self.norm(out)
        return self.out(out.flatten(-2)), state

    def _by_head(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.num_heads, -1)

    def _decay(self, x: Tensor) -> Tensor | None:
        if self.gate is None:
            retention: Tensor | None = self.retention
            return retention
        gates = (logsigmoid(self.gate(x).float()) / _SLOW).exp()
        return gates if self.decay == "scalar" else self._by_head(gates)

    def extra_repr(self) -> str:
        """Return what print(layer) shows."""
        parts = [f"{self.embed_dim}, {self.num_heads}, causal={self.causal}"]
        if not isinstance(self.feature_map, nn.Module):
            parts.append(f"feature_map={self.feature_map!r}")
        return ", ".join([*parts, f"decay={self.decay!r}, delta={self.delta}"])
