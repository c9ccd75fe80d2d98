"""Values with which the factors of a Kronecker-sparse layer may start, other than random ones.

A chain of square factors (a, r, r, d), a the product of the radices to its left and d of those to its right, holds
I_n, the orthonormal Hadamard matrix (r a power of two; the Kronecker product of small ones), and the Fourier matrix of
inputs in digit-reversed order: X[i, k, l, j] = exp(-2 pi i (k l / r + l j / (r d))), decimation in time.
Orthonormal blocks make orthonormal factors, whose product keeps lengths.
Sources: Cooley, Tukey, 1965; Dao et al., "Learning fast algorithms with butterflies", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..patterns import Chain, KSPattern

Init = Literal["normal", "identity", "orthogonal", "hadamard", "fft"]
NAMES: tuple[Init, ...] = ("normal", "identity", "orthogonal", "hadamard", "fft")


def _identity(pattern: KSPattern, dtype: torch.dtype) -> Tensor:
    a, b, c, d = pattern
    return torch.eye(b, c, dtype=dtype).view(1, b, c, 1).expand(a, b, c, d)


def _hadamard(pattern: KSPattern, dtype: torch.dtype) -> Tensor:
    a, b, c, d = pattern
    block = torch.ones(1, 1, dtype=dtype)
    while len(block) < b:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / math.sqrt(2)
    return block.view(1, b, c, 1).expand(a, b, c, d)


def _fourier(pattern: KSPattern, dtype: torch.dtype) -> Tensor:
    a, b, c, d = pattern
    out, into, j = torch.arange(b).view(b, 1, 1), torch.arange(c).view(1, c, 1), torch.arange(d).view(1, 1, d)
    turns = (out * into * d + into * j) % (b * d)  # exact integers, so that angles are as good as float64 can say
    angles = turns.double() * (-2 * math.pi / (b * d))
    return torch.polar(torch.ones_like(angles), angles).to(dtype).expand(a, b, c, d)


def check_init(init: Init, chain: Chain, dtype: torch.dtype) -> None:
    """Refuse values that a chain cannot hold.

    Args:
        init: Name of the values.
        chain: Patterns, leftmost first.
        dtype: Of the entries.

    Raises:
        ValueError: if the name is unknown, a factor is not square or not in its place, "hadamard" meets a radix that is
            no power of two, or "fft" meets a real type.
    """
    if init not in NAMES:
        raise ValueError(f"init is one of {', '.join(map(repr, NAMES))}, got {init!r}.")
    if init == "fft" and not dtype.is_complex:
        raise ValueError(f"init='fft' needs a complex layer such as dtype=torch.complex64, got {dtype}.")
    if init in {"normal", "orthogonal"}:
        return
    before = 1
    for pattern in chain:
        a, b, c, d = pattern
        if b != c or (init != "identity" and (a != before or a * b * d != chain.shape[0])):
            raise ValueError(
                f"init={init!r} needs square factors (a, r, r, d) with a the product of the radices to the left, such "
                f"as Chain.butterfly(n), got {tuple(pattern)} in {chain}."
            )
        if init == "hadamard" and b & (b - 1):
            raise ValueError(f"init='hadamard' needs radices that are powers of two, got {b} in {chain}.")
        before *= b


@torch.no_grad()
def fill_(blocks: Tensor, pattern: KSPattern, init: Init, generator: torch.Generator | None) -> None:
    """Write the values of one factor; `check_init` must have passed.

    Args:
        blocks: Free entries, (a, b, c, d); written.
        pattern: (a, b, c, d).
        init: Any name but "normal".
        generator: Source of randomness of "orthogonal"; None for torch's own.
    """
    if init == "orthogonal":
        a, b, c, d = pattern
        exact = torch.complex128 if blocks.is_complex() else torch.float64
        noise = torch.randn(a, d, max(b, c), min(b, c), dtype=exact, device=blocks.device, generator=generator)
        q, r = torch.linalg.qr(noise)
        # Signs of the diagonal make the distribution uniform.
        signs = torch.sgn(r.diagonal(dim1=-2, dim2=-1))
        q = q * signs.unsqueeze(-2)
        blocks.copy_((q if b >= c else q.mH).permute(0, 2, 3, 1))
        return
    made: dict[str, Callable[[KSPattern, torch.dtype], Tensor]] = {
        "identity": _identity, "hadamard": _hadamard, "fft": _fourier,
    }  # fmt: skip
    exact = torch.complex128 if blocks.is_complex() else torch.float64
    blocks.copy_(made[init](pattern, exact))
