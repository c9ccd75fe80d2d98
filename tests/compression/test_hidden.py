"""Hidden states: which modules can be compared, with which channels, and what the distance is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eke.compression import Recovery, distillation, forward
from eke.compression.hidden import Hint, Watch, distance, hints
from eke.compression.lessons import collect
from eke.compression.recover import Teacher, recover_
from eke.sites import Surgery, channel_groups, find

from .nets import batches, same, state


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
        self.last = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.body(x))).mean((2, 3))


@pytest.fixture
def pair():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Staged().eval()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    groups = {group.name: group for group in channel_groups(teacher, (x,))}
    surgery = Surgery.merge([groups["body.2"].cut([0, 2, 3, 5]), groups["body.0"].cut([1, 2, 4])])
    student = copy.deepcopy(teacher)
    surgery.apply_(student)
    return teacher, student, surgery, x


def found(teacher, student, surgery, x):
    return hints(teacher, student, find(teacher), surgery, call=lambda model: model(x))


def test_modules_are_compared_on_the_channels_that_stay(pair):
    first, second = found(*pair)
    assert (first.name, first.dim, first.kept.tolist()) == ("body", 1, [0, 2, 3, 5])
    assert (second.name, second.dim) == ("last", None)


def test_the_distance_is_the_relative_squared_error_of_these_channels(pair):
    teacher, student, _, x = pair
    chosen = found(*pair)
    outputs = []
    for model in (student, teacher):
        with torch.no_grad(), Watch(model, ["body", "last"]) as watch:
            model(x)
        outputs.append(watch.outputs)
    wanted = 0.0
    for name, kept in (("body", [0, 2, 3, 5]), ("last", [0, 1, 2, 3])):
        ours, theirs = outputs[0][name].double(), outputs[1][name][:, kept].double()
        wanted += float((ours - theirs).square().mean() / theirs.var(unbiased=False)) / 2
    assert float(distance(chosen, *outputs)) == pytest.approx(wanted, rel=1e-5)
    assert float(distance(chosen, outputs[1] | {"body": outputs[1]["body"][:, [0, 2, 3, 5]]}, outputs[1])) == 0


def test_hooks_are_gone_afterwards(pair):
    teacher, _, _, x = pair
    with Watch(teacher, ["body"]) as watch:
        teacher(x)
    kept = watch.outputs["body"]
    teacher(x + 1)
    assert watch.outputs["body"] is kept
    assert not teacher.body._forward_hooks


def test_recovery_lowers_the_distance_of_hidden_states_and_leaves_the_teacher_alone(pair):
    teacher, student, _, x = pair
    chosen = tuple(found(*pair))
    before = state(teacher)
    lessons = collect(teacher, batches(64), forward=forward)

    def apart(model):
        with torch.no_grad(), Watch(teacher, ["body", "last"]) as theirs, Watch(model, ["body", "last"]) as ours:
            teacher(x), model(x)
        return float(distance(chosen, ours.outputs, theirs.outputs))

    start = apart(student)
    recovery = Recovery(steps=40, batch_size=16, learning_rate=1e-2, hidden=1.0, match=distillation)
    recover_(student, lessons, recovery, forms={}, forward=forward, teacher=Teacher(teacher, chosen))
    assert apart(student) < 0.7 * start
    assert same(before, state(teacher))


def test_a_hint_without_a_dimension_takes_the_whole_output():
    x = torch.randn(2, 3)
    assert Hint("name").of(x) is x


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_the_weight_of_hidden_states_must_be_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match="finite weight hidden >= 0, got"):
        Recovery(hidden=weight)
