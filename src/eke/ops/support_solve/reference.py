"""What the kernel must agree with: gather, factor and solve by torch, on any device and in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def reference(gram: Tensor, support: Tensor, right: Tensor) -> Tensor:
    """Return the solutions of G[s, s] z = c[s] for a support of each sample.

    Args:
        gram: G = A^H A, (n, n).
        support: Indices of each sample, (batch, k), each once a row.
        right: c = A^H b, (batch, n).

    Returns:
        (batch, n), zero off the support. Singular systems are regularised at the level of rounding.
    """
    # one flat index a pair is several times faster than indexing rows and columns
    pairs = (support * gram.shape[1]).unsqueeze(-1) + support.unsqueeze(-2)
    solved = solve_positive(gram.reshape(-1).take(pairs), right.gather(1, support))
    return torch.zeros_like(right).scatter(1, support, solved)


def solve_positive(system: Tensor, right: Tensor) -> Tensor:
    """Return the solutions of positive semidefinite systems (batch, k, k) for right-hand sides (batch, k)."""
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        scale = system.diagonal(dim1=-2, dim2=-1).real.mean(-1)[:, None, None]
        factor, _ = torch.linalg.cholesky_ex(system + eye * scale * 100 * torch.finfo(system.dtype).eps)
    solved: Tensor = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    return solved
