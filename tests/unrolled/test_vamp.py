"""Message passing: its formulas, what it learns, how fast it is on the standard problem, and what it says elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from eke.unrolled import VAMP, gaussian, nmse_db, vamp
from eke.unrolled.vamp import _denoised, _fitted_noise

from .cases import small, standard


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("q", [0.0, 0.3, 1.0, 2.5])
def test_denoiser_is_the_posterior_by_quadrature(q):
    density, spread, e = 0.2, 1.7, 0.09

    def joint(x):
        return density * np.exp(-(x**2) / (2 * spread) - (x - q) ** 2 / (2 * e)) / np.sqrt(spread * 2 * np.pi)

    zero = (1 - density) * np.exp(-(q**2) / (2 * e))
    total = zero + integrate.quad(joint, -12, 12, points=[0, q])[0]
    mean = integrate.quad(lambda x: x * joint(x), -12, 12, points=[0, q])[0] / total
    square = integrate.quad(lambda x: x * x * joint(x), -12, 12, points=[0, q])[0] / total
    column = lambda v: torch.tensor([[v]], dtype=torch.float64)  # noqa: E731
    x, u, new_density, new_spread = _denoised(column(q), column(e), column(density), column(spread))
    assert float(x) == pytest.approx(mean, abs=1e-9)
    assert float(u) * e == pytest.approx(square - mean**2, abs=1e-9)
    assert float(new_density) == pytest.approx(min(0.999, 1 - zero / total), abs=1e-9)
    assert float(new_spread) == pytest.approx(square / (1 - zero / total), rel=1e-9)


def test_complex_denoiser_is_the_posterior_by_quadrature():
    density, spread, e, q = 0.2, 1.7, 0.4, 0.6 - 0.5j

    def weigh(f):
        def integrand(im, re):
            x = re + 1j * im
            return f(x) * density / (np.pi * spread) * np.exp(-(abs(x) ** 2) / spread - abs(x - q) ** 2 / e)

        return integrate.dblquad(integrand, -8, 8, -8, 8, epsabs=1e-10)[0]

    zero = (1 - density) * np.exp(-(abs(q) ** 2) / e)
    total = zero + weigh(lambda x: 1.0)
    mean = (weigh(np.real) + 1j * weigh(np.imag)) / total
    square = weigh(lambda x: abs(x) ** 2) / total
    real = lambda v: torch.tensor([[v]], dtype=torch.float64)  # noqa: E731
    x, u, _, _ = _denoised(torch.tensor([[q]]), real(e), real(density), real(spread))
    assert complex(x) == pytest.approx(mean, abs=1e-7)
    assert float(u) * e == pytest.approx(square - abs(mean) ** 2, abs=1e-7)


def test_noise_is_fitted_without_bias():
    level = torch.linspace(0.1, 3, 200, dtype=torch.float64)
    power = torch.randn(4000, 200, generator=seeded(), dtype=torch.float64).square() * (0.5 + level)
    column = torch.full((4000, 1), 1.0, dtype=torch.float64)
    fitted = _fitted_noise(power, level.expand_as(power), column, torch.zeros_like(column), 0)
    assert float(fitted.mean()) == pytest.approx(0.5, abs=0.02)


def slow_first_step(a, b, noise, density, spread):
    """The linear estimator on one sample, written with inverses of A A^T + (s / t) I."""
    m, n = a.shape
    t = density * spread
    inverse = torch.linalg.inv(a @ a.T + noise / t * torch.eye(m, dtype=a.dtype))
    c = torch.trace(a.T @ inverse @ a) / n
    return a.T @ inverse @ b / c, t * (1 - c) / c


def test_first_step_is_its_definition():
    a, _, b = small(batch=2)
    noise, density, spread = 0.01, 0.1, 1.3
    solver = VAMP(a, iterations=1, density=density, variance=spread, noise_variance=noise)
    for right, x in zip(b, solver(b), strict=True):
        q, e = slow_first_step(a, right, noise, density, spread)
        prior = [torch.full((1, 1), v, dtype=torch.float64) for v in (density, spread)]
        expected = _denoised(q[None], e.reshape(1, 1), *prior)[0]
        torch.testing.assert_close(x, expected[0], rtol=0, atol=1e-10)


def test_standard_problem_without_a_given_prior():
    a, x, b = standard(200, drawn=1000)
    assert nmse_db(VAMP(a, iterations=8)(b), x) < -55
    assert nmse_db(VAMP(a, iterations=12)(b), x) < -86
    # six steps and two rounds of least squares are eight
    assert nmse_db(VAMP(a, iterations=6, polish=1)(b), x) < -60
    assert nmse_db(VAMP(a, iterations=8, polish=3)(b), x) < -280


def test_single_precision_loses_nothing():
    a, x, b = standard(100, drawn=1000)
    double, single = VAMP(a, iterations=10)(b), VAMP(a.float(), iterations=10)(b.float())
    assert nmse_db(single, x) == pytest.approx(nmse_db(double, x), abs=0.1)


@pytest.mark.parametrize("snr", [20, 30, 40])
def test_learned_prior_and_noise_cost_nothing(snr):
    problem = gaussian(250, 500, 0.1, batch=200, snr_db=snr, dtype=torch.float64, generator=seeded(snr))
    learned = problem.nmse_db(VAMP(problem.A)(problem.b))
    noise = float(problem.noise_std.square().mean())
    given = VAMP(problem.A, density=0.1, variance=1.0, noise_variance=noise)
    assert learned <= problem.nmse_db(given(problem.b)) + 0.1
    details = VAMP(problem.A).solve(problem.b).details
    assert float(details["density"].mean()) == pytest.approx(0.1, abs=0.01)
    assert float(details["variance"].mean()) == pytest.approx(1, abs=0.1)
    assert float((details["noise_variance"] / problem.noise_std.square()).log().mean().exp()) == pytest.approx(
        1, abs=0.1
    )


def test_posterior_variance_is_the_error():
    problem = gaussian(250, 500, 0.1, batch=200, snr_db=30, dtype=torch.float64, generator=seeded(1))
    solution = vamp(problem.A, problem.b)
    error = (solution.x - problem.x).square().mean()
    assert float(solution.details["posterior_variance"].mean() / error) == pytest.approx(1, abs=0.15)


def test_polish_leaves_noisy_answers_alone():
    problem = gaussian(250, 500, 0.1, batch=50, snr_db=30, dtype=torch.float64, generator=seeded(2))
    plain, polished = (problem.nmse_db(VAMP(problem.A, polish=p)(problem.b)) for p in (0, 2))
    assert polished == pytest.approx(plain, abs=0.05)


def oversampled():
    """A cosine dictionary four times finer than its rows can tell apart, with sparse x."""
    k = torch.arange(64, dtype=torch.float64)
    a = torch.cos(math.pi * (k[:, None] + 0.5) * torch.arange(256, dtype=torch.float64) / 256)
    a = a / torch.linalg.vector_norm(a, dim=0)
    x = torch.randn(20, 256, generator=seeded(), dtype=torch.float64) * (
        torch.rand(20, 256, generator=seeded(1), dtype=torch.float64) < 0.05
    )
    return a, x, x @ a.T


def test_coherent_dictionaries_run_away_and_it_is_said():
    a, _, b = oversampled()
    with pytest.warns(RuntimeWarning, match="VAMP diverged on"):
        solution = vamp(a, b, iterations=30)
    assert bool((solution.residual <= 1.01 * torch.linalg.vector_norm(b, dim=-1)).all())


def test_polish_takes_no_huge_answers_from_nearly_singular_supports():
    a, _, b = oversampled()
    x = VAMP(a, iterations=3, polish=2)(b)
    shortest = b @ torch.linalg.pinv(a).T
    assert bool((torch.linalg.vector_norm(x, dim=-1) <= 11 * torch.linalg.vector_norm(shortest, dim=-1)).all())


@pytest.mark.parametrize("settings", [{"condition": 50.0}, {"density": 0.05}, {"density": 0.15}])
def test_other_problems_converge_too(settings):
    given = {"density": 0.1} | settings
    problem = gaussian(250, 500, given.pop("density"), batch=50, dtype=torch.float64, generator=seeded(3), **given)
    assert problem.nmse_db(VAMP(problem.A, iterations=20)(problem.b)) < -90


@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("polish", [0, 2])
def test_complex_and_batched_dictionaries(matrices, polish):
    a, x, b = small(m=40, n=60, nonzeros=4, dtype=torch.complex128, matrices=matrices)
    found = VAMP(a, iterations=15, polish=polish)(b)
    assert nmse_db(found, x) < (-250 if polish else -60)


def test_tall_dictionaries_see_noise_outside_their_range():
    generator = seeded(4)
    a = torch.randn(60, 30, generator=generator, dtype=torch.float64) / 60**0.5
    x = torch.randn(20, 30, generator=generator, dtype=torch.float64) * (
        torch.rand(20, 30, generator=generator, dtype=torch.float64) < 0.2
    )
    b = x @ a.T + 0.1 * torch.randn(20, 60, generator=generator, dtype=torch.float64)
    noise = vamp(a, b).details["noise_variance"]
    assert float(noise.mean()) == pytest.approx(0.01, rel=0.25)


def test_scale_and_sign_go_through():
    a, _, b = small()
    for factor in (1e-6, -2.0, 1e5):
        torch.testing.assert_close(VAMP(a)(factor * b), factor * VAMP(a)(b), rtol=1e-6, atol=1e-9 * abs(factor))


def test_columns_may_change_places():
    a, _, b = small()
    order = torch.randperm(30, generator=seeded())
    torch.testing.assert_close(VAMP(a[:, order])(b), VAMP(a)(b)[:, order], rtol=0, atol=1e-8)


def test_zero_in_gives_zero_out():
    a, _, b = small()
    assert bool((VAMP(a)(torch.zeros_like(b)) == 0).all())


def test_large_batches_go_in_parts():
    a, _, b = small()
    many = b.repeat(100, 1)
    torch.testing.assert_close(VAMP(a)(many), VAMP(a)(b).repeat(100, 1), rtol=0, atol=1e-10)


def test_warm_start_saves_steps():
    problem = gaussian(100, 200, 0.08, batch=20, dtype=torch.float64, generator=seeded(5))
    near = problem.x + 1e-3 * torch.randn(problem.x.shape, generator=seeded(6), dtype=torch.float64)
    cold = problem.nmse_db(VAMP(problem.A, iterations=5)(problem.b))
    warm = problem.nmse_db(VAMP(problem.A, iterations=5)(problem.b, near))
    assert warm < cold - 10


def test_damping_takes_part_of_each_message():
    a, _, b = small(m=40, n=60)
    assert nmse_db(VAMP(a, iterations=60, damping=0.7)(b), VAMP(a, iterations=60)(b)) < -40


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0.0"),
        ({"density": 2.0}, "density must be above 0 and at most 1, got 2.0"),
        ({"variance": -1.0}, "variance must be above 0 and at most inf, got -1.0"),
        ({"damping": 0.0}, "damping must be above 0 and at most 1, got 0.0"),
        ({"noise_variance": -1.0}, "noise_variance must be 0 or more, got -1.0"),
        ({"noise_variance": math.nan}, "noise_variance must be 0 or more, got nan"),
        ({"polish": -1}, "polish is a number of rounds, 0 or more, got -1"),
        ({"iterations": 0}, "VAMP needs at least 1 iteration, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        VAMP(small()[0], **settings)


def test_what_wanders_about_is_said():
    at, waves = torch.arange(128.0).double(), torch.ones(1, 1, dtype=torch.float64)
    while len(waves) < 128:
        both, eye = torch.ones(2, 1, dtype=torch.float64), torch.eye(len(waves), dtype=torch.float64)
        waves = torch.cat([torch.kron(waves, both), torch.kron(eye, both * torch.tensor([[1.0], [-1.0]]))], 1)
    a = torch.cat([torch.cos(torch.pi * (at[:, None] + 0.5) * at / 128), waves[:, 1:]], 1)
    a = a / torch.linalg.vector_norm(a, dim=0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, a.shape[1], generator=generator, dtype=torch.float64)
    x *= torch.rand(x.shape, generator=generator) < 0.05
    b = x @ a.T
    with pytest.warns(
        RuntimeWarning, match="has not settled on .* of 100 problems: one more step would move x by more"
    ):
        found = vamp(a, b, iterations=20)
    settled = found.details["settled"]
    error = (found.x - x).norm(dim=1) / x.norm(dim=1)
    assert 0 < int(settled.sum()) < 100
    assert float(error[settled].max()) < 0.1
    assert float(error[~settled].median()) > float(error[settled].median())
