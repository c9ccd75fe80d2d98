"""Exact answers without noise: on every kind of A, proved where they are said to be, handed on where they are not."""

from __future__ import annotations

import sys

import pytest
import torch

from eke import unrolled


def problem(m=60, n=120, density=0.1, **settings):
    settings = {"batch": 40, "dtype": torch.float64, "generator": torch.Generator().manual_seed(0)} | settings
    return unrolled.gaussian(m, n, density, **settings)


@pytest.mark.parametrize(
    ("dtype", "decibels"),
    [(torch.float32, -100), (torch.float64, -250), (torch.complex64, -100), (torch.complex128, -250)],
    ids=str,
)
def test_answers_are_exact(dtype, decibels):
    given = problem(dtype=dtype)
    solution = unrolled.exact(given.A, given.b)
    assert bool(solution.converged.all())
    assert given.nmse_db(solution.x) < decibels
    assert given.nmse_db(unrolled.Exact(given.A)(given.b)) < decibels
    assert str(solution).startswith("Exact: 40 problems, ")


@pytest.mark.parametrize("settings", [{"condition": 50.0}, {"density": 0.02}, {"density": 0.18}, {"m": 30, "n": 300,
    "density": 0.01}], ids=str)  # fmt: skip
def test_answers_that_are_proved_are_right(settings):
    given = problem(**settings)
    solution = unrolled.exact(given.A, given.b)
    assert float(solution.converged.double().mean()) > 0.7
    proved = solution.converged
    torch.testing.assert_close(solution.x[proved], given.x[proved], rtol=0, atol=1e-8)


@pytest.mark.parametrize("settings", [{"snr_db": 30.0}, {"density": 0.9}], ids=str)
def test_nothing_is_proved_where_there_is_noise_or_no_sparsity(settings):
    given = problem(**settings)
    solution = unrolled.exact(given.A, given.b)
    assert not bool(solution.converged.any())
    assert not bool(solution.diverged.any())


def test_one_matrix_a_sample():
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(8, 40, 80, generator=generator, dtype=torch.float64)
    x = torch.randn(8, 80, generator=generator, dtype=torch.float64)
    x *= torch.rand(8, 80, generator=generator) < 0.08
    b = (a @ x.unsqueeze(-1)).squeeze(-1)
    solution = unrolled.exact(a, b)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(unrolled.Exact(a)(b), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("shape", [(60, 40), (60, 60)])
def test_as_many_rows_as_columns_and_more(shape):
    given = problem(*shape, 0.2)
    solution = unrolled.exact(given.A, given.b)
    assert bool(solution.converged.all())
    torch.testing.assert_close(solution.x, given.x, rtol=0, atol=1e-9)


def test_what_lies_outside_the_range_is_noise():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(60, 30, generator=generator, dtype=torch.float64) @ torch.randn(
        30, 120, generator=generator, dtype=torch.float64
    )
    x = torch.zeros(2, 120, dtype=torch.float64)
    x[:, [3, 70]] = 1.0
    b = x @ a.T
    outside = torch.linalg.svd(a).U[:, -1]
    b[1] += outside
    solution = unrolled.exact(a, b)
    assert solution.converged.tolist() == [True, False]
    torch.testing.assert_close(solution.x[0], x[0], rtol=0, atol=1e-9)


def test_steps_and_kernel_agree():
    given = problem()
    solver = unrolled.Exact(given.A)
    fast = solver.solve(given.b)
    slow = solver.solve(given.b, callback=lambda progress: None)
    torch.testing.assert_close(fast.x, slow.x, rtol=0, atol=1e-10)
    assert bool((fast.converged == slow.converged).all())
    assert int((fast.iterations - slow.iterations).abs().max()) <= 1
    torch.testing.assert_close(solver.trajectory(given.b)[-1], slow.x, rtol=0, atol=1e-10)


def test_a_start_near_the_answer_is_used():
    given = problem()
    cold = unrolled.exact(given.A, given.b)
    warm = unrolled.exact(given.A, given.b, x0=given.x + 1e-4 * torch.randn(given.x.shape, dtype=torch.float64))
    assert bool(warm.converged.all())
    assert float(warm.iterations.double().mean()) < float(cold.iterations.double().mean())


def test_derivatives_are_those_of_least_squares_in_the_range():
    given = problem(20, 40, 0.05, batch=2)
    b, plain = given.b.clone().requires_grad_(), given.b.clone().requires_grad_()
    weights = torch.randn(2, 40, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (weights * unrolled.Exact(given.A)(b)).sum().backward()
    inverse = torch.linalg.pinv(given.A)
    for i in range(2):
        support = given.x[i].nonzero().squeeze(-1)
        system = (inverse @ given.A)[support][:, support]
        (weights[i, support] * torch.linalg.solve(system, inverse[support] @ plain[i])).sum().backward()
    torch.testing.assert_close(b.grad, plain.grad)


def test_no_kernel_is_no_difference(monkeypatch):
    given = problem()
    fast = unrolled.Exact(given.A)(given.b)
    # the function has the name of its file
    monkeypatch.setattr(sys.modules[unrolled.Exact.__module__], "available", lambda like: False)
    torch.testing.assert_close(unrolled.Exact(given.A)(given.b), fast, rtol=0, atol=1e-10)


def test_moving_prepares_anew():
    given = problem()
    solver = unrolled.Exact(given.A)
    solver(given.b)
    assert given.nmse_db(solver.to(torch.float32)(given.b.float()).double()) < -100


def test_what_runs_away_is_answered_by_the_shortest_solution():
    steps, at = torch.arange(512.0), torch.arange(64.0)[:, None] + 0.5
    a = torch.cos(torch.pi * at * steps / 512).double()
    a = a / torch.linalg.vector_norm(a, dim=0)
    x = torch.zeros(30, 512, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    x.scatter_(1, torch.randint(512, (30, 12), generator=generator), 1.0)
    b = x @ a.T
    for found in (unrolled.exact(a, b), unrolled.exact(a, b, callback=lambda progress: None)):
        wrong = ~found.converged
        assert bool(wrong.any())
        shortest = torch.linalg.vector_norm(b @ torch.linalg.pinv(a, rtol=1e-6).T, dim=-1)
        assert bool((torch.linalg.vector_norm(found.x, dim=-1) <= 10.01 * shortest).all())
