"""Which solver is chosen, and how near an answer is to the optimum."""

from __future__ import annotations

import pytest
import torch

from eke.unrolled import FISTA, HTP, OMP, VAMP, Exact, Fallback, Functions, choose, fista, gaussian, nmse_db, optimality

from .cases import small


def test_random_dictionaries_without_noise_are_solved_exactly():
    problem = gaussian(100, 200, 0.05, batch=40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for exact in (True, False):
        choice = choose(problem.A, problem.b, exact=exact)
        assert isinstance(choice.solver, Fallback)
        assert isinstance(choice.solver.first, Exact)
        assert "proved exact on 16 samples tried" in choice.reason
        assert problem.nmse_db(choice.solver.solve(problem.b, tolerance=choice.tolerance).x) < -200
    assert isinstance(choose(problem.A, problem.b[:5], exact=True).solver, Exact)


def test_without_a_kernel_message_passing_is_polished():
    problem = gaussian(100, 200, 0.05, batch=40, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    choice = choose(problem.A, problem.b, exact=True)
    assert isinstance(choice.solver, VAMP)
    assert problem.nmse_db(choice.solver.solve(problem.b).x) < -200


def test_samples_of_zeros_say_nothing_against_message_passing():
    problem = gaussian(100, 200, 0.05, batch=40, snr_db=30, generator=torch.Generator().manual_seed(0))
    b = problem.b * (torch.arange(40) % 3 != 0)[:, None]
    choice = choose(problem.A, b)
    assert isinstance(choice.solver.first, VAMP)
    assert "holds on 16 samples" in choice.reason
    assert bool((choice.solver(b)[::3] == 0).all())
    for exact in (True, False):
        assert bool((choose(problem.A, 0 * b, exact=exact).solver(0 * b) == 0).all())


def test_similar_columns_that_greedy_choices_tell_apart_are_solved_by_them():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 60, generator=generator, dtype=torch.float64)
    a = torch.cat([a, a[:, :20] + 0.2 * torch.randn(30, 20, generator=generator, dtype=torch.float64)], 1)
    x = torch.zeros(24, 80, dtype=torch.float64)
    x[:, [3, 40]] = torch.tensor([1.0, -2.0], dtype=torch.float64)
    choice = choose(a, x @ a.T + 0.01, sparsity=2)
    assert isinstance(choice.solver, (HTP, OMP))
    exact = choose(a, x @ a.T, sparsity=2)
    torch.testing.assert_close(exact.solver.solve(x @ a.T, tolerance=exact.tolerance).x, x, rtol=0, atol=1e-9)


def test_noise_does_not_send_message_passing_away():
    problem = gaussian(100, 200, 0.1, batch=20, snr_db=20, generator=torch.Generator().manual_seed(0))
    assert isinstance(choose(problem.A, problem.b).solver.first, VAMP)


def test_coherent_dictionaries_fall_back_on_the_lasso():
    generator = torch.Generator().manual_seed(0)
    a = torch.exp(-((torch.arange(60.0)[:, None] - torch.arange(120.0) / 2) ** 2) / 8).double()
    a = a / torch.linalg.vector_norm(a, dim=0)
    x = torch.zeros(20, 120, dtype=torch.float64)
    x[:, 10::40] = 1 + torch.rand(20, 3, generator=generator, dtype=torch.float64)
    b = x @ a.T
    choice = choose(a, b)
    assert isinstance(choice.solver, FISTA)
    assert "coherent" in choice.reason
    assert nmse_db(choice.solver.solve(b, tolerance=choice.tolerance).x, x) < -35


def test_what_is_asked_decides():
    a, _, b = small()
    assert isinstance(choose(a, b, penalty=0.1).solver, FISTA)
    assert isinstance(choose(a, b + 0.1, sparsity=3).solver, (HTP, OMP))
    functions = Functions(lambda x: x @ a.T, lambda r: r @ a, shape=(20, 30), dtype=torch.float64)
    assert isinstance(choose(functions, b).solver, FISTA)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gap_bounds_the_distance_to_the_minimum_and_closes_there(dtype):
    a, _, b = small(dtype=dtype)
    penalty = torch.linspace(0.05, 0.3, len(b), dtype=torch.float64)
    best = fista(a, b, penalty=penalty, iterations=20_000, tolerance=1e-14)
    near = optimality(a, b, best.x, penalty=penalty)
    assert float(near.violation.max()) < 1e-8
    assert float(near.gap.abs().max()) < 1e-10
    torch.testing.assert_close(near.objective, best.objective)
    rough = optimality(a, b, fista(a, b, penalty=penalty, iterations=5).x, penalty=penalty)
    assert bool((rough.gap >= rough.objective - near.objective).all())
    assert float(rough.violation.max()) > 0.01


def test_zero_is_optimal_from_the_largest_penalty_on():
    a, _, b = small()
    penalty = (b @ a).abs().amax(-1)
    near = optimality(a, b, torch.zeros(6, 30, dtype=torch.float64), penalty=penalty)
    assert float(near.violation.max()) < 1e-12
    assert float(near.gap.abs().max()) < 1e-12


def test_contradictions_are_refused():
    a, x, b = small()
    with pytest.raises(ValueError, match=r"got both: 0\.1 and 3"):
        choose(a, b, penalty=0.1, sparsity=3)
    with pytest.raises(ValueError, match="penalties above 0, got 0"):
        optimality(a, b, x, penalty=0.0)
    with pytest.raises(ValueError, match=r"^x must be \(batch, n\) = \(batch, 30\).*got \(6, 20\)"):
        optimality(a, b, b, penalty=0.1)
    with pytest.raises(ValueError, match="x has 2 samples and b 6"):
        optimality(a, b, x[:2], penalty=0.1)


def test_a_tolerance_is_the_lassos():
    problem = gaussian(20, 40, 0.1, batch=3, dtype=torch.float64)
    assert choose(problem.A, problem.b, penalty=0.1).tolerance == 1e-8
    assert choose(problem.A, problem.b, penalty=0.1, tolerance=1e-4).tolerance == 1e-4
    with pytest.raises(ValueError, match="belongs to a penalty's lasso, got 0\\.1"):
        choose(problem.A, problem.b, tolerance=0.1)
