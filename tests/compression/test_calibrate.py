"""Corrections: what was measured counts, what was not follows its family, and nothing touches the model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eke import Budget, cost
from eke.compression import apply
from eke.compression import calibrate as calibrate_module
from eke.compression import calibrate as space_module
from eke.compression.apply import Layout
from eke.compression.blocks import leave_out_
from eke.compression.calibrate import (
    Anchor,
    Calibration,
    Meter,
    Random,
    affordable,
    anchor_options,
    best_level,
    calibrate,
    families_of,
    family,
    levelled,
    plan_loss,
    power_law,
    share,
)
from eke.compression.candidates import (
    Block,
    Decisions,
    Forms,
    channel_candidates,
    form_candidates,
)
from eke.compression.prepare import prepare
from eke.compression.task import cross_entropy
from eke.curvature import Curvature
from eke.sites import channel_groups, find
from eke.structures import NM, Both, LowRank, Rows, UniformGrid, Unstructured

from .nets import Blocky, batches, same, state

STRUCTURES = (UniformGrid(8), UniformGrid(4), UniformGrid(3), UniformGrid(2), Unstructured(0.25), LowRank(0.25))


def nearest(structure, weight, metric):
    return structure.project(weight)


@pytest.fixture(scope="module")
def world():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Blocky()
        for images, _ in batches(128, seed=3):
            model(images)
    model.eval()
    data, sites = batches(96, seed=1), find(model)
    curvature = Curvature.estimate(model, cross_entropy, data, sites=sites)
    widths = channel_candidates(model, channel_groups(model, data[0][0]), sites, curvature)
    forms = form_candidates(
        model, sites, curvature, STRUCTURES, solver=nearest, factorable=("first.one", "second.one", "stem")
    )
    blocks = (Block("first", "identity", 0.3), Block("second", "identity", 0.2))
    decisions = Decisions(tuple(widths), tuple(forms), blocks)

    def carry_out(picks):
        return apply.draft(model, decisions, picks, sites=sites, curvature=curvature, solver=nearest, layout=Layout())

    job = SimpleNamespace(inputs=(data[0][0],), model=model, loss=cross_entropy, batches=data)
    return model, data, decisions, job, carry_out


def increase(net, model, data, loss=cross_entropy) -> tuple[float, float]:
    """The mean over batches of the loss increase, and its standard error."""
    with torch.no_grad():
        found = np.asarray([float(loss(net, batch)) - float(loss(model, batch)) for batch in data])
    return found.mean(), found.std(ddof=1) / math.sqrt(len(found))


@pytest.mark.parametrize(("scale", "gamma"), [(1.0, 1.0), (0.3, 0.7), (2.5, 1.4), (4.0, 0.3)])
def test_an_exact_power_law_is_recovered(scale, gamma):
    pairs = [(x, scale * x**gamma) for x in (0.001, 0.01, 0.2, 3.0, 5.0)]
    assert power_law(pairs) == pytest.approx((scale, gamma), rel=1e-9)


def test_a_power_law_falls_back_where_too_little_is_known():
    assert power_law([]) == (1.0, 1.0)
    # One to three pairs, or sums that hardly differ, say how much but not how steeply.
    assert power_law([(2.0, 3.0)]) == pytest.approx((1.5, 1.0))
    assert power_law([(1.0, 2.0), (10.0, 200.0), (4.0, 8.0)]) == pytest.approx((2.0, 1.0))
    assert power_law([(1.0, 5.0), (1.1, 5.5), (1.2, 6.0), (1.3, 6.5)]) == pytest.approx((5.0, 1.0))


@pytest.mark.parametrize(("exponent", "kept"), [(0.1, 0.3), (3.0, 1.5)])
def test_the_exponent_stays_within_limits(exponent, kept):
    pairs = [(x, x**exponent) for x in (0.01, 0.1, 1.0, 10.0, 100.0)]
    assert power_law(pairs)[1] == kept


def test_one_outlier_does_not_move_the_scale():
    pairs = [(x, 2 * x) for x in (1.0, 1.01, 1.02, 1.03, 1.04)]
    assert power_law([*pairs[:-1], (1.04, 1e6)])[0] == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize(
    ("predicted", "measured", "error", "factor"),
    [
        (0.1, 0.3, 0.0, 3.0),
        (0.3, 0.1, 0.0, 1 / 3),
        (0.1, 0.3, 0.1, 3.0),
        # Beyond a factor of 20 nothing is believed.
        (1e-6, 1.0, 0.0, 20.0),
        (1.0, 1e-9, 0.0, 1 / 20),
        # What noise hides counts as at most twice its error, and does not contradict a small prediction.
        (1.0, 0.01, 0.1, 0.2),
        (1.0, -0.5, 0.1, 0.2),
        (0.1, 0.01, 0.1, 1.0),
        (0.1, -0.3, 0.06, 1.0),
        # A gain is no loss: without noise the least factor.
        (0.1, -0.3, 0.0, 1 / 20),
    ],
)
def test_the_correction_is_measured_over_predicted_within_limits(predicted, measured, error, factor):
    anchor = Anchor("matrix:x", 1, "grid", predicted, measured, error)
    assert math.exp(anchor.correction) == pytest.approx(factor, rel=1e-9)


def decided() -> Decisions:
    """Grids at two matrices and a support at one, as numbers alone."""
    sites = find(Blocky())[:2]
    forms = (
        Forms(
            sites[0],
            (None, *(UniformGrid(b) for b in (8, 6, 4, 2)), Unstructured(0.1)),
            (0, 0.01, 0.04, 0.16, 0.64, 0.5),
        ),
        Forms(sites[1], (None, UniformGrid(4), NM(1, 4)), (0, 0.2, 0.3)),
    )
    return Decisions((), forms, (Block("second", "zero", 2.0),))


def test_a_correction_meets_its_anchors_and_is_interpolated_between():
    decisions = decided()
    choice, other = (form.choice for form in decisions.forms)
    anchors = (Anchor(choice, 4, "grid", 0.64, 1.28), Anchor(choice, 2, "grid", 0.04, 0.32))
    found = Calibration(anchors).corrected(decisions).losses
    assert found[choice][0] == 0
    assert found[choice][4] == pytest.approx(1.28, rel=1e-12)
    assert found[choice][2] == pytest.approx(0.32, rel=1e-12)
    # Half way between 0.04 and 0.64 in logarithms is 0.16; factors 8 and 2 meet at 4. Beyond, the nearest one holds.
    assert found[choice][3] == pytest.approx(0.16 * 4, rel=1e-12)
    assert found[choice][1] == pytest.approx(0.01 * 8, rel=1e-12)
    # Another matrix takes the median of its family; families without any measurement stay.
    assert found[other] == pytest.approx((0, 0.2 * 4, 0.3), rel=1e-12)
    assert found[choice][5] == 0.5
    assert found["block:second"] == (0.0, 2.0)


def test_what_was_not_measured_takes_the_median_of_its_family():
    decisions = decided()
    anchors = tuple(Anchor(f"matrix:{n}", 1, "support", 1.0, factor) for n, factor in enumerate((0.5, 3.0, 16.0)))
    found = Calibration(anchors).corrected(decisions).losses
    assert found[decisions.forms[0].choice][5] == pytest.approx(0.5 * 3, rel=1e-12)
    assert found[decisions.forms[1].choice] == pytest.approx((0, 0.2, 0.3 * 3), rel=1e-12)


def test_no_measurements_correct_nothing():
    decisions = decided()
    found = Calibration().corrected(decisions).losses
    assert all(found[name] == pytest.approx(losses, rel=1e-15) for name, losses in decisions.losses.items())
    assert Calibration().whole(0.3) == 0.3


def test_a_whole_plan_follows_the_power_law_within_the_measured_ones():
    calibration = Calibration((), 1.0, ((0.01, 0.2), (1.0, 2.0)), scale=2.0, gamma=0.5)
    assert calibration.whole(0.25) == pytest.approx(1.0)
    assert calibration.whole(0.0) == calibration.whole(-1.0) == 0.0
    # Beyond them measured / predicted stays as it is at their ends.
    assert calibration.whole(0.001) == pytest.approx(0.001 * 0.2 / 0.01)
    assert calibration.whole(10.0) == pytest.approx(10 * 2.0)
    sums = np.geomspace(1e-6, 1e3, 200)
    assert (np.diff([calibration.whole(x) for x in sums]) > 0).all()


def test_families_gather_what_errs_alike():
    found = [family(s) for s in (None, UniformGrid(4), LowRank(2), LowRank(0.5, UniformGrid(4)), NM(2, 4), Rows(0.5),
                                 Unstructured(0.5), Both(NM(2, 4), UniformGrid(4)))]  # fmt: skip
    assert found == ["as it is", "grid", "rank", "rank", *["support"] * 4]

    class Mine:
        """From outside."""

    assert family(Mine()) == "Mine"


def test_anchors_are_the_strongest_and_a_middle_option_of_every_family(world):
    decisions = world[2]
    options = anchor_options(decisions)
    assert len(options) == len(set(options))
    for choice, losses in decisions.losses.items():
        families = families_of(decisions, choice)
        mine = [option for name, option in options if name == choice]
        assert all(losses[option] > 0 for option in mine)
        assert {families[option] for option in mine} == set(families) - {"as it is"}
        for name in set(families) - {"as it is"}:
            of_family = [i for i, f in enumerate(families) if f == name and losses[i] > 0]
            strongest = of_family[-2] if name == "channels" and len(of_family) > 2 else of_family[-1]
            assert strongest in mine
            assert len([o for o in mine if families[o] == name]) == 1 + (len(of_family) > 2) or name == "channels"
    # The most telling ones come first, should time run out.
    strong = [(choice, options[-1]) for choice, options in ((c, range(len(x))) for c, x in decisions.losses.items())]
    assert set(options[: len(options) // 2]) & set(strong)


def test_random_plans_are_reproducible_valid_and_of_many_strengths(world):
    decisions = world[2]
    first, again, other = Random(decisions, 3), Random(decisions, 3), Random(decisions, 4)
    plans = [first.draw() for _ in range(60)]
    assert plans == [again.draw() for _ in range(60)]
    assert plans != [other.draw() for _ in range(60)]
    losses = decisions.losses
    for picks in plans:
        assert set(picks) == set(losses)
        assert all(0 <= option < len(losses[choice]) for choice, option in picks.items())
    sums = sorted(plan_loss(decisions, picks) for picks in plans)
    assert sums[-1] > 10 * max(sums[len(sums) // 10], 1e-9)
    assert Random(Decisions()).draw() == {}


def test_random_plans_without_losses_change_nothing():
    decisions = decided().with_losses({name: [0.0] * len(losses) for name, losses in decided().losses.items()})
    assert set(Random(decisions).draw().values()) == {0}


def test_the_loss_of_a_plan_leaves_out_what_a_removed_block_holds(world):
    decisions = world[2]
    losses = decisions.losses
    picks = {choice: len(found) - 1 for choice, found in losses.items()}
    inside = {f.choice for f in decisions.forms if f.site.name.startswith(("first.", "second."))}
    assert len(inside) == 4
    everything = sum(found[-1] for found in losses.values())
    held = sum(losses[choice][-1] for choice in inside)
    assert plan_loss(decisions, picks) == pytest.approx(everything - held, rel=1e-12)
    stay = {**picks, "block:first": 0, "block:second": 0}
    blocks = losses["block:first"][1] + losses["block:second"][1]
    assert plan_loss(decisions, stay) == pytest.approx(everything - blocks, rel=1e-12)
    assert plan_loss(decisions, {}) == 0


def test_measured_increases_are_those_of_the_changed_net_alone(world):
    model, data, decisions, job, carry_out = world
    before = state(model)
    found = calibrate(decisions, Meter(job), carry_out, plans=5, seed=1)
    assert same(before, state(model))
    assert [(a.choice, a.option) for a in found.anchors] == anchor_options(decisions)
    forms = {form.choice: form for form in decisions.forms}
    for anchor in found.anchors:
        net = copy.deepcopy(model)
        if anchor.choice in forms:
            site = forms[anchor.choice].site
            site.write_(net, forms[anchor.choice].structures[anchor.option].project(site.read(net)))
        elif anchor.choice.startswith("block:"):
            leave_out_(net, anchor.choice.partition(":")[2], "identity")
        else:
            net = carry_out({anchor.choice: anchor.option}).net
        mean, error = increase(net, model, data)
        assert anchor.predicted == levelled(decisions, found.level)[anchor.choice][anchor.option]
        # Two factors round otherwise than their product.
        assert anchor.measured == pytest.approx(mean, abs=2e-6)
        assert anchor.error == pytest.approx(error, abs=2e-6)
        assert anchor.family == families_of(decisions, anchor.choice)[anchor.option]
    # Whole plans: the very draws that the seed gives, measured as they are.
    corrected = Calibration(found.anchors, found.level).corrected(decisions)
    drawn = Random(corrected, 1)
    wanted = []
    for number in range(5):
        picks = drawn.draw((number + 0.5) / 5)
        mean, error = increase(carry_out(picks).finished(), model, data)
        if plan_loss(corrected, picks) > 0:
            wanted.append((plan_loss(corrected, picks), max(mean, error)))
    assert np.asarray(found.plans) == pytest.approx(np.asarray(wanted), abs=1e-6)
    assert (found.scale, found.gamma) == pytest.approx(power_law(found.plans), rel=1e-6)
    # Corrected, every anchor that is clear of noise is predicted as it was measured, up to the limit of a factor.
    for anchor in found.anchors:
        if anchor.measured > 2 * anchor.error and abs(anchor.correction) < math.log(19.9):
            assert corrected.losses[anchor.choice][anchor.option] == pytest.approx(anchor.measured, rel=1e-9)


def test_no_more_options_are_carried_out_than_the_most(world, monkeypatch):
    _, _, decisions, job, carry_out = world
    monkeypatch.setattr(calibrate_module, "ANCHORS", 3)
    found = calibrate(decisions, Meter(job, samples=32), carry_out, plans=0)
    assert [(a.choice, a.option) for a in found.anchors] == anchor_options(decisions)[:3]
    assert (found.plans, found.scale, found.gamma) == ((), 1.0, 1.0)


def test_a_large_model_is_measured_on_fewer_samples(world, monkeypatch):
    model, data, _, _, _ = world
    job = prepare(model, data, loss=cross_entropy, budget=Budget(size="0.5x")).job
    assert affordable(job) == 512
    macs = cost.flops(model, data[0][0][:1]) / 2
    monkeypatch.setattr(space_module, "WORK", 40 * macs)
    assert affordable(job) == 40
    monkeypatch.setattr(space_module, "WORK", 1.0)
    assert affordable(job) == 16


def test_all_kinds_of_decisions_are_among_the_first_anchors(world):
    _, _, decisions, _, _ = world
    first = [choice.partition(":")[0] for choice, _ in anchor_options(decisions)[:3]]
    assert set(first) == {choice.partition(":")[0] for choice in decisions.losses}


def test_calibration_shows_its_progress(world):
    _, _, decisions, job, carry_out = world
    few = Decisions(decisions.widths[:1], decisions.forms[:1], ())
    shares = []
    calibrate(few, Meter(job), carry_out, plans=2, progress=lambda done, text: shares.append((done, text)))
    assert [done for done, _ in shares] == sorted(done for done, _ in shares)
    assert shares[0] == (0.0, f"{anchor_options(few)[0][0]}, option {anchor_options(few)[0][1]}, alone")
    assert [text for _, text in shares[-2:]] == ["random plan 1", "random plan 2"]


def test_a_meter_takes_only_as_many_samples_as_asked(world):
    model, data, _, job, carry_out = world
    net = carry_out({"block:first": 1}).finished()
    assert Meter(job, samples=33)(net) == pytest.approx(increase(net, model, data[:2]), abs=1e-7)
    assert Meter(job, samples=1)(net) == pytest.approx((increase(net, model, data[:1])[0], 0.0), abs=1e-7)
    assert Meter(job)(model) == (0.0, 0.0)


def test_calibrations_survive_json_bit_for_bit():
    anchors = (Anchor("matrix:a", 2, "grid", 0.1, 1 / 3, 1e-17), Anchor("block:b", 1, "block", 2.0, -0.25))
    calibration = Calibration(anchors, 1 / 3, ((0.1, 0.2), (1 / 7, 3.0)), 1.0000000001, 0.7)
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


def rising(choice: str, quadratics, rises) -> Decisions:
    site = find(torch.nn.Linear(4, 4))[0]
    site = dataclasses.replace(site, name=choice)
    grids = (None, *(UniformGrid(bits) for bits in range(8, 8 - len(quadratics), -1)))
    losses = (0.0, *(q + r for q, r in zip(quadratics, rises)))
    return Decisions(forms=(Forms(site, grids, losses, (0.0, *rises)),))


def test_the_level_multiplies_quadratic_terms_alone():
    decisions = rising("a", (0.01, 0.02), (0.005, 0.0))
    assert levelled(decisions, 4.0)["matrix:a"] == pytest.approx([0.0, 0.045, 0.08])
    assert levelled(decisions, 1.0)["matrix:a"] == pytest.approx([0.0, 0.015, 0.02])


def test_the_level_is_found_where_the_law_is_exact_and_outliers_do_not_move_it():
    quadratics, rises = (0.001, 0.002, 0.004, 0.01, 0.02), (0.0, 0.001, 0.0, 0.003, 0.0)
    decisions = rising("a", quadratics, rises)
    anchors = [Anchor("matrix:a", i + 1, "grid", q + r, 4 * q + r) for i, (q, r) in enumerate(zip(quadratics, rises))]
    assert best_level(anchors, decisions.rises) == pytest.approx(4.0, rel=0.05)
    spoiled = [*anchors[:-1], dataclasses.replace(anchors[-1], measured=50.0)]
    assert best_level(spoiled, decisions.rises) == pytest.approx(4.0, rel=0.05)


def test_the_level_is_one_where_little_is_clear_of_noise():
    decisions = rising("a", (0.001, 0.002, 0.004, 0.01), (0.0,) * 4)
    noisy = [Anchor("matrix:a", i, "grid", 0.01, 0.01, error=0.006) for i in range(1, 5)]
    assert best_level(noisy, decisions.rises) == 1.0
    assert best_level([], {}) == 1.0


def test_less_is_carried_out_for_a_larger_model_but_never_nothing(world, monkeypatch):
    model, data, decisions, job, carry_out = world
    assert share(job) == 1.0
    macs = cost.flops(model, data[0][0][:1]) / 2
    monkeypatch.setattr(calibrate_module, "TOTAL", 16 * affordable(job) * macs)
    assert share(job) == pytest.approx(0.25)
    options = anchor_options(decisions)
    for effort, anchors, plans in ((1.0, 64, 10), (0.5, 32, 5), (0.01, 12, 4)):
        found = calibrate(decisions, Meter(job, samples=32), carry_out, effort=effort)
        assert [(a.choice, a.option) for a in found.anchors] == options[:anchors]
        assert len(found.plans) <= plans
    assert len(calibrate(decisions, Meter(job, samples=32), carry_out, effort=0.01, plans=1).plans) <= 1
