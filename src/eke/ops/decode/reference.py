"""One step of decoding in torch's own operations: the specification of the kernel, for every type and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..linear_attention import LinearAttentionState
from ..linear_attention.features import NAMED
from ..linear_attention.operators import EPSILON
from .blocks import Activation, Block, KeyValues, Linear, Norm, Projection, Softmax

ACTIVATIONS = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
_SLOW = 16


def normed(norm: Norm | None, x: Tensor) -> Tensor:
    """Apply a norm.

    Args:
        norm: Which; None for none.
        x: (..., size).

    Returns:
        What it gives, of the same shape.
    """
    if norm is None:
        return x
    if norm.kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def step(
    x: Tensor,
    blocks: Sequence[Block],
    states: Sequence[LinearAttentionState | KeyValues],
    *,
    heads: int,
    activation: Activation,
    last: Norm | None,
    head: Projection | None,
) -> Tensor:
    """Take one position of every sample through all blocks; the states are changed in place.

    Args:
        x: (batch, width).
        blocks: Layers.
        states: What each has read so far.
        heads: Of every attention.
        activation: Of every feed-forward part.
        last: Norm behind the last block, or None.
        head: Projection behind it, or None.

    Returns:
        (batch, outputs of head), or (batch, width) without one.
    """
    for block, state in zip(blocks, states):
        y = normed(block.norm, x)
        q, k, v = functional.linear(y, *block.projections).reshape(len(x), 3, heads, -1).unbind(1)
        if isinstance(block.attention, Linear):
            assert isinstance(state, LinearAttentionState)
            found = _linear(block.attention, y, (q, k, v), state)
        else:
            assert isinstance(state, KeyValues)
            found = _softmax(block.attention, (q, k, v), state)
        x = x + functional.linear(found.flatten(1), *block.out)
        inner = functional.linear(normed(block.feed.norm, x), *block.feed.up)
        x = x + functional.linear(ACTIVATIONS[activation](inner), *block.feed.down)
    x = normed(last, x)
    return x if head is None else functional.linear(x, *head)


def _linear(kind: Linear, y: Tensor, qkv: tuple[Tensor, Tensor, Tensor], state: LinearAttentionState) -> Tensor:
    q, k, v = (x.to(state.memory.dtype) for x in qkv)
    if kind.rate is not None:
        q, k = (functional.normalize(functional.silu(x), dim=-1) for x in (q, k))
    q, k = NAMED[kind.feature_map](q), NAMED[kind.feature_map](k)
    if kind.gate is not None:
        gates = (functional.logsigmoid(functional.linear(y, *kind.gate)) / _SLOW).exp().to(q.dtype)
        decay = gates.reshape(len(q), q.shape[1], -1)
        state.memory.mul_(decay.unsqueeze(-1))
        state.keys.mul_(decay)
    elif kind.retention is not None:
        state.memory.mul_(kind.retention[:, None, None])
        state.keys.mul_(kind.retention[:, None])
    if kind.rate is not None:
        rate = torch.sigmoid(functional.linear(y, *kind.rate)).to(q.dtype).unsqueeze(-1)
        v = rate * (v - torch.einsum("bhd,bhdm->bhm", k, state.memory))
    state.memory.add_(k.unsqueeze(-1) * v.unsqueeze(-2))
    state.keys.add_(k)
    out = torch.einsum("bhd,bhdm->bhm", q, state.memory)
    if kind.normalize:
        out = out / ((q * state.keys).sum(-1, keepdim=True) + EPSILON)
    return normed(kind.norm, out.to(y.dtype))


def _softmax(kind: Softmax, qkv: tuple[Tensor, Tensor, Tensor], state: KeyValues) -> Tensor:
    q, k, v = qkv
    at = state.filled
    state.keys[:, :, at], state.values[:, :, at] = k, v
    positions = torch.arange(at + 1, device=q.device)
    seen = torch.ones(len(q), at + 1, dtype=torch.bool, device=q.device)
    if state.starts is not None:
        seen = positions >= state.starts[:, None]
    if kind.window is not None:
        seen = seen & (positions > at - kind.window)
    keys, values = state.keys[:, :, : at + 1], state.values[:, :, : at + 1]
    out = functional.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=seen[:, None, None])
    state.filled += 1
    return out.squeeze(2)
