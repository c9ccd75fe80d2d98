"""The operators torch.ops.eke.linear_attention and its derivative: causal attention without decay on the native kernel.

They carry fake implementations, derivatives (once) and FLOP formulas; where no kernel was compiled they go in chunks of
torch's own operations. Derivatives recompute everything from q, k, v and the denominators.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from ..calls import direct, transformed
from . import chunks, native
from .features import NAMED

EPSILON = 1e-6
"""Added to every denominator."""
_CHUNK = 64
_Four = tuple[Tensor, Tensor, Tensor, Tensor]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v (batch, length, heads, ...), S (batch, heads, D, M) and z (batch, heads, D)."""

_LIBRARY = torch.library.Library("eke", "FRAGMENT")  # type: ignore[no-untyped-call]
_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor memory, Tensor keys"
_OPTIONS = "str feature_map, bool normalize"
for _schema in (
    f"linear_attention({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    f"linear_attention_backward({_INPUTS}, Tensor out, Tensor bottom, Tensor grad, Tensor grad_memory, "
    f"Tensor grad_keys, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel serves calls there: float32 on a CPU or a GPU, no transform of torch.func."""
    if dtype != torch.float32 or device.type not in {"cpu", "cuda"}:
        return False
    if torch.compiler.is_compiling():  # need not look into the library: the operator goes in chunks where there is none
        return True
    ready = find_spec("triton") is not None if device.type == "cuda" else native.available()
    return ready and not transformed()


def attend(inputs: Inputs, *, feature_map: str, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attend causally.

    Args:
        inputs: See `Inputs`; float32.
        feature_map: "elu" or "identity".
        normalize: Whether to divide.

    Returns:
        Outputs (batch, length, heads, M), S and z after.
    """
    if direct(*inputs):
        out, _, memory, keys = _attend(*inputs, feature_map, normalize)
    else:
        out, _, memory, keys = torch.ops.eke.linear_attention(*inputs, feature_map, normalize)
    return out, memory, keys


def _on_gpu(q: Tensor, v: Tensor) -> bool:
    """Return whether the Triton kernel takes these; torch brings Triton where it supports the GPU."""
    fits = max(q.shape[-1], v.shape[-1]) <= 128  # columns of the state must fit into registers
    return q.is_cuda and fits and find_spec("triton") is not None


def _attend(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, keys: Tensor, feature_map: str, normalize: bool) -> _Four:
    if _on_gpu(q, v):
        from . import gpu

        return gpu.forward((q, k, v), (memory, keys), elu=feature_map == "elu", normalize=normalize)
    if q.is_cpu and q.dtype == torch.float32 and native.available():
        return native.forward((q, k, v), (memory, keys), feature_map=native.MAPS[feature_map], normalize=normalize)
    return _in_chunks((q, k, v, memory, keys), feature_map, normalize)


def _in_chunks(inputs: Inputs, feature_map: str, normalize: bool) -> _Four:
    q, k, v, memory, keys = inputs
    f = NAMED[feature_map]
    parts = tuple(x.transpose(1, 2) for x in (f(q), f(k), v))
    top, bottom, memory, keys = chunks.chunked((*parts, None, None), memory, keys, chunk=_CHUNK)
    out = top / (bottom.unsqueeze(-1) + EPSILON) if normalize else top
    return out.transpose(1, 2).contiguous(), bottom.contiguous(), memory.clone(), keys.clone()


def _differentiate(*arguments: Any) -> Inputs:
    """Return the derivatives of q, k, v, S and z; arguments as in the schema."""
    (q, k, v, memory, keys, out, bottom), grads, (feature_map, normalize) = (
        arguments[:7], arguments[7:10], arguments[10:],
    )  # fmt: skip
    if _on_gpu(q, v):
        from . import gpu

        elu = feature_map == "elu"
        return gpu.backward((q, k, v), (memory, keys), (out, bottom), grads, elu=elu, normalize=normalize)
    if q.is_cpu and q.dtype == torch.float32 and native.available():
        return native.backward(
            (q, k, v), (memory, keys), (out, bottom), grads, feature_map=native.MAPS[feature_map], normalize=normalize
        )
    with torch.enable_grad():
        q, k, v, memory, keys = (x.detach().requires_grad_() for x in (q, k, v, memory, keys))
        again, _, *last = _in_chunks((q, k, v, memory, keys), feature_map, normalize)
    found = torch.autograd.grad((again, *last), (q, k, v, memory, keys), grads)
    return found[0].contiguous(), found[1].contiguous(), found[2].contiguous(), found[3].clone(), found[4].clone()


def _fake_attend(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, keys: Tensor, feature_map: str, normalize: bool
) -> _Four:
    bottom = v.new_empty(q.shape[0], q.shape[2], q.shape[1])
    return v.new_empty(v.shape), bottom, memory.new_empty(memory.shape), keys.new_empty(keys.shape)


def _fake_differentiate(q: Tensor, k: Tensor, v: Tensor, memory: Tensor, keys: Tensor, *rest: Any) -> Inputs:
    made = [x.new_empty(x.shape) for x in (q, k, v, memory, keys)]
    return made[0], made[1], made[2], made[3], made[4]


def _save(ctx: Any, inputs: tuple[Any, ...], output: _Four) -> None:
    ctx.save_for_backward(*inputs[:5], *output[:2])
    ctx.options = inputs[5:]


def _derive(ctx: Any, grad: Tensor, _: Tensor, memory: Tensor, keys: Tensor) -> tuple[Tensor | None, ...]:
    found: Inputs = torch.ops.eke.linear_attention_backward(*ctx.saved_tensors, grad, memory, keys, *ctx.options)
    return (*found, None, None)


for _name, _function, _fake in (
    ("linear_attention", _attend, _fake_attend),
    ("linear_attention_backward", _differentiate, _fake_differentiate),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"eke::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("eke::linear_attention", _derive, setup_context=_save, lib=_LIBRARY)


def _work(q: Any, v: Any) -> int:
    """Return the multiply-adds of one pass: the state is read and written, half of a chunk's pairs are met."""
    batch, length, heads, features = q
    return int(batch * length * heads * (2 * features * v[3] + _CHUNK // 2 * (features + v[3])))


@flop_counter.register_flop_formula(torch.ops.eke.linear_attention)
def _attend_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **unused: Any) -> int:
    return 2 * _work(q, v)


@flop_counter.register_flop_formula(torch.ops.eke.linear_attention_backward)
def _differentiate_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **unused: Any) -> int:
    return 5 * _work(q, v)
