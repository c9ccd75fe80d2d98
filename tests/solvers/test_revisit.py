"""Revisiting columns: never worse, a member, and at its end no column can be rounded better."""

from __future__ import annotations

import itertools

import pytest
import torch

from eke.linalg import Metric
from eke.solvers import reconstruct, revisit
from eke.structures import NM, Both, Rows, UniformGrid, Unstructured

STRUCTURES = [
    UniformGrid(1),
    UniformGrid(3),
    UniformGrid(2, group=8),
    NM(2, 4),
    Unstructured(0.3),
    Both(NM(2, 4), UniformGrid(3)),
    Both(Rows(0.5), UniformGrid(4)),
]


def problem(m: int = 6, n: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * n, n, dtype=torch.float64, generator=generator) + 1
    g = torch.randn(2 * m, m, dtype=torch.float64, generator=generator) + 0.5
    return torch.randn(m, n, dtype=torch.float64, generator=generator), x.T @ x / len(x), g.T @ g / len(g)


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
@pytest.mark.parametrize("with_g", [False, True])
def test_each_round_gives_a_member_that_is_no_worse(structure, with_g):
    w, a, g = problem()
    metric = Metric(a, g if with_g else None)
    start = structure.project(w)
    losses = [metric.loss(start - w)]
    for rounds in (0, 1, 2, 3):
        v = revisit(structure, w, metric, start=start, rounds=rounds)
        torch.testing.assert_close(structure.project(v), v, rtol=0, atol=1e-12)
        losses.append(metric.loss(v - w))
    assert losses[1] == losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_with_g_the_whole_loss_falls_where_rounding_to_nearest_would_raise_it():
    """Two rows that nearly always err together: what one column's rounding costs depends on both errors' signs."""
    a, g = torch.eye(2, dtype=torch.float64), torch.tensor([[1.0, 0.95], [0.95, 1.0]], dtype=torch.float64)
    grid = UniformGrid(2)
    w = torch.tensor([[0.45, 1.0], [0.45, 1.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)  # errors 0.55 and -0.45 nearly cancel
    v = revisit(grid, w, Metric(a, g), start=start)
    assert torch.equal(v, start)
    nearest = revisit(grid, w, Metric(a), start=start)
    assert torch.equal(nearest[:, 0], torch.zeros(2, dtype=torch.float64))
    assert Metric(a, g).loss(v - w) < 0.3 * Metric(a, g).loss(nearest - w)


def test_at_the_end_no_column_can_be_rounded_better():
    """With G = I, against every choice of codes for one column, all others as they are."""
    w, a, _ = problem(m=2, n=6)
    grid, metric = UniformGrid(2), Metric(a)
    v = revisit(grid, w, metric, start=grid.project(w), rounds=100)
    scales = grid.quantize(v)[1][:, 0].double()
    for j in range(6):
        for codes in itertools.product((-1.0, 0.0, 1.0), repeat=2):
            other = v.clone()
            other[:, j] = scales * torch.tensor(codes, dtype=torch.float64)
            assert metric.loss(other - w) >= metric.loss(v - w) * (1 - 1e-9)


def test_columns_that_no_input_reaches_stay():
    w, a, g = problem()
    a[3], a[:, 3] = 0, 0
    start = UniformGrid(3).project(w)
    v = revisit(UniformGrid(3), w, Metric(a, g), start=start)
    assert torch.equal(v[:, 3], start[:, 3])


class Whole:
    """Whole numbers, written outside eke: its rule rounds down, which is not the nearest."""

    exactness = "heuristic"

    def project(self, v, score=None):
        return v.floor()

    def by_columns(self, v, score=None):
        return lambda column, j: column.floor()

    def bits(self, shape):
        return 8 * shape[0] * shape[1]

    def check(self, shape):
        return None


@pytest.mark.parametrize("with_g", [False, True])
def test_a_rule_from_outside_that_is_not_the_nearest_never_does_harm(with_g):
    w, a, g = problem()
    metric = Metric(a, g if with_g else None)
    start = w.round()
    v = revisit(Whole(), w, metric, start=start)
    assert metric.loss(v - w) <= metric.loss(start - w)
    assert torch.equal(v, v.round())
    solution = reconstruct(Whole(), w, metric)
    assert {"sweep", "revisits"} <= set(solution.losses)


def test_a_start_that_is_not_on_the_rule_is_rounded_first():
    w, a, _ = problem()
    v = revisit(Whole(), w, Metric(a), start=w, rounds=0)
    assert torch.equal(v, w.floor())


def test_what_is_not_finite_is_refused():
    w, a, _ = problem()
    bad = w.clone()
    bad[0, 0] = float("nan")
    for weight, start in ((bad, w), (w, bad)):
        with pytest.raises(ValueError, match="revisit got 1 of 96 entries that are not finite"):
            revisit(UniformGrid(3), weight, Metric(a), start=start)
    with pytest.raises(ValueError, match=r"any rows and 16 columns, got \(16, 6\)"):
        revisit(UniformGrid(3), w.T, Metric(a), start=w.T)
