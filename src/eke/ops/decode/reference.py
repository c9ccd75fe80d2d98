"""One step of decoding in torch's own operations: the specification of the kernel, for every type and device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..linear_attention import LinearAttentionState
from ..linear_attention.features import NAMED
from ..linear_attention.operators import EPSILON
from .blocks import Activation, Block, Hybrid, KeyValues, Linear, Map, Norm, Projection, Ring, Separate, Softmax

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
    states: Sequence[LinearAttentionState | KeyValues | Ring],
    *,
    heads: int,
    activation: Activation,
    last: Norm | None,
    head: Projection | None,
    rotation: tuple[Tensor, Tensor] | None = None,
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
        rotation: Cosines and sines of the rotation of queries and keys, each (batch or 1, size), or None.

    Returns:
        (batch, outputs of head), or (batch, width) without one.
    """
    for block, state in zip(blocks, states):
        y = normed(block.norm, x)
        q, k, v = _projected(block.projections, y, heads)
        if rotation is not None:
            q, k = _rotated(q, rotation), _rotated(k, rotation)
        if isinstance(block.attention, Linear):
            assert isinstance(state, LinearAttentionState)
            found = _linear(block.attention, y, (q, k, v), state)
        elif isinstance(block.attention, Hybrid):
            assert isinstance(state, Ring)
            found = _hybrid(block.attention, (q, k, v), state)
        else:
            assert isinstance(state, KeyValues)
            found = _softmax(block.attention, (q, k, v), state)
        x = x + functional.linear(found.flatten(1), *block.out)
        y = normed(block.feed.norm, x)
        inner = functional.linear(y, *(block.feed.gate or block.feed.up))
        inner = ACTIVATIONS[activation](inner)
        if block.feed.gate is not None:
            inner = inner * functional.linear(y, *block.feed.up)
        x = x + functional.linear(inner, *block.feed.down)
    x = normed(last, x)
    return x if head is None else functional.linear(x, *head)


def _projected(parts: Projection | Separate, y: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (batch, heads, size)."""
    if isinstance(parts, Projection):
        q, k, v = functional.linear(y, *parts).reshape(len(y), 3, heads, -1).unbind(1)
        return q, k, v
    q = functional.linear(y, *parts.queries).reshape(len(y), heads, -1)
    k, v = (functional.linear(y, *part).reshape(len(y), -1, q.shape[-1]) for part in parts[1:])
    shared = heads // k.shape[1]
    return (q, k, v) if shared == 1 else (q, k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1))


def _rotated(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = (part[:, None] for part in rotation)
    first, second = x.chunk(2, -1)
    return x * cosines + torch.cat([-second, first], -1) * sines


def features(f: Map, x: Tensor) -> Tensor:
    """Apply a feature map.

    Args:
        f: Which.
        x: (batch, heads, size).

    Returns:
        (batch, heads, features).
    """
    if f.weight is None:
        return NAMED[f.name](x)
    y = torch.einsum("bhd,hdf->bhf", x, f.weight.to(x.dtype))
    if f.name == "hedgehog":
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)
    return torch.relu(y if f.bias is None else y + f.bias.to(y.dtype))


def _hybrid(kind: Hybrid, qkv: tuple[Tensor, Tensor, Tensor], state: Ring) -> Tensor:
    q, k, v = (x.to(state.memory.dtype) for x in qkv)
    at = state.slot
    fq = features(kind.query_map, q)
    if kind.window:
        leaving = features(kind.key_map, state.keys[:, :, at]) * state.real[:, None, at, None]
        value = state.values[:, :, at].clone()
        state.keys[:, :, at], state.values[:, :, at], state.real[:, at] = k, v, True
    else:
        leaving, value = features(kind.key_map, k), v
    state.memory.add_(leaving.unsqueeze(-1) * value.unsqueeze(-2))
    state.sums.add_(leaving)
    state.move()
    top, bottom = torch.einsum("bhf,bhfm->bhm", fq, state.memory), (fq * state.sums).sum(-1, keepdim=True)
    if not kind.window:
        return (top / (bottom + EPSILON)).to(qkv[0].dtype)
    assert kind.balance is not None
    s = torch.einsum("bhd,bhwd->bhw", q, state.keys) / q.shape[-1] ** 0.5
    s = s.masked_fill(~state.real[:, None], -torch.inf)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    gain = kind.balance.to(q.dtype).exp()[:, None]
    near = torch.einsum("bhw,bhwm->bhm", e, state.values)
    out = (near + gain * top) / (e.sum(-1, keepdim=True) + gain * bottom + EPSILON)
    return out.to(qkv[0].dtype)


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
