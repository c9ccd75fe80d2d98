"""Random problems have the statistics they promise."""

from __future__ import annotations

import math

import pytest
import torch

from eke.unrolled import gaussian, nmse_db


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_problems_are_consistent(dtype):
    problem = gaussian(20, 40, 0.2, batch=500, dtype=dtype, generator=seeded())
    assert problem.A.dtype == problem.x.dtype == problem.b.dtype == dtype
    assert not problem.noise_std.is_complex()
    torch.testing.assert_close(
        torch.linalg.vector_norm(problem.A, dim=0), torch.ones(40, dtype=problem.noise_std.dtype)
    )
    torch.testing.assert_close(problem.x @ problem.A.T, problem.b, rtol=1e-4, atol=1e-4)
    share = float((problem.x != 0).double().mean())
    assert share == pytest.approx(0.2, abs=4 * math.sqrt(0.2 * 0.8 / 20_000))
    assert float(problem.x[problem.x != 0].abs().square().mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("snr", [20, 30, 40])
def test_noise_has_the_asked_level(snr):
    problem = gaussian(250, 500, 0.1, batch=200, snr_db=snr, dtype=torch.float64, generator=seeded())
    clean = problem.x @ problem.A.T
    noise = problem.b - clean
    assert 10 * math.log10(float(clean.var(1).sum() / noise.square().mean(1).sum())) == pytest.approx(snr, abs=0.1)
    torch.testing.assert_close(noise.std(1).mean(), problem.noise_std.mean(), rtol=0.02, atol=0)


def test_condition_is_that_of_the_matrix_before_its_columns_are_normalized():
    plain = gaussian(30, 60, 0.1, batch=1, dtype=torch.float64, generator=seeded()).A
    hard = gaussian(30, 60, 0.1, batch=1, condition=50, dtype=torch.float64, generator=seeded()).A
    assert float(torch.linalg.cond(hard)) == pytest.approx(50, rel=0.3)
    assert float(torch.linalg.cond(hard)) > 5 * float(torch.linalg.cond(plain))


def test_generators_repeat_and_leave_the_global_one_alone():
    state = torch.get_rng_state()
    first, second = (gaussian(5, 9, 0.5, batch=3, generator=seeded(7)) for _ in range(2))
    assert torch.equal(first.b, second.b)
    assert torch.equal(state, torch.get_rng_state())


def test_error_is_a_ratio_of_sums():
    truth = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    x = torch.tensor([[1.1, 0.0], [0.0, 3.0]])
    assert nmse_db(x, truth) == pytest.approx(10 * math.log10(0.01 / 10), abs=1e-4)
    assert nmse_db(truth, truth) == -math.inf
    assert nmse_db(1j * truth, 1j * truth.to(torch.complex64)) == -math.inf


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"m": 0}, "positive sizes, got m=0"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"condition": 0.5}, "1 or more, got 0.5"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_wrong_problems_are_refused(settings, says):
    given = {"m": 4, "n": 8, "density": 0.1, "batch": 2} | settings
    with pytest.raises(ValueError, match=says):
        gaussian(given.pop("m"), given.pop("n"), given.pop("density"), **given)


def test_errors_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\) and \(3, 3\)"):
        nmse_db(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="not zero everywhere"):
        nmse_db(torch.ones(2, 3), torch.zeros(2, 3))
