"""The operator torch.ops.eke.clustered_attention and its derivative, on the native kernel where there is one.

It carries fake implementations, derivatives (once) and FLOP formulas. Derivatives hold clusters and chosen keys fixed
and are exact otherwise, the mass of the chosen keys included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from ..calls import direct, transformed
from . import gathered, native

_LIBRARY = torch.library.Library("eke", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor centres, Tensor groups, Tensor? mask, int[] topk, float scale, "
_INPUTS += "bool key=False"
for _schema in (
    f"clustered_attention({_INPUTS}) -> (Tensor, Tensor)",
    f"clustered_attention_backward(Tensor grad, Tensor grad_lse, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def attend(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    groups: Tensor,
    *,
    topk: list[int],
    mask: Tensor | None,
    scale: float,
    key: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend; see `gathered.attend`.

    Args:
        inputs: q, k, v and centres, (batch, heads, ..., size).
        groups: (batch, heads, length).
        topk: For each head.
        mask: Which keys are real, (batch, keys), or None.
        scale: Of the logits.
        key: Whether the rest is one key.

    Returns:
        Outputs (batch, heads, length, M) and logarithms of the sums of exponentials (batch, heads, length).
    """
    if transformed():
        return gathered.attend(inputs, groups, topk=topk, mask=mask, scale=scale, key=key)
    if direct(*inputs, groups):
        return _attend(*inputs, groups, mask, topk, scale, key)
    out, lse = torch.ops.eke.clustered_attention(*inputs, groups, mask, topk, scale, key)
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, centres: Tensor, groups: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    mask, topk, scale, *rest = options
    way = native.attend if native.serves(q) else gathered.attend
    out, lse = way((q, k, v, centres), groups, topk=topk, mask=mask, scale=scale, key=_key(rest))
    if way is native.attend:
        return out, lse
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _differentiate(grad: Tensor, grad_lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, centres, groups, mask, topk, scale, *rest = arguments
    found = gathered.differentiate(
        (q, k, v, centres), groups, (grad, grad_lse), topk=topk, mask=mask, scale=scale, key=_key(rest)
    )
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous(), found[3].contiguous()


def _key(rest: Sequence[bool]) -> bool:
    """Return the last argument, which calls may leave out."""
    return bool(rest and rest[0])


def _fake_attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length = q.shape[:3]
    return q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2), q.new_empty(q.shape[:3])


def _fake_differentiate(grad: Tensor, grad_lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, centres = arguments[:4]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), centres.new_empty(centres.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _derive(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.eke.clustered_attention_backward(grad, grad_lse, *ctx.saved_tensors, *ctx.options)
    return (*found, *[None] * (2 + len(ctx.options)))


for _name, _function, _fake in (
    ("clustered_attention", _attend, _fake_attend),
    ("clustered_attention_backward", _differentiate, _fake_differentiate),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"eke::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("eke::clustered_attention", _derive, setup_context=_save, lib=_LIBRARY)


def multiply_adds(q: Any, k: Any, v: Any, centres: Any, topk: Any, *, key: bool = False) -> int:
    """Return the multiply-adds of one pass from the shapes: centres with all keys, queries with the chosen ones.

    Args:
        q: Shape of the queries, (batch, heads, length, D).
        k: Of the keys.
        v: Of the values.
        centres: Of the centres.
        topk: Keys that a query weighs itself, for each head.
        key: Whether the rest is one key: the mean of all keys by the centre's weights, and one key more.
    """
    batch, heads, length, dim = q
    each = dim + v[3]
    mean = batch * heads * centres[2] * k[2] * dim if key else 0
    return int(batch * each * (heads * centres[2] * k[2] + length * (sum(topk) + heads * key)) + mean)


@flop_counter.register_flop_formula(torch.ops.eke.clustered_attention)
def _attend_flops(q: Any, k: Any, v: Any, centres: Any, *rest: Any, **unused: Any) -> int:
    return 2 * multiply_adds(q, k, v, centres, rest[2], key=_key(rest[4:]))


@flop_counter.register_flop_formula(torch.ops.eke.clustered_attention_backward)
def _differentiate_flops(grad: Any, grad_lse: Any, *rest: Any, **unused: Any) -> int:
    return 6 * multiply_adds(rest[0], rest[1], rest[2], rest[3], rest[6], key=_key(rest[8:]))
