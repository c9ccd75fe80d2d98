"""Causal linear attention on GPUs: one Triton kernel for outputs and all derivatives.

Outputs, dq, dk and dv are one sum in four disguises, with tri the lower part, or from the end on the upper one:

    Y = tri(L R^T + side) X + L S,    S' = S + R^T X
    outputs: L, R, X = fq, fk, v             dq: L, R, X, side = g, v, fk, h_i
    dv, from the end: L, R, X = fk, fq, g    dk, from the end: L, R, X, side = v, g, fq, h_j

with g = grad / denominator, h = -(g . o). A program walks along one sequence of one head in chunks and keeps columns
of S in registers; the features' derivative is applied in passing. Sums are float32 whatever the inputs are; nothing of
the size of the length times the state is stored.
Source: Katharopoulos and others, "Transformers are RNNs", 2020 (the derivative), in chunks. Checked in Triton's
interpreter and compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6
_Three = tuple[Tensor, Tensor, Tensor]
CHUNK, WARPS = 16, 8
"""Positions of a chunk, and warps of a program."""


@triton.jit  # type: ignore[untyped-decorator]
def _map(x, seen, ELU: tl.constexpr):  # type: ignore[no-untyped-def]
    if ELU:
        x = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return tl.where(seen, x, 0.0)  # elu(0) + 1 is 1 where nothing is


@triton.jit  # type: ignore[untyped-decorator]
def scan_kernel(  # type: ignore[no-untyped-def]  # noqa: D103
    left, right, x, raw, side, begin, begin_sums, out, under, end, end_sums, length, heads, depth, width,
    left_row, left_head, right_row, right_head, x_row, x_head, raw_row, raw_head,
    C: tl.constexpr, K: tl.constexpr, N: tl.constexpr, MAP_PAIRS: tl.constexpr, MAP_X: tl.constexpr,
    SLOPE: tl.constexpr, SIDE: tl.constexpr, UNDER: tl.constexpr, NORMALIZE: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(width, N)
    sequence = (tl.program_id(0) // across).to(tl.int64)
    sample = sequence // heads
    head = sequence % heads
    c, d = tl.arange(0, C), tl.arange(0, K)
    m = tl.program_id(0) % across * N + tl.arange(0, N)
    deep, wide = (d < depth)[None, :], (m < width)[None, :]
    places = sequence * depth * width + d[:, None] * width + m[None, :]
    state = tl.load(begin + places, mask=(d < depth)[:, None] & wide, other=0.0)
    if UNDER:
        sums = tl.load(begin_sums + sequence * depth + d, mask=d < depth, other=0.0)
    if SIDE > 0:
        totals = tl.load(begin_sums + sequence * width + m, mask=m < width, other=0.0)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        n = (chunks - 1 - step if REVERSE else step) * C + c
        row = (sample * length + n).to(tl.int64)[:, None]
        seen = (n < length)[:, None]
        a = tl.load(left + row * left_row + head * left_head + d[None, :], mask=seen & deep, other=0.0)
        b = tl.load(right + row * right_row + head * right_head + d[None, :], mask=seen & deep, other=0.0)
        u = tl.load(x + row * x_row + head * x_head + m[None, :], mask=seen & wide, other=0.0).to(tl.float32)
        a = _map(a.to(tl.float32), seen & deep, MAP_PAIRS)
        b = _map(b.to(tl.float32), seen & deep, MAP_PAIRS)
        u = _map(u, seen & wide, MAP_X)
        pairs = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        if SIDE > 0:
            h = tl.load(side + sequence * length + n, mask=n < length, other=0.0)
            pairs += h[:, None] if SIDE == 1 else h[None, :]
        met = c[None, :] >= c[:, None] if REVERSE else c[:, None] >= c[None, :]
        pairs = tl.where(met, pairs, 0.0)
        found = tl.dot(pairs, u, input_precision=PRECISION)
        found = tl.dot(a, state, found, input_precision=PRECISION)
        if UNDER:
            below = tl.sum(pairs, 1) + tl.sum(a * sums[None, :], 1)
            tl.store(under + sequence * length + n, below, mask=n < length)
            if NORMALIZE:
                found = found / (below + 1e-6)[:, None]
            sums += tl.sum(b, 0)
        if SIDE == 1:
            found += h[:, None] * totals[None, :]
            totals += tl.sum(u, 0)
        if SIDE == 2:
            found += totals[None, :]
            totals += tl.sum(h[:, None] * u, 0)
        if SLOPE:
            r = tl.load(raw + row * raw_row + head * raw_head + m[None, :], mask=seen & wide, other=0.0).to(tl.float32)
            found = found * tl.where(r > 0, 1.0, tl.exp(tl.minimum(r, 0.0)))
        tl.store(out + (row * heads + head) * width + m[None, :], found.to(out.dtype.element_ty), mask=seen & wide)
        state = tl.dot(tl.trans(b), u, state, input_precision=PRECISION)
    tl.store(end + places, state, mask=(d < depth)[:, None] & wide)
    if UNDER:
        tl.store(end_sums + sequence * depth + d, sums, mask=d < depth)
    if SIDE > 0:
        tl.store(end_sums + sequence * width + m, totals, mask=m < width)


def scan(
    tiles: _Three, state: tuple[Tensor, Tensor], *, kind: Literal["out", "dq", "dk", "dv"], elu: bool, normalize: bool,
    side: Tensor, raw: Tensor,
) -> _Three:  # fmt: skip
    """Return tri(L R^T + side) X + L S, with the state after it, for one of the four sums that the module names.

    Args:
        tiles: L and R (batch, length, heads, depth), and X (batch, length, heads, width).
        state: S (batch, heads, depth, width) and sums, (batch, heads, depth) for outputs, else (batch, heads, width).
        kind: Which of the four.
        elu: Whether features are elu + 1.
        normalize: Whether outputs are divided.
        side: h, (batch, heads, length); for outputs their denominators are written there.
        raw: q for dq, k for dk: where the features' derivative is taken.

    Returns:
        The sum (batch, length, heads, width), S and sums.
    """
    left, right, x, raw = (_rows(t) for t in (*tiles, raw))
    begin, sums = (t.contiguous() for t in state)
    batch, length, heads, width = x.shape
    depth = left.shape[-1]
    out = torch.empty(x.shape, dtype=raw.dtype, device=x.device)
    end, end_sums = torch.empty_like(begin), torch.empty_like(sums)
    strides = [stride for t in (left, right, x, raw) for stride in (t.stride(1), t.stride(2))]
    programs = batch * heads * triton.cdiv(width, columns(depth))
    if programs:
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            scan_kernel[(programs,)](
                left, right, x, raw, side, begin, sums, out, side, end, end_sums, length, heads, depth, width,
                *strides, **constants(kind, depth, elu=elu, normalize=normalize), num_warps=WARPS,
            )  # fmt: skip
    return out, end, end_sums


def constants(kind: str, depth: int, *, elu: bool, normalize: bool) -> dict[str, object]:
    """Return what is compiled into the kernel for one of the four sums."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        "C": CHUNK, "K": padded(depth), "N": columns(depth), "MAP_PAIRS": elu and kind in {"out", "dv"},
        "MAP_X": elu and kind in {"dq", "dk"}, "SLOPE": elu and kind in {"dq", "dk"},
        "SIDE": {"dq": 1, "dk": 2}.get(kind, 0), "UNDER": kind == "out", "NORMALIZE": kind == "out" and normalize,
        "REVERSE": kind in {"dk", "dv"}, "PRECISION": "tf32" if tf32 else "ieee",
    }  # fmt: skip


