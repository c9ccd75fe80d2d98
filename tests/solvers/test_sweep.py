"""Column sweep: members of the structure, never worse than projection, much better where inputs are correlated."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from eke.linalg import Metric
from eke.solvers import sweep, swept
from eke.structures import UniformGrid


def problem(m: int = 6, n: int = 20, seed: int = 0, rank: int = 5) -> tuple[torch.Tensor, Metric]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, rank, dtype=torch.float64, generator=generator)
    x = x @ torch.randn(rank, n, dtype=torch.float64, generator=generator)
    x = x + 0.1 * torch.randn(200, n, dtype=torch.float64, generator=generator)
    g = torch.randn(m, m + 3, dtype=torch.float64, generator=generator)
    return torch.randn(m, n, dtype=torch.float64, generator=generator), Metric(x.T @ x / 200, g @ g.T)


@pytest.mark.parametrize(
    "grid", [UniformGrid(1), UniformGrid(2), UniformGrid(3), UniformGrid(4, 7), UniformGrid(8)], ids=repr
)
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse_than_projection_and_a_member(grid, seed):
    w, metric = problem(seed=seed)
    solution = sweep(grid, w, metric)
    assert solution.loss <= metric.loss(grid.project(w) - w)
    assert solution.loss == metric.loss(solution.weight - w)
    assert torch.equal(grid.project(solution.weight), solution.weight)
    packed = grid.encode(solution.weight.float())
    assert torch.equal(grid.decode(packed, (6, 20)), solution.weight.float())
    assert solution.losses[solution.method] == min(solution.losses.values())


def test_correlated_inputs_gain_a_factor():
    w, metric = problem(m=16, n=64)
    solution = sweep(UniformGrid(4), w, metric)
    assert solution.loss < 0.25 * solution.losses["projection"]


def test_uncorrelated_inputs_leave_nothing_to_gain():
    """With a diagonal A and given scales, rounding to nearest is optimal and the sweep finds it."""
    w, _ = problem()
    metric = Metric(torch.diag(torch.rand(20, dtype=torch.float64) + 0.1))
    solution = sweep(UniformGrid(3), w, metric)
    assert solution.loss == pytest.approx(solution.losses["weighted projection"], rel=1e-12)


def test_revisits_reach_the_optimum_of_small_problems_or_come_near():
    """Exhaustive search over all codes of one row with the same scale."""
    w, metric = problem(m=1, n=6, rank=3)
    grid = UniformGrid(2)
    rule = grid.by_columns(w, metric.score((1, 6)))
    scale = float(rule(torch.tensor([100.0], dtype=torch.float64), 0))
    codes = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)), dtype=torch.float64) * scale - w
    plain = Metric(metric.a)
    best = min(plain.loss(row[None]) for row in codes)
    assert sweep(grid, w, plain).loss <= 1.5 * best
    assert sweep(grid, w, plain).loss >= best * (1 - 1e-12)


def test_the_sweep_without_damping_is_successive_least_squares():
    """Fixing columns in order and refitting the free ones by least squares each time gives the same matrix."""
    w, metric = problem(m=3, n=5, rank=5)
    grid = UniformGrid(3)
    rule = grid.by_columns(w, metric.score((3, 5)))
    order = metric.a.diagonal().argsort(descending=True).tolist()
    v = w.clone()
    for position, j in enumerate(order):
        v[:, j] = rule(v[:, j], j)
        done, free = order[: position + 1], order[position + 1 :]
        delta = v[:, done] - w[:, done]
        a = metric.a
        if free:
            v[:, free] = w[:, free] - torch.linalg.solve(a[free][:, free], a[free][:, done] @ delta.T).T
    solution = sweep(grid, w, metric, damping=0.0, revisits=0)
    assert solution.losses["sweep"] == pytest.approx(metric.loss(v - w), rel=1e-8)


def test_bad_arguments_are_named():
    w, metric = problem()
    with pytest.raises(ValueError, match="revisits must be >= 0, got -1"):
        sweep(UniformGrid(3), w, metric, revisits=-1)
    with pytest.raises(ValueError, match=r"6 rows and 20 columns, got \(20, 6\)"):
        sweep(UniformGrid(3), w.T, metric)
    with pytest.raises(TypeError, match="structure with by_columns, Everything has none"):
        sweep(Everything(), w, metric)


class Everything:
    """All matrices."""

    exactness = "exact"

    def project(self, v, score=None):
        return v

    def bits(self, shape):
        return 32 * shape[0] * shape[1]

    def check(self, shape):
        return None

    def __repr__(self) -> str:
        return "Everything"


@pytest.mark.parametrize("seed", [0, 1])
def test_the_sweep_alone_is_what_sweep_tries(seed):
    w, metric = problem(seed=seed)
    alone = swept(UniformGrid(3), w, metric)
    tried = sweep(UniformGrid(3), w, metric, revisits=0)
    assert metric.loss(alone - w) == pytest.approx(tried.losses["sweep"], rel=1e-9)
    assert torch.equal(UniformGrid(3).project(alone), alone)


def test_what_follows_from_a_metric_is_derived_once():
    w, metric = problem()
    first = sweep(UniformGrid(3), w, metric, revisits=0).weight
    order, answers = metric.derived(("sweep", 1e-3), lambda: pytest.fail("not kept"))
    assert answers.shape == (20, 20)
    assert order.tolist() == metric.a.diagonal().argsort(descending=True).tolist()
    assert torch.equal(sweep(UniformGrid(3), w, metric, revisits=0).weight, first)
    assert torch.equal(sweep(UniformGrid(3), w, Metric(metric.a, metric.g), revisits=0).weight, first)
    assert metric.derived("other", lambda: 7) == 7


def test_projection_is_taken_where_some_rows_say_that_it_is_better(monkeypatch):
    w, metric = problem()
    grid = UniformGrid(3)
    monkeypatch.setattr(sys.modules[swept.__module__], "_sweep", lambda w, *_: torch.zeros_like(w))
    assert torch.equal(swept(grid, w, metric), grid.project(w, metric.score((6, 20))))
