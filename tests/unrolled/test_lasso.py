"""The three lasso solvers reach the one minimiser, and each keeps its own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import optimize

from eke.unrolled import (
    FISTA,
    ISTA,
    Convolutional,
    CoordinateDescent,
    Functions,
    coordinate_descent,
    fista,
    ista,
    nmse_db,
)

from .cases import small, standard

SOLVERS = {
    "ista": lambda a, b, p, **k: ista(a, b, penalty=p, iterations=20_000, tolerance=1e-13, **k),
    "fista": lambda a, b, p, **k: fista(a, b, penalty=p, iterations=5_000, tolerance=1e-13, **k),
    "fista, continued": lambda a, b, p, **k: fista(
        a, b, penalty=p, iterations=5_000, continuation=100.0, tolerance=1e-13, **k
    ),
    "coordinate": lambda a, b, p, **k: coordinate_descent(a, b, penalty=p, iterations=2_000, tolerance=1e-13, **k),
}


def objective(a, x, b, penalty):
    residual = (a @ x.unsqueeze(-1)).squeeze(-1) - b
    return residual.abs().square().sum(-1) / 2 + penalty * x.abs().sum(-1)


def quadratic_program(a, b, penalty):
    """The minimiser by bounded quasi-Newton on x = u - v, u and v >= 0: independent and slow."""
    a, b = a.numpy(), b.numpy()
    n = a.shape[1]

    def value(uv):
        r = a @ (uv[:n] - uv[n:]) - b
        g = a.T @ r
        return r @ r / 2 + penalty * uv.sum(), np.concatenate([g + penalty, -g + penalty])

    found = optimize.minimize(
        value, np.zeros(2 * n), jac=True, bounds=[(0, None)] * 2 * n, method="L-BFGS-B",
        options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 20_000, "maxfun": 100_000},
    )  # fmt: skip
    return torch.from_numpy(found.x[:n] - found.x[n:])


@pytest.mark.parametrize("name", SOLVERS)
def test_all_reach_the_minimiser_of_a_quadratic_program(name):
    a, _, b = small(batch=3)
    solution = SOLVERS[name](a, b, 0.05)
    assert bool(solution.converged.all())
    for x, right in zip(solution.x, b, strict=True):
        torch.testing.assert_close(x, quadratic_program(a, right, 0.05), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", SOLVERS)
def test_all_reach_the_minimiser_of_scikit_learn(name):
    linear_model = pytest.importorskip("sklearn.linear_model")
    a, _, b = small(batch=3, seed=1)
    solution = SOLVERS[name](a, b, 0.05)
    for x, right in zip(solution.x, b, strict=True):
        peer = linear_model.Lasso(alpha=0.05 / len(right), fit_intercept=False, tol=1e-12, max_iter=100_000)
        peer.fit(a.numpy(), right.numpy())
        torch.testing.assert_close(x, torch.from_numpy(peer.coef_), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_optimality_conditions_hold(name, matrices, dtype):
    a, _, b = small(dtype=dtype, matrices=matrices)
    solution = SOLVERS[name](a, b, 0.05)
    gradient = (a.mH @ (b - (a @ solution.x.unsqueeze(-1)).squeeze(-1)).unsqueeze(-1)).squeeze(-1)
    assert bool((gradient.abs() <= 0.05 * (1 + 1e-6)).all())
    active = solution.x != 0
    torch.testing.assert_close(gradient[active], 0.05 * solution.x.sgn()[active], rtol=0, atol=1e-7)
    torch.testing.assert_close(solution.objective, objective(a, solution.x, b, 0.05))


@pytest.mark.parametrize("name", SOLVERS)
def test_large_penalties_give_exactly_zero(name):
    a, _, b = small()
    solution = SOLVERS[name](a, b, float((b @ a).abs().max()))
    assert bool((solution.x == 0).all())


@pytest.mark.parametrize("name", SOLVERS)
def test_a_sample_does_not_see_its_batch(name):
    a, _, b = small()
    whole = SOLVERS[name](a, b, 0.05)
    single = SOLVERS[name](a, b[2:3], 0.05)
    torch.testing.assert_close(whole.x[2:3], single.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_penalties_may_differ_by_sample(name):
    a, _, b = small(batch=3)
    penalties = torch.tensor([0.01, 0.05, 0.2], dtype=torch.float64)
    whole = SOLVERS[name](a, b, penalties)
    for i in range(3):
        single = SOLVERS[name](a, b[i : i + 1], float(penalties[i]))
        torch.testing.assert_close(whole.x[i : i + 1], single.x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_signs_and_scales_go_through(name):
    a, _, b = small()
    x = SOLVERS[name](a, b, 0.05).x
    torch.testing.assert_close(SOLVERS[name](a, -3 * b, 0.15).x, -3 * x, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", SOLVERS)
def test_zero_in_gives_zero_out(name):
    a, _, b = small()
    solution = SOLVERS[name](a, torch.zeros_like(b), 0.05)
    assert bool((solution.x == 0).all())
    assert bool(solution.converged.all())


@pytest.mark.parametrize("name", SOLVERS)
def test_warm_start_at_the_answer_ends_at_once(name):
    a, _, b = small()
    cold = SOLVERS[name](a, b, 0.05)
    warm = SOLVERS[name](a, b, 0.05, x0=cold.x)
    torch.testing.assert_close(warm.x, cold.x, rtol=0, atol=1e-9)
    if name != "fista, continued":
        assert int(warm.iterations.max()) < int(cold.iterations.min())


@pytest.mark.parametrize("kind", ["functions", "convolutional"])
def test_operators_without_a_matrix_give_the_matrix_answer(kind):
    if kind == "functions":
        a, _, b = small()
        operator = Functions(lambda x: x @ a.T, lambda r: r @ a, shape=(20, 30), dtype=torch.float64)
    else:
        filters = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        operator = Convolutional(filters, (4, 5))
        a, b = operator.dense(), torch.randn(4, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrix = fista(a, b, penalty=0.1, iterations=5_000, tolerance=1e-13)
    plain = fista(operator, b, penalty=0.1, iterations=5_000, tolerance=1e-13)
    torch.testing.assert_close(plain.objective, matrix.objective, rtol=1e-9, atol=0)


def test_ista_is_its_formula():
    a, _, b = small()
    step = 1 / torch.linalg.matrix_norm(a, 2) ** 2
    x = torch.zeros(6, 30, dtype=torch.float64)
    for _ in range(7):
        z = x - step * (x @ a.T - b) @ a
        x = z.sign() * (z.abs() - step * 0.05).clamp_min(0)
    torch.testing.assert_close(ISTA(a, penalty=0.05, iterations=7)(b), x, rtol=0, atol=1e-13)


def test_ista_never_raises_the_objective():
    a, _, b = small()
    values = [objective(a, ISTA(a, penalty=0.05, iterations=k)(b), b, 0.05) for k in range(1, 30)]
    assert all(bool((after <= before + 1e-12).all()) for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("restart", [False, True])
def test_fista_keeps_its_rate(restart):
    a, _, b = small()
    best = fista(a, b, penalty=0.05, iterations=20_000, tolerance=1e-14)
    bound = 2 * float(torch.linalg.matrix_norm(a, 2) ** 2) * best.x.square().sum(-1)
    for k in range(1, 60):
        value = objective(a, FISTA(a, penalty=0.05, iterations=k, restart=restart)(b), b, 0.05)
        assert bool((value - best.objective <= bound / (k + 1) ** 2 + 1e-12).all())


def test_fista_on_the_standard_problem_is_where_it_was_measured():
    a, x, b = standard(100, drawn=200)
    found = FISTA(a, penalty=0.005, iterations=400, restart=False)(b)
    assert nmse_db(found, x) == pytest.approx(-41.8, abs=1.0)


def test_one_sweep_solves_an_orthogonal_dictionary():
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    b = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = b @ q
    expected = z.sign() * (z.abs() - 0.3).clamp_min(0)
    torch.testing.assert_close(CoordinateDescent(q, penalty=0.3, iterations=1)(b), expected)


@pytest.mark.parametrize("make", [ISTA, FISTA])
def test_gradients_reach_the_right_hand_side(make):
    a, _, b = small(batch=2)
    solver = make(a, penalty=0.05, iterations=4)
    assert torch.autograd.gradcheck(solver, (b.requires_grad_(),))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda a: ISTA(a, penalty=-0.1), "penalty must be 0 or more, got -0.1"),
        (lambda a: ISTA(a, penalty=torch.tensor([-1.0])), r"\(batch,\), >= 0, got shape \(1,\) with least value -1"),
        (lambda a: ISTA(a, penalty=0.1, step=0.0), "step must be positive, or None.*got 0.0"),
        (lambda a: ISTA(a, penalty=0.1, iterations=0), "ISTA needs at least 1 iteration, got 0"),
        (lambda a: FISTA(a, penalty=0.1, continuation=0.5), "by 1 or more, got 0.5"),
        (lambda a: fista(a, torch.ones(2, 20).double(), penalty=torch.ones(3)), "penalty has 3 entries, b 2 samples"),
        (lambda a: fista(a, torch.ones(2, 20).double(), penalty=0.1, tolerance=-1), "0 or more, got -1"),
    ],
)
def test_wrong_settings_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(small()[0])
