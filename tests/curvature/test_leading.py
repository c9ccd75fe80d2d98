"""Leading directions beside corrected eigenvalues: what they keep, what they leave, and that the diagonal stays."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from eke.curvature import Curvature, totals
from eke.curvature import basis as bases
from eke.curvature import factors as factors_
from eke.curvature import leading as leading_
from eke.curvature.factors import Factors
from eke.curvature.leading import Sketch, affordable, leading_rows
from eke.sites import find

KINDS = ("linear", "convolution", "groups")


def squared(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over samples of a loss whose gradient depends on the sample."""
    return ((model(batch[0]).flatten(1) - batch[1][:, None]) ** 2).sum(1).mean()


def world(kind: str, count: int = 24) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    y = torch.randn(count, dtype=torch.float64)
    if kind == "linear":
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh()).double(), (torch.randn(count, 3, 5).double(), y)
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2 if kind == "groups" else 1)
    return nn.Sequential(layer, nn.Tanh()).double(), (torch.randn(count, 4, 5, 5).double(), y)


def estimated(kind: str, leading: int, *, batch: int = 24) -> Factors:
    model, (x, y) = world(kind)
    batches = list(zip(x.split(batch), y.split(batch)))
    return Curvature.estimate(model, squared, batches, sites=find(model), leading=leading).factors("0")


def gradients(kind: str) -> Tensor:
    """Whole gradients of single samples, flat."""
    model, (x, y) = world(kind)
    found = []
    for i in range(len(x)):
        value = squared(model, (x[i : i + 1], y[i : i + 1]))
        found.append(torch.autograd.grad(value, model[0].weight)[0].flatten())
    return torch.stack(found)


def form(found: Factors) -> Tensor:
    """The matrix of the quadratic form, by polarisation of `quadratic` over unit changes."""
    m, n = found.shape
    units = torch.eye(m * n, dtype=torch.float64).reshape(-1, m, n)
    single = [found.quadratic(unit) for unit in units]
    full = torch.empty(m * n, m * n, dtype=torch.float64)
    for i in range(m * n):
        for j in range(i + 1):
            full[i, j] = full[j, i] = found.quadratic(units[i] + units[j]) - single[i] - single[j]
    return full


@pytest.mark.parametrize("kind", KINDS)
def test_enough_directions_give_the_whole_second_moment(kind):
    """As many directions as samples: 1/2 E[<grad, D>^2], whatever the change, however samples are batched."""
    found, samples = estimated(kind, 24, batch=10), gradients(kind)
    assert found.leading.rows.shape[0] <= 24
    for seed in range(4):
        change = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        wanted = 0.5 * float((samples @ change.flatten()).square().mean())
        assert found.quadratic(change) == pytest.approx(wanted, rel=1e-6)


def test_error_falls_with_some_directions_and_is_nothing_with_all():
    samples = gradients("linear")
    true = samples.T @ samples / len(samples)
    errors = [float((form(estimated("linear", r)) - true).norm()) for r in (0, 2, 4, 8, 12, 24)]
    assert all(later < before for before, later in itertools.pairwise(errors))
    assert errors[2] < 0.5 * errors[0]
    assert errors[-1] < 1e-9 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [24, 7])
