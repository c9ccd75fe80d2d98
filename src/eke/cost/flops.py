"""FLOPs of one inference forward pass, 2 per multiply-add, from the shapes of the operations that run.

Counted are products: matrix products (sparse ones by their stored entries), convolutions, attention, recurrent
layers, bilinear forms, distances. Additions, activations, normalisation, pooling, embeddings and look-ups count zero.
Attention counts every score, masked or causal or not, since a mask does not change the shapes.

The same number in train, eval, no_grad and inference mode: the count is of the eval-mode forward of a copy.
Formulas: torch.utils.flop_counter for most of aten; here those it lacks or that need more than shapes.

Source: the convention of torch.utils.flop_counter; fvcore and thop count multiply-adds (half), and miss or count
twice what runs inside `nn.MultiheadAttention`, fused recurrent layers and sparse products.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_flop,
)

from .forward import rehearse, unwrap

aten = torch.ops.aten


def flops(model: nn.Module, *inputs: Any) -> int:
    """Count the FLOPs of one inference forward pass.

    Nothing of the model, the inputs or the global RNG changes, and where the forward pass does not depend on data
    nothing is computed.

    Args:
        model: Module in any mode; compiled and DDP-wrapped ones are unwrapped.
        *inputs: Inputs of `forward`, or one mapping of its keyword inputs. The count is for this batch size.

    Returns:
        Floating-point operations, 2 per multiply-add.
    """
    return int(_counted(model, inputs).get_total_flops())


def flops_by_module(model: nn.Module, *inputs: Any) -> dict[str, int]:
    """Count the FLOPs spent inside each module, those of its children included.

    Args:
        model: Module in any mode.
        *inputs: Inputs of `forward`, or one mapping of its keyword inputs.

    Returns:
        FLOPs for every name of `model.named_modules()`; the name "" is the whole model. A product with the weight of
        a module that is not itself called (`out_proj` of attention) counts for the module that computes it.
    """
    counter = _counted(model, inputs)
    model = unwrap(model)
    inside = {name: int(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}
    root = type(model).__name__
    counted = {name: inside.get(f"{root}.{name}", 0) for name, _ in model.named_modules()}
    return counted | {"": int(counter.get_total_flops())}


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """Tell the counter what a custom operation costs.

    Torch's own registry keeps the formula, so `FlopCounterMode` counts it too. An operation that reaches its kernel
    without the dispatcher (ctypes) is not seen: it must call its `torch.library` form while a dispatch mode is active.

    Args:
        op: `torch.ops.namespace.name`, one of its overloads, or what `torch.library.custom_op` returned.
        formula: Called as the operation, with shapes in place of tensors and `out_shape=` added; returns FLOPs.

    Raises:
        TypeError: if `op` is no operation.
        ValueError: if the operation has a formula already.
    """
    overload = getattr(op, "_opoverload", op)
    packet = getattr(overload, "overloadpacket", overload)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        raise TypeError(f"register_flops needs an operation such as torch.ops.eke.ks_matmul, got {op!r}.")
    if packet in flop_registry or packet in _FORMULAS:
        raise ValueError(f"{packet} has a FLOP formula already; register each operation once.")
    register_flop_formula(packet)(formula)


def _counted(model: nn.Module, inputs: tuple[Any, ...]) -> FlopCounterMode:
    formulas = {packet: _OnTensors(formula) for packet, formula in _FORMULAS.items()}
    return rehearse(model, inputs, lambda *_: FlopCounterMode(display=False, custom_mapping=formulas))


class _OnTensors:
    """A formula that receives the tensors themselves (torch's counter passes shapes otherwise)."""

    _get_raw = True

    def __init__(self, formula: Callable[..., int]) -> None:
        self.formula = formula

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        return self.formula(*args, **kwargs)


def _is_sparse(tensor: Tensor) -> bool:
    return tensor.layout is not torch.strided


def _stored(tensor: Tensor) -> int:
    values = tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()
    return values.numel()


def _product(a: Tensor, b: Tensor) -> int:
    """Return the FLOPs of a @ b, batched or not; a stored entry of a sparse factor meets one row or column."""
    columns = b.shape[-1] if b.ndim > 1 else 1
    if _is_sparse(a) and _is_sparse(b):
        left, right = a.to_sparse(), b.to_sparse()
        inner = a.shape[-1]
        uses = torch.bincount(left._indices()[1], minlength=inner) * torch.bincount(
            right._indices()[0], minlength=inner
        )
        return 2 * int(uses.sum())
    if _is_sparse(a):
        return 2 * _stored(a) * columns
    if _is_sparse(b):
        return 2 * _stored(b) * (a.shape[-2] if a.ndim > 1 else 1)
    return 2 * a.numel() * columns


def _first_two(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return _product(a, b)


def _after_addend(_addend: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return _product(a, b)


def _sampled_product(pattern: Tensor, a: Tensor, _b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _stored(pattern) * a.shape[-1]


def _outer_update(_addend: Tensor, a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    return 2 * a.numel() * b.numel()


def _entries_times_inner(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Return the FLOPs where each entry of the result is one inner product over the last dimension of x."""
    return 2 * out_val.numel() * x.shape[-1]


def _trilinear(*args: Any, out_val: Tensor, **_: Any) -> int:
    """Return the FLOPs of x1 W x2 for each output: W x2, then one inner product, as einsum would do it."""
    x1, weight, x2 = args[:3]
    return 2 * out_val.numel() * (weight.shape[-2] + 1) * x2.shape[-1] if x1.numel() else 0


def _packed_weight(x: Tensor, packed: Any, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Return the FLOPs of a quantised layer; its packed weight tells the length of each output's inner product."""
    weight = packed.unpack()[0]
    return 2 * out_val.numel() * (weight.numel() // weight.shape[0]) if x.numel() else 0


def _one_recurrent_layer(x: Tensor, *args: Any, **_: Any) -> int:
    """Return the FLOPs of input and recurrent matrix for each step and sample; x: (steps, batch, features)."""
    rows = x.numel() // max(1, x.shape[-1])
    return 2 * rows * int(args[0].numel() + args[1].numel())


def _fused_recurrent(x: Tensor, weights: list[Tensor], *_: Any, **__: Any) -> int:
    """Return the FLOPs of all layers and directions at once (cuDNN, MIOpen); vectors among the weights are biases."""
    rows = x.numel() // max(1, x.shape[-1])
    return 2 * rows * sum(weight.numel() for weight in weights if weight.ndim == 2)


def _fused_attention(*args: Any, **_: Any) -> int:
    """Return the FLOPs of input projection, scores, weighted sum, output projection; x: (batch, steps, width)."""
    query, key, _value, width, _heads, qkv_weight, _qkv_bias, out_weight = args[:8]
    batch, steps, keys = query.shape[0], query.shape[1], key.shape[1]
    inputs = batch * (steps + 2 * keys) * (qkv_weight.numel() // 3)
    return int(2 * (inputs + 2 * batch * steps * keys * width + batch * steps * out_weight.numel()))


def _fused_encoder_layer(*args: Any, **_: Any) -> int:
    x, width, heads, qkv_weight, qkv_bias, out_weight = args[:6]
    attention = _fused_attention(x, x, x, width, heads, qkv_weight, qkv_bias, out_weight)
    matrices = [tensor for tensor in args[6:] if isinstance(tensor, Tensor) and tensor.ndim == 2]
    feed_forward = matrices[:2]  # later ones are masks
    return attention + 2 * int(prod(x.shape[:2])) * sum(weight.numel() for weight in feed_forward)


def _scaled_dot_product(*args: Any, out_val: Any, **_: Any) -> int:
    return int(sdpa_flop(*(tensor.shape for tensor in args[:3])))


def _scaled_dot_product_backward(*args: Any, out_val: Any, **_: Any) -> int:
    return int(sdpa_backward_flop(*(tensor.shape for tensor in args[:4])))


def _formulas() -> dict[Any, Callable[..., int]]:
    table: dict[Any, Callable[..., int]] = {
        **dict.fromkeys([aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot, aten._sparse_mm_reduce_impl], _first_two),
        **dict.fromkeys([aten._sparse_sparse_matmul, aten._int_mm, aten.hspmm], _first_two),
        **dict.fromkeys([aten.addmm, aten.addmv, aten.baddbmm, aten.addbmm], _after_addend),
        **dict.fromkeys([aten._sparse_addmm, aten.sspaddmm, aten._addmm_activation], _after_addend),
        **dict.fromkeys([aten.mkldnn_linear, aten._weight_int8pack_mm, aten._weight_int4pack_mm], _entries_times_inner),
        **dict.fromkeys([aten._euclidean_dist, aten._cdist_forward], _entries_times_inner),
        aten._scaled_dot_product_fused_attention_overrideable: _scaled_dot_product,
        # torch's own table has these from 2.15 on
        aten._scaled_dot_product_flash_attention_for_cpu: _scaled_dot_product,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _scaled_dot_product_backward,
        aten.sparse_sampled_addmm: _sampled_product,
        aten.addr: _outer_update,
        aten._trilinear: _trilinear,
        aten.mkldnn_rnn_layer: _one_recurrent_layer,
        aten._cudnn_rnn: _fused_recurrent,
        aten.miopen_rnn: _fused_recurrent,
        aten._native_multi_head_attention: _fused_attention,
        aten._transformer_encoder_layer_fwd: _fused_encoder_layer,
    }
    for kind in ("linear", "linear_dynamic", "linear_dynamic_fp16", "conv1d", "conv2d", "conv3d"):
        for name in (kind, kind.replace("linear", "linear_relu") if "linear" in kind else f"{kind}_relu"):
            if hasattr(torch.ops.quantized, name):
                table[getattr(torch.ops.quantized, name)] = _packed_weight
    return table


_FORMULAS = _formulas()
