"""Kronecker-sparse products as a structure: declared exactness, weights, messages."""

from __future__ import annotations

import math

import pytest
import torch

from eke.linalg import factorize
from eke.patterns import Chain
from eke.structures import KroneckerSparse


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_exactness_counts_the_factors_without_redundancy():
    assert KroneckerSparse(Chain.monarch(8, 8, 2)).exactness == "exact"
    assert KroneckerSparse(Chain.butterfly(16)).exactness == math.sqrt(3)
    assert KroneckerSparse(Chain([(1, 4, 4, 1)] * 3)).exactness == "exact"


def test_the_projection_is_within_the_declared_factor_of_the_lower_bound():
    structure = KroneckerSparse(Chain.butterfly(32))
    v = noise(32, 32)
    error = float((structure.project(v) - v).norm() / v.norm())
    assert error <= structure.exactness * factorize(v, structure.chain).lower_bound * (1 + 1e-12)


def test_a_separable_score_is_a_scaling():
    structure = KroneckerSparse(Chain.mixed_radix(12, 18))
    v, rows, cols = noise(12, 18), noise(12, seed=1).abs() + 0.1, noise(18, seed=2).abs() + 0.1
    scaled = structure.project(rows[:, None] * v * cols) / rows[:, None] / cols
    torch.testing.assert_close(structure.project(v, rows[:, None] ** 2 * cols**2), scaled, rtol=0, atol=1e-10)
    assert structure.project(v.half()).dtype == torch.float32


def test_what_does_not_fit_is_refused():
    structure = KroneckerSparse(Chain.butterfly(8))
    with pytest.raises(ValueError, match=r"matrices of shape \(8, 8\), got \(8, 4\); use skip="):
        structure.project(noise(8, 4))
    with pytest.raises(ValueError, match=r"row weight times a column weight, got \(8, 8\)"):
        structure.project(noise(8, 8), noise(8, 8, seed=1).abs())
    with pytest.raises(ValueError, match=r"factor of shape \(1, 2, 2, 4\), got \(4, 2, 2, 1\)"):
        structure.decode(dict(enumerate_reversed(structure)), (8, 8))
    with pytest.raises(TypeError, match=r"needs a floating point matrix, got torch.complex128"):
        structure.encode(noise(8, 8) + 1j * noise(8, 8, seed=1))
    with pytest.raises(ValueError, match=r"1 of 64 entries that are not finite"):
        structure.encode(torch.full((8, 8), 1.0).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan)))
    with pytest.raises(ValueError, match=r"not chainable"):
        KroneckerSparse(Chain([*Chain.butterfly(4), *Chain.butterfly(4).transpose]))


def enumerate_reversed(structure: KroneckerSparse) -> list[tuple[str, torch.Tensor]]:
    blocks = list(structure.encode(noise(8, 8)).values())[::-1]
    return [(str(i), block) for i, block in enumerate(blocks)]
