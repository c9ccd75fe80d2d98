"""Linear attention: attention without a softmax, in time linear in the length, that continues as a recurrent network.

    out, state = linear_attention(q, k, v, causal=True)                       # (batch, length, heads, dim)
    more, state = linear_attention(q2, k2, v2, causal=True, initial_state=state)   # goes on where it ended

One engine for elu + 1 and other feature maps, RetNet, Mamba-2 and gated linear attention (`decay`), DeltaNet and gated
DeltaNet (`beta`). Causal attention without decay runs on a native kernel. All forms give the same numbers up to
rounding; sums are kept in float32 (float64 for float64).
Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", 2020; see reference.py for the others.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from . import chunks, operators, reference
from .features import FeatureMap, find
from .operators import EPSILON
from .packed import check_packed, groups

__all__ = ["LinearAttentionState", "linear_attention"]

_CHUNK = {"dense": 64, "vector": 16}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Form = Literal["auto", "parallel", "chunk", "recurrent"]


class LinearAttentionState(NamedTuple):
    """A sequence so far: S (batch, heads, D, M) and the sum of keys z (batch, heads, D); float32 or float64."""

    memory: Tensor
    keys: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    feature_map: str | FeatureMap | None = "elu",
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: LinearAttentionState | tuple[Tensor, Tensor] | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    normalize: bool | None = None,
    form: Form = "auto",
    chunk: int | None = None,
) -> tuple[Tensor, LinearAttentionState]:
    """Attend with f(q) . f(k) in the place of the softmax.

    Args:
        q: Queries, (batch, length, heads, dim).
        k: Keys, (batch, keys, heads, dim); as many as queries if causal.
        v: Values, (batch, keys, heads, values).
        causal: Whether position i sees positions up to i alone.
        feature_map: f: "elu" (elu + 1), "relu", "identity" or None, or any callable on (..., dim).
        decay: Factors in (0, 1] by which the state shrinks before a position is added: (heads,), (batch, length,
            heads) or, a factor for each feature of the keys, (batch, length, heads, features).
        beta: Rates in [0, 1] of the delta rule, (batch, length, heads): the state forgets what it holds for a key
            before it takes the new value. Keys should have norm 1.
        initial_state: State that an earlier call returned, of the same batch (of the same sequences when packed).
        cu_seqlens: Borders 0, ..., length of sequences packed in one row (batch 1).
        mask: Which keys are real, (batch, keys), bool; the others are as if they were not there.
        normalize: Whether to divide by f(q) . sum of f(k), plus 1e-6. None: without decay and beta.
        form: "chunk"; "parallel", all pairs of positions at once; "recurrent", one position at a time; "auto" chooses
            by the length. They agree up to rounding.
        chunk: Positions of a chunk; None for 64 (16 where features decay one by one).

    Returns:
        Outputs (batch, length, heads, values) of the type of v, and the state after the last position: S and the sum
        of keys. Differentiable in all tensors; twice in float64 up to 1 024 positions.

    Raises:
        ValueError: if shapes, types or borders do not fit, decay or beta come without causal, or beta is normalized.
    """
    normalize = decay is None and beta is None if normalize is None else normalize
    _check(q, k, v, causal=causal, decay=decay, beta=beta, mask=mask)
    if normalize and beta is not None:
        raise ValueError(
            f"The delta rule has no denominator: use normalize=False (or None) with beta, got {normalize}."
        )
    if form not in {"auto", "parallel", "chunk", "recurrent"}:
        raise ValueError(f"form is 'auto', 'parallel', 'chunk' or 'recurrent', got {form!r}.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is a positive number of positions, got {chunk!r}.")
    f = find(feature_map)
    exact = torch.float64 if v.dtype == torch.float64 else torch.float32
    plain = causal and decay is None and beta is None and cu_seqlens is None and form == "auto" and chunk is None
    fused = plain and operators.supports(v.device, exact)
    inside = fused and feature_map == "elu" and mask is None  # the kernel applies the map
    if not inside:
        q, k = f(q), f(k)
        if normalize:
            _warn_of_negative(k)
    log_decay = None if decay is None else _log(decay, k, exact)
    if mask is not None:
        k = k * mask[..., None, None]
        log_decay = None if log_decay is None else log_decay * mask[..., None, None]
        beta = None if beta is None else beta * mask[..., None]
    state = _state(initial_state, _sequences(cu_seqlens, k), k, v, exact)
    if fused:
        tensors = (q.to(exact), k.to(exact), v.to(exact), *state)
        out, *last = operators.attend(tensors, feature_map="elu" if inside else "identity", normalize=normalize)
        return out.to(v.dtype), LinearAttentionState(*last)
    parts = tuple(None if x is None else x.to(exact).transpose(1, 2) for x in (q, k, v, log_decay, beta))
    if not causal:
        if cu_seqlens is not None:
            raise ValueError("Packed sequences (cu_seqlens) are for causal=True; use mask= with padded ones.")
        top, bottom, state = _whole(parts, state)
    elif cu_seqlens is not None:
        top, bottom, state = _packed(parts, state, cu_seqlens, form=form, chunk=chunk)
    else:
        top, bottom, state = _forms(parts, state, form=form, chunk=chunk)
    out = top / (bottom.unsqueeze(-1) + EPSILON) if normalize else top
    return out.transpose(1, 2).to(v.dtype), state


def _warn_of_negative(k: Tensor) -> None:
    if torch.compiler.is_compiling() or not k.numel() or not bool(k.detach().amin() < 0):
        return
    warnings.warn(
        "The feature map gave negative values: denominators may vanish. Use a positive map such as 'elu', or "
        "normalize=False.",
        stacklevel=3,
    )


def _check(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, decay: Tensor | None, beta: Tensor | None, mask: Tensor | None
) -> None:
    """Refuse what does not fit.

    Raises:
        ValueError: naming what was given.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4) or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"linear_attention needs q, k, v of shape (batch, length, heads, dim), got {shapes}.")
    if q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k need the same heads and dim, got {shapes}.")
    if causal and q.shape[1] != k.shape[1]:
        raise ValueError(f"Causal attention needs as many keys as queries, got {shapes}.")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or v.dtype not in _FLOATS:
        raise ValueError(f"q, k and v need one floating-point type, got {q.dtype}, {k.dtype} and {v.dtype}.")
    if len({q.device, k.device, v.device}) > 1:
        raise ValueError(f"q, k and v need one device, got {q.device}, {k.device} and {v.device}.")
    if not causal and (decay is not None or beta is not None):
        raise ValueError("decay and beta have a meaning in time alone: use causal=True.")
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta must be (batch, length, heads) = {tuple(k.shape[:3])}, got {tuple(beta.shape)}.")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != k.shape[:2]):
        raise ValueError(
            f"mask says which keys are real: bool of shape (batch, keys) = {tuple(k.shape[:2])}, got {mask.dtype} of "
            f"{tuple(mask.shape)}. Other masks (pairs of positions) do not exist for linear attention."
        )


