"""Products with one Kronecker-sparse factor or a chain of them, on the last or the first dimension of a tensor.

K has the support I_a x 1_(b x c) x I_d and the free entries `blocks` of shape (a, b, c, d): the shape is the pattern.
y = x K^T costs 2 a b c d operations a sample. Calls without gradients go straight to a native kernel; the operators
torch.ops.eke.* serve autograd, torch.compile, torch.export and the FLOP counter. Complex
numbers take torch's einsum.
Source: Gonon, Zheng, Carrivain, Le, "Fast inference with Kronecker-sparse matrices", 2024 (layouts, fused product).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import kept, operators, reference
from .choose import Algorithm, choose_algorithm
from .native import available, describe

__all__ = [
    "Algorithm",
    "available",
    "choose_algorithm",
    "describe",
    "ks_chain_matmul",
    "ks_matmul",
    "ks_matmul_batch_last",
]

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def _check(x: Tensor, blocks: Tensor, *, batch_last: bool, name: str) -> None:
    """Refuse what is no product.

    Args:
        x: Inputs.
        blocks: Free entries.
        batch_last: Whether features are the first dimension of x.
        name: The public function, for the message.

    Raises:
        ValueError: if shapes, types or devices do not fit.
    """
    if blocks.dim() != 4 or 0 in blocks.shape:
        raise ValueError(f"{name} needs blocks of shape (a, b, c, d) with positive entries, got {tuple(blocks.shape)}.")
    a, _, c, d = blocks.shape
    wanted = "(a*c*d, batch)" if batch_last else "(..., a*c*d)"
    if x.dim() < 1 or (batch_last and x.dim() != 2) or x.shape[0 if batch_last else -1] != a * c * d:
        raise ValueError(
            f"{name} needs x of shape {wanted} with a*c*d = {a * c * d} for blocks "
            f"(a, b, c, d) = {tuple(blocks.shape)}, got {tuple(x.shape)}."
        )
    if x.dtype != blocks.dtype or x.dtype not in _TYPES:
        raise ValueError(
            f"{name} needs x and blocks of one floating-point type (float16, bfloat16, float32, float64, complex64 or "
            f"complex128), got {x.dtype} and {blocks.dtype}; convert one of them with .to()."
        )
    if x.device != blocks.device:
        raise ValueError(f"{name} needs x and blocks on one device, got {x.device} and {blocks.device}.")


def _cast(x: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the tensors in autocast's type where autocast is on, as they are otherwise."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return x, others
    if x.dtype == torch.float64 or not x.is_floating_point():
        return x, others
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), [other.to(dtype) for other in others]


def ks_matmul(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply the last dimension of x by a Kronecker-sparse matrix: y = x K^T.

    Args:
        x: Inputs, (..., a*c*d).
        blocks: Free entries, (a, b, c, d): K[i*b*d + k*d + j, i*c*d + l*d + j] = blocks[i, k, l, j].

    Returns:
        Outputs, (..., a*b*d), of the type of x. Differentiable in x and blocks, twice.
        Shapes, types or devices that do not fit are a ValueError.
    """
    if not torch.compiler.is_compiling():
        y = kept.product(x, blocks, False)
        if y is not None:
            return y
    x, (blocks,) = _cast(x, (blocks,))
    _check(x, blocks, batch_last=False, name="ks_matmul")
    if x.is_complex():
        y = reference.matmul(x.reshape(-1, x.shape[-1]), blocks)
        return y.reshape(*x.shape[:-1], y.shape[-1])
    if x.dim() == 2:
        return operators.matmul(x, blocks, batch_last=False, keep=True)
    y = operators.matmul(x.reshape(-1, x.shape[-1]), blocks, batch_last=False, keep=True)
    return y.reshape(*x.shape[:-1], y.shape[-1])


def ks_matmul_batch_last(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply a Kronecker-sparse matrix by columns: y = K x.

    Args:
        x: Inputs, (a*c*d, batch).
        blocks: Free entries, (a, b, c, d).

    Returns:
        Outputs, (a*b*d, batch), of the type of x. Differentiable in x and blocks, twice.
        Shapes, types or devices that do not fit are a ValueError.
    """
    if not torch.compiler.is_compiling():
        y = kept.product(x, blocks, True)
        if y is not None:
            return y
    x, (blocks,) = _cast(x, (blocks,))
    _check(x, blocks, batch_last=True, name="ks_matmul_batch_last")
    if x.is_complex():
        return reference.matmul_batch_last(x, blocks)
    return operators.matmul(x, blocks, batch_last=True, keep=True)


def ks_chain_matmul(
    x: Tensor,
    blocks_list: Sequence[Tensor],
    *,
    bias: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Multiply the last dimension of x by a product of Kronecker-sparse factors: y = f(x (K_1 ... K_L)^T + bias).

    Without gradients, a tile of the batch stays in cache through all factors, and small neighbours are multiplied
    into one factor where that costs no more operations.

    Args:
        x: Inputs, (..., inputs of the last factor).
        blocks_list: Free entries of K_1 ... K_L, leftmost first: the last one is applied first.
        bias: Added to the outputs, (outputs of the first factor,).
        activation: Applied at the end; `torch.relu` is part of the kernel.

    Returns:
        Outputs, (..., outputs of the first factor), of the type of x.

    Raises:
        ValueError: if the list is empty, two neighbours do not fit, or shapes, types or devices do not fit.
    """
    if not len(blocks_list):
        raise ValueError("ks_chain_matmul needs at least one factor, got an empty list.")
    x, blocks_list = _cast(x, blocks_list)
    for number, blocks in enumerate(blocks_list):
        if blocks.dim() != 4 or 0 in blocks.shape or blocks.dtype != x.dtype or blocks.device != x.device:
            raise ValueError(
                f"ks_chain_matmul needs factors (a, b, c, d) with positive entries, of x's type and device ({x.dtype}, "
                f"{x.device}), got {tuple(blocks.shape)}, {blocks.dtype} and {blocks.device} at factor {number}."
            )
    for number, (left, right) in enumerate(itertools.pairwise(blocks_list)):
        (a, _, c, d), (p, q, _, s) = left.shape, right.shape
        if a * c * d != p * q * s:
            raise ValueError(
                f"Factor {number} takes {a * c * d} features, factor {number + 1} gives {p * q * s}: "
                f"{tuple(left.shape)} and {tuple(right.shape)} cannot be multiplied; a*c*d must equal the next a*b*d."
            )
    _check(x, blocks_list[-1], batch_last=False, name="ks_chain_matmul")
    a, b, _, d = blocks_list[0].shape
    if bias is not None:
        bias = bias.to(x.dtype)
        if bias.shape != (a * b * d,) or bias.device != x.device:
            raise ValueError(
                f"ks_chain_matmul needs a bias of shape ({a * b * d},) on {x.device}, got {tuple(bias.shape)} on "
                f"{bias.device}."
            )
    flat = x.reshape(-1, x.shape[-1])
    fused = not x.is_complex() and (activation is torch.relu or activation is torch.nn.functional.relu)
    if x.is_complex():
        y = functools.reduce(reference.matmul, reversed(blocks_list), flat)
        y = y if bias is None else y + bias
    else:
        y = operators.chain(flat, list(blocks_list), bias, relu=fused)
    y = y.reshape(*x.shape[:-1], a * b * d)
    return y if activation is None or fused else activation(y)
