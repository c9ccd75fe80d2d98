"""Kronecker algebra against dense matrices."""

from __future__ import annotations

import pytest
import torch

from eke.curvature import Basis, Factors


def factors(groups: int = 2, rows: int = 3, n: int = 4) -> Factors:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, n, 9, dtype=torch.float64, generator=generator)
    g = torch.randn(groups, rows, 9, dtype=torch.float64, generator=generator)
    return Factors(x @ x.mT / 3, g @ g.mT / 9, x.mean(-1), samples=3, locations=3.0, active=0.5, channel_dim=1)


def dense(f: Factors) -> torch.Tensor:
    """The curvature of vec(D), rows of D stacked."""
    return torch.block_diag(*[torch.kron(g, a) for g, a in zip(f.g, f.a)])


def test_quadratic_diagonal_and_solve_agree_with_the_dense_matrix():
    f = factors()
    delta = torch.randn(f.shape, dtype=torch.float64)
    matrix = dense(f)
    assert f.quadratic(delta) == pytest.approx(0.5 * float(delta.flatten() @ matrix @ delta.flatten()), rel=1e-12)
    torch.testing.assert_close(f.diagonal.flatten(), matrix.diagonal())
    damped = matrix + 0.1 * torch.eye(len(matrix), dtype=torch.float64)
    exact = torch.linalg.solve(damped, delta.flatten())
    torch.testing.assert_close(f.eigenbasis().solve(delta, 0.1).flatten(), exact, rtol=1e-9, atol=1e-9)


def test_large_damping_turns_preconditioning_into_scaling():
    f = factors()
    gradient = torch.randn(f.shape, dtype=torch.float64)
    torch.testing.assert_close(1e9 * f.eigenbasis().solve(gradient, 1e9), gradient, rtol=1e-6, atol=1e-6)


def test_homogeneous_moment_is_that_of_inputs_with_a_one():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 9, dtype=torch.float64, generator=generator)
    ones = torch.cat([x, torch.ones(1, 1, 9, dtype=torch.float64)], 1)
    f = Factors(x @ x.mT / 3, torch.eye(2)[None], x.mean(-1), samples=3, locations=3.0)
    torch.testing.assert_close(f.homogeneous, ones @ ones.mT / 3)
    torch.testing.assert_close(f.second_moment, x @ x.mT / 9)


def test_output_is_the_block_diagonal_mean_over_all_locations():
    f = factors()
    torch.testing.assert_close(f.output, 0.5 * torch.block_diag(*f.g))


def test_wrong_shapes_and_damping_are_named():
    f = factors()
    with pytest.raises(ValueError, match=r"matrix is \(6, 4\), got a change or gradient of \(4, 6\)"):
        f.quadratic(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"damping must be positive, got 0"):
        f.eigenbasis().solve(torch.zeros(6, 4), 0.0)


@pytest.mark.parametrize(("p", "q"), [(3, 4), (2, 4), (3, 2), (2, 1)])
def test_a_basis_is_the_operator_of_its_dense_matrix(p, q):
    generator = torch.Generator().manual_seed(2)
    g, a = (
        torch.linalg.qr(torch.randn(2, n, n, dtype=torch.float64, generator=generator))[0][:, :, :k]
        for n, k in ((3, p), (4, q))
    )
    moments = torch.rand(2, p + (p < 3), q + (q < 4), dtype=torch.float64, generator=generator)
    basis = Basis(g, a, moments)
    matrix = basis.dense()
    # Written out: one projector for each pair of directions, with all that is orthogonal as one more.
    blocks = []
    for group in range(2):
        parts = []
        for vectors, n in ((g[group], 3), (a[group], 4)):
            lines = [torch.outer(v, v) for v in vectors.T]
            if len(lines) < n:
                lines.append(torch.eye(n, dtype=torch.float64) - sum(lines))
            parts.append(lines)
        pairs = [(i, j) for i in range(len(parts[0])) for j in range(len(parts[1]))]
        blocks.append(sum(moments[group, i, j] * torch.kron(parts[0][i], parts[1][j]) for i, j in pairs))
    torch.testing.assert_close(matrix, torch.block_diag(*blocks), rtol=0, atol=1e-13)
    delta = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(basis.mv(delta).flatten(), matrix @ delta.flatten(), rtol=0, atol=1e-13)
    damped = matrix + 0.3 * torch.eye(24, dtype=torch.float64)
    torch.testing.assert_close(basis.solve(delta, 0.3).flatten(), torch.linalg.solve(damped, delta.flatten()))
    assert basis.trace() == pytest.approx(float(matrix.trace()), rel=1e-12)
    assert basis.logdet(0.3) == pytest.approx(float(torch.logdet(damped)), rel=1e-12)
    torch.testing.assert_close(basis.diagonal().flatten(), matrix.diagonal())
    with pytest.raises(ValueError, match="damping must be positive, got -1"):
        basis.logdet(-1.0)


def test_a_dense_view_is_for_small_matrices():
    eye = torch.eye(100, dtype=torch.float64)[None]
    basis = Basis(eye, eye, torch.ones(1, 100, 100, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"100 x 100 would take 100000000 entries: use mv"):
        basis.dense()
