"""The metric: its value, gradient and diagonal against dense algebra."""

from __future__ import annotations

import pytest
import torch

from eke.linalg import Metric, cholesky, damped


def factors(m: int = 3, n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 6, dtype=torch.float64, generator=generator)
    g = torch.randn(m, 6, dtype=torch.float64, generator=generator)
    return a @ a.T, g @ g.T


@pytest.mark.parametrize("with_g", [False, True])
def test_loss_gradient_and_score_agree_with_the_dense_form(with_g):
    a, g = factors()
    metric = Metric(a, g if with_g else None)
    dense = torch.kron(g if with_g else torch.eye(3, dtype=torch.float64), a)
    delta = torch.randn(3, 4, dtype=torch.float64)
    flat = delta.flatten()
    assert metric.loss(delta) == pytest.approx(0.5 * float(flat @ dense @ flat), rel=1e-12)
    torch.testing.assert_close(metric.gradient(delta).flatten(), dense @ flat)
    torch.testing.assert_close(metric.score((3, 4)).flatten(), dense.diagonal())


def test_damping_is_relative_to_the_mean_diagonal():
    a, _ = factors()
    expected = a + 0.1 * a.diagonal().mean() * torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(damped(a, 0.1), expected)
    torch.testing.assert_close(damped(torch.zeros(4, 4), 0.1), 0.1 * torch.eye(4, dtype=torch.float64))
    assert torch.equal(damped(torch.stack([a, 2 * a]), 0.1)[1], damped(2 * a, 0.1))


def test_bad_factors_are_named():
    a, g = factors()
    with pytest.raises(ValueError, match=r"Metric.a must be a square matrix, got shape \(4, 3\)"):
        Metric(a[:, :3])
    with pytest.raises(ValueError, match=r"Metric.g has 1 entries that are not finite"):
        Metric(a, g.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan")).double()))
    with pytest.raises(ValueError, match=r"Metric.a must be symmetric"):
        Metric(a.triu())
    with pytest.raises(ValueError, match=r"Metric.a needs a diagonal >= 0, got -1"):
        Metric(-torch.eye(2))
    with pytest.raises(ValueError, match=r"3 rows and 4 columns, got \(4, 3\)"):
        Metric(a, g).loss(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"The second moment of the inputs \(2 x 2\) is not positive definite"):
        cholesky(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"damping must be >= 0.*got -0.1"):
        damped(a, -0.1)
