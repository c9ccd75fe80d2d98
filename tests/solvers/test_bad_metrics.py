"""Metrics and matrices that should not be: rank-deficient ones are solved, the others refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from eke.curvature import Curvature
from eke.linalg import Metric, damped, damped_cholesky
from eke.sites import find
from eke.solvers import Consumer, admm, greedy_removal, reconstruct, refit, remove_columns, sweep, weighted_low_rank
from eke.structures import NM, Both, LowRank, Rows, UniformGrid, Unstructured

STRUCTURES = [NM(2, 4), Unstructured(0.3), Rows(0.5), LowRank(2), UniformGrid(3), Both(NM(2, 4), UniformGrid(3))]


def matrix(m: int = 6, n: int = 8) -> torch.Tensor:
    return torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of_rank(rank: int, size: int = 8) -> torch.Tensor:
    x = torch.randn(rank, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.T @ x / rank


def dead_input() -> torch.Tensor:
    a = of_rank(12)
    a[3], a[:, 3] = 0, 0
    return a


SINGULAR = {
    "fewer samples than inputs": Metric(of_rank(3), of_rank(9, 6)),
    "one sample": Metric(of_rank(1), of_rank(9, 6)),
    "an input that is always 0": Metric(dead_input(), of_rank(9, 6)),
    "fewer gradients than outputs": Metric(of_rank(12), of_rank(2, 6)),
    "no gradient at all": Metric(of_rank(12), torch.zeros(6, 6, dtype=torch.float64)),
    "no input at all": Metric(torch.zeros(8, 8, dtype=torch.float64)),
}


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("metric", SINGULAR.values(), ids=SINGULAR)
def test_a_singular_metric_has_a_solution_that_is_a_member_and_no_worse_than_projection(structure, metric):
    w = matrix()
    solution = reconstruct(structure, w, metric)
    assert bool(torch.isfinite(solution.weight).all())
    torch.testing.assert_close(structure.project(solution.weight), solution.weight, rtol=0, atol=1e-9)
    assert solution.loss <= solution.losses["projection"]
    # Rounding of a product of 8 x 8 and 6 x 6 entries of order 1.
    assert solution.loss >= -1e-10


@pytest.mark.parametrize("structure", [NM(2, 4), UniformGrid(4), Both(NM(2, 4), UniformGrid(3)), LowRank(2)], ids=repr)
def test_factors_of_far_too_few_samples_can_be_solved_with(structure):
    """A in float32 of rank 16 beside 256 columns, as an estimate from 16 samples gives it."""
    generator = torch.Generator().manual_seed(2)
    layer = nn.Sequential(nn.Linear(256, 8))
    x = torch.relu(torch.randn(16, 256, generator=generator) + 2)
    with pytest.warns(UserWarning, match="has 256 inputs but only 16 rows were seen.*at least 256 samples"):
        curvature = Curvature.estimate(layer, lambda m, b: m(b).square().mean(), [x], sites=find(layer))
    factors = curvature.factors("0")
    solution = reconstruct(structure, layer[0].weight.detach(), Metric(factors.a[0], factors.g[0]), steps=10)
    assert bool(torch.isfinite(solution.weight).all())
    assert solution.loss <= solution.losses["projection"]


def rounded(rank: int, size: int) -> torch.Tensor:
    """A second moment of positive inputs in float32: rounding leaves it with eigenvalues below 0."""
    x = torch.randn(rank, size, generator=torch.Generator().manual_seed(4)).relu() + 2
    a = x.T @ x / rank
    assert float(torch.linalg.eigvalsh(a.double())[0]) < -1e-6 * float(a.diagonal().mean())
    return a


@pytest.mark.parametrize("both", [False, True])
def test_low_rank_in_a_metric_that_rounding_made_indefinite_is_solved(both):
    """The loss is that of the truncation in the metric with its eigenvalues below 0 set to 0, up to the damping."""
    w = torch.randn(320, 512, generator=torch.Generator().manual_seed(5))
    metric = Metric(rounded(16, 512), rounded(16, 320) if both else None)
    structure = LowRank(4)
    solution = reconstruct(structure, w, metric)
    roots = []
    for factor in (metric.a, metric.g if both else torch.eye(320)):
        values, vectors = torch.linalg.eigh(factor.double())
        roots.append(vectors * values.clamp_min(0).sqrt())
    s = torch.linalg.svdvals(roots[1].T @ w.double() @ roots[0])
    assert solution.loss <= 1.01 * 0.5 * float((s[4:] ** 2).sum())
    assert int(torch.linalg.matrix_rank(solution.weight.double(), rtol=1e-5)) == 4


def test_enough_damping_is_left_as_it_is_and_too_little_raised_tenfold():
    definite, indefinite = of_rank(12), rounded(16, 512)
    assert torch.equal(damped_cholesky(definite, 1e-6), torch.linalg.cholesky(damped(definite, 1e-6)))
    least = next(d for d in (1e-8, 1e-7, 1e-6, 1e-5, 1e-4) if not torch.linalg.cholesky_ex(damped(indefinite, d)).info)
    assert least > 1e-7
    torch.testing.assert_close(damped_cholesky(indefinite, 1e-8), torch.linalg.cholesky(damped(indefinite, least)))
    with pytest.raises(ValueError, match=r"inputs \(512 x 512\) is not positive definite"):
        damped_cholesky(indefinite, 0.0)


def test_a_curvature_without_warning_gives_a_metric_of_full_rank():
    layer = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors = Curvature.estimate(layer, lambda m, b: m(b).square().mean(), [x], sites=find(layer)).factors("0")
    solution = sweep(UniformGrid(3), layer[0].weight.detach(), Metric(factors.a[0], factors.g[0]), damping=0.0)
    assert bool(torch.isfinite(solution.weight).all())


W, A = matrix(), of_rank(3)
UNDAMPED = {
    "sweep": lambda: sweep(UniformGrid(3), W, Metric(A), damping=0.0),
    "weighted_low_rank": lambda: weighted_low_rank(LowRank(2), W, Metric(A), damping=0.0),
    "remove_columns": lambda: remove_columns(W, A, torch.tensor([0]), damping=0.0),
    "greedy_removal": lambda: greedy_removal([Consumer(W, A, torch.arange(8)[:, None])], 3, damping=0.0),
}


@pytest.mark.parametrize("solve", UNDAMPED.values(), ids=UNDAMPED)
def test_a_singular_metric_without_damping_says_what_to_do(solve):
    message = (
        r"The second moment of the inputs \((7 x 7|8 x 8)\) is not positive definite, seen at column \d+; "
        "use more calibration samples or a larger damping"
    )
    with pytest.raises(ValueError, match=message):
        solve()


def test_singular_gradients_are_told_from_singular_inputs():
    metric = Metric(of_rank(12), of_rank(2, 6))
    with pytest.raises(ValueError, match=r"The second moment of the gradients \(6 x 6\) is not positive definite"):
        weighted_low_rank(LowRank(2), matrix(), metric, damping=0.0)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_an_indefinite_metric_is_refused(structure):
    """Off-diagonal 2 beside a diagonal of 1: no second moment of anything."""
    a = torch.eye(8, dtype=torch.float64)
    a[0, 1] = a[1, 0] = 2.0
    with pytest.raises(ValueError, match=r"inputs \(8 x 8\) is not positive definite, seen at column 2"):
        reconstruct(structure, matrix(), Metric(a))
    with pytest.raises(ValueError, match=r"gradients \(8 x 8\) is not positive definite, seen at column 2"):
        reconstruct(structure, matrix(8), Metric(of_rank(12), a))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_factors_that_are_not_finite_are_refused_with_their_number(value):
    a, g = of_rank(12), of_rank(9, 6)
    a[2, 5] = a[5, 2] = value
    with pytest.raises(ValueError, match=r"Metric\.a has 2 entries that are not finite"):
        Metric(a, g)
    g[1] = value
    with pytest.raises(ValueError, match=r"Metric\.g has 6 entries that are not finite"):
        Metric(of_rank(12), g)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_a_matrix_that_is_not_finite_is_refused_with_the_number_of_entries(structure, value):
    w = matrix()
    w[1, 2] = w[4, 0] = value
    with pytest.raises(ValueError, match="got 2 of 48 entries that are not finite; check the weights"):
        reconstruct(structure, w, Metric(of_rank(12), of_rank(9, 6)))


NOT_FINITE = {
    "refit": lambda w: refit(w, torch.ones(6, 8, dtype=torch.bool), Metric(of_rank(12))),
    "refit from a start": lambda w: refit(
        torch.nan_to_num(w), torch.ones(6, 8, dtype=torch.bool), Metric(of_rank(12)), start=w
    ),
    "remove_columns": lambda w: remove_columns(w, of_rank(12), torch.tensor([0])),
    "Consumer": lambda w: Consumer(w, of_rank(12), torch.arange(8)[:, None]),
    "weighted_low_rank": lambda w: weighted_low_rank(LowRank(2), w, Metric(of_rank(12))),
    "sweep": lambda w: sweep(NM(2, 4), w, Metric(of_rank(12))),
    "admm": lambda w: admm(NM(2, 4), w, Metric(of_rank(12))),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("solver", NOT_FINITE)
def test_every_solver_refuses_a_matrix_that_is_not_finite_by_its_own_name(solver, value):
    w = matrix()
    w[1, 2] = w[4, 0] = value
    message = f"{solver.split()[0]} got 2 of 48 entries that are not finite; check the weights"
    with pytest.raises(ValueError, match=message):
        NOT_FINITE[solver](w)


def test_a_mean_that_is_not_finite_is_refused():
    mean = torch.full((8,), float("nan"))
    with pytest.raises(ValueError, match="remove_columns got 8 of 8 entries that are not finite"):
        remove_columns(matrix(), of_rank(12), torch.tensor([0]), mean=mean)


MISFITS = [
    (NM(2, 4), (6, 10), r"NM\(n=2, m=4\) needs a number of columns divisible by 4, got \(6, 10\)"),
    (Both(NM(2, 4), UniformGrid(3)), (6, 10), r"NM\(n=2, m=4\) needs a number of columns divisible by 4"),
    (NM(1, 16), (6, 8), r"divisible by 16, got \(6, 8\)"),
    (LowRank(7), (6, 8), r"LowRank\(rank=7\) needs a matrix with min\(m, n\) >= 7, got \(6, 8\)"),
]
SOLVERS = {
    "reconstruct": reconstruct,
    "admm": admm,
    "project": lambda structure, w, metric: structure.project(w),
    "check": lambda structure, w, metric: structure.check(tuple(w.shape)),
    "bits": lambda structure, w, metric: structure.bits(tuple(w.shape)),
}


@pytest.mark.parametrize("solve", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize(("structure", "shape", "message"), MISFITS, ids=[repr(case[0]) for case in MISFITS])
def test_a_structure_that_does_not_fit_says_to_skip_the_site(solve, structure, shape, message):
    with pytest.raises(ValueError, match=message + ".*skip="):
        solve(structure, matrix(*shape), Metric(of_rank(20, shape[1])))


def test_a_sweep_of_a_structure_that_does_not_fit_says_to_skip_the_site():
    for structure in (NM(2, 4), Both(NM(2, 4), UniformGrid(3))):
        with pytest.raises(ValueError, match=r"divisible by 4, got \(6, 10\).*skip="):
            sweep(structure, matrix(6, 10), Metric(of_rank(20, 10)))
