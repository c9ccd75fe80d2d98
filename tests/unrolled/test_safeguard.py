"""The safeguard: whatever the learned part does, the lasso's minimiser is reached."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from eke.unrolled import ALISTA, FISTA, ISTA, HyperLISTA, Safeguarded, SparseSolver

from .cases import small

PENALTY = 0.1


class Adversary(SparseSolver):
    """Answers with something large, something random, the old x turned round, or NaN, by turns."""

    def __init__(self, a, *, layers=40, kinds=4):
        super().__init__(a, iterations=layers)
        self.kinds = kinds

    def start(self, operator, b, x0):
        return (b.new_zeros(len(b), operator.shape[1]) if x0 is None else x0,)

    def step(self, k, operator, state):
        x = state[0]
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64).to(x.dtype)
        return ([1e6 * noise, x + 0.1 * noise, -x, x * math.nan][k % self.kinds],)


class Tempter(Adversary):
    """Moves towards the minimiser of another penalty, so that many of its steps look good."""

    def step(self, k, operator, state):
        del k
        return (state[0] * 0.999,)


def minimiser(a, b):
    """The lasso by coordinate descent in numpy, to machine precision."""
    a, b = a.numpy(), b.numpy()
    x = np.zeros((len(b), a.shape[1]))
    size = (a**2).sum(0)
    for row, right in zip(x, b, strict=True):
        r = right.copy()
        for _ in range(400):
            for j in range(a.shape[1]):
                z = row[j] * size[j] + a[:, j] @ r
                new = np.sign(z) * max(abs(z) - PENALTY, 0) / size[j]
                r += (row[j] - new) * a[:, j]
                row[j] = new
    return torch.from_numpy(x)


@pytest.mark.parametrize("repeat", [False, True], ids=["once", "over and over"])
@pytest.mark.parametrize("classic", [ISTA, FISTA], ids=lambda c: c.__name__)
@pytest.mark.parametrize("learned", [Adversary, Tempter], ids=lambda c: c.__name__)
def test_adversaries_cannot_keep_it_from_the_minimiser(learned, classic, repeat):
    a, _, b = small(m=15, n=20, batch=3)
    solver = Safeguarded(learned(a), classic(a, penalty=PENALTY, iterations=2000), repeat=repeat)
    torch.testing.assert_close(solver(b), minimiser(a, b), rtol=0, atol=1e-7)


def test_adversary_ends_at_scikit_learns_minimiser():
    linear_model = pytest.importorskip("sklearn.linear_model")
    a, _, b = small(m=15, n=20, batch=3)
    found = Safeguarded(Adversary(a), ISTA(a, penalty=PENALTY, iterations=2000), repeat=True)(b)
    lasso = linear_model.Lasso(alpha=PENALTY / 15, fit_intercept=False, tol=1e-14, max_iter=100_000)
    expected = np.stack([lasso.fit(a.numpy(), row).coef_.copy() for row in b.numpy()])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("matrices", [False, True], ids=["one", "each"])
def test_good_steps_are_taken_and_bad_samples_alone_fall_back(dtype, matrices):
    a, _, b = small(dtype=dtype, matrices=matrices)
    learned = HyperLISTA(a, c1=0.05, c2=0.03, c3=0.2, layers=12)
    solver = Safeguarded(learned, FISTA(a, penalty=1e-3, iterations=3000))
    solution = solver.solve(b, tolerance=1e-10)
    assert bool((solution.details["accepted"] >= 2).all())
    assert float(solution.details["fixed_point_residual"].max()) < 1e-8
    alone = FISTA(a, penalty=1e-3, iterations=20000).solve(b, tolerance=1e-13)
    torch.testing.assert_close(solution.x, alone.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(solution.objective, alone.objective, rtol=0, atol=1e-9)


def test_penalties_of_each_sample_and_samples_that_leave_fit_together():
    a, _, b = small()
    penalty = torch.linspace(0.01, 0.3, len(b), dtype=torch.float64)
    solver = Safeguarded(ALISTA(a, layers=6), FISTA(a, penalty=penalty, iterations=5000), repeat=True)
    found = solver.solve(b, tolerance=1e-12)
    expected = FISTA(a, penalty=penalty, iterations=20000).solve(b, tolerance=1e-14)
    torch.testing.assert_close(found.x, expected.x, rtol=0, atol=1e-7)


A = small()[0]


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Safeguarded(ALISTA(A), ALISTA(A)), TypeError, "falls back on ISTA or FISTA, got ALISTA"),
        (lambda: Safeguarded(ALISTA(A), FISTA(A, penalty=0.1, continuation=9.0)), ValueError, "got continuation=9.0"),
        (lambda: Safeguarded(ALISTA(A), ISTA(A, penalty=0.1, step=3.0)), ValueError, "own step.*got step=3.0"),
        (lambda: Safeguarded(ALISTA(A), ISTA(A[:, :9], penalty=0.1)), ValueError, "same A, got Dense"),
        (lambda: Safeguarded(ALISTA(A), ISTA(A, penalty=0.1), margin=1.0), ValueError, "got 1.0 and 0.25"),
        (lambda: Safeguarded(ALISTA(A), ISTA(A, penalty=0.1), pace=0.0), ValueError, "got 0.01 and 0.0"),
        (
            lambda: Safeguarded(ALISTA(A.expand(2, 20, 30)), ISTA(A.expand(2, 20, 30), penalty=0.1), repeat=True),
            ValueError,
            "repeat needs one A for all samples, got one for each of 2",
        ),
    ],
)
def test_wrong_pairs_are_refused(make, error, says):
    with pytest.raises(error, match=says):
        make()
