"""A pre-norm transformer block with linear or softmax attention, and all blocks of one token as a single native call.

    block = TransformerBlock(256, 8, inner=1024)                          # linear attention
    block = TransformerBlock(256, 8, inner=1024, kind="sliding_attention", window=64)
    y, state = block(x)
    step = fuse(blocks, last=norm, head=linear)                           # None if a layer is not what a step knows
    logits = step.decoder(embedded, states)                               # eke.ops.decode

Both attentions have the same parameters: queries, keys and values in one projection, and one behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..ops.decode import Block, Decoder, Feed, Hybrid, Linear, Norm, Projection, Softmax
from ..ops.decode.blocks import Activation
from ..ops.decode.reference import ACTIVATIONS
from ..ops.linear_attention import LinearAttentionState
from .fused_step import PARTS, FusedStep, described_hybrid, watched
from .linear_attention import Decay, LinearAttention
from .substitute import CHILD, converted_from

Kind = Literal["linear_attention", "full_attention", "sliding_attention"]
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class SoftmaxAttention(nn.Module):
    """Causal softmax attention over (batch, length, embed_dim), with the parameters of `LinearAttention`.

    Args:
        embed_dim: Size of inputs and outputs, a multiple of num_heads.
        num_heads: Heads.
        window: How many positions are seen, the own one included; None for all.

    Raises:
        ValueError: if the sizes do not fit.
    """

    def __init__(self, embed_dim: int, num_heads: int, *, window: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}.")
        if window is not None and window < 1:
            raise ValueError(f"window is a positive number of positions or None, got {window!r}.")
        self.num_heads, self.window = num_heads, window
        self.projections, self.out = nn.Linear(embed_dim, 3 * embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, *, mask: Tensor | None = None, keep: Keep | None = None) -> Tensor:
        """Attend.

        Args:
            x: (batch, length, embed_dim).
            mask: Which positions are real, (batch, positions), bool, the kept ones first; None for all.
            keep: Takes keys and values of these positions, returns those of all that may be seen, these last.

        Returns:
            (batch, length, embed_dim).
        """
        size = x.shape[-1] // self.num_heads
        q, k, v = self.projections(x).reshape(*x.shape[:2], 3, self.num_heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        k, v = (k, v) if keep is None else keep(k, v)
        length, total = q.shape[2], k.shape[2]
        if mask is None and self.window is None and length == total:
            out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self._joined(out)
        away = torch.arange(total - length, total, device=x.device)[:, None] - torch.arange(total, device=x.device)
        seen = away >= 0 if self.window is None else (away >= 0) & (away < self.window)
        if mask is not None:
            seen = seen & mask[:, None, -total:]
            if CHILD not in self._modules:  # a softmax needs something to see; converted attention sees padding as such
                seen = seen | (away == 0)
            seen = seen[:, None]
        return self._joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=seen))

    def _joined(self, heads: Tensor) -> Tensor:
        joined: Tensor = self.out(heads.transpose(1, 2).flatten(2))
        return joined


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + down(activation(up(norm(x)))).

    Args:
        embed_dim: Size of inputs and outputs.
        num_heads: Heads.
        inner: Size between up and down.
        kind: "linear_attention", "full_attention" or "sliding_attention".
        window: Positions that sliding attention sees.
        feature_map: Of linear attention.
        decay: Of linear attention.
        delta: Of linear attention.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        eps: Of the norms.

    Raises:
        ValueError: if kind or activation is unknown, or sliding attention comes without a window.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        inner: int,
        kind: Kind = "linear_attention",
        window: int | None = None,
        feature_map: str | None = None,
        decay: Decay | None = None,
        delta: bool = False,
        activation: Activation = "gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind is one of {', '.join(map(repr, get_args(Kind)))}, got {kind!r}.")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}.")
        if kind == "sliding_attention" and window is None:
            raise ValueError(f"Sliding attention needs a window (a number of positions), got {window!r}.")
        self.norm_attention = nn.LayerNorm(embed_dim, eps=eps)
        self.attention: LinearAttention | SoftmaxAttention
        if kind == "linear_attention":
            self.attention = LinearAttention(
                embed_dim, num_heads, causal=True, feature_map=feature_map, decay=decay, delta=delta
            )
        else:
            self.attention = SoftmaxAttention(
                embed_dim, num_heads, window=window if kind == "sliding_attention" else None
            )
        self.norm_feed = nn.LayerNorm(embed_dim, eps=eps)
        self.up, self.down = nn.Linear(embed_dim, inner), nn.Linear(inner, embed_dim)
        self.activation: Activation = activation

    def forward(
        self,
        x: Tensor,
        *,
        state: LinearAttentionState | tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        keep: Keep | None = None,
    ) -> tuple[Tensor, LinearAttentionState | None]:
        """Apply the block.

        Args:
            x: (batch, length, embed_dim).
            state: Of linear attention, to go on from.
            mask: Which positions are real, bool; those of x for linear attention, see `SoftmaxAttention` otherwise.
            keep: Of softmax attention, see there.

        Returns:
            Outputs, and the state of linear attention after them.
        """
        y = self.norm_attention(x)
        if isinstance(self.attention, LinearAttention):
            found, after = self.attention(y, state=state, mask=mask)
        else:
            found, after = self.attention(y, mask=mask, keep=keep), None
        x = x + found
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.norm_feed(x)))), after


def fuse(
    blocks: Sequence[nn.Module], *, last: nn.Module | None = None, head: nn.Module | None = None
) -> FusedStep | None:
    """Return all blocks as one step for a token, on the same parameters.

    Args:
        blocks: Of `TransformerBlock`, as they are or after `linearize`.
        last: Norm behind the last one, or None.
        head: Linear layer behind it, or None.

    Returns:
        The step, or None if a module is not of the plain kind: another class, a feature map of one's own, hooks.
        Softmax attention may have been converted by `linearize`, with any of its feature maps but FAVOR+.
    """
    ends = [module for module in (last, head) if module is not None]
    modules = [module for part in (*blocks, *ends) for module in part.modules()]
    if not blocks or not all(type(block) is TransformerBlock for block in blocks):
        return None
    if any(not _plain(module) or watched(module) for module in modules):
        return None
    parts = [block for block in blocks if isinstance(block, TransformerBlock)]
    kinds = {(block.activation, block.attention.num_heads) for block in parts}
    attentions = [_attention(block.attention) for block in parts]
    if len(kinds) > 1 or None in attentions:
        return None
    activation, heads = kinds.pop()
    decoder = Decoder(
        [_described(block, kind) for block, kind in zip(parts, attentions) if kind is not None],
        heads=heads, activation=activation,
        last=None if last is None else _norm(last), head=None if head is None else _projection(head),
    )  # fmt: skip
    return FusedStep(decoder, modules)


def _plain(module: nn.Module) -> bool:
    """Return whether a module is of a class that a step knows, or was before it was converted."""
    plain = {TransformerBlock, SoftmaxAttention, LinearAttention, nn.Linear, nn.LayerNorm, nn.RMSNorm}
    kind = type(module)
    return kind in plain or kind in PARTS or converted_from(module) is SoftmaxAttention


def _projection(module: nn.Module) -> Projection:
    assert isinstance(module, nn.Linear)
    return Projection(module.weight, module.bias)


def _norm(module: nn.Module) -> Norm:
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", module.weight, module.bias, module.eps)
    assert isinstance(module, nn.RMSNorm)
    return Norm("rms", module.weight, None, torch.finfo(torch.float32).eps if module.eps is None else module.eps)


def _attention(attention: LinearAttention | SoftmaxAttention) -> Linear | Softmax | Hybrid | None:
    """Return an attention as a step knows it, None if it does not."""
    if isinstance(attention, LinearAttention):
        if not isinstance(attention.feature_map, str):
            return None
        name: Any = attention.feature_map
        return Linear(
            name, attention.decay is None and not attention.delta, retention=attention.retention,
            gate=None if attention.gate is None else _projection(attention.gate),
            rate=None if attention.rate is None else _projection(attention.rate),
            norm=None if attention.norm is None else _norm(attention.norm),
        )  # fmt: skip
    if converted_from(attention) is None:
        return Softmax(attention.window)
    if attention.window is not None:
        return None
    return described_hybrid(attention, attention.num_heads, attention.out.in_features // attention.num_heads)


def _described(block: TransformerBlock, kind: Linear | Softmax | Hybrid) -> Block:
    attention = block.attention
    return Block(
        _norm(block.norm_attention), _projection(attention.projections), kind, _projection(attention.out),
        Feed(_norm(block.norm_feed), _projection(block.up), _projection(block.down)),
    )  # fmt: skip
