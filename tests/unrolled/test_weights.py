"""Weights in closed form against brute force, the numbers of the standard problem, and what coherence promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize

from eke.unrolled import Functions, analytic_weight, coherence, recovery_condition, symmetric_weight

WEIGHTS = [analytic_weight, symmetric_weight]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(a):
    return a / torch.linalg.vector_norm(a, dim=-2, keepdim=True)


def standard():
    a = np.random.default_rng(0).standard_normal((250, 500))
    return torch.from_numpy(a / np.linalg.norm(a, axis=0))


def off_diagonal(weight, a):
    return float((weight.mH @ a - torch.eye(a.shape[-1], dtype=a.dtype)).abs().square().sum())


@pytest.mark.parametrize(
    ("make", "objective", "largest"),
    [
        (analytic_weight, 501.8128145721622, 0.2147435848),
        (symmetric_weight, 503.6559033632524, 0.2079388358),
        (lambda a: a, 1000.2501786, 0.2997643),
    ],
    ids=["analytic", "symmetric", "transpose"],
)
def test_standard_dictionary_has_the_known_objectives(make, objective, largest):
    a = standard()
    weight = make(a)
    assert off_diagonal(weight, a) == pytest.approx(objective, rel=1e-9)
    assert coherence(a, weight).generalized == pytest.approx(largest, rel=1e-6)


def test_objectives_are_ordered_and_above_the_bound():
    a = standard()
    m, n = a.shape
    asymmetric, symmetric = (off_diagonal(make(a), a) for make in WEIGHTS)
    assert n * n / m - n <= asymmetric <= symmetric


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("make", WEIGHTS)
def test_each_column_answers_its_own_with_one(make, dtype):
    a = unit(random(3, 12, 20, dtype=dtype))
    product = make(a).mH @ a
    torch.testing.assert_close(product.diagonal(dim1=-2, dim2=-1), torch.ones(3, 20, dtype=dtype), rtol=0, atol=1e-11)
    if make is symmetric_weight:
        torch.testing.assert_close(product, product.mH, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_analytic_gradient_is_parallel_to_its_constraint(dtype):
    a = random(12, 20, dtype=dtype)
    gradient = 2 * a @ a.mH @ analytic_weight(a)
    inner = (gradient.conj() * a).sum(0).abs()
    cosine = inner / (torch.linalg.vector_norm(gradient, dim=0) * torch.linalg.vector_norm(a, dim=0))
    assert bool((cosine > 1 - 1e-12).all())


def brute_force(a, basis):
    """Least squares of W^T A - I with a unit diagonal over W = sum_k t_k basis_k, by the KKT system of that QP."""
    maps = np.stack([(w.T @ a).ravel() for w in basis], axis=1)
    n = a.shape[1]
    diagonal = maps.reshape(n, n, -1)[np.arange(n), np.arange(n)]
    count = maps.shape[1]
    kkt = np.block([[maps.T @ maps, diagonal.T], [diagonal, np.zeros((n, n))]])
    right = np.concatenate([maps.T @ np.eye(n).ravel(), np.ones(n)])
    t = np.linalg.lstsq(kkt, right, rcond=None)[0][:count]
    return sum(c * w for c, w in zip(t, basis, strict=True))


def test_analytic_weight_is_the_brute_force_quadratic_program():
    a = random(4, 6, seed=3).numpy()
    basis = []
    for i in range(4):
        for j in range(6):
            w = np.zeros((4, 6))
            w[i, j] = 1
            basis.append(w)
    np.testing.assert_allclose(analytic_weight(torch.from_numpy(a)).numpy(), brute_force(a, basis), atol=1e-8)


def test_symmetric_weight_is_the_brute_force_quadratic_program():
    a = unit(random(4, 6, seed=4)).numpy()
    basis = []
    for i in range(4):
        for j in range(i, 4):
            q = np.zeros((4, 4))
            q[i, j] = q[j, i] = 1
            basis.append(q @ a)
    np.testing.assert_allclose(symmetric_weight(torch.from_numpy(a)).numpy(), brute_force(a, basis), atol=1e-8)


def indefinite():
    """A dictionary whose unconstrained Q is not positive semidefinite."""
    for seed in range(200):
        a = unit(random(3, 5, seed=seed) + torch.tensor([3.0, 0, 0], dtype=torch.float64)[:, None])
        k = torch.linalg.solve(a @ a.T, a)
        multipliers = torch.linalg.solve((a.T @ k).square(), torch.ones(5, dtype=torch.float64))
        if torch.linalg.eigvalsh(k @ torch.diag(multipliers) @ k.T)[0] < -1e-3:
            return a
    pytest.fail("no such dictionary among 200")


def test_symmetric_weight_stays_semidefinite_and_is_the_best_such():
    a = indefinite()
    weight = symmetric_weight(a)
    q = weight @ torch.linalg.pinv(a)
    assert float(torch.linalg.eigvalsh((q + q.T) / 2)[0]) > -1e-8
    torch.testing.assert_close((weight * a).sum(0), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-6)

    def objective(flat):
        g = flat.reshape(3, 3)
        return np.square(a.numpy().T @ g.T @ g @ a.numpy() - np.eye(5)).sum()

    constraint = {"type": "eq", "fun": lambda flat: np.square(flat.reshape(3, 3) @ a.numpy()).sum(0) - 1}
    starts = [np.eye(3).ravel(), *np.random.default_rng(0).standard_normal((5, 9))]
    found = [optimize.minimize(objective, s, constraints=constraint, tol=1e-12, method="SLSQP") for s in starts]
    best = min(run.fun for run in found if np.abs(constraint["fun"](run.x)).max() < 1e-6)
    assert off_diagonal(weight, a) <= best * (1 + 1e-5)


@pytest.mark.parametrize("make", WEIGHTS)
def test_orthogonal_and_invertible_dictionaries_are_solved_in_one_step(make):
    q = torch.linalg.qr(random(6, 6)).Q
    torch.testing.assert_close(make(q), q)
    a = random(6, 6, seed=1)
    torch.testing.assert_close(analytic_weight(a).T @ a, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("make", WEIGHTS)
def test_batched_weights_are_single_weights(make):
    a = unit(random(3, 5, 8))
    for batched, single in zip(make(a), a, strict=True):
        torch.testing.assert_close(batched, make(single))


@pytest.mark.parametrize("make", WEIGHTS)
def test_weights_keep_dtype_and_take_operators(make):
    a = unit(random(5, 8))
    assert make(a.float()).dtype == torch.float32
    operator = Functions(lambda x: x @ a.T, lambda r: r @ a, shape=(5, 8), dtype=torch.float64)
    torch.testing.assert_close(make(operator), make(a))


@pytest.mark.parametrize("make", WEIGHTS)
def test_weights_are_differentiable(make):
    a = unit(random(3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(make, (a,))


def test_columns_of_any_length_answer_with_one():
    a = random(5, 8) * torch.arange(1.0, 9, dtype=torch.float64)
    torch.testing.assert_close((analytic_weight(a) * a).sum(0), torch.ones(8, dtype=torch.float64))


@pytest.mark.parametrize("make", WEIGHTS)
def test_rank_deficient_dictionaries_need_consent(make):
    a = unit(random(4, 7))
    a = torch.cat([a, a[:1]])
    with pytest.raises(ValueError, match=r"A of shape \(5, 7\) has a rank below m = 5.*pass pinv=True"):
        make(a)
    product = make(a, pinv=True).T @ a
    torch.testing.assert_close(product.diagonal(), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_repeated_columns_have_no_symmetric_weight_without_consent(sign):
    a = unit(random(4, 6))
    a = torch.cat([a, sign * a[:, :1]], 1)
    with pytest.raises(ValueError, match=r"no unique answer for A of shape \(4, 7\): columns repeat"):
        symmetric_weight(a)
    product = symmetric_weight(a, pinv=True).T @ a
    torch.testing.assert_close(product.diagonal(), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-9)


def test_columns_that_no_ellipsoid_joins_are_refused():
    a = torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.3]], dtype=torch.float64)
    a = torch.cat([a, torch.tensor([[0.05], [-0.05]], dtype=torch.float64)], 1)[:, [0, 1, 3]]
    with pytest.raises(ValueError, match="no positive semidefinite Q"):
        symmetric_weight(a)


def test_coherence_is_what_its_definition_says():
    a = random(5, 9)
    report = coherence(a)
    normalized = unit(a)
    worst = max(abs(float(normalized[:, i] @ normalized[:, j])) for i in range(9) for j in range(9) if i != j)
    assert report.mutual == pytest.approx(worst)
    assert report.generalized is None
    assert report.welch_bound == pytest.approx((4 / (5 * 8)) ** 0.5)
    assert report.mutual >= report.welch_bound
    assert "coherence 0." in str(report)
    assert "with the weight" in str(coherence(a, analytic_weight(a)))


@pytest.mark.parametrize(("mutual", "guaranteed"), [(0.0, 100), (1.0, 0), (0.5, 1), (1 / 3, 1), (0.3, 2), (0.1, 5)])
def test_recovery_condition_is_strict(mutual, guaranteed):
    assert recovery_condition(mutual, n=100) == guaranteed
    if mutual:
        assert guaranteed < (1 + 1 / mutual) / 2 <= guaranteed + 1


def test_wrong_coherence_is_refused():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        recovery_condition(1.5, n=10)
    with pytest.raises(ValueError, match=r"one matrix \(m, n\) with n >= 2, got \(2, 3, 4\)"):
        coherence(random(2, 3, 4))
    with pytest.raises(ValueError, match=r"must have A's shape \(3, 4\), got \(4, 3\)"):
        coherence(random(3, 4), random(4, 3))


def test_columns_that_repeat_with_other_lengths_have_no_symmetric_weight():
    a = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twice = torch.cat([a, -2 * a[:, :1]], 1)
    with pytest.raises(ValueError, match=r"no answer for A of shape \(6, 10\): the diagonal is off by 0\..*normalize"):
        symmetric_weight(twice, pinv=True)
    product = symmetric_weight(torch.cat([a, -a[:, :1]], 1), pinv=True).T @ torch.cat([a, -a[:, :1]], 1)
    torch.testing.assert_close(product.diagonal(), torch.ones(10, dtype=torch.float64))
