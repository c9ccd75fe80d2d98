"""Recovery: a run that is killed and continued ends bit for bit where an uninterrupted one ends."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from eke.compression import recover as recovery_module
from eke.compression.lessons import collect
from eke.compression.recover import Recovery, recover_
from eke.compression.task import forward
from eke.sites import find
from eke.structures import UniformGrid

from .nets import batches, same, state

RECOVERY = Recovery(steps=12, batch_size=16, learning_rate=1e-2, grid_from=0.5)


class Killed(Exception):
    """Stands for a kill."""


def forms_for(model: nn.Module, *names: str, structure=UniformGrid(3)) -> dict:
    return {site.name: (site, structure) for site in find(model) if site.name in names}


def impatient(monkeypatch, *, seconds: float) -> None:
    """Let every look at the clock find so many seconds gone."""
    ticks = itertools.count()
    monkeypatch.setattr(recovery_module.time, "monotonic", lambda: seconds * next(ticks))


def damaged(model: nn.Module) -> nn.Module:
    """A student that has something to learn."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.conv2.weight.mul_(0.7)
        student.classifier.bias.add_(0.3)
    return student


def recovered(
    model, student, *, checkpoint=None, kill_after=None, recovery=RECOVERY, seed=3, forms=None, members=None
):
    def progress(step, loss):
        if step == kill_after:
            raise Killed

    return recover_(
        student,
        collect(model, batches(96), forward=forward),
        recovery,
        forms=forms_for(student, "conv2", "classifier") if forms is None else forms(student),
        members=members,
        forward=forward,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kills", [(1,), (5,), (6,), (7,), (11,), (12,), (2, 6, 9), (4, 5, 6, 7, 8)])
def test_a_killed_recovery_ends_bit_for_bit_where_it_would_have(taught, tmp_path, monkeypatch, kills, layout):
    impatient(monkeypatch, seconds=11)
    start = damaged(taught)
    if layout == "channels_last":
        start.to(memory_format=torch.channels_last)
    whole = copy.deepcopy(start)
    recovered(taught, whole)
    for kill in kills:
        with pytest.raises(Killed):
            recovered(taught, copy.deepcopy(start), checkpoint=tmp_path / "r.safetensors", kill_after=kill)
    rest = copy.deepcopy(start)
    losses = recovered(taught, rest, checkpoint=tmp_path / "r.safetensors")
    # The step that was killed had not been written yet: the callback comes first.
    assert len(losses) == 12 - (kills[-1] - 1)
    assert same(state(whole), state(rest))
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


def test_checkpoints_are_written_no_more_often_than_every_ten_seconds(taught, tmp_path, monkeypatch):
    impatient(monkeypatch, seconds=4)
    written = []
    write = recovery_module.write_tensors
    monkeypatch.setattr(
        recovery_module, "write_tensors", lambda path, *rest: (written.append(rest[1]["step"]), write(path, *rest))
    )
    recovered(taught, damaged(taught), checkpoint=tmp_path / "r.safetensors")
    assert 2 <= len(written) <= 6
    impatient(monkeypatch, seconds=0.1)
    written.clear()
    recovered(taught, damaged(taught), checkpoint=tmp_path / "s.safetensors")
    assert written == []


def test_recovery_brings_the_student_nearer_to_the_teacher(taught):
    losses = recovered(taught, damaged(taught), recovery=Recovery(steps=40, batch_size=32, grid_from=1.0))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_weights_pass_through_their_grids_in_the_last_part(taught):
    student, seen = damaged(taught), []

    def watched(model, batch):
        seen.append({
            name: parametrize.is_parametrized(getattr(model, name)) for name in ("conv2", "classifier", "conv1")
        })
        if seen[-1]["conv2"]:
            matrix = model.conv2.weight.detach().flatten(1)
            assert torch.equal(matrix, UniformGrid(3).project(matrix))
        return forward(model, batch)

    lessons = collect(taught, batches(96), forward=forward)
    recover_(student, lessons, RECOVERY, forms=forms_for(student, "conv2", "classifier"), forward=watched)
    assert [s["conv2"] for s in seen] == [False] * 6 + [True] * 6
    assert all(s["classifier"] == s["conv2"] and not s["conv1"] for s in seen)


@pytest.mark.parametrize("kill", [None, 3, 9])
def test_nothing_but_values_is_left_behind(taught, tmp_path, kill):
    student = damaged(taught)
    student.bn1.weight.requires_grad_(False)
    names, buffers = [n for n, _ in student.named_parameters()], [n for n, _ in student.named_buffers()]
    objects = [id(p) for p in student.parameters()]
    if kill is None:
        recovered(taught, student)
    else:
        with pytest.raises(Killed):
            recovered(taught, student, kill_after=kill)
    assert [n for n, _ in student.named_parameters()] == names
    assert [n for n, _ in student.named_buffers()] == buffers
    assert [id(p) for p in student.parameters()] == objects
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["bn1.weight"]
    assert all(p.grad is None for p in student.parameters())
    assert not any(parametrize.is_parametrized(m) for m in student.modules())
    assert not any(m.training for m in student.modules())
    assert type(student.conv2) is nn.Conv2d


def test_the_teacher_is_not_changed(taught):
    before = state(taught)
    recovered(taught, damaged(taught))
    assert same(before, state(taught))
    assert all(p.grad is None for p in taught.parameters())


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(taught):
    students = [damaged(taught) for _ in range(3)]
    for student, seed in zip(students, (3, 3, 4)):
        recovered(taught, student, seed=seed)
    assert same(state(students[0]), state(students[1]))
    assert not same(state(students[0]), state(students[2]))


def test_no_steps_change_no_value(taught):
    student = damaged(taught)
    before = state(student)
    assert recovered(taught, student, recovery=Recovery(steps=0)) == []
    assert same(before, state(student))


class Dropping(nn.Module):
    """Dropout, and a parameter that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.second = nn.Linear(3, 32), nn.Dropout(0.5), nn.Linear(32, 4)
        self.idle = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.second(self.drop(torch.relu(self.first(x.mean((2, 3))))))


@pytest.fixture
def dropping():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Dropping()


def recover_dropping(model, student, *, checkpoint=None, kill_after=None):
    def progress(step, loss):
        if step == kill_after:
            raise Killed

    lessons = collect(model, batches(96), forward=forward)
    recover_(student, lessons, RECOVERY, forms={}, forward=forward, checkpoint=checkpoint, progress=progress)
    return student


def test_dropout_depends_on_the_seed_alone_and_leaves_the_global_random_state(dropping):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = recover_dropping(dropping, copy.deepcopy(dropping))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same(state(first), state(recover_dropping(dropping, copy.deepcopy(dropping))))


def test_dropout_and_idle_parameters_survive_a_kill(dropping, tmp_path, monkeypatch):
    impatient(monkeypatch, seconds=11)
    whole = recover_dropping(dropping, copy.deepcopy(dropping))
    path = tmp_path / "r.safetensors"
    with pytest.raises(Killed):
        recover_dropping(dropping, copy.deepcopy(dropping), checkpoint=path, kill_after=7)
    assert same(state(whole), state(recover_dropping(dropping, copy.deepcopy(dropping), checkpoint=path)))


def test_the_learning_rate_rises_and_falls():
    recovery = Recovery(steps=100, learning_rate=1.0, warmup=0.2)
    rates = [recovery.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 21)
    assert all(b > a for a, b in itertools.pairwise(rates[:21]))
    assert max(rates) == pytest.approx(1.0)
    assert all(b < a for a, b in itertools.pairwise(rates[20:]))
    assert 0 < rates[-1] < 0.01


@pytest.mark.parametrize("field", [{"steps": -1}, {"batch_size": 0}, {"learning_rate": 0}, {"weight_decay": -1}])
def test_recovery_refuses_negative_numbers(field):
    with pytest.raises(ValueError, match=r"Recovery needs steps >= 0, batch_size >= 1, learning_rate > 0 and .*, got "):
        Recovery(**field)


@pytest.mark.parametrize("field", [{"warmup": 1.0}, {"warmup": -0.1}, {"grid_from": 1.1}, {"grid_from": -0.1}])
def test_recovery_refuses_shares_out_of_range(field):
    with pytest.raises(ValueError, match=r"Recovery needs 0 <= warmup < 1 and 0 <= grid_from <= 1, got "):
        Recovery(**field)
