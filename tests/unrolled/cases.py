"""The standard problem by numpy's generator, and small ones."""

from __future__ import annotations

import numpy as np
import torch


def standard(batch: int, *, drawn: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A (250, 500), x and b of the standard problem, seed 0: `drawn` vectors are drawn and the first `batch` kept."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((250, 500))
    a /= np.linalg.norm(a, axis=0)
    count = drawn or batch
    x = (rng.random((count, 500)) < 0.1) * rng.standard_normal((count, 500))
    return torch.from_numpy(a), torch.from_numpy(x[:batch]), torch.from_numpy((x @ a.T)[:batch])


def small(*, dtype=torch.float64, batch=6, m=20, n=30, nonzeros=3, seed=0, matrices=False):
    """A, x and b: unit columns, `nonzeros` entries of magnitude at least 0.5 a sample."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, m, n) if matrices else (m, n)
    a = torch.randn(shape, generator=generator, dtype=dtype)
    a = a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)
    x = torch.zeros(batch, n, dtype=dtype)
    for row in x:
        at = torch.randperm(n, generator=generator)[:nonzeros]
        values = torch.randn(nonzeros, generator=generator, dtype=dtype)
        row[at] = values + 0.5 * values.sgn()
    return a, x, (a @ x.unsqueeze(-1)).squeeze(-1)
