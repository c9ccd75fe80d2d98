"""One factor: its support, and blocks against the matrix they stand for."""

from __future__ import annotations

import itertools

import pytest
import torch

from eke.patterns import KSPattern, from_dense, to_dense

PATTERNS = [KSPattern(1, 3, 2, 1), KSPattern(2, 2, 3, 4), KSPattern(3, 1, 4, 2), KSPattern(5, 1, 1, 3)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)


@every_pattern
def test_support_is_the_kronecker_product(pattern):
    eye = torch.kron(torch.kron(torch.eye(pattern.a), torch.ones(pattern.b, pattern.c)), torch.eye(pattern.d))
    assert torch.equal(pattern.support(), eye != 0)
    assert pattern.shape == tuple(eye.shape)
    assert pattern.parameters == int(eye.sum())
    assert pattern.flops == 2 * pattern.parameters
    assert pattern.density == pytest.approx(float(eye.mean()))


@every_pattern
def test_every_block_entry_is_where_the_layout_says(pattern):
    blocks = torch.randn(2, *pattern, generator=torch.Generator().manual_seed(0))
    dense = to_dense(blocks)
    a, b, c, d = pattern
    for i, k, l, j in itertools.product(range(a), range(b), range(c), range(d)):  # noqa: E741
        assert torch.equal(dense[:, i * b * d + k * d + j, i * c * d + l * d + j], blocks[:, i, k, l, j])
    assert torch.equal(from_dense(dense, pattern), blocks)
    x = torch.randn(7, pattern.shape[1], generator=torch.Generator().manual_seed(1))
    einsum = torch.einsum("nacd,abcd->nabd", x.reshape(7, a, c, d), blocks[0]).reshape(7, -1)
    torch.testing.assert_close(einsum, x @ dense[0].T)


@every_pattern
def test_transpose_swaps_b_and_c(pattern):
    blocks = torch.randn(*pattern, generator=torch.Generator().manual_seed(2))
    assert torch.equal(to_dense(blocks).T, to_dense(blocks.transpose(1, 2)))
    assert pattern.transpose.shape == pattern.shape[::-1]
    assert pattern.transpose.transpose == pattern


@pytest.mark.parametrize("bad", [0, -1, 2.0, "2", True, None])
@pytest.mark.parametrize("place", range(4))
def test_entries_that_are_no_positive_integers_are_refused(bad, place):
    entries = [1, 2, 3, 4]
    entries[place] = bad
    with pytest.raises(ValueError, match=rf"KSPattern.{'abcd'[place]} must be a positive integer, got {bad!r}"):
        KSPattern(*entries)


def test_a_matrix_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 2, 2, 2\) describes matrices of shape \(4, 4\), got .*\(4, 6\)"):
        from_dense(torch.zeros(4, 6), KSPattern(1, 2, 2, 2))
