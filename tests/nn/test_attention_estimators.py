"""Estimators of attention sampling, over every draw there is."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from eke.nn.attention_sampling import draw, entropy_penalty, expectation
from eke.nn.attention_sampling.estimators import murthy_ratios

SIZES = [(4, 1), (4, 2), (5, 3), (6, 3), (6, 5), (6, 6)]


def every_draw(k, n, *, replacement=False):
    """All ordered draws (draws, n), attention (k,), features (k, 3) and the probability of each draw."""
    generator = torch.Generator().manual_seed(100 * k + n)
    attention = torch.softmax(torch.randn(k, generator=generator, dtype=torch.float64), 0)
    features = torch.randn(k, 3, generator=generator, dtype=torch.float64)
    orders = itertools.product(range(k), repeat=n) if replacement else itertools.permutations(range(k), n)
    order = torch.tensor(list(orders))
    probabilities = torch.ones(len(order), dtype=torch.float64)
    for i, row in enumerate(order.tolist()):
        left = 1.0
        for place in row:
            probabilities[i] *= float(attention[place]) / (1.0 if replacement else left)
            left -= float(attention[place])
    return attention, features, order, probabilities


def mean_over_draws(k, n, estimator, *, replacement=False):
    attention, features, order, probabilities = every_draw(k, n, replacement=replacement)
    a, f = attention.requires_grad_(), features.requires_grad_()
    found = expectation(f[order], a.expand(len(order), -1), order, estimator=estimator, replacement=replacement)
    mean = torch.einsum("d,df->f", probabilities, found)
    return a, f, mean, found, probabilities


@pytest.mark.parametrize(("k", "n"), SIZES)
@pytest.mark.parametrize(("estimator", "replacement"), [("corrected", False), ("murthy", False), ("corrected", True)])
def test_value_and_both_derivatives_are_unbiased(k, n, estimator, replacement):
    if replacement and n > 3:
        n = 3  # 6 ** 5 draws say no more
    a, f, mean, _, probabilities = mean_over_draws(k, n, estimator, replacement=replacement)
    assert abs(float(probabilities.sum()) - 1) < 1e-12
    true = torch.einsum("k,kf->f", a, f)
    torch.testing.assert_close(mean, true, rtol=0, atol=1e-12)
    side = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(mean @ side, (a, f), retain_graph=True)
    wanted = torch.autograd.grad(true @ side, (a, f))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("k", "n"), [(5, 3), (6, 5)])
def test_published_derivative_by_the_attention_is_biased_and_nothing_else(k, n):
    a, f, mean, _, _ = mean_over_draws(k, n, "paper_code")
    true = torch.einsum("k,kf->f", a, f)
    torch.testing.assert_close(mean, true, rtol=0, atol=1e-12)
    by_a, by_f = torch.autograd.grad(mean.sum(), (a, f), retain_graph=True)
    true_a, true_f = torch.autograd.grad(true.sum(), (a, f))
    torch.testing.assert_close(by_f, true_f, rtol=0, atol=1e-12)
    assert float((by_a - true_a).abs().max()) > 0.05


def test_published_derivative_is_the_published_one():
    attention, features, order, _ = every_draw(6, 4)
    row = order[17]
    a = attention.requires_grad_()
    found = expectation(features[row][None], a[None], row[None], estimator="paper_code")
    (by_a,) = torch.autograd.grad(found.sum(), a)
    f, p = features.sum(1).tolist(), attention.tolist()
    for n, place in enumerate(row.tolist()):
        before = row[:n].tolist()
        left = 1 - sum(p[j] for j in before)
        value = sum(p[j] * f[j] for j in before) + left * f[place]
        wanted = (value * left / p[place] + sum(f[j] for j in before) - n * f[place]) / 4
        assert float(by_a[place]) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("k", "n"), [(5, 2), (5, 3), (6, 5), (6, 6)])
def test_murthy_varies_least(k, n):
    spread = {}
    for estimator, replacement in (("corrected", True), ("corrected", False), ("murthy", False)):
        if replacement and n > 3:
            continue
        _, _, mean, found, probabilities = mean_over_draws(k, n, estimator, replacement=replacement)
        spread[estimator, replacement] = float((probabilities[:, None] * (found - mean).detach() ** 2).sum())
    ordered = [value for _, value in sorted(spread.items(), key=lambda item: item[1])]
    assert ordered[0] == spread["murthy", False]
    if n == k:
        assert ordered[0] < 1e-28


def test_one_draw_is_one_draw_with_and_without_replacement():
    attention, features, order, _ = every_draw(5, 1)
    rows = attention.expand(5, -1)
    for estimator in ("corrected", "murthy", "paper_code"):
        without = expectation(features[order], rows, order, estimator=estimator)
        torch.testing.assert_close(without, features[order[:, 0]], rtol=0, atol=1e-14)
    torch.testing.assert_close(expectation(features[order], rows, order, replacement=True), features[order[:, 0]])


@pytest.mark.parametrize("estimator", ["corrected", "paper_code"])
def test_mean_of_ones_is_one(estimator):
    attention, _, order, _ = every_draw(6, 4)
    ones = torch.ones(len(order), 4, 1, dtype=torch.float64)
    found = expectation(ones, attention.expand(len(order), -1), order, estimator=estimator)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-14)


def ratios_by_orders(a, rest):
    """P(S | i first) / P(S) over every order of the set."""

    def chance(left):
        mass = math.fsum([*(a[i] for i in left), rest])  # never by taking away: that loses digits
        return math.fsum(a[i] / mass * chance(left - {i}) for i in left) if left else 1.0

    whole = frozenset(range(len(a)))
    return [chance(whole - {i}) / chance(whole) for i in whole]


@pytest.mark.parametrize("spread", [0.1, 3.0, 20.0])
@pytest.mark.parametrize("n", [1, 3, 6])
def test_quadrature_gives_the_sum_over_orders(n, spread):
    logits = spread * torch.randn(n + 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    a = torch.softmax(logits, 0).tolist()
    found = murthy_ratios(torch.tensor([a[:n]], dtype=torch.float64), torch.tensor([a[n]], dtype=torch.float64))
    np.testing.assert_allclose(found[0].numpy(), ratios_by_orders(a[:n], a[n]), rtol=1e-11)


def test_quadrature_of_many_equal_positions_is_the_uniform_answer():
    # Equal attention: every set of N from K has one probability, and R = K / N.
    for n, k in ((40, 400), (150, 200)):
        a = torch.full((1, n), 1 / k, dtype=torch.float64)
        found = murthy_ratios(a, torch.tensor([1 - n / k], dtype=torch.float64))
        torch.testing.assert_close(found, torch.full_like(found, k / n), rtol=1e-11, atol=0)


@pytest.mark.parametrize("replacement", [False, True])
def test_draws_come_as_often_as_they_should(replacement):
    attention, _, order, probabilities = every_draw(4, 2, replacement=replacement)
    many = 40_000
    found = draw(
        attention.log().expand(many, -1), 2, replacement=replacement, generator=torch.Generator().manual_seed(0)
    )
    seen = torch.tensor([float((found == row).all(1).sum()) for row in order])
    wanted = probabilities * many
    statistic = float(((seen - wanted) ** 2 / wanted).sum())
    degrees = len(order) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees)  # five deviations of chi-square


def test_draw_depends_on_its_generator_alone():
    logits = torch.randn(3, 50)
    first = draw(logits, 7, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(99)
    assert torch.equal(first, draw(logits, 7, generator=torch.Generator().manual_seed(5)))
    assert first.shape == (3, 7)
    assert all(len(set(row)) == 7 for row in first.tolist())


def test_closed_positions_are_never_drawn_and_faint_ones_are_not_lost():
    logits = torch.tensor([[0.0, -math.inf, -2000.0, -2001.0]])
    found = draw(logits.expand(200, -1), 3, generator=torch.Generator().manual_seed(0))
    assert not bool((found == 1).any())
    assert set(found.unique().tolist()) == {0, 2, 3}
    with pytest.raises(ValueError, match="4 positions cannot be drawn without replacement from 3"):
        draw(logits, 4)


def test_single_precision_stays_single_and_agrees():
    attention, features, order, _ = every_draw(6, 4)
    rows = attention.expand(len(order), -1)
    exact = expectation(features[order], rows, order, estimator="murthy")
    found = expectation(features[order].float(), rows.float(), order, estimator="murthy")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_second_derivatives_exist():
    attention, features, order, _ = every_draw(5, 3)
    f = features.requires_grad_()
    found = expectation(f[order[:4]] ** 2, attention.expand(4, -1), order[:4])
    (first,) = torch.autograd.grad(found.sum(), f, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), f)
    assert bool(second.isfinite().all())
    assert float(second.abs().max()) > 0


def test_entropy_penalty_is_least_for_uniform_attention():
    uniform = torch.full((2, 10), 0.1, dtype=torch.float64)
    assert float(entropy_penalty(uniform)) == pytest.approx(-math.log(10), abs=1e-4)
    peaked = torch.softmax(torch.randn(2, 10, dtype=torch.float64), -1)
    assert float(entropy_penalty(peaked)) > float(entropy_penalty(uniform))


F, A, ORDER = torch.ones(1, 2, 3), torch.full((1, 4), 0.25), torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((F, A * 1.1, ORDER), {}, "must sum to 1 within 0.0001, got one that is 0.1"),
        ((F, torch.tensor([[-0.5, 1.0, 0.25, 0.25]]), ORDER), {}, "at least 0 and not NaN, got -0.5"),
        ((F, A * math.nan, ORDER), {}, "not NaN, got nan"),
        ((F, A, torch.tensor([[1, 1]])), {}, "Position 1 stands twice in order: pass replacement=True"),
        ((F, A, torch.tensor([[0, 4]])), {}, "must lie in 0 … 3, got 0 … 4"),
        ((F, torch.tensor([[0.0, 0.5, 0.25, 0.25]]), ORDER), {}, "Position 0 of row 0 has attention 0"),
        ((torch.ones(1, 5, 3), A, torch.tensor([[0, 1, 2, 3, 3]])), {}, "5 positions cannot be drawn without"),
        ((torch.ones(1, 3, 3), A, ORDER), {}, r"got \(1, 3, 3\), \(1, 4\), \(1, 2\)"),
        ((F, A.expand(2, -1), ORDER), {}, "Attention has 2 rows and order 1"),
        ((torch.ones(1, 0, 3), A, torch.zeros(1, 0, dtype=torch.long)), {}, r"got order of shape \(1, 0\)"),
        ((F, A, ORDER), {"estimator": "desraj"}, "An estimator is one of corrected, murthy, paper_code, got 'desraj'"),
        ((F, A, ORDER), {"estimator": "murthy", "replacement": True}, "estimator='murthy' is for draws without"),
    ],
)
def test_what_is_no_draw_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        expectation(*arguments, **options)


@pytest.mark.parametrize(
    ("logits", "samples", "message"),
    [
        (torch.zeros(4), 1, r"must be \(batch, positions\), got \(4,\)"),
        (torch.tensor([[0.0, math.nan]]), 1, "hold nan at row 0, position 1"),
        (torch.tensor([[math.inf, 0.0]]), 1, "hold inf at row 0, position 0"),
        (torch.zeros(1, 4), 0, "got samples=0"),
        (torch.zeros(1, 4), 5, "5 positions cannot be drawn without replacement from 4"),
    ],
)
def test_logits_that_cannot_be_drawn_from_are_refused(logits, samples, message):
    with pytest.raises(ValueError, match=message):
        draw(logits, samples)
