"""Reconstruction in a metric: every structure gains, none loses, and closed forms are optimal."""

from __future__ import annotations

import pytest
import torch

from eke.linalg import Metric
from eke.solvers import admm, reconstruct, refit, weighted_factors, weighted_low_rank
from eke.structures import NM, Both, LowRank, Rows, UniformGrid, Unstructured


def problem(m: int = 12, n: int = 32, seed: int = 0) -> tuple[torch.Tensor, Metric]:
    """Correlated inputs and gradients, as trained networks have them: spectra fall off."""
    generator = torch.Generator().manual_seed(seed)

    def moment(size: int) -> torch.Tensor:
        spread = torch.logspace(0, -2, size, dtype=torch.float64)[:, None]
        basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
        return basis @ (spread * basis.T)

    w = torch.randn(m, n, dtype=torch.float64, generator=generator)
    a, g = moment(n), moment(m)
    return w, Metric((a + a.T) / 2, (g + g.T) / 2)


STRUCTURES = [
    Unstructured(0.3),
    NM(2, 4),
    Rows(0.5),
    LowRank(4),
    UniformGrid(3),
    UniformGrid(2, group=8),
    Both(NM(2, 4), UniformGrid(3)),
    Both(Unstructured(0.3), UniformGrid(4)),
]


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_result_is_a_member_and_never_worse_than_projection(structure):
    w, metric = problem()
    solution = reconstruct(structure, w, metric)
    projected = structure.project(solution.weight)
    torch.testing.assert_close(projected, solution.weight, rtol=0, atol=1e-12)
    assert solution.loss == metric.loss(solution.weight - w)
    assert solution.loss <= metric.loss(structure.project(w) - w)
    assert solution.loss == min(solution.losses.values())


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if not isinstance(s, Rows)], ids=repr)
def test_the_metric_is_used(structure):
    w, metric = problem()
    solution = reconstruct(structure, w, metric)
    assert solution.loss < 0.6 * solution.losses["projection"]


def test_joint_sparsity_and_bits_beat_one_projection_after_the_other_tenfold():
    """On inputs with a steep spectrum, as the layers of trained nets have."""
    w, metric = problem(m=16, n=64)
    steep = Metric(torch.linalg.matrix_power(metric.a, 2), metric.g)
    solution = reconstruct(Both(NM(2, 4), UniformGrid(3)), w, steep)
    assert solution.loss < 0.1 * solution.losses["projection"]


def test_weighted_low_rank_is_optimal():
    """Eckart-Young in the whitened space, with the loss as the sum of the dropped squared singular values."""
    w, metric = problem()
    v = weighted_low_rank(LowRank(5), w, metric, damping=0.0)
    assert int(torch.linalg.matrix_rank(v)) == 5
    roots = [torch.linalg.cholesky(factor) for factor in (metric.g, metric.a)]
    s = torch.linalg.svdvals(roots[0].T @ w @ roots[1])
    assert metric.loss(v - w) == pytest.approx(0.5 * float((s[5:] ** 2).sum()), rel=1e-8)


def test_weighted_low_rank_without_g():
    w, metric = problem()
    v = weighted_low_rank(LowRank(5), w, Metric(metric.a), damping=0.0)
    s = torch.linalg.svdvals(w @ torch.linalg.cholesky(metric.a))
    assert Metric(metric.a).loss(v - w) == pytest.approx(0.5 * float((s[5:] ** 2).sum()), rel=1e-8)