def _log(decay: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    """Return log decay as (batch, length, heads, 1 or features).

    Raises:
        ValueError: if its shape does not fit or a factor is not in (0, 1].
    """
    batch, length, heads, features = k.shape
    if decay.shape == (heads,):
        decay = decay.expand(batch, length, heads)
    if decay.shape == (batch, length, heads):
        decay = decay.unsqueeze(-1)
    if decay.shape[:3] != (batch, length, heads) or decay.ndim != 4 or decay.shape[3] not in {1, features}:
        raise ValueError(
            f"decay must be (heads,), (batch, length, heads) or (batch, length, heads, features) for {heads} heads, "
            f"batch {batch}, length {length} and {features} features, got {tuple(decay.shape)}."
        )
    if not torch.compiler.is_compiling() and decay.numel():
        low, high = (float(x) for x in decay.detach().aminmax())
        if not (low > 0 and high <= 1):
            raise ValueError(f"decay must lie in (0, 1], got values from {low} to {high}.")
    return decay.to(dtype).log()


def _sequences(cu_seqlens: Tensor | None, k: Tensor) -> int:
    return k.shape[0] if cu_seqlens is None else len(check_packed(cu_seqlens, k.shape[0], k.shape[1])) - 1


def _state(
    given: LinearAttentionState | tuple[Tensor, Tensor] | None, sequences: int, k: Tensor, v: Tensor, dtype: torch.dtype
) -> LinearAttentionState:
    """Return a state to start with.

    Raises:
        ValueError: if a given one is of another batch, size or type.
    """
    shape = (sequences, k.shape[2], k.shape[3], v.shape[3])
    if given is None:
        zeros = torch.zeros(shape, dtype=dtype, device=v.device)
        return LinearAttentionState(zeros, zeros.new_zeros(shape[:3]))
    memory, keys = given
    if memory.shape != shape or keys.shape != shape[:3]:
        raise ValueError(
            f"initial_state must be S {shape} and z {shape[:3]} (batch, heads, features[, values]), got "
            f"{tuple(memory.shape)} and {tuple(keys.shape)}: the batch may not change while a sequence goes on."
        )
    if memory.dtype != dtype or keys.dtype != dtype:
        raise ValueError(
            f"initial_state must be {dtype}, got {memory.dtype} and {keys.dtype}: sums over many positions need it."
        )
    return LinearAttentionState(memory, keys)


def _whole(parts: chunks.Parts, state: LinearAttentionState) -> tuple[Tensor, Tensor, LinearAttentionState]:
    q, k, v = parts[:3]
    assert q is not None
    assert k is not None
    assert v is not None
    memory, keys = state.memory + k.mT @ v, state.keys + k.sum(2)
    return q @ memory, (q @ keys.unsqueeze(-1)).squeeze(-1), LinearAttentionState(memory, keys)


def _forms(
    parts: chunks.Parts, state: LinearAttentionState, *, form: Form, chunk: int | None
) -> tuple[Tensor, Tensor, LinearAttentionState]:
    q, k, v, log_decay, beta = parts
    assert q is not None
    assert k is not None
    assert v is not None
    length = q.shape[2]
    if form == "recurrent" or (form == "auto" and length == 1):
        top, bottom, *last = reference.recurrent((q, k, v), log_decay, beta, *state)
        return top, bottom, LinearAttentionState(*last)
    if form == "parallel":
        top, bottom, *last = chunks.segment(parts, *state, chunk=max(1, length))
        return top, bottom, LinearAttentionState(*last)
    vector = log_decay is not None and log_decay.shape[-1] > 1
    size = chunk or min(_CHUNK["vector" if vector else "dense"], max(1, length))
    top, bottom, *last = chunks.chunked(parts, *state, chunk=size)
    return top, bottom, LinearAttentionState(*last)


def _packed(
    parts: chunks.Parts, state: LinearAttentionState, cu_seqlens: Tensor, *, form: Form, chunk: int | None
) -> tuple[Tensor, Tensor, LinearAttentionState]:
    """Return what every sequence gives by itself."""
    v = parts[2]
    assert v is not None
    borders = check_packed(cu_seqlens, 1, v.shape[2])
    order: list[int] = []
    tops, bottoms, places, memories, keys = [], [], [], [], []
    for numbers, positions, real in groups(borders):
        index, kept = positions.to(v.device), real.to(v.device)
        some: list[Tensor | None] = []
        for number, part in enumerate(parts):
            if part is None:
                some.append(None)
                continue
            picked = part[0][:, index].movedim(0, 1)  # (sequences, heads, longest, ...)
            # Beyond the end of a sequence keys are zero, nothing decays and nothing is learned.
            still = kept[:, None, :] if picked.ndim == 3 else kept[:, None, :, None]
            some.append(picked * still if number in {1, 3, 4} else picked)
        here = LinearAttentionState(state.memory[numbers], state.keys[numbers])
        top, bottom, last = _forms(tuple(some), here, form=form, chunk=chunk)
        tops.append(top.transpose(1, 2)[kept])
        bottoms.append(bottom.transpose(1, 2)[kept])
        places.append(index[kept])
        memories.append(last.memory)
        keys.append(last.keys)
        order += numbers
    back = torch.argsort(torch.cat(places))
    sequences = torch.argsort(torch.tensor(order, device=v.device))
    top, bottom = torch.cat(tops)[back].transpose(0, 1)[None], torch.cat(bottoms)[back].transpose(0, 1)[None]
    return top, bottom, LinearAttentionState(torch.cat(memories)[sequences], torch.cat(keys)[sequences])
