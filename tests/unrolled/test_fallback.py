"""The second solver answers exactly where the first does not vouch for its answer."""

from __future__ import annotations

import warnings

import pytest
import torch

from eke import unrolled


def mixed():
    """A batch whose first five samples have no noise."""
    given = unrolled.gaussian(
        60, 120, 0.1, batch=20, snr_db=30.0, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    b = given.b.clone()
    b[:5] = given.x[:5] @ given.A.T
    return given, b


def test_others_take_what_is_not_proved():
    given, b = mixed()
    other = unrolled.VAMP(given.A, iterations=20)
    both = unrolled.Fallback(unrolled.Exact(given.A), other)
    solution = both.solve(b)
    assert solution.details["first"].tolist() == [True] * 5 + [False] * 15
    assert solution.converged.tolist() == [True] * 5 + [False] * 15
    assert solution.method == "Exact, VAMP for 15"
    for x in (solution.x, both(b)):
        torch.testing.assert_close(x[:5], given.x[:5], rtol=0, atol=1e-10)
        torch.testing.assert_close(x[5:], other(b[5:]))
    torch.testing.assert_close(solution.residual, (solution.x @ given.A.T - b).norm(dim=1), rtol=1e-6, atol=1e-12)


def test_nothing_changes_where_all_is_well():
    given, b = mixed()
    first = unrolled.Exact(given.A)
    alone, both = first.solve(b[:5]), unrolled.Fallback(first, unrolled.ISTA(given.A, penalty=1.0)).solve(b[:5])
    assert bool((alone.x == both.x).all())
    assert both.method == "Exact"


def test_penalties_of_samples_follow_them():
    given, b = mixed()
    penalty = torch.linspace(0.01, 0.2, len(b), dtype=torch.float64)
    lasso = unrolled.FISTA(given.A, penalty=penalty, iterations=500)
    both = unrolled.Fallback(unrolled.Exact(given.A), lasso)
    torch.testing.assert_close(both.solve(b).x[5:], lasso(b)[5:])
    assert lasso.penalty is penalty


def test_matrices_of_samples_follow_them():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 40, 80, generator=generator, dtype=torch.float64)
    x = torch.zeros(4, 80, dtype=torch.float64)
    x[:, 7] = 1.0
    b = (a @ x.unsqueeze(-1)).squeeze(-1)
    b[2:] += 0.1 * torch.randn(2, 40, generator=generator, dtype=torch.float64)
    lasso = unrolled.FISTA(a, penalty=0.5, iterations=300)
    solution = unrolled.Fallback(unrolled.Exact(a), lasso).solve(b)
    torch.testing.assert_close(solution.x[:2], x[:2], rtol=0, atol=1e-10)
    torch.testing.assert_close(solution.x[2:], lasso(b)[2:])


def test_what_has_not_settled_goes_to_the_lasso_without_warnings():
    at = torch.arange(60.0)[:, None] - torch.arange(120.0) / 2
    bumps = torch.exp(-(at**2) / 8).double()
    bumps = bumps / bumps.norm(dim=0)
    x = torch.zeros(10, 120, dtype=torch.float64)
    x[:, 10::40] = 1 + torch.rand(10, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    b = x @ bumps.T
    lasso = unrolled.FISTA(bumps, penalty=1e-3, iterations=3000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = unrolled.Fallback(unrolled.VAMP(bumps), lasso).solve(b)
    wrong = ~solution.details["first"]
    assert bool(wrong.any())
    torch.testing.assert_close(solution.x[wrong], lasso(b)[wrong])


def test_another_matrix_is_refused():
    given, _ = mixed()
    with pytest.raises(ValueError, match="Both solvers must be for the same A, got Dense"):
        unrolled.Fallback(unrolled.Exact(given.A), unrolled.VAMP(given.A[:, :50]))