@pytest.mark.parametrize("with_g", [False, True])
def test_refit_solves_the_normal_equations_of_the_support(with_g):
    w, metric = problem(m=5, n=8)
    metric = metric if with_g else Metric(metric.a)
    support = torch.rand(5, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    g = metric.g if metric.g is not None else torch.eye(5, dtype=torch.float64)
    dense = torch.kron(g, metric.a)
    free = support.flatten()
    oracle = torch.zeros(40, dtype=torch.float64)
    oracle[free] = torch.linalg.solve(dense[free][:, free], (dense @ w.flatten())[free])
    v = refit(w, support, metric, steps=200, tolerance=1e-12)
    torch.testing.assert_close(v.flatten(), oracle, rtol=1e-6, atol=1e-6)


def test_refit_from_the_optimum_stays_and_each_step_lowers_the_loss():
    w, metric = problem()
    support = NM(2, 4).support(w)
    losses = [metric.loss(refit(w, support, metric, steps=steps) - w) for steps in (0, 1, 3, 10, 100)]
    assert losses == sorted(losses, reverse=True)
    fit = refit(w, support, metric, steps=300, tolerance=1e-12)
    again = refit(w, support, metric, start=fit, steps=5)
    assert metric.loss(again - w) == pytest.approx(metric.loss(fit - w), rel=1e-9)


class Ball:
    """A convex set: matrices of norm at most 1. Written as a user outside eke would."""

    exactness = "exact"

    def project(self, v, score=None):
        return v / max(1.0, float(v.norm()))

    def bits(self, shape):
        return 32 * shape[0] * shape[1]

    def check(self, shape):
        return None


def test_admm_finds_the_optimum_of_a_convex_set():
    """Optimality on the ball: the gradient points along the solution."""
    w, metric = problem(m=4, n=6)
    v = admm(Ball(), w, metric, steps=3000, rho=(0.3, 0.3))
    gradient = metric.gradient(v - w)
    assert float(v.norm()) == pytest.approx(1.0)
    cosine = -float((gradient * v).sum() / gradient.norm() / v.norm())
    assert cosine == pytest.approx(1.0, abs=1e-8)


def test_a_structure_from_outside_is_reconstructed():
    w, metric = problem(m=4, n=6)
    solution = reconstruct(Ball(), w, metric)
    assert solution.method == "admm"
    assert solution.loss < solution.losses["projection"]


def test_bad_arguments_are_named():
    w, metric = problem()
    with pytest.raises(ValueError, match=r"at least 1 step and positive, finite penalties, got steps=0"):
        admm(NM(2, 4), w, metric, steps=0)
    for rho in ((float("nan"), 1.0), (1.0, float("nan")), (0.1, float("inf")), (0.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match=r"positive, finite penalties, got steps=60, rho=\(.*(nan|inf|0\.0|-1)"):
            admm(NM(2, 4), w, metric, rho=rho)
    with pytest.raises(ValueError, match=r"support must have the shape \(12, 32\) of the matrix, got \(12, 31\)"):
        refit(w, torch.ones(12, 31, dtype=torch.bool), metric)
    with pytest.raises(ValueError, match="steps must be >= 0, got -1"):
        reconstruct(NM(2, 4), w, metric, steps=-1)
    with pytest.raises(ValueError, match=r"12 rows and 32 columns, got \(12, 30\)"):
        reconstruct(NM(2, 3), w[:, :30], metric)


@pytest.mark.parametrize("g", [True, False])
def test_factors_of_a_rank_are_those_of_the_closest_matrix(g):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, n, dtype=torch.float64, generator=generator) for n in (9, 7))
    weight = torch.randn(7, 9, dtype=torch.float64, generator=generator)
    metric = Metric(x.T @ x, y.T @ y if g else None)
    for rank in (5, 2, 5):  # what one rank leaves for another does not change it
        closest = weighted_low_rank(LowRank(rank), weight, Metric(metric.a, metric.g))
        left, right = weighted_factors(LowRank(rank), weight, metric)
        torch.testing.assert_close(left @ right, closest, rtol=1e-9, atol=1e-12)
        wanted = LowRank(rank).factors(closest)
        for ours, theirs in zip((left.abs(), right.abs()), (wanted[0].abs(), wanted[1].abs())):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    weight.mul_(2)
    left, right = weighted_factors(LowRank(2), weight, metric)
    torch.testing.assert_close(
        left @ right, 2 * weighted_low_rank(LowRank(2), weight / 2, metric), rtol=1e-9, atol=1e-9
    )