def forward(
    inputs: _Three, state: tuple[Tensor, Tensor], *, elu: bool, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend causally.

    Args:
        inputs: q, k (batch, length, heads, features) and v (batch, length, heads, values).
        state: S (batch, heads, features, values) and z (batch, heads, features), float32.
        elu: Whether features are elu + 1 of q and k, or q and k themselves.
        normalize: Whether to divide by the sum of weights plus 1e-6.

    Returns:
        Outputs of the type of v, denominators (batch, heads, length), and the state after the last position.
    """
    q, k, v = inputs
    batch, length, heads, _ = v.shape
    bottom = torch.empty(batch, heads, length, dtype=torch.float32, device=v.device)
    out, *last = scan((q, k, v), state, kind="out", elu=elu, normalize=normalize, side=bottom, raw=v)
    return out, bottom, last[0], last[1]


def backward(
    inputs: _Three, state: tuple[Tensor, Tensor], results: tuple[Tensor, Tensor], grads: _Three,
    *, elu: bool, normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Differentiate.

    Args:
        inputs: q, k and v, as for `forward`.
        state: As for `forward`.
        results: Outputs and denominators of `forward`.
        grads: Of the outputs, of S and of z after the last position.
        elu: As for `forward`.
        normalize: As for `forward`.

    Returns:
        Derivatives of q, k, v, S and z.
    """
    q, k, v = inputs
    out, bottom = results
    grad, grad_memory, grad_keys = grads
    g = grad.to(torch.float32)
    h = torch.zeros_like(bottom)
    if normalize:
        g = g / (bottom.transpose(1, 2).unsqueeze(-1) + EPSILON)
        h = -(g * out).sum(-1).transpose(1, 2).contiguous()
    memory, keys = state
    common: dict[str, Any] = {"elu": elu, "normalize": normalize, "side": h}
    dq, _, _ = scan((g, v, k), (memory.mT, keys), kind="dq", raw=q, **common)
    dk, _, begun = scan((v, g, q), (grad_memory.mT, grad_keys), kind="dk", raw=k, **common)
    dv, first, _ = scan((k, q, g), (grad_memory, grad_keys), kind="dv", raw=v, **common)
    return dq, dk, dv, first, begun


def _rows(x: Tensor) -> Tensor:
    """Return a tensor whose positions are at one distance across samples and whose features are contiguous."""
    return x if x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1) else x.contiguous()


def columns(depth: int) -> int:
    """Return how many columns of a state of so many rows one program keeps: more spill."""
    return 16 if depth > 64 else 32


def padded(size: int) -> int:
    """Return the size of a tile that holds so many features: a power of two, at least 16."""
    return max(16, 1 << (size - 1).bit_length())