def test_diagonal_and_trace_stay(kind, batch):
    """Along any one pair of eigenvectors nothing changes, and neither does anything but `quadratic`."""
    plain, found = estimated(kind, 0, batch=batch), estimated(kind, 3, batch=batch)
    assert plain.leading is None
    assert torch.equal(found.basis.moments, plain.basis.moments)
    assert torch.equal(found.diagonal, plain.diagonal)
    basis = found.basis
    for i, j in ((0, 0), (-1, -1), (1, 2)):
        change = torch.zeros_like(basis.g_vectors @ basis.moments @ basis.a_vectors.mT)
        change[0] = basis.g_vectors[0, :, i : i + 1] @ basis.a_vectors[0, :, j : j + 1].T
        change = change.reshape(found.shape)
        assert found.quadratic(change) == pytest.approx(plain.quadratic(change), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("batch", [24, 7])
def test_nothing_is_negative_and_the_parts_are_the_whole(batch):
    found = estimated("convolution", 3, batch=batch)
    held = sum(found.basis.energies(row) for row in found.leading.rows)
    assert bool((found.leading.rest >= 0).all())
    torch.testing.assert_close(found.leading.rest + held, found.basis.moments, rtol=1e-9, atol=1e-15)
    assert float(torch.linalg.eigvalsh(form(estimated("linear", 3, batch=batch)))[0]) > -1e-9


def test_one_sample_is_one_direction():
    model, (x, y) = world("linear")
    curvature = Curvature.estimate(model, squared, [(x[:1], y[:1])], sites=find(model), leading=16)
    found, gradient = curvature.factors("0"), gradients("linear")[0]
    assert found.leading.rows.shape[0] == 1
    change = torch.randn(4, 5, dtype=torch.float64)
    assert found.quadratic(change) == pytest.approx(0.5 * float(gradient @ change.flatten()) ** 2, rel=1e-9)


def test_rows_are_the_leading_part_in_order():
    rows = torch.randn(9, 4, 5, dtype=torch.float64)
    found = leading_rows(rows, 3).flatten(1)
    _, values, vectors = torch.linalg.svd(rows.flatten(1), full_matrices=False)
    wanted = (vectors[:3].T * values[:3].square()) @ vectors[:3]
    torch.testing.assert_close(found.T @ found, wanted, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.norm(dim=1), values[:3], rtol=1e-9, atol=0)
    assert leading_rows(rows[:1].expand(6, 4, 5), 3).shape == (1, 4, 5)
    assert leading_rows(torch.zeros(6, 4, 5), 3).shape == (0, 4, 5)


def test_sketch_stays_below_and_finds_a_direction_that_all_share():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(30, dtype=torch.float64, generator=generator)
    rows = torch.randn(200, 30, dtype=torch.float64, generator=generator) * 0.2
    rows += torch.randn(200, 1, dtype=torch.float64, generator=generator) * shared
    sketch = Sketch(4)
    for part in rows.split(9):
        sketch.add(part)
    found = sketch.rows(1.0)
    assert found.shape == (4, 30)
    left = torch.linalg.eigvalsh(rows.T @ rows - found.T @ found)
    assert float(left[0]) > -1e-9 * float(left[-1])
    best = torch.linalg.svd(rows)[2][0]
    assert abs(float(found[0] @ best / found[0].norm())) > 0.999


def test_large_models_keep_fewer_directions_or_none(monkeypatch):
    monkeypatch.setattr(leading_, "ROOM", 47)
    assert estimated("linear", 16).leading.rows.shape[0] == 2
    assert affordable(16, [(4, 5), (2, 5)]) == 1
    monkeypatch.setattr(leading_, "ROOM", 19)
    assert estimated("linear", 16).leading is None
    assert affordable(16, []) == 16
    with pytest.raises(ValueError, match="0 for none, got -1"):
        Curvature.estimate(nn.Linear(3, 2), [], lambda *_: torch.zeros(()), [], leading=-1)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_part_of_a_basis_and_rows_that_are_rotated(kind, monkeypatch):
    """Where gradients are not formed for the moments, directions come out the same."""
    whole = estimated(kind, 24)
    for room in (bases, factors_, totals):
        monkeypatch.setattr(room, "WIDE", 3)
    monkeypatch.setattr(bases, "LEADING", 2)
    monkeypatch.setattr(bases, "_OVERSAMPLING", 1)
    found = estimated(kind, 24)
    assert any(found.basis.rest)
    change = torch.randn(found.shape, dtype=torch.float64)
    assert found.quadratic(change) == pytest.approx(whole.quadratic(change), rel=1e-4)
    held = sum(found.basis.energies(row) for row in found.leading.rows) / found.basis.sizes
    torch.testing.assert_close(found.leading.rest + held, found.basis.moments, rtol=1e-4, atol=1e-6)


def test_saving_keeps_directions(tmp_path):
    model, data = world("convolution")
    curvature = Curvature.estimate(model, squared, [data], sites=find(model), leading=3)
    curvature.save(tmp_path / "c.safetensors")
    again = Curvature.load(tmp_path / "c.safetensors")
    change = torch.randn(6, 36, dtype=torch.float64)
    assert again.quadratic("0", change) == curvature.quadratic("0", change)
    assert torch.equal(again.factors("0").leading.rows, curvature.factors("0").leading.rows)
