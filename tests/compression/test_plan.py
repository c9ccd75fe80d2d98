"""The planner against enumeration of every plan."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import scipy.optimize

from eke.compression.plan import Choice, InfeasibleError, Term, choose, total, undominated

GAP = 1e-4
HALF = {"size": 40.0}


def factor_graph(seed: int, *, decisions: int = 4, options: int = 3) -> tuple[list[Choice], list[Term]]:
    """Random tables over no, one, two and three decisions."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, options + 1, size=decisions)
    choices = [Choice(f"c{i}", tuple(str(o) for o in range(n))) for i, n in enumerate(sizes)]
    terms = []
    for resource in ("loss", "size", "macs"):
        for arity in (1, 1, 2, 2, 3):
            members = rng.choice(decisions, size=min(arity, decisions), replace=False)
            over = tuple(choices[i].name for i in members)
            terms.append(Term(over, resource, rng.uniform(0, 10, [len(choices[i].options) for i in members])))
        terms.append(Term((), resource, np.asarray(rng.uniform(0, 5))))
    return choices, terms


def every_plan(choices: list[Choice], terms: list[Term]) -> list[dict[str, float]]:
    names = [c.name for c in choices]
    return [total(terms, dict(zip(names, p))) for p in itertools.product(*(range(len(c.options)) for c in choices))]


def limits_at(plans: list[dict[str, float]], share: float) -> dict[str, float]:
    """Limits between the least and the largest total of each cost."""
    found = {}
    for name in ("size", "macs"):
        values = [p[name] for p in plans]
        found[name] = min(values) + share * (max(values) - min(values))
    return found


