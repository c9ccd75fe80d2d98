"""The operators torch.ops.eke.sparse_matmul, sparse_matmul_inputs and sparse_matmul_values, and the way around them.

An operator carries a fake implementation, derivatives and a FLOP formula. The three are closed under derivatives:

    y = x W(v)^T      d/dx: g W(v)                d/dv: <g, x> at the kept entries
    h = g W(v)        d/dg: outer W(v)^T          d/dv: <g, outer>
    k = <g, x>        d/dx: g W(outer)            d/dg: x W(outer)^T
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from ..calls import direct, transformed
from . import native, reference

_LIBRARY = torch.library.Library("eke", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema in (
    "sparse_matmul(Tensor x, Tensor values, Tensor columns, Tensor starts, Tensor? bias) -> Tensor",
    "sparse_matmul_inputs(Tensor grad, Tensor values, Tensor columns, Tensor starts, SymInt inputs) -> Tensor",
    "sparse_matmul_values(Tensor x, Tensor grad, Tensor columns, Tensor starts, SymInt block) -> Tensor",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]


def matmul(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias for x (batch, inputs) and values (entries, r), by the way that fits the call."""
    if direct(x, values, columns, starts) and (bias is None or direct(bias)):
        return _matmul(x, values, columns, starts, bias)
    if transformed():
        return reference.matmul(x, values, columns, starts, bias)
    product: Tensor = torch.ops.eke.sparse_matmul(x, values, columns, starts, bias)
    return product


def _matmul(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    if native.supports(x, values.shape[1]):
        return native.forward(x, values, columns, starts, bias=bias)
    return reference.matmul(x, values, columns, starts, bias)


def _to_inputs(grad: Tensor, values: Tensor, columns: Tensor, starts: Tensor, inputs: int) -> Tensor:
    run = native.to_inputs if native.supports(grad, values.shape[1]) else reference.to_inputs
    return run(grad, values, columns, starts, inputs)


def _to_values(x: Tensor, grad: Tensor, columns: Tensor, starts: Tensor, block: int) -> Tensor:
    run = native.to_values if native.supports(x, block) else reference.to_values
    return run(x, grad, columns, starts, block)


def _fake_matmul(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], (starts.shape[0] - 1) * values.shape[1])


def _fake_to_inputs(grad: Tensor, values: Tensor, columns: Tensor, starts: Tensor, inputs: int) -> Tensor:
    return grad.new_empty(grad.shape[0], inputs)


def _fake_to_values(x: Tensor, grad: Tensor, columns: Tensor, starts: Tensor, block: int) -> Tensor:
    return x.new_empty(columns.shape[0], block)


def _save_matmul(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_matmul(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, columns, starts = ctx.saved_tensors
    to_x, to_values, _, _, to_bias = ctx.needs_input_grad
    operators = torch.ops.eke
    return (
        operators.sparse_matmul_inputs(grad, values, columns, starts, x.shape[1]) if to_x else None,
        operators.sparse_matmul_values(x, grad, columns, starts, values.shape[1]) if to_values else None,
        None,
        None,
        grad.sum(0) if to_bias else None,
    )


def _save_to_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_to_inputs(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    grad, values, columns, starts = ctx.saved_tensors
    to_grad, to_values = ctx.needs_input_grad[:2]
    operators = torch.ops.eke
    return (
        operators.sparse_matmul(outer, values, columns, starts, None) if to_grad else None,
        operators.sparse_matmul_values(outer, grad, columns, starts, values.shape[1]) if to_values else None,
        None,
        None,
        None,
    )


def _save_to_values(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate_to_values(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
    x, grad, columns, starts = ctx.saved_tensors
    to_x, to_grad = ctx.needs_input_grad[:2]
    operators = torch.ops.eke
    return (
        operators.sparse_matmul_inputs(grad, outer, columns, starts, x.shape[1]) if to_x else None,
        operators.sparse_matmul(x, outer, columns, starts, None) if to_grad else None,
        None,
        None,
        None,
    )


for _name, _function, _fake, _save, _differentiate in (
    ("sparse_matmul", _matmul, _fake_matmul, _save_matmul, _differentiate_matmul),
    ("sparse_matmul_inputs", _to_inputs, _fake_to_inputs, _save_to_inputs, _differentiate_to_inputs),
    ("sparse_matmul_values", _to_values, _fake_to_values, _save_to_values, _differentiate_to_values),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"eke::{_name}", _fake, lib=_LIBRARY)
    torch.library.register_autograd(f"eke::{_name}", _differentiate, setup_context=_save, lib=_LIBRARY)


@flop_counter.register_flop_formula(torch.ops.eke.sparse_matmul)
def _matmul_flops(x: Any, values: Any, *rest: Any, out_shape: Any = None, **unused: Any) -> int:
    return int(2 * x[0] * values[0] * values[1])


@flop_counter.register_flop_formula(torch.ops.eke.sparse_matmul_inputs)
def _to_inputs_flops(grad: Any, values: Any, *rest: Any, out_shape: Any = None, **unused: Any) -> int:
    return int(2 * grad[0] * values[0] * values[1])


@flop_counter.register_flop_formula(torch.ops.eke.sparse_matmul_values)
def _to_values_flops(
    x: Any, grad: Any, columns: Any, starts: Any, block: Any, *, out_shape: Any = None, **unused: Any
) -> int:
    return int(2 * x[0] * columns[0] * block)
