"""Nested plans against enumeration of every sequence of plans, and the bounds behind them."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from eke.compression.graph import Duals, Graph
from eke.compression.greedy import descend
from eke.compression.plan import Choice, InfeasibleError, Term, choose, choose_nested, total, undominated

GAP = 1e-4
Totals = dict[str, float]


def problem(seed: int, *, decisions: int = 3) -> tuple[list[Choice], list[Term]]:
    """Random tables over one and two decisions, with options in no order of cost."""
    rng = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", tuple("abcd"[: rng.integers(2, 4)])) for i in range(decisions)]
    size = {c.name: len(c.options) for c in choices}
    terms = []
    for resource in ("loss", "size", "macs"):
        terms += [Term((c.name,), resource, rng.uniform(0, 10, size[c.name])) for c in choices]
        terms += [
            Term((b.name, a.name), resource, rng.uniform(0, 4, (size[b.name], size[a.name])))
            for a, b in itertools.pairwise(choices)
        ]
        terms.append(Term((), resource, np.asarray(1.0)))
    return choices, terms


def every(choices: list[Choice], terms: list[Term]) -> dict[tuple[int, ...], Totals]:
    names = [c.name for c in choices]
    picks = itertools.product(*(range(len(c.options)) for c in choices))
    return {p: total(terms, dict(zip(names, p))) for p in picks}


def least(
    plans: dict[tuple[int, ...], Totals], limits: list[Totals], weights: list[float], *, below: tuple[int, ...] = ()
) -> float:
    """Least weighted loss of all sequences, by recursion over the budgets; infinite if there is none."""
    if not limits:
        return 0.0
    return min(
        (
            weights[0] * totals["loss"] + least(plans, limits[1:], weights[1:], below=picks)
            for picks, totals in plans.items()
            if all(totals[name] <= limit for name, limit in limits[0].items())
            and all(a <= b for a, b in zip(below, picks))
        ),
        default=np.inf,
    )


def tightening(plans: dict[tuple[int, ...], Totals], shares: tuple[float, ...]) -> list[Totals]:
    found = []
    for share in shares:
        found.append({})
        for name in ("size", "macs"):
            values = [p[name] for p in plans.values()]
            found[-1][name] = min(values) + share * (max(values) - min(values))
    return found


@pytest.mark.parametrize("weights", [None, [5.0, 1.0, 0.1]], ids=["equal", "weighted"])
@pytest.mark.parametrize("shares", [(0.9, 0.5, 0.3), (0.6, 0.6, 0.45), (1.0, 0.8, 0.25)])
@pytest.mark.parametrize("seed", range(8))
def test_nested_plans_are_the_best_of_all_sequences(seed, shares, weights):
    choices, terms = problem(seed)
    plans = every(choices, terms)
    limits = tightening(plans, shares)
    best = least(plans, limits, weights or [1.0] * 3)
    if best == np.inf:
        with pytest.raises(InfeasibleError, match=r"Budget \d of 3 is below the smallest plan"):
            choose_nested(choices, terms, limits=limits, weights=weights)
        return
    found = choose_nested(choices, terms, limits=limits, weights=weights)
    value = sum(w * plan.predicted["loss"] for w, plan in zip(weights or [1.0] * 3, found))
    assert best * (1 - 1e-9) <= value <= best * (1 + 2 * GAP)
    assert value * (1 - found[0].gap) <= best * (1 + 1e-9)
    for plan, line in zip(found, limits):
        assert plan.predicted == total(terms, plan.picks)
        assert all(plan.predicted[name] <= limit * (1 + 1e-9) for name, limit in line.items())
        assert plan.gap == found[0].gap <= GAP
    for loose, tight in itertools.pairwise(found):
        assert all(loose.picks[c.name] <= tight.picks[c.name] for c in choices)


@pytest.mark.parametrize("seed", range(6))
def test_one_budget_gives_the_plan_of_choose(seed):
    choices, terms = problem(seed, decisions=4)
    limits = tightening(every(choices, terms), (0.5,))
    (nested,) = choose_nested(choices, terms, limits=limits)
    alone = choose(choices, terms, limits=limits[0])
    assert nested.predicted["loss"] == pytest.approx(alone.predicted["loss"], rel=GAP)


@pytest.mark.parametrize("seed", range(4))
def test_options_never_decrease_over_many_decisions(seed):
    rng = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", tuple("abcdef")) for i in range(30)]
    share = np.linspace(1, 0.1, 6)
    terms = [Term((c.name,), "loss", np.cumsum(rng.uniform(0, 1, 6)) * 10 ** rng.uniform(-3, 0)) for c in choices]
    terms += [Term((c.name,), "size", share * rng.uniform(1, 10)) for c in choices]
    whole = sum(t.table[0] for t in terms if t.resource == "size")
    limits = [{"size": s * whole} for s in (0.8, 0.5, 0.3, 0.2)]
    found = choose_nested(choices, terms, limits=limits, gap=1e-3)
    for loose, tight in itertools.pairwise(found):
        assert all(loose.picks[c.name] <= tight.picks[c.name] for c in choices)
    for plan, line in zip(found, limits):
        assert plan.predicted["size"] <= line["size"] * (1 + 1e-9)
        # Nesting has a price: no plan beats the one of its budget alone by more than the gap.
        assert plan.predicted["loss"] >= choose(choices, terms, limits=line).predicted["loss"] * (1 - 2 * GAP)


ONE = [Choice("a", ("x", "y", "z"))]
STEPS = [Term(("a",), "loss", np.array([1.0, 0.0, 1.0])), Term(("a",), "size", np.array([1.0, 5.0, 1.0]))]


def test_an_equal_option_further_on_may_be_needed_for_the_order():
    found = choose_nested(ONE, STEPS, limits=[{"size": 5.0}, {"size": 1.0}])
    assert [plan.picks["a"] for plan in found] == [1, 2]
    assert undominated(ONE, STEPS, ["size"]) == {"a": [0, 1]}
    assert undominated(ONE, STEPS, ["size"], nested=True) == {"a": [0, 1, 2]}


def test_options_next_to_their_better_go_when_nested_too():
    choices = [Choice("a", tuple("vwxyz"))]
    terms = [
        Term(("a",), "loss", np.array([0.0, 2.0, 2.0, 1.0, 3.0])),
        Term(("a",), "size", np.array([9.0, 9.0, 5.0, 4.0, 4.0])),
    ]
    assert undominated(choices, terms, ["size"], nested=True) == {"a": [0, 3]}


@pytest.mark.parametrize("seed", range(10))
def test_what_stays_for_nesting_holds_the_best_sequence(seed):
    rng = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", tuple("abcd")) for i in range(2)]
    terms = [Term((c.name,), r, rng.integers(0, 4, 4).astype(float)) for c in choices for r in ("loss", "size")]
    terms.append(Term(("c0", "c1"), "loss", rng.integers(0, 2, (4, 4)).astype(float)))
    stay = undominated(choices, terms, ["size"], nested=True)
    plans = every(choices, terms)
    left = {p: t for p, t in plans.items() if all(o in stay[c.name] for o, c in zip(p, choices))}
    sizes = sorted({t["size"] for t in plans.values()})
    for tight, middle, loose in itertools.combinations_with_replacement(sizes, 3):
        limits = [{"size": loose}, {"size": middle}, {"size": tight}]
        assert least(left, limits, [1.0, 1.0, 1.0]) == least(plans, limits, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("seed", range(10))
def test_any_prices_give_a_lower_bound_also_when_an_option_is_forced(seed):
    choices, terms = problem(seed)
    plans = every(choices, terms)
    limits = tightening(plans, (0.9, 0.6))
    tables: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    place = {c.name: i for i, c in enumerate(choices)}
    for term in terms:
        row = ("loss", "size", "macs").index(term.resource)
        tables.setdefault(tuple(place[name] for name in term.over), []).append((row, term.table))
    graph = Graph.of([len(c.options) for c in choices], tables, 3)
    for picks, totals in plans.items():
        np.testing.assert_allclose(graph.totals(np.asarray(picks)), [totals[r] for r in ("loss", "size", "macs")])
    rng = np.random.default_rng(seed)
    messages = tuple(rng.normal(0, 1, (2, sum(s.table.shape[1:]))) for s in graph.scopes)
    line = np.asarray([[at[r] for r in ("size", "macs")] for at in limits])
    weights = np.array([1.0, 0.5])
    bound, extra = graph.bound(
        weights,
        line,
        duals=Duals(rng.uniform(0, 4, (2, 2)), messages),
        allowed=np.repeat(graph.valid[None], 2, axis=0),
    )
    kept = [[p for p, t in plans.items() if all(t[name] <= limit for name, limit in at.items())] for at in limits]
    sequences = [(a, b) for a in kept[0] for b in kept[1] if all(x <= y for x, y in zip(a, b))]
    for pair in sequences:
        value = weights[0] * plans[pair[0]]["loss"] + weights[1] * plans[pair[1]]["loss"]
        forced = max(extra[b, c, pair[b][c]] for b in range(2) for c in range(len(choices)))
        assert value >= bound + max(forced, 0.0) - 1e-9
    greedy = descend(graph, line, deadline=time.perf_counter() + 10)
    assert greedy is None or tuple(map(tuple, greedy.tolist())) in sequences


@pytest.mark.parametrize(
    ("limits", "weights", "message"),
    [
        ([], None, r"Nested plans need the limits of one budget at least, got \[\]"),
        ([{"size": 5.0}], [1.0, 2.0], r"Nested plans for 1 budgets need as many positive weights, got \[1\.0, 2\.0\]"),
        ([{"size": 5.0}], [0.0], r"Nested plans for 1 budgets need as many positive weights, got \[0\.0\]"),
        ([{"size": 5.0}], [np.nan], r"Nested plans for 1 budgets need as many positive weights, got \[nan\]"),
        (
            [{"size": 2.0}, {"size": 5.0}],
            None,
            r"from the loosest to the tightest: 'size' is limited to 2\.0 in budget 1 and to 5\.0 in budget 2\. Sort",
        ),
        ([{"size": 2.0}, {"loss": 5.0}], None, r"'size' is limited to 2\.0 in budget 1 and to nothing in budget 2"),
        ([{"size": 5.0}, {"size": -1.0}], None, r"The limit of 'size' must be positive and finite, got -1\.0"),
        ([{"size": 5.0}, {"macs": 1.0}], None, r"Limits on resources without a table: \['macs'\]"),
    ],
)
def test_bad_budgets_are_refused(limits, weights, message):
    with pytest.raises(ValueError, match=message):
        choose_nested(ONE, STEPS, limits=limits, weights=weights)


def test_the_first_impossible_budget_is_named_with_the_plan_nearest_to_it():
    limits = [{"size": 6.0}, {"size": 0.9}, {"size": 0.5}]
    with pytest.raises(
        InfeasibleError, match=r"Budget 2 of 3 is below the smallest plan\. Nearest feasible: size 1 B \(limit .*\)"
    ) as caught:
        choose_nested(ONE, STEPS, limits=limits)
    assert caught.value.proved
    assert caught.value.nearest["size"] == 1.0


def test_a_tight_budget_that_the_loose_one_leads_away_from_is_kept():
    # The loose budget alone would take "z"; from there no option keeps the tight one.
    choices = [Choice("a", ("x", "y", "z", "w"))]
    terms = [
        Term(("a",), "loss", np.array([0.0, 3.0, 1.0, 9.0])),
        Term(("a",), "size", np.array([9.0, 1.0, 4.0, 4.0])),
    ]
    found = choose_nested(choices, terms, limits=[{"size": 5.0}, {"size": 1.0}])
    assert [plan.picks["a"] for plan in found] == [1, 1]
    assert found[0].gap <= GAP


def test_out_of_time_nested_plans_keep_their_budgets():
    choices, terms = problem(2)
    plans = every(choices, terms)
    limits = tightening(plans, (0.9, 0.6, 0.5))
    found = choose_nested(choices, terms, limits=limits, seconds=1e-9, gap=0.0)
    value = sum(plan.predicted["loss"] for plan in found)
    assert value * (1 - found[0].gap) <= least(plans, limits, [1.0, 1.0, 1.0]) * (1 + 1e-9)
    for plan, line in zip(found, limits):
        assert all(plan.predicted[name] <= limit * (1 + 1e-9) for name, limit in line.items())
