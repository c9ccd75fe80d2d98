"""Wide sites: a part of the eigenbasis with the rest as one direction, against dense matrices and whole gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eke.curvature import Basis, Curvature, factors, totals
from eke.curvature import basis as bases
from eke.sites import find

COUNTS = [(4, 3), (6, 3), (4, 10)]
"""Directions told apart of 6 rows and of 10 columns."""


def basis(p: int, q: int, groups: int = 1) -> Basis:
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(groups, n, n, dtype=torch.float64, generator=generator) for n in (6, 10)]
    g, a = (torch.linalg.qr(matrix)[0] for matrix in random)
    shape = (groups, p + (p < 6), q + (q < 10))
    moments = torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1
    return Basis(g[:, :, :p], a[:, :, :q], moments)


def dense(found: Basis) -> torch.Tensor:
    """The curvature as a (60, 60) matrix: a projector for every pair of directions, times its moment."""
    projectors = []
    for vectors in (found.g_vectors[0], found.a_vectors[0]):
        each = [torch.outer(v, v) for v in vectors.T]
        rest = torch.eye(len(vectors), dtype=torch.float64) - vectors @ vectors.T
        projectors.append([*each, rest] if vectors.shape[0] > vectors.shape[1] else each)
    return sum(
        found.moments[0, i, j] * torch.kron(g, a)
        for i, g in enumerate(projectors[0])
        for j, a in enumerate(projectors[1])
    )


@pytest.mark.parametrize(("p", "q"), COUNTS)
def test_energies_diagonal_and_solve_are_those_of_the_dense_matrix(p, q):
    found = basis(p, q)
    matrix = dense(found)
    change = torch.randn(6, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    form = float(change.flatten() @ matrix @ change.flatten())
    assert float((found.energies(change[None]) * found.moments).sum()) == pytest.approx(form, rel=1e-5)
    torch.testing.assert_close(found.diagonal().flatten(), matrix.diagonal(), rtol=1e-9, atol=1e-12)
    assert float((found.moments * found.sizes).sum()) == pytest.approx(float(matrix.trace()), rel=1e-12)
    damped = matrix + 0.3 * torch.eye(60, dtype=torch.float64)
    wanted = torch.linalg.solve(damped, change.flatten()).view(6, 10)
    torch.testing.assert_close(found.solve(change, 0.3), wanted, rtol=1e-9, atol=1e-12)


def squared(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    out = model(batch[0]).flatten(1).mean(1)
    return (out - batch[1]).square().mean()


@pytest.fixture
def narrow(monkeypatch):
    """Everything above 5 rows or columns is wide, and 4 directions are told apart."""
    for room in (bases, factors, totals):
        monkeypatch.setattr(room, "WIDE", 5)
    monkeypatch.setattr(bases, "LEADING", 4)
    monkeypatch.setattr(bases, "_OVERSAMPLING", 2)
    monkeypatch.setattr(bases, "_ITERATIONS", 8)


def site_and_data(kind: str) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    if kind == "linear":
        model: nn.Module = nn.Sequential(nn.Linear(9, 7), nn.Tanh())
        x = torch.randn(12, 3, 9)
    else:
        model = nn.Sequential(nn.Conv2d(2, 7, 3, padding=1), nn.Tanh())
        x = torch.randn(12, 2, 4, 4)
    y = torch.randn(12)
    return model, [(x[:6], y[:6]), (x[6:], y[6:])]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_moments_are_those_of_whole_per_sample_gradients(kind):
    model, data = site_and_data(kind)
    found = Curvature.estimate(model, squared, data, sites=find(model)).factors("0")
    assert found.basis is not None
    assert found.basis.rest == (7 - 4, found.shape[1] - 4)
    wanted = torch.zeros_like(found.basis.moments)
    trace = 0.0
    for x, y in data:
        for i in range(len(x)):
            value = squared(model, (x[i : i + 1], y[i : i + 1]))
            gradient = torch.autograd.grad(value, model[0].weight)[0].reshape(1, *found.shape)
            wanted += found.basis.energies(gradient) / 12
            trace += float(gradient.square().sum()) / 12
    torch.testing.assert_close(found.basis.moments * found.basis.sizes, wanted, rtol=1e-3, atol=1e-4 * trace)
    assert float((found.basis.moments * found.basis.sizes).sum()) == pytest.approx(trace, rel=1e-4)
    assert float(found.diagonal.sum()) == pytest.approx(trace, rel=1e-4)


@pytest.mark.usefixtures("narrow")
def test_directions_are_the_leading_eigenvectors():
    model, data = site_and_data("linear")
    found = Curvature.estimate(model, squared, data, sites=find(model), corrected_samples=0).factors("0")
    part = found.eigenbasis()
    for moment, vectors in ((found.a, part.a_vectors), (found.g, part.g_vectors)):
        values, wanted = torch.linalg.eigh(moment[0].double())
        captured = (vectors[0].double().T @ moment[0].double() @ vectors[0].double()).trace()
        assert float(captured) == pytest.approx(float(values[-4:].sum()), rel=1e-2)
        assert float((wanted[:, -1] @ vectors[0].double()).norm()) == pytest.approx(1, abs=1e-3)
    trace = float(found.a[0].double().trace() * found.g[0].double().trace())
    assert float((part.moments * part.sizes).sum()) == pytest.approx(trace, rel=1e-5)


@pytest.mark.usefixtures("narrow")
def test_a_change_along_leading_directions_costs_what_the_whole_basis_says(monkeypatch):
    model, data = site_and_data("linear")
    part = Curvature.estimate(model, squared, data, sites=find(model), corrected_samples=0)
    held = part.factors("0").eigenbasis()
    change = held.g_vectors[0, :, -2:] @ torch.randn(2, 2) @ held.a_vectors[0, :, -2:].T
    expected = 0.5 * float((part.factors("0").g[0] @ change @ part.factors("0").a[0] * change).sum())
    assert 0.5 * float((held.energies(change[None]) * held.moments).sum()) == pytest.approx(expected, rel=1e-2)
    assert part.quadratic("0", change) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("narrow")
def test_saving_keeps_a_part_of_a_basis(tmp_path):
    model, data = site_and_data("convolution")
    found = Curvature.estimate(model, squared, data, sites=find(model))
    found.save(tmp_path / "c.safetensors")
    again = Curvature.load(tmp_path / "c.safetensors")
    change = torch.randn(7, 18)
    assert again.quadratic("0", change) == found.quadratic("0", change)
    assert torch.equal(again.precondition("0", change, 0.1), found.precondition("0", change, 0.1))


def test_second_moments_are_the_same_in_blocks(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh()).double()
    data = [(torch.randn(5, 2, 9, dtype=torch.float64), torch.randn(5, dtype=torch.float64)) for _ in range(2)]
    whole = Curvature.estimate(model, squared, data, sites=find(model)).factors("0")
    monkeypatch.setattr(totals, "_BLOCK", 4)
    found = Curvature.estimate(model, squared, data, sites=find(model)).factors("0")
    for ours, theirs in ((found.a, whole.a), (found.g, whole.g)):
        assert torch.equal(ours, ours.mT)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_many_directions_are_held_in_single_precision(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(40, 9, dtype=torch.float64)
    moment = (x.mT @ x)[None]
    values, vectors = bases.directions(moment)
    monkeypatch.setattr(bases, "MANY", 80)
    again, single = bases.directions(moment)
    assert (vectors.dtype, single.dtype) == (torch.float64, torch.float32)
    assert torch.equal(values, again)
    torch.testing.assert_close(single.double(), vectors, rtol=0, atol=1e-7)
    delta = torch.randn(1, 9, 9, dtype=torch.float64)
    basis = bases.Basis(vectors, vectors, values[:, :, None] * values[:, None])
    energies = bases.Basis(vectors, single, basis.moments).energies(delta)
    assert energies.dtype == torch.float64
    torch.testing.assert_close(energies, basis.energies(delta), rtol=1e-4, atol=1e-6)


def test_rotating_rows_or_gradients_is_the_same(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 7), nn.Tanh()).double()
    data = [(torch.randn(5, 2, 9, dtype=torch.float64), torch.randn(5, dtype=torch.float64))]
    formed = Curvature.estimate(model, squared, data, sites=find(model)).factors("0")
    monkeypatch.setattr(totals, "MANY", 0)
    rotated = Curvature.estimate(model, squared, data, sites=find(model)).factors("0")
    torch.testing.assert_close(rotated.basis.moments, formed.basis.moments, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(rotated.gradient, formed.gradient, rtol=1e-12, atol=1e-15)
    assert rotated.coherence == pytest.approx(formed.coherence, rel=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0), dilation=(2, 1)),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 2, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_kernel_gradients_are_those_of_autograd(layer):
    model = nn.Sequential(layer, nn.Tanh())
    x, y = torch.randn(3, 4, 7, 7), torch.randn(3)
    found = Curvature.estimate(model, squared, [(x, y)], sites=find(model)).factors("0")
    wanted = torch.autograd.grad(squared(model, (x, y)), layer.weight)[0].reshape(found.shape)
    torch.testing.assert_close(found.gradient, wanted, rtol=1e-4, atol=1e-6)


def test_a_sum_over_three_kinds_of_directions_is_never_negative():
    inside = torch.tensor([[[1.0, 2.0]]])
    found = bases.gathered(inside, torch.tensor([[2.9]]), inside[:, 0] + 1, torch.tensor([5.0]), (2, 3))
    assert bool((found >= 0).all())
    assert found.shape == (1, 2, 3)
