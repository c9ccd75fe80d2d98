"""Orders in which a matrix is a butterfly, known and unknown, and transforms with known factors."""

from __future__ import annotations

import functools

import pytest
import torch

from eke.linalg import (
    best_level_permutation,
    bit_reversal,
    cosine,
    factorize,
    find_permutations,
    fourier,
    fourier_blocks,
    hadamard,
    hadamard_blocks,
    level_permutations,
)
from eke.patterns import Chain, to_dense


def dense_product(blocks: list[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.matmul, [to_dense(block) for block in blocks])


def test_bit_reversal_reverses_the_digits():
    for levels in range(1, 8):
        n = 2**levels
        assert bit_reversal(n).tolist() == [int(f"{i:0{levels}b}"[::-1], 2) for i in range(n)]


@pytest.mark.parametrize("n", [2, 4, 8, 64])
def test_transforms_equal_their_definitions_and_their_factors(n):
    eye = torch.eye(n, dtype=torch.complex128)
    torch.testing.assert_close(fourier(n), torch.fft.fft(eye), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard(n) @ hadamard(n).T, n * eye.real, rtol=0, atol=0)
    torch.testing.assert_close(cosine(n) @ cosine(n).T, eye.real, rtol=0, atol=1e-12)
    assert torch.equal(dense_product(hadamard_blocks(n)), hadamard(n))
    torch.testing.assert_close(dense_product(fourier_blocks(n)), fourier(n)[:, bit_reversal(n)], rtol=0, atol=1e-12)
    assert [tuple(b.shape) for b in fourier_blocks(n)] == [tuple(p) for p in Chain.butterfly(n)]
    assert fourier_blocks(n, dtype=torch.complex64)[0].dtype == torch.complex64


def test_the_eight_permutations_are_the_known_ones():
    orders = level_permutations(32)
    assert len(orders) == 8
    assert all(sorted(order.tolist()) == list(range(32)) for order in orders.values())
    assert torch.equal(orders[0, 0, 0], torch.arange(32))
    assert torch.equal(orders[0, 0, 1], bit_reversal(32))
    chain = Chain.butterfly(32)
    for (_, _, split), order in orders.items():
        assert (factorize(fourier(32)[:, order], chain).error < 1e-14) == bool(split)
        error = factorize(hadamard(32)[:, order], chain).error
        assert error == pytest.approx(0.8660254, abs=1e-6) if split else error < 1e-14
    assert best_level_permutation(fourier(32), chain).error < 1e-14
    assert 0.9 < best_level_permutation(cosine(32), chain).error < 0.92


def shuffled(matrix: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(matrix)
    return matrix[torch.randperm(n, generator=generator)][:, torch.randperm(n, generator=generator)]


@pytest.mark.parametrize("n", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["real", "complex", "hadamard", "fourier"])
def test_unknown_orders_of_members_are_found(n, kind):
    dtype = torch.complex128 if kind == "complex" else torch.float64
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        blocks = [torch.randn(*p, dtype=dtype, generator=generator) for p in Chain.butterfly(n)]
        target = {"hadamard": hadamard, "fourier": fourier}.get(kind, lambda _, b=blocks: dense_product(b))(n)
        matrix = shuffled(target, seed)
        found = find_permutations(matrix)
        assert found.error <= 1e-13
        torch.testing.assert_close(found.to_dense(), matrix, rtol=0, atol=1e-12 * float(matrix.abs().max()))


@pytest.mark.parametrize("kind", [hadamard, fourier])
def test_unknown_orders_are_found_under_noise(kind):
    """What is left is the part of the noise that no butterfly takes up: a little less than all of it."""
    matrix = shuffled(kind(32), 3)
    for level in (1e-3, 1e-2, 1e-1):
        noise = torch.randn(32, 32, dtype=matrix.dtype, generator=torch.Generator().manual_seed(4))
        noise *= level * torch.linalg.matrix_norm(matrix) / torch.linalg.matrix_norm(noise)
        assert 0.7 * level < find_permutations(matrix + noise).error < level


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.zeros(4, 8), {}, r"describes 8 x 8 matrices, got \(4, 8\)"),
        (torch.zeros(12, 12), {}, r"power of two of at least 2, got 12"),
        (torch.zeros(2, 8, 8), {}, r"one matrix and tries >= 1, got \(2, 8, 8\) and tries=4"),
        (torch.zeros(8, 8), {"tries": 0}, r"got \(8, 8\) and tries=0"),
    ],
)
def test_what_has_no_orders_to_find_is_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        find_permutations(matrix, **options)


def test_the_best_of_eight_orders_is_of_one_matrix():
    for stack in (torch.zeros(2, 8, 8), torch.zeros(8, 8, 8)):
        with pytest.raises(ValueError, match=r"needs one matrix \(m, n\), got \(., 8, 8\)"):
            best_level_permutation(stack, Chain.butterfly(8))
    with pytest.raises(ValueError, match=r"describes 8 x 8 matrices, got \(8, 4\)"):
        best_level_permutation(torch.zeros(8, 4), Chain.butterfly(8))