@pytest.mark.parametrize("share", [0.25, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(12))
def test_the_plan_is_the_best_of_all(seed, share):
    choices, terms = factor_graph(seed)
    plans = every_plan(choices, terms)
    limits = limits_at(plans, share)
    feasible = [p for p in plans if all(p[name] <= limits[name] for name in limits)]
    if not feasible:
        with pytest.raises(InfeasibleError):
            choose(choices, terms, limits=limits)
        return
    found = choose(choices, terms, limits=limits)
    least = min(p["loss"] for p in feasible)
    assert found.predicted["loss"] <= least * (1 + 2 * GAP) + 1e-9
    for name, limit in limits.items():
        assert found.predicted[name] <= limit * (1 + 1e-9)
    assert found.predicted == total(terms, found.picks)
    assert found.gap <= GAP
    assert found.seconds > 0


def test_a_limit_that_a_plan_just_keeps_is_kept():
    choices, terms = factor_graph(3)
    plans = every_plan(choices, terms)
    for wanted in plans[::7]:
        limits = {"size": wanted["size"], "macs": wanted["macs"]}
        found = choose(choices, terms, limits=limits)
        assert found.predicted["loss"] <= wanted["loss"] * (1 + 2 * GAP)
        assert all(found.predicted[name] <= limit * (1 + 1e-9) for name, limit in limits.items())


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_costs_loss(seed):
    choices, terms = factor_graph(100 + seed, decisions=5)
    plans = every_plan(choices, terms)
    losses = []
    for share in np.linspace(0, 1, 9):
        try:
            losses.append(choose(choices, terms, limits=limits_at(plans, share)).predicted["loss"])
        except InfeasibleError:
            assert not losses
    assert len(losses) > 2
    assert all(b <= a * (1 + 2 * GAP) for a, b in itertools.pairwise(losses))


def test_without_limits_the_least_loss_is_chosen():
    choices, terms = factor_graph(5)
    assert choose(choices, terms, limits={}).predicted["loss"] == pytest.approx(
        min(p["loss"] for p in every_plan(choices, terms)), rel=2 * GAP
    )


@pytest.mark.parametrize("seed", range(8))
def test_an_impossible_budget_names_the_least_common_stretch(seed):
    choices, terms = factor_graph(seed)
    plans = every_plan(choices, terms)
    limits = {name: 0.6 * min(p[name] for p in plans) for name in ("size", "macs")}
    with pytest.raises(
        InfeasibleError, match=r"below the smallest plan\. Nearest feasible: size .* \(limit .*\), macs"
    ) as caught:
        choose(choices, terms, limits=limits)
    nearest = caught.value.nearest
    assert any(all(nearest[r] == pytest.approx(p[r], rel=1e-9) for r in p) for p in plans)
    stretch = min(max(p[name] / limits[name] for name in limits) for p in plans)
    assert max(nearest[name] / limits[name] for name in limits) <= stretch * (1 + 2e-3)
    again = choose(choices, terms, limits={name: nearest[name] * (1 + 1e-9) for name in limits})
    assert all(again.predicted[name] <= nearest[name] * (1 + 1e-6) for name in limits)


def test_the_message_shows_values_with_units():
    choices = [Choice("c", ("all", "half"))]
    terms = [Term(("c",), "loss", np.array([0.0, 1.0])), Term(("c",), "size", np.array([9.4e6, 4.7e6]))]
    with pytest.raises(
        InfeasibleError, match=r"Nearest feasible: size 4\.7 MB \(limit 4 MB\)\. Raise the limits or allow"
    ):
        choose(choices, terms, limits={"size": 4e6})


def test_constants_count_against_the_limits():
    choices = [Choice("c", ("all", "half"))]
    terms = [
        Term(("c",), "loss", np.array([0.0, 1.0])),
        Term(("c",), "size", np.array([8.0, 4.0])),
        Term((), "size", np.asarray(3.0)),
    ]
    assert choose(choices, terms, limits={"size": 11.0}).picks == {"c": 0}
    found = choose(choices, terms, limits={"size": 10.9})
    assert found.picks == {"c": 1}
    assert found.predicted == {"loss": 1.0, "size": 7.0}
    with pytest.raises(InfeasibleError) as caught:
        choose(choices, terms, limits={"size": 2.0})
    assert caught.value.nearest["size"] == 7.0


def test_a_resource_that_no_decision_changes_can_be_limited():
    choices = [Choice("c", ("all", "half"))]
    terms = [Term(("c",), "loss", np.array([0.0, 1.0])), Term((), "macs", np.asarray(3.0))]
    assert choose(choices, terms, limits={"macs": 3.0}).picks == {"c": 0}
    with pytest.raises(InfeasibleError):
        choose(choices, terms, limits={"macs": 2.9})


def test_one_plan_solves_forty_decisions_with_pairs():
    rng = np.random.default_rng(0)
    choices = [Choice(f"c{i}", tuple("abcdef")) for i in range(40)]
    share = np.linspace(1, 0.2, 6)
    terms = [Term((c.name,), "loss", np.cumsum(rng.uniform(0, 1, 6))) for c in choices]
    terms += [Term((a.name, b.name), "macs", np.outer(share, share)) for a, b in itertools.pairwise(choices)]
    found = choose(choices, terms, limits={"macs": 13.0})
    assert found.predicted["macs"] <= 13.0 * (1 + 1e-9)
    assert set(found.picks) == {c.name for c in choices}


def knapsack(seed: int, *, decisions: int = 8) -> tuple[list[Choice], list[Term]]:
    """Tables over one decision each, whose relaxed program has a gap."""
    rng = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", ("a", "b", "c")) for i in range(decisions)]
    terms = [Term((c.name,), "loss", np.sort(rng.uniform(0, 10, 3))) for c in choices]
    return choices, terms + [Term((c.name,), "size", -np.sort(-rng.uniform(1, 10, 3))) for c in choices]


def test_standard_output_stays_clean_while_solving(capfd, monkeypatch):
    solve = scipy.optimize.milp

    def noisy(*arguments, **options):
        os.write(1, b"noise of a native library\n")
        return solve(*arguments, **{**options, "options": {**options["options"], "disp": True}})

    monkeypatch.setattr(scipy.optimize, "milp", noisy)
    choices, terms = knapsack(0)
    choose(choices, terms, limits=HALF, gap=0.0)
    out, err = capfd.readouterr()
    assert out == ""
    assert "noise of a native library" in err
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


def test_standard_output_is_restored_after_an_error(capfd, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("solver broke")

    monkeypatch.setattr(scipy.optimize, "milp", broken)
    choices, terms = knapsack(0)
    with pytest.raises(RuntimeError, match="solver broke"):
        choose(choices, terms, limits=HALF, gap=0.0)
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("interrupted", ["at once", "before the integer program"])
def test_out_of_time_the_best_plan_comes_with_a_gap_that_is_true(interrupted, seed, monkeypatch):
    choices, terms = knapsack(seed)
    seconds = 1e-9
    if interrupted != "at once":
        seconds = 20.0
        nothing = scipy.optimize.OptimizeResult(x=None, status=1, mip_dual_bound=None)
        monkeypatch.setattr(scipy.optimize, "milp", lambda *_, **__: nothing)
    found = choose(choices, terms, limits=HALF, gap=0.0, seconds=seconds)
    least = min(p["loss"] for p in every_plan(choices, terms) if p["size"] <= HALF["size"])
    assert found.predicted["size"] <= HALF["size"] * (1 + 1e-9)
    assert found.predicted["loss"] * (1 - found.gap) <= least * (1 + 1e-9)
    assert 0 <= found.gap <= 1


TRAP = [Choice("a", ("x", "y")), Choice("b", ("x", "y"))]
TRAP_TERMS = [
    Term(("a",), "loss", np.array([0.0, 1.0])),
    Term(("a", "b"), "size", np.array([[2.0, 3.0], [3.0, 1.0]])),
]
"""No single change comes nearer to a size of 1.5."""


def test_when_no_plan_is_found_in_time_it_is_said():
    with pytest.raises(
        InfeasibleError,
        match=r"No plan was found within 1e-09 s for the limits \[\{'size': 1\.5\}\], and none was ruled out\. "
        r"Raise `seconds` or the limits\. Nearest: size .* \(limit .*\)\.",
    ) as caught:
        choose(TRAP, TRAP_TERMS, limits={"size": 1.5}, seconds=1e-9)
    assert not caught.value.proved
    assert caught.value.nearest["size"] in (1.0, 2.0)
    assert choose(TRAP, TRAP_TERMS, limits={"size": 1.5}).picks == {"a": 1, "b": 1}


def test_an_impossible_budget_is_proved():
    with pytest.raises(InfeasibleError) as caught:
        choose(TRAP, TRAP_TERMS, limits={"size": 0.5})
    assert caught.value.proved
    assert caught.value.nearest == {"loss": 1.0, "size": 1.0}


@pytest.mark.parametrize("unit", [1e-12, 1.0, 1e12])
def test_the_unit_of_the_loss_does_not_matter(unit):
    # All of the loss is in a table over two decisions, and descent alone finds no plan.
    loss = unit * np.array([[0.0, 3.0], [3.0, 2.0]])
    terms = [Term(("a", "b"), "loss", loss), *TRAP_TERMS[1:]]
    found = choose(TRAP, terms, limits={"size": 1.5})
    assert found.picks == {"a": 1, "b": 1}
    assert found.gap <= GAP


def test_the_loss_can_be_limited_like_a_cost():
    choices, terms = knapsack(1)
    assert choose(choices, terms, limits={"loss": 1e3}).gap <= GAP
    with pytest.raises(InfeasibleError, match=r"below the smallest plan\. Nearest feasible: loss"):
        choose(choices, terms, limits={"loss": 1e-3})


@pytest.mark.parametrize("seed", range(20))
def test_leaving_dominated_options_out_never_changes_the_best_loss(seed):
    rng = np.random.default_rng(seed)
    choices = [Choice(f"c{i}", tuple("abcd")) for i in range(4)]
    # Few different values and few axes that matter, so that options are dominated and equal now and then.
    terms = [Term((f"c{i}",), r, rng.integers(0, 4, 4).astype(float)) for i in range(4) for r in ("loss", "size")]
    for i, j in [(0, 1), (2, 1)]:
        pair = rng.integers(0, 3, 4)[:, None] + rng.integers(0, 3, 4)[None] + rng.integers(0, 2, (4, 4))
        terms.append(Term((f"c{i}", f"c{j}"), ("loss", "size")[i // 2], pair.astype(float)))
    stay = undominated(choices, terms, ["size"])
    assert all(options and options == sorted(options) for options in stay.values())
    assert sum(map(len, stay.values())) < 16
    names = [c.name for c in choices]
    plans = every_plan(choices, terms)
    left = [total(terms, dict(zip(names, p))) for p in itertools.product(*stay.values())]
    for limit in {p["size"] for p in plans}:
        best, still = (min((p["loss"] for p in of if p["size"] <= limit), default=None) for of in (plans, left))
        assert best == still


def test_of_equal_options_the_first_stays():
    choices = [Choice("a", ("x", "y", "z"))]
    terms = [Term(("a",), "loss", np.array([1.0, 1.0, 2.0])), Term(("a",), "size", np.array([3.0, 3.0, 3.0]))]
    assert undominated(choices, terms, ["size"]) == {"a": [0]}


def test_costs_without_a_limit_do_not_keep_an_option():
    choices = [Choice("a", ("x", "y"))]
    terms = [
        Term(("a",), r, np.array(t)) for r, t in (("loss", [0.0, 1.0]), ("size", [2.0, 2.0]), ("macs", [2.0, 1.0]))
    ]
    assert undominated(choices, terms, ["size"]) == {"a": [0]}
    assert undominated(choices, terms, ["size", "macs"]) == {"a": [0, 1]}
    assert undominated(choices, terms, ["loss"]) == {"a": [0]}


def test_an_option_that_a_neighbour_may_need_stays_until_the_neighbour_does_not():
    pair = np.array([[1.0, 1.0], [0.0, 5.0]])
    terms = [Term(("a", "b"), "size", pair), Term(("b",), "loss", np.array([0.0, 1.0]))]
    # b's second option is dominated, and without it a's second option dominates the first.
    assert undominated(TRAP, terms, ["size"]) == {"a": [1], "b": [0]}


def test_undominated_knows_its_resources():
    with pytest.raises(ValueError, match=r"Limits on resources without a table: \['macs'\]; known: \['loss', 'size'\]"):
        undominated(TRAP, TRAP_TERMS, ["macs"])


A = Choice("a", ("x", "y"))
LOSS = Term(("a",), "loss", np.zeros(2))


def size(*table: float, over: tuple[str, ...] = ("a",)) -> Term:
    return Term(over, "size", np.asarray(table))


@pytest.mark.parametrize(
    ("choices", "terms", "limits", "message"),
    [
        ([A, A], [LOSS], {}, r"Choices must have different names, got \['a', 'a'\]"),
        ([A], [size(0, 0, over=("b",))], {}, r"A term of 'size' names unknown choices: \['b'\]"),
        ([A], [size(0, 0, 0)], {}, r"'size' table over \('a',\) must have shape \(2,\), got \(3,\)"),
        ([A], [size(0, np.nan)], {}, r"'size' table over \('a',\) is not finite at \(1,\): nan"),
        ([A], [Term((), "size", np.asarray(np.inf))], {}, r"'size' table over \(\) is not finite at \(\): inf"),
        ([A], [LOSS], {"macs": 1.0}, r"Limits on resources without a table: \['macs'\]; known: \['loss'\]"),
        ([A], [LOSS, size(1, 1)], {"size": 0.0}, r"limit of 'size' must be positive and finite, got 0"),
        ([A], [LOSS, size(1, 1)], {"size": np.nan}, r"limit of 'size' must be positive and finite, got nan"),
        ([A], [LOSS, size(1, -1)], {}, r"'size' table over \('a',\) is negative at \(1,\): -1"),
        ([], [], {}, r"Every choice needs an option, got 0 choices, without options: \[\]"),
        ([Choice("a", ())], [], {}, r"Every choice needs an option, got 1 choices, without options: \['a'\]"),
        ([A], [Term(("a", "a"), "size", np.ones((2, 2)))], {}, r"A term of 'size' names a choice twice: \('a', 'a'\)"),
    ],
)
def test_bad_problems_are_refused(choices, terms, limits, message):
    with pytest.raises(ValueError, match=message):
        choose(choices, terms, limits=limits)
