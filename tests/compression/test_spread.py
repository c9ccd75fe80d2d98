"""Intervals of metrics against textbook formulas, against each other, and against their own promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from eke.compression import Metric, Samples, interval, paired_difference
from eke.compression.dense import overlap
from eke.compression.intervals import wilson
from eke.compression.regression import determination
from eke.compression.spread import around, influences, worsening

ERROR = {"name": "error", "lower_is_better": True}


def samples(values, **options) -> Samples:
    return Samples.mean(torch.as_tensor(np.asarray(values), dtype=torch.float64), **{"name": "gain", **options})


def quotient(t: torch.Tensor) -> torch.Tensor:
    return t[..., 0] / t[..., 1]


# Laws


def test_the_influence_on_a_mean_is_the_deviation_from_it():
    values = np.random.default_rng(0).normal(size=40)
    estimate, influence = influences(samples(values).sums, quotient)
    assert estimate == pytest.approx(values.mean(), abs=1e-14)
    np.testing.assert_allclose(influence.numpy(), values - values.mean(), atol=1e-12)


def test_the_influence_on_a_quotient_is_that_of_the_delta_method_to_first_order():
    rng = np.random.default_rng(1)
    x, w = rng.normal(3, 1, 2000), rng.gamma(3, size=2000)
    _, influence = influences(torch.from_numpy(np.stack([x * w, w], 1)), quotient)
    delta = w * (x - (x * w).sum() / w.sum()) / w.mean()
    # Second order terms are 1 / n of the first.
    np.testing.assert_allclose(influence.numpy(), delta, atol=0.02)


def test_the_influence_does_not_depend_on_how_many_rows_are_in_memory(monkeypatch):
    sums = torch.from_numpy(np.random.default_rng(2).gamma(2, size=(50, 2)))
    whole = influences(sums, quotient)[1]
    monkeypatch.setattr("eke.compression.spread._CHUNK", 7)
    assert torch.equal(influences(sums, quotient)[1], whole)


def test_the_interval_of_symmetric_samples_is_students():
    half = np.random.default_rng(3).normal(size=30)
    values = 5 + np.concatenate([half, -half])
    low, high = interval(samples(values))
    wanted = student.interval(0.95, 59, loc=5, scale=values.std(ddof=1) / math.sqrt(60))
    assert (low, high) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("skew", [0.3, -0.3, 2.0])
def test_the_far_end_is_where_halls_cubic_reaches_the_quantile(skew):
    rng = np.random.default_rng(4)
    centred = torch.from_numpy(rng.gamma(1 / skew**2, size=60) * math.copysign(1, skew))
    centred -= centred.mean()
    low, high = around(0.0, [centred])
    n, error = 60, float(centred.std()) / math.sqrt(60)
    k = float(((centred / error) ** 3).sum()) / n**3
    quantile = student.ppf(0.975, n - 1)
    reached = []
    for end in (low, high):
        z = -end / error
        reached.append(z + k / 3 * z**2 + k * k / 27 * z**3 + k / 6)
    # Hall's end on the side of the long tail, Student's on the other.
    hall, plain = (1, 0) if skew > 0 else (0, 1)
    assert abs(reached[hall]) == pytest.approx(quantile, abs=1e-6)
    assert abs((low, high)[plain]) == pytest.approx(quantile * error, rel=1e-9)


def test_two_independent_groups_give_welchs_interval():
    rng = np.random.default_rng(5)
    half_a, half_b = rng.normal(size=20), rng.normal(0, 2, size=10)
    a, b = 2 + np.concatenate([half_a, -half_a]), 1 + np.concatenate([half_b, -half_b])
    va, vb = a.var(ddof=1) / 40, b.var(ddof=1) / 20
    freedom = (va + vb) ** 2 / (va**2 / 39 + vb**2 / 19)
    difference, ends = paired_difference(samples(a, order="one"), samples(b, order="another"))
    assert difference == pytest.approx(1)
    assert ends == pytest.approx(student.interval(0.95, freedom, loc=1, scale=math.sqrt(va + vb)), abs=1e-9)


def test_pairing_narrows_the_interval_of_models_that_agree():
    rng = np.random.default_rng(6)
    a = rng.gamma(2, size=200)
    b = a + rng.normal(0, 0.05, 200)
    _, paired = paired_difference(samples(a, order="x"), samples(b, order="x"))
    _, unpaired = paired_difference(samples(a, order="x"), samples(b, order="y"))
    assert paired[1] - paired[0] < 0.1 * (unpaired[1] - unpaired[0])


@pytest.mark.parametrize("options", [{}, ERROR, {**ERROR, "span": 1.0}])
def test_swapping_the_models_mirrors_the_difference(options):
    rng = np.random.default_rng(7)
    a, b = (samples(rng.random(60), **options) for _ in range(2))
    difference, (low, high) = paired_difference(a, b)
    assert difference == pytest.approx(a.value - b.value)
    assert paired_difference(b, a)[0] == pytest.approx(-difference)
    assert paired_difference(b, a)[1] == pytest.approx((-high, -low))
    assert low < difference < high


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_worse_is_positive_and_relative_to_the_first(positive, lower):
    metric = Metric("m", quotient, lower_is_better=lower, positive=positive)
    rng = np.random.default_rng(8)
    values = rng.gamma(4, size=(2, 80))
    first, second = (Samples(torch.from_numpy(np.stack([v, np.ones(80)], 1)), metric) for v in values)
    found = worsening(first, second)
    wanted = (second.value - first.value) / first.value * (1 if lower else -1)
    assert found.relative
    assert found.value == pytest.approx(wanted)
    assert found.interval[0] < wanted < found.interval[1]


def test_the_scale_of_a_metric_does_not_matter_to_a_relative_difference():
    rng = np.random.default_rng(9)
    a, b = rng.gamma(2, size=(2, 100))
    one, many = (worsening(samples(c * a, **ERROR), samples(c * b, **ERROR)) for c in (1.0, 1e4))
    assert one.interval == pytest.approx(many.interval)


def test_the_perplexity_of_twice_the_likelihood_is_half():
    metric = Metric("perplexity", lambda t: torch.exp(quotient(t)), lower_is_better=True, positive=True)
    costs = torch.from_numpy(np.random.default_rng(10).gamma(4, size=60))
    first = Samples(torch.stack([costs, torch.ones(60)], 1), metric)
    second = Samples(torch.stack([costs + math.log(2), torch.ones(60)], 1), metric)
    assert worsening(first, second).value == pytest.approx(1.0)
    assert worsening(first, second).interval == pytest.approx((1.0, 1.0))
    assert worsening(second, first).interval == pytest.approx((-0.5, -0.5))


def test_a_first_metric_of_zero_leaves_the_difference_in_its_own_unit():
    found = worsening(samples(np.zeros(20), **ERROR), samples(np.linspace(0, 1, 20), **ERROR))
    assert not found.relative
    assert found.value == pytest.approx(0.5)


def test_samples_that_weigh_nothing_change_nothing_but_their_number():
    values, weights = torch.rand(30, generator=torch.Generator().manual_seed(0)), torch.ones(30)
    plain = Samples.mean(values, weights=weights, name="m")
    more = Samples.mean(
        torch.cat([values, torch.full((30,), 9.0)]), weights=torch.cat([weights, 0 * weights]), name="m"
    )
    assert more.value == pytest.approx(plain.value)
    widths = [high - low for low, high in (interval(plain), interval(more))]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


# Few samples that differ


@pytest.mark.parametrize("n", [10, 400, 5000])
def test_models_that_never_differ_keep_the_width_that_wilson_leaves(n):
    score = samples(np.full(n, 0.8), span=1.0, order="x")
    reach = wilson(0, n)[1]
    assert paired_difference(score, score)[1] == pytest.approx((-reach, reach))
    assert worsening(score, score).interval == pytest.approx((-reach / 0.8, reach / 0.8))
    assert interval(score) == pytest.approx((max(0.8 - reach, 0), 0.8 + reach))


def test_a_metric_without_a_span_has_no_width_where_nothing_differs():
    score = samples(np.arange(20.0), order="x")
    assert paired_difference(score, score)[1] == (0, 0)


@pytest.mark.parametrize("differ", [1, 9, 10])
def test_fewer_than_ten_differing_samples_may_differ_by_all_of_the_span(differ):
    a = np.full(300, 0.5)
    b = a.copy()
    b[:differ] -= np.linspace(0.01, 0.02, differ)
    _, (low, high) = paired_difference(*(samples(v, span=1.0, order="x") for v in (a, b)))
    reach = wilson(differ, 300)[1]
    assert (low <= -reach and high >= reach) is (differ < 10)


def test_a_share_ends_at_zero_and_one():
    metric = Metric("share", quotient, span=1.0, percent=True)
    values = torch.ones(60)
    values[0] = 0.9
    low, high = interval(Samples(torch.stack([values, torch.ones(60)], 1), metric))
    assert 0.9 < low < high <= 1


# Coverage: three standard errors of a share of 0.95 are 0.015 over 2000 replications and 0.02 over 1000.


def mean_of(kind):
    def make(rng, n):
        values = kind(rng, n)
        return Samples(torch.from_numpy(np.stack([values, np.ones(n)], 1)), Metric("m", quotient)), None

    return make


def errors(rng, n):
    """Squared errors of a regression before and after a change that adds noise: heavy tails, correlated."""
    e = rng.standard_t(6, size=n)
    after = e + 0.3 * rng.normal(size=n)
    metric = Metric("mse", quotient, lower_is_better=True, positive=True)
    return tuple(Samples(torch.from_numpy(np.stack([v**2, np.ones(n)], 1)), metric) for v in (e, after))


def likelihoods(rng, n):
    """Sequences of very different lengths and difficulties, each a little worse by an amount of its own."""
    length = np.ceil(rng.lognormal(3, 0.6, size=n))
    before = rng.gamma(4, 0.8, size=n)
    after = before + rng.gamma(2, 0.01, size=n)
    metric = Metric("ppl", lambda t: torch.exp(quotient(t)), lower_is_better=True, positive=True)
    return tuple(Samples(torch.from_numpy(np.stack([length * v, length], 1)), metric) for v in (before, after))


def regression(rng, n):
    y = rng.standard_t(8, size=n) * math.sqrt(0.75)
    e = rng.normal(0, 0.5, size=n)
    after = e + rng.normal(0, 0.15, size=n)
    metric = Metric("r2", determination)
    return tuple(Samples(torch.from_numpy(np.stack([np.ones(n), y, y * y, v * v], 1)), metric) for v in (e, after))


def ranks(rng, n):
    """Reciprocal ranks of which three in ten get worse."""
    rank = np.ceil(rng.exponential(3, size=n))
    after = np.where(rng.random(n) < 0.3, rank + np.ceil(rng.exponential(2, size=n)), rank)
    metric = Metric("mrr", quotient, span=1.0)
    return tuple(Samples(torch.from_numpy(np.stack([1 / v, np.ones(n)], 1)), metric, "x") for v in (rank, after))


def sequences(rng, n):
    """Right tokens of sequences: some sequences are hard, and some lose many tokens at once."""
    length = np.ceil(rng.lognormal(3, 0.5, size=n)).astype(int)
    right = rng.binomial(length, rng.beta(8, 2, size=n))
    after = right - rng.binomial(right, rng.beta(0.5, 9.5, size=n))
    metric = Metric("tokens", quotient, span=1.0, percent=True)
    return tuple(Samples(torch.from_numpy(np.stack([v, length], 1).astype(float)), metric, "x") for v in (right, after))


def images(rng, n):
    """Intersections and unions of four classes, the last one in every fifth image alone."""
    there = rng.random((n, 4)) < np.array([1, 0.8, 0.5, 0.2])
    size = np.where(there, rng.gamma(2, 200, size=(n, 4)), 0)
    shared = size * rng.beta(16, 4, size=(n, 4))
    union = size + rng.gamma(1, 20, size=(n, 4))
    worse = shared * (1 - rng.beta(1, 40, size=(n, 4)))
    metric = Metric("iou", overlap, span=1.0, percent=True)
    return tuple(
        Samples(torch.from_numpy(np.stack([s, union], 2).reshape(n, -1)), metric, "x") for s in (shared, worse)
    )


CASES = {
    "normal": (mean_of(lambda rng, n: rng.normal(size=n)), 0.0),
    "exponential": (mean_of(lambda rng, n: rng.exponential(size=n)), 1.0),
    "lognormal": (mean_of(lambda rng, n: rng.lognormal(size=n)), math.exp(0.5)),
    "squared normal": (mean_of(lambda rng, n: rng.normal(size=n) ** 2), 1.0),
    "squared errors": (errors, 0.09 / 1.5),
    "perplexity": (likelihoods, math.expm1(0.02)),
    "R2": (regression, 0.0225 / 0.75),
    "reciprocal rank": (ranks, None),
    "tokens": (sequences, None),
    "mean IoU": (images, None),
}


def truth(make, known):
    """The relative worsening of a very large sample, unless it is known."""
    return worsening(*make(np.random.default_rng(99), 500_000)).value if known is None else known


def covered(make, wanted, *, n, runs):
    rng = np.random.default_rng(n)
    hits = 0
    for _ in range(runs):
        first, second = make(rng, n)
        low, high = interval(first) if second is None else worsening(first, second).interval
        hits += low <= wanted <= high
    return hits / runs


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("n", "runs"), [(50, 2000), (200, 1000)])
def test_the_interval_covers_the_truth_as_often_as_it_says(case, n, runs):
    make, known = CASES[case]
    share = covered(make, truth(make, known), n=n, runs=runs)
    # What few differing samples leave open is added, so metrics with a span may cover more.
    assert 0.93 <= share <= (0.995 if case in ("reciprocal rank", "tokens") else 0.975)


def test_intervals_of_ten_skewed_samples_promise_too_much():
    make, known = CASES["lognormal"]
    assert 0.8 < covered(make, known, n=10, runs=2000) < 0.92


def test_the_unpaired_interval_covers_the_truth_as_often_as_it_says():
    def make(rng, n):
        one, _ = errors(rng, n)
        return one, errors(rng, n + 30)[1]

    assert 0.93 <= covered(make, 0.06, n=100, runs=2000) <= 0.975


@pytest.mark.parametrize("p", [0.0, 0.01, 0.05])
def test_rare_differences_are_covered(p):
    def make(rng, n):
        length = rng.integers(10, 30, size=n)
        right = rng.binomial(length, 0.9)
        lost = np.where(rng.random(n) < p, rng.binomial(right, 0.3), 0)
        metric = Metric("tokens", quotient, span=1.0, percent=True)
        return tuple(
            Samples(torch.from_numpy(np.stack([v, length], 1).astype(float)), metric, "x")
            for v in (right, right - lost)
        )

    assert covered(make, 0.3 * p, n=200, runs=1000) >= 0.94


# What is refused


@pytest.mark.parametrize(
    ("sums", "shape"), [(torch.ones(3), r"\(3,\)"), (torch.ones(0, 2), r"\(0, 2\)"), (torch.ones(2, 0), r"\(2, 0\)")]
)
def test_sums_must_be_a_table(sums, shape):
    with pytest.raises(ValueError, match=rf"sums must be \(samples, columns\) with at least one of each, got {shape}"):
        Samples(sums, Metric("m", quotient))


def test_sums_must_be_finite():
    with pytest.raises(ValueError, match="not finite in 2 of 3 samples: check the model's outputs and the targets"):
        Samples.mean(torch.tensor([1.0, math.nan, math.inf]), name="m")


@pytest.mark.parametrize("options", [{"name": ""}, {"name": "m", "span": 0.0}, {"name": "m", "span": -1.0}])
def test_a_metric_has_a_name_and_a_positive_span(options):
    with pytest.raises(ValueError, match="Metric needs a name and a positive span or None, got"):
        Metric(of=quotient, **options)


@pytest.mark.parametrize("weights", [torch.ones(2), -torch.ones(3)])
def test_weights_must_fit_the_values(weights):
    with pytest.raises(ValueError, match=r"needs values \(samples,\) and weights >= 0 of the same shape, got \(3,\)"):
        Samples.mean(torch.ones(3), weights=weights, name="m")


def test_scores_of_two_metrics_are_not_compared():
    with pytest.raises(ValueError, match="compared by one metric, got 'gain' with 2 columns and 'error' with 2"):
        worsening(samples([1.0, 2.0]), samples([1.0, 2.0], name="error"))


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_must_be_a_share(confidence):
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {confidence}"):
        interval(samples([1.0, 2.0, 4.0]), confidence=confidence)
