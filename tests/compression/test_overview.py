"""Looking before compressing: every option with what it costs and saves, and predictions beside measurements."""

from __future__ import annotations

import pytest
import torch

import eke
from eke.compression.checks import mean_loss
from eke.compression.tables import choices

from .conftest import shorten_measurements
from .nets import same, state, tiny_task, trained


@pytest.fixture(scope="module")
def model():
    return trained(seed=2)


@pytest.fixture(scope="module")
def found(model):
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch.setattr)
        return eke.survey(model, tiny_task(), seconds=0.02)


def test_every_option_that_changes_something_is_listed_once(found):
    listed = [(option.choice, option.label) for option in found.options()]
    wanted = [(c.name, label) for c in choices(found.space.decisions) for label in c.options[1:]]
    assert listed == wanted
    assert len(listed) > 30


def test_bytes_saved_are_those_of_the_built_net(found):
    chosen = next(o for o in found.options(only="matrix:conv2") if o.label == "UniformGrid(bits=4)")
    # 32 x 144 floats against 4-bit codes and 32 scales; the header of the file is estimated.
    assert chosen.bytes == pytest.approx(4 * 32 * 144 - (32 * 144 / 2 + 4 * 32), abs=200)
    assert chosen.measured_loss is None or isinstance(chosen.measured_loss, float)


def test_measured_options_have_the_loss_increase_and_the_score_of_the_changed_net(model, found):
    option = list(found.options(only="channels:conv2", measured=True))[-1]
    picks = {"channels:conv2": len(found.space.decisions.losses["channels:conv2"]) - 1}
    net = found.space.draft(picks).finished()
    task = tiny_task()
    cross_entropy = eke.compression.cross_entropy
    wanted = mean_loss(net, task.calibration, loss=cross_entropy) - mean_loss(
        model, task.calibration, loss=cross_entropy
    )
    assert option.measured_loss == pytest.approx(wanted, rel=0.3, abs=0.02)
    assert option.score.correct == task.score(net, task.selection).correct


def test_a_name_that_no_decision_has_is_refused(found):
    with pytest.raises(ValueError, match=r"No decision's name contains 'nothing'; there are \['channels:"):
        list(found.options(only="nothing"))


def test_calibration_measures_fresh_changes_and_whole_plans(found):
    pairs = found.calibrate(singles=6, plans=3)
    assert [pair.kind == "plan" for pair in pairs] == [False] * 6 + [True] * 3
    labels = {choice.name: choice.options for choice in choices(found.space.decisions)}
    anchors = {f"{a.choice}: {labels[a.choice][a.option]}" for a in found.space.calibration.anchors}
    assert anchors
    assert not anchors & {pair.label for pair in pairs}
    assert all(pair.predicted >= 0 for pair in pairs)
    again = found.calibrate(singles=6, plans=3)
    assert [(p.label, p.predicted, p.measured) for p in again] == [(p.label, p.predicted, p.measured) for p in pairs]


def test_looking_changes_nothing(model, found):
    before, random = state(model), torch.random.get_rng_state()
    list(found.options(only="block", measured=False) if found.space.decisions.blocks else ())
    found.calibrate(singles=2, plans=1)
    assert same(before, state(model))
    assert torch.equal(random, torch.random.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())
