"""Kronecker-sparse products on GPUs: one Triton kernel for both layouts and both directions, one for the entries.

Every program computes a tile of one group (i, j): rows are samples, columns are outputs k, the sum runs over l. Inputs,
outputs and entries are read through strides, so batch first, batch last and the transposed factor differ in numbers
alone, and nothing is permuted in memory: B (N + M) words move, a batched product moves three times as many.
Source: Gonon, Zheng, Carrivain, Le, "Fast inference with Kronecker-sparse matrices", 2024 (the fused product).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 64, 64
"""Tile of samples and outputs of one program; 64 x 64 in four warps needs no spills on sm_80 and sm_90."""
WARPS = 4


def depth(dtype: torch.dtype) -> int:
    """Return the terms summed at once: 64 bytes of a row."""
    return 64 // (torch.finfo(dtype).bits // 8)


def gradient_depth(dtype: torch.dtype) -> int:
    """Return the samples summed at once by the gradient: in float32 half as many, sixteen spill on sm_80."""
    return 8 if dtype == torch.float32 else depth(dtype)


@triton.jit  # type: ignore[untyped-decorator]
def product_kernel(  # type: ignore[no-untyped-def]  # noqa: D103
    x, w, y, batch, b, c, d, x_row, x_feature, y_row, y_feature, w_a, w_b, w_c, w_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(batch, ROWS)
    across = tl.cdiv(b, COLUMNS)
    program = tl.program_id(0)
    group = program // (tiles * across)
    i = (group // d).to(tl.int64)
    j = group % d
    n = (program // across % tiles * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = program % across * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, c, DEPTH):
        m = start + tl.arange(0, DEPTH)
        left = tl.load(
            x + n[:, None] * x_row + (i * c * d + m[None, :] * d + j) * x_feature,
            mask=(n[:, None] < batch) & (m[None, :] < c), other=0.0,
        )  # fmt: skip
        right = tl.load(
            w + i * w_a + k[None, :] * w_b + m[:, None] * w_c + j * w_d,
            mask=(k[None, :] < b) & (m[:, None] < c), other=0.0,
        )  # fmt: skip
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    tl.store(
        y + n[:, None] * y_row + (i * b * d + k[None, :] * d + j) * y_feature, sums.to(y.dtype.element_ty),
        mask=(n[:, None] < batch) & (k[None, :] < b),
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def gradient_kernel(  # type: ignore[no-untyped-def]  # noqa: D103
    x, g, w, batch, b, c, d, x_row, x_feature, g_row, g_feature,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    down = tl.cdiv(b, ROWS)
    across = tl.cdiv(c, COLUMNS)
    program = tl.program_id(0)
    group = program // (down * across)
    i = (group // d).to(tl.int64)
    j = group % d
    k = program // across % down * ROWS + tl.arange(0, ROWS)
    m = program % across * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, batch, DEPTH):
        n = (start + tl.arange(0, DEPTH)).to(tl.int64)
        left = tl.load(
            g + n[None, :] * g_row + (i * b * d + k[:, None] * d + j) * g_feature,
            mask=(n[None, :] < batch) & (k[:, None] < b), other=0.0,
        )  # fmt: skip
        right = tl.load(
            x + n[:, None] * x_row + (i * c * d + m[None, :] * d + j) * x_feature,
            mask=(n[:, None] < batch) & (m[None, :] < c), other=0.0,
        )  # fmt: skip
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    tl.store(
        w + ((i * b + k[:, None]) * c + m[None, :]) * d + j, sums.to(w.dtype.element_ty),
        mask=(k[:, None] < b) & (m[None, :] < c),
    )  # fmt: skip


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _strides(x: Tensor, batch_last: bool) -> tuple[int, int]:
    row, feature = x.stride()
    return (feature, row) if batch_last else (row, feature)


def matmul(x: Tensor, blocks: Tensor, *, batch_last: bool) -> Tensor:
    """Multiply a batch by one factor.

    Args:
        x: Inputs, (batch, a*c*d) or, batch last, (a*c*d, batch); float32 or float16; any strides.
        blocks: Free entries, (a, b, c, d), of the same type; any strides.
        batch_last: Layout.

    Returns:
        Outputs in the same layout; sums are kept in float32.
    """
    a, b, c, d = blocks.shape
    batch = x.shape[1 if batch_last else 0]
    y = x.new_empty((a * b * d, batch) if batch_last else (batch, a * b * d))
    programs = a * d * triton.cdiv(batch, ROWS) * triton.cdiv(b, COLUMNS)
    if programs:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            product_kernel[(programs,)](
                x, blocks, y, batch, b, c, d, *_strides(x, batch_last), *_strides(y, batch_last), *blocks.stride(),
                ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=depth(x.dtype), PRECISION=_precision(), num_warps=WARPS,
            )  # fmt: skip
    return y


def gradient(x: Tensor, grad: Tensor, shape: tuple[int, int, int, int], *, batch_last: bool) -> Tensor:
    """Differentiate a product with respect to its free entries.

    Args:
        x: Inputs, as for `matmul`.
        grad: Gradient of the outputs in the same layout.
        shape: (a, b, c, d).
        batch_last: Layout.

    Returns:
        Gradient of the entries, (a, b, c, d).
    """
    a, b, c, d = shape
    w = x.new_empty(shape)
    programs = a * d * triton.cdiv(b, ROWS) * triton.cdiv(c, COLUMNS)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        gradient_kernel[(programs,)](
            x, grad, w, x.shape[1 if batch_last else 0], b, c, d, *_strides(x, batch_last), *_strides(grad, batch_last),
            ROWS=ROWS, COLUMNS=COLUMNS, DEPTH=gradient_depth(x.dtype), PRECISION=_precision(), num_warps=WARPS,
        )  # fmt: skip
    return w
