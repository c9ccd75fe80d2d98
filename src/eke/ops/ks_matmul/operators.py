"""The operators torch.ops.eke.ks_matmul, ks_matmul_gradient and ks_chain_matmul, and the way around them.

An operator carries a fake implementation, derivatives and a FLOP formula, and costs some microseconds a call; a call
that needs none of these goes straight to the algorithm chosen. Derivatives: dx = g K is the product with the
transposed pattern (a, c, b, d); d(blocks) sums outer products over the batch.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from ..calls import direct as _direct
from ..calls import transformed as _transformed
from . import choose, kept, native, reference

_LIBRARY = torch.library.Library("eke", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "ks_matmul(Tensor x, Tensor blocks, bool batch_last) -> Tensor",
    "ks_matmul_gradient(Tensor x, Tensor grad, SymInt[] shape, bool batch_last) -> Tensor",
    "ks_chain_matmul(Tensor x, Tensor[] blocks, Tensor? bias, bool relu) -> Tensor",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def matmul(x: Tensor, blocks: Tensor, *, batch_last: bool, keep: bool = False) -> Tensor:
    """Multiply a batch by one factor.

    Args:
        x: Inputs, (batch, a*c*d) or, batch last, (a*c*d, batch).
        blocks: Free entries, (a, b, c, d).
        batch_last: Layout.
        keep: Whether these entries may come again.

    Returns:
        Outputs in the same layout.
    """
    if _direct(x, blocks):
        if keep:
            batch = x.shape[1 if batch_last else 0]
            kept.meet((id(blocks), batch_last), (blocks,), x, batch=batch, batch_last=batch_last)
        return _matmul(x, blocks, batch_last)
    if _transformed():
        return (reference.matmul_batch_last if batch_last else reference.matmul)(x, blocks)
    if blocks.shape[0] * blocks.shape[3] == 1:
        return choose.ALGORITHMS["dense"](x, blocks, batch_last)  # a dense matrix: torch differentiates it in less time
    product: Tensor = torch.ops.eke.ks_matmul(x, blocks, batch_last)
    return product


def chain(x: Tensor, factors: list[Tensor], bias: Tensor | None, *, relu: bool) -> Tensor:
    """Multiply a batch by a product of factors.

    Args:
        x: Inputs, (batch, features).
        factors: Leftmost first.
        bias: Added at the end.
        relu: Whether to clip at zero at the end.

    Returns:
        Outputs, (batch, outputs).
    """
    tensors = [x, *factors] if bias is None else [x, *factors, bias]
    if _direct(*tensors):
        y = kept.chain(x, factors, bias, relu)
        if y is None:
            kept.meet(kept.chain_key(factors, x.shape[0], relu), factors, x, batch=x.shape[0], relu=relu)
            y = _chain(x, factors, bias, relu)
        return y
    if _transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        # The derivative needs what lies between the factors, so there is nothing to gain from one pass.
        for blocks in reversed(factors):
            x = matmul(x, blocks, batch_last=False)
        x = x if bias is None else x + bias
        return torch.relu(x) if relu else x
    product: Tensor = torch.ops.eke.ks_chain_matmul(x, factors, bias, relu)
    return product


def _on_gpu(x: Tensor) -> bool:
    """Return whether the Triton kernels take this input; torch brings Triton where it supports the GPU.

    bfloat16 compiles, but Triton's interpreter cannot multiply it, so nothing here has checked its results.
    """
    return x.is_cuda and x.dtype in {torch.float32, torch.float16} and find_spec("triton") is not None


def _matmul(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    if _on_gpu(x):
        from . import gpu

        return gpu.matmul(x, blocks, batch_last=batch_last)
    if not x.is_cpu:
        return (reference.matmul_batch_last if batch_last else reference.matmul)(x, blocks)
    a, b, c, d = blocks.shape
    name = choose.choose_algorithm((a, b, c, d), x.shape[1 if batch_last else 0], x.dtype, batch_last=batch_last)
    # As the fake implementation has it.
    return choose.ALGORITHMS[name](x, blocks, batch_last).contiguous()


def _gradient(x: Tensor, grad: Tensor, shape: list[int], batch_last: bool) -> Tensor:
    a, b, c, d = shape
    if _on_gpu(x):
        from . import gpu

        return gpu.gradient(x, grad, (a, b, c, d), batch_last=batch_last)
    if native.supports(x) and x.dtype == torch.float32 and a * d > 1:
        return native.gradient(x, grad, (a, b, c, d), batch_last=batch_last)
    if a * d == 1:
        return (grad @ x.t() if batch_last else grad.t() @ x).reshape(a, b, c, d)
    return (reference.gradient_batch_last if batch_last else reference.gradient)(x, grad, (a, b, c, d)).contiguous()


def _chain(x: Tensor, factors: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    if native.supports(x):
        applied = choose.merge_neighbours([blocks.float() for blocks in factors], x.shape[0])[::-1]
        while len(applied) > native.LONGEST:
            x = native.forward(x, applied[: native.LONGEST], batch_last=False)
            applied = applied[native.LONGEST :]
        return native.forward(
            x, applied, batch_last=False, bias=None if bias is None else bias.float().contiguous(), relu=relu
        )
    for blocks in reversed(factors):
        x = _matmul(x, blocks, False)
    x = x if bias is None else x + bias
    return torch.relu(x) if relu else x


def _fake_matmul(x: Tensor, blocks: Tensor, batch_last: bool) -> Tensor:
    a, b, _, d = blocks.shape
    return x.new_empty((a * b * d, x.shape[1]) if batch_last else (x.shape[0], a * b * d))


def _fake_gradient(x: Tensor, grad: Tensor, shape: list[int], batch_last: bool) -> Tensor:
    return x.new_empty(shape)


def _fake_chain(x: Tensor, blocks: list[Tensor], bias: Tensor | None, relu: bool) -> Tensor:
    a, b, _, d = blocks[0].shape
    return x.new_empty((x.shape[0], a * b * d))


def _save_matmul(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, blocks, ctx.batch_last = inputs
    ctx.save_for_backward(x, blocks)


def _differentiate_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, blocks = ctx.saved_tensors
    last = ctx.batch_last
    to_x, to_blocks = ctx.needs_input_grad[:2]
    found = None
    if to_blocks:
        # Without a second derivative to come nobody watches the first one.
        run = _gradient if _direct(x, grad) else torch.ops.eke.ks_matmul_gradient
        found = run(x, grad, list(blocks.shape), last)
    return matmul(grad, blocks.transpose(1, 2), batch_last=last) if to_x else None, found, None


def _save_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, list[int], bool], output: Tensor) -> None:
    x, grad, _, ctx.batch_last = inputs
    ctx.save_for_backward(x, grad)


def _differentiate_gradient(ctx: Any, outer: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, grad = ctx.saved_tensors
    last = ctx.batch_last
    to_x, to_grad = ctx.needs_input_grad[:2]
    return (
        matmul(grad, outer.transpose(1, 2), batch_last=last) if to_x else None,
        matmul(x, outer, batch_last=last) if to_grad else None,
        None,
        None,
    )


def _chain_is_not_differentiable(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        f"torch.ops.eke.ks_chain_matmul has no derivative (asked for one of shape {tuple(grad.shape)}); "
        "call eke.ops.ks_chain_matmul, which goes factor by factor where gradients are needed."
    )


for _name, _function, _fake in (
    ("ks_matmul", _matmul, _fake_matmul),
    ("ks_matmul_gradient", _gradient, _fake_gradient),
    ("ks_chain_matmul", _chain, _fake_chain),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"eke::{_name}", _fake, lib=_LIBRARY)
torch.library.register_autograd("eke::ks_matmul", _differentiate_matmul, setup_context=_save_matmul, lib=_LIBRARY)
torch.library.register_autograd(
    "eke::ks_matmul_gradient", _differentiate_gradient, setup_context=_save_gradient, lib=_LIBRARY
)
torch.library.register_autograd("eke::ks_chain_matmul", _chain_is_not_differentiable, lib=_LIBRARY)


@flop_counter.register_flop_formula(torch.ops.eke.ks_matmul)
def _matmul_flops(x: Any, blocks: Any, batch_last: bool, *, out_shape: Any = None, **unused: Any) -> int:
    return int(2 * x[1 if batch_last else 0] * math.prod(blocks))


@flop_counter.register_flop_formula(torch.ops.eke.ks_matmul_gradient)
def _gradient_flops(x: Any, grad: Any, shape: Any, batch_last: bool, *, out_shape: Any = None, **unused: Any) -> int:
    return int(2 * x[1 if batch_last else 0] * math.prod(shape))


@flop_counter.register_flop_formula(torch.ops.eke.ks_chain_matmul)
def _chain_flops(x: Any, blocks: Any, bias: Any, relu: bool, *, out_shape: Any = None, **unused: Any) -> int:
    return int(2 * x[0] * sum(math.prod(shape) for shape in blocks))
