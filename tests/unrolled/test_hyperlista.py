"""HyperLISTA: the layer against its formulas, its symmetries, and the search for its three numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eke.unrolled import HyperLISTA, gaussian, hard_threshold, nmse_db, symmetric_weight, tune_hyperlista

from .cases import small, standard


def by_hand(a, b, c1, c2, c3, layers):
    """The published layer for one problem, in numpy, with a sorted selection."""
    a, b = a.numpy(), b.numpy()
    weight, inverse = symmetric_weight(torch.from_numpy(a)).numpy(), np.linalg.pinv(a)
    n = a.shape[1]
    x = last = np.zeros(n)
    first = np.abs(inverse @ b).sum()
    for _ in range(layers):
        r = a @ x - b
        error = np.abs(inverse @ r).sum()
        share = min(max(c3 * np.log(first / error), 0), 1)
        z = x - weight.T @ r + c2 * (x != 0).sum() * (x - last)
        out = np.sign(z) * np.maximum(np.abs(z) - c1 * error, 0)
        for i in np.argsort(-np.abs(z))[: int(np.floor(share * n))]:
            if abs(z[i]) >= c1 * error:
                out[i] = z[i]
        x, last = out, x
    return x


def test_layers_follow_the_formulas():
    a, _, b = small(batch=4)
    found = HyperLISTA(a, c1=0.04, c2=0.05, c3=0.08, layers=9)(b)
    for row in range(4):
        expected = by_hand(a, b[row], 0.04, 0.05, 0.08, 9)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=0, atol=1e-11)


def test_standard_problem_is_solved_as_published_here():
    a, x, b = standard(500, drawn=1000)
    found = HyperLISTA(a).trajectory(b)
    expected = [
        -2.8,
        -7.9,
        -13.5,
        -19.3,
        -25.3,
        -31.5,
        -37.6,
        -43.8,
        -49.8,
        -55.8,
        -61.8,
        -67.8,
        -74.4,
        -80.4,
        -86.2,
        -91.9,
    ]
    assert [nmse_db(step, x) for step in found] == pytest.approx(expected, abs=0.051)
    assert nmse_db(HyperLISTA(a.float())(b.float()), x) <= -91


@pytest.mark.parametrize(("m", "n", "density"), [(60, 120, 0.08), (100, 200, 0.05), (400, 800, 0.1)])
def test_usual_numbers_follow_the_size(m, n, density):
    generator = torch.Generator().manual_seed(1)
    problem = gaussian(m, n, density, batch=100, dtype=torch.float64, generator=generator)
    assert problem.nmse_db(HyperLISTA(problem.A)(problem.b)) < -65


@pytest.mark.parametrize("scale", [1e-4, 0.3, 1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_scaling_b_scales_x(scale, dtype):
    a, _, b = small(dtype=dtype)
    solver = HyperLISTA(a, c1=0.05, c2=0.05, c3=0.2, layers=6)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    torch.testing.assert_close(solver(scale * b) / scale, solver(b), rtol=tolerance, atol=tolerance)


def test_growing_support_makes_layers_after_the_first_threshold_hard():
    a, _, b = small()
    solver = HyperLISTA(a, c1=0.05, c2=0.0, c3=1e9, layers=2)
    one, two = solver.trajectory(b)
    inner = b - one @ a.T
    error = (inner @ torch.linalg.pinv(a).T).abs().sum(-1, keepdim=True)
    shrunk = error < (b @ torch.linalg.pinv(a).T).abs().sum(-1, keepdim=True)
    assert bool(shrunk.all())
    torch.testing.assert_close(two, hard_threshold(one + inner @ symmetric_weight(a), 0.05 * error))


def test_exact_answers_stay():
    a, x, _ = small()
    b = x @ a.T
    torch.testing.assert_close(HyperLISTA(a, layers=4)(b, x), x, rtol=0, atol=1e-12)


def test_chunks_do_not_matter():
    a, _, b = small(batch=3)
    many = b.repeat(400, 1)
    solver = HyperLISTA(a, layers=3)
    torch.testing.assert_close(solver(many)[-3:], solver(b), rtol=0, atol=1e-12)
    start = solver(b).repeat(400, 1)
    torch.testing.assert_close(solver(many, start)[-3:], solver(b, solver(b)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(("c1", "c3"), [(0.04, 0.08), (0.01, 0.02), (0.05, 5.0), (0.02, 0.0)])
def test_layers_in_place_are_the_same_layers(c1, c3, warm):
    a, x, b = small(batch=9)
    kept = b.clone(), x.clone()
    solver = HyperLISTA(a, c1=c1, c2=0.04, c3=c3, layers=7)
    start = 0.5 * x if warm else None
    expected = solver(b, start)
    with torch.no_grad():
        torch.testing.assert_close(solver(b, start), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(solver(b, x), solver.solve(b, x0=x).x, rtol=0, atol=1e-12)
        with pytest.raises(ValueError, match="x0 has 4 samples and b 9"):
            solver(b, x[:4])
    assert torch.equal(b, kept[0])
    assert torch.equal(x, kept[1])


def test_threshold_and_momentum_have_gradients():
    a, _, b = small(batch=2)

    def run(c1, c2):
        solver = HyperLISTA(a, c1=0.0, c2=0.0, c3=0.1, layers=4)
        del solver.c1, solver.c2
        solver.c1, solver.c2 = c1, c2
        return solver(b)

    numbers = (torch.tensor(0.04, dtype=torch.float64), torch.tensor(0.05, dtype=torch.float64))
    assert torch.autograd.gradcheck(run, tuple(number.requires_grad_(True) for number in numbers))
    assert not any(p.requires_grad for p in HyperLISTA(a).parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_tuning_beats_the_usual_numbers_on_other_problems(dtype):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(30, 50, generator=generator, dtype=dtype)
    a = a / torch.linalg.vector_norm(a, dim=0)
    x = (torch.rand(80, 50, generator=generator) < 0.06) * torch.randn(80, 50, generator=generator, dtype=dtype)
    b, heard = x @ a.T, []
    tuned = tune_hyperlista(a, x[:40], b[:40], layers=12, candidates=64, callback=heard.append)
    usual = HyperLISTA(a, layers=12)
    assert nmse_db(tuned(b[40:]), x[40:]) < nmse_db(usual(b[40:]), x[40:]) - 10
    assert tuned.tuning is heard[-1]
    assert float(tuned.c1) == pytest.approx(tuned.tuning.c1)
    assert nmse_db(tuned(b[:40]), x[:40]) == pytest.approx(tuned.tuning.nmse_db, abs=0.5)
    assert tuned.tuning.seconds > 0
    assert heard[0].solved < heard[-1].solved


def test_tuning_is_repeatable():
    a, x, b = small()
    first, second = (tune_hyperlista(a, x, b, layers=3, candidates=8) for _ in range(2))
    assert torch.equal(torch.stack([*first.parameters()]), torch.stack([*second.parameters()]))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"candidates": 0}, "candidates must be 1 or more, got 0"),
        ({"x": torch.zeros(5, 30, dtype=torch.float64)}, "x has 5 samples and b 6"),
        ({"A": small(matrices=True)[0]}, "one A for all samples, got one for each of 6"),
    ],
)
def test_wrong_problems_are_refused(change, says):
    a, x, b = small()
    given = {"A": a, "x": x, "b": b} | change
    with pytest.raises(ValueError, match=says):
        tune_hyperlista(given.pop("A"), given.pop("x"), given.pop("b"), layers=2, **given)
