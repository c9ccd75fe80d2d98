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
from eke.structures import NM, Both, Rows, UniformGrid, Unstructured

from .nets import batches, same, state

RECOVERY = Recovery(steps=12, batch_size=16, learning_rate=1e-2, grid_from=0.5)
FRESH = (6,)
"""Steps of it before which scales are searched anew: every ten from the first on grids, after half of the steps."""


class Killed(Exception):
    """Stands for a kill."""


GRID = UniformGrid(3)


def forms_for(model: nn.Module, *names: str, structure=GRID) -> dict:
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


def recovered(model, student, *, checkpoint=None, kill_after=None, recovery=RECOVERY, seed=3, forms=None, members=None):
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
    # It is written where scales are searched anew; of the step that was killed not yet: the callback comes first.
    assert len(losses) == 12 - max((step for step in FRESH if step < max(kills)), default=0)
    assert same(state(whole), state(rest))
    assert [p.name for p in tmp_path.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize(("pace", "wanted"), [(0.1, 0), (0.6, 2), (1.1, 4), (30.0, 5)])
def test_checkpoints_are_written_no_more_often_than_every_ten_seconds(taught, tmp_path, monkeypatch, pace, wanted):
    clock, written = [0.0], []
    monkeypatch.setattr(recovery_module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(recovery_module, "write_tensors", lambda path, *rest: written.append((clock[0], rest)))
    student = damaged(taught)

    def progress(step, loss):
        clock[0] = pace * step

    recover_(
        student, collect(taught, batches(96), forward=forward), Recovery(steps=50, batch_size=8, grid_from=0.5),
        forms=forms_for(student, "conv2"), forward=forward, checkpoint=tmp_path / "r", progress=progress,
    )  # fmt: skip
    assert len(written) == wanted
    assert all(later - earlier > 10 for (earlier, _), (later, _) in itertools.pairwise([(0.0, ()), *written]))
    assert all((int(rest[1]["step"]) - 25) % recovery_module.REFRESH == 0 for _, rest in written)


def test_recovery_brings_the_student_nearer_to_the_teacher(taught):
    losses = recovered(taught, damaged(taught), recovery=Recovery(steps=40, batch_size=32, grid_from=1.0))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_weights_pass_through_their_grids_in_the_last_part(taught):
    student, seen = damaged(taught), []

    def watched(model, batch):
        seen.append({name: on(UniformGrid(3), getattr(model, name)) for name in ("conv2", "classifier", "conv1")})
        return forward(model, batch)

    lessons = collect(taught, batches(96), forward=forward)
    recover_(student, lessons, RECOVERY, forms=forms_for(student, "conv2", "classifier"), forward=watched)
    assert [s["conv2"] for s in seen] == [False] * 6 + [True] * 6
    assert all(s["classifier"] == s["conv2"] and not s["conv1"] for s in seen)


def on(structure, module: nn.Module) -> bool:
    """Whether a module's weight is a member, seen as a matrix."""
    matrix = module.weight.detach().flatten(1)
    return torch.equal(structure.project(matrix), matrix)


class Signs:
    """A structure from outside: every row is its largest magnitude times signs."""

    exactness = "heuristic"

    def __repr__(self) -> str:
        return "Signs()"

    def project(self, v, score=None):
        return v.abs().amax(1, keepdim=True) * torch.where(v < 0, -1.0, 1.0).to(v)

    def bits(self, shape):
        return shape[0] * (shape[1] + 32)

    def check(self, shape):
        assert len(shape) == 2


SUPPORTED = [Unstructured(0.4), NM(2, 4), Rows(0.5), Both(NM(1, 4), UniformGrid(4))]


@pytest.mark.parametrize("structure", SUPPORTED, ids=repr)
@pytest.mark.parametrize("given", [True, False])
def test_the_support_never_changes(taught, structure, given):
    student = damaged(taught)
    members = {name: structure.project(torch.randn_like(m.read(student)))
               for name, (m, _) in forms_for(student, "conv2", "classifier", structure=structure).items()}  # fmt: skip
    start = {
        name: structure.support(members[name] if given else student.get_submodule(name).weight.detach().flatten(1))
        for name in members
    }
    seen = []

    def watched(model, batch):
        seen.append({name: model.get_submodule(name).weight.detach().flatten(1).clone() for name in members})
        return forward(model, batch)

    recover_(
        student, collect(taught, batches(96), forward=forward), Recovery(steps=25, batch_size=16, grid_from=0.5),
        forms=forms_for(student, *members, structure=structure), members=members if given else None, forward=watched,
    )  # fmt: skip
    seen.append({name: student.get_submodule(name).weight.detach().flatten(1) for name in members})
    for name, support in start.items():
        assert all((matrices[name][~support] == 0).all() for matrices in seen)
        assert (seen[-1][name][support] != seen[0][name][support]).any()
    if given:
        # What recovery leaves is projected on the very support that it was given.
        for name, support in start.items():
            assert ((structure.project(seen[-1][name]) != 0) <= support).all()


def test_a_structure_from_outside_is_met_from_the_first_step(taught):
    student, seen = damaged(taught), []

    def watched(model, batch):
        seen.append([on(Signs(), model.conv2), on(Signs(), model.conv1)])
        return forward(model, batch)

    lessons = collect(taught, batches(96), forward=forward)
    recover_(student, lessons, RECOVERY, forms=forms_for(student, "conv2", structure=Signs()), forward=watched)
    assert seen == [[True, False]] * 12


FORMED = [UniformGrid(3), UniformGrid(1), UniformGrid(2, group=5), *SUPPORTED, Signs()]
LONG = Recovery(steps=23, batch_size=16, learning_rate=1e-2, grid_from=0.3)
"""Scales are searched anew before the steps 6 and 16."""


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("structure", FORMED, ids=repr)
def test_interrupted_anywhere_and_continued_is_uninterrupted(taught, tmp_path, monkeypatch, structure, given):
    impatient(monkeypatch, seconds=11)
    start = damaged(taught)
    forms = forms_for(start, "conv2", "classifier", structure=structure)
    members = {name: structure.project(site.read(start) + 0.1) for name, (site, _) in forms.items()} if given else None

    def again(**options):
        student = copy.deepcopy(start)
        losses = recovered(
            taught, student, recovery=LONG, members=members,
            forms=lambda net: forms_for(net, "conv2", "classifier", structure=structure), **options,
        )  # fmt: skip
        return student, losses

    whole, losses = again()
    assert len(losses) == 23
    generator = torch.Generator().manual_seed(len(repr(structure)))
    for attempt in range(2):
        path = tmp_path / f"{attempt}.safetensors"
        kills = torch.randint(1, 24, (2,), generator=generator).tolist()
        kept = 0
        for kill in kills:
            if kill <= kept:
                continue
            with pytest.raises(Killed):
                again(checkpoint=path, kill_after=kill)
            kept = max([kept, *(step for step in (6, 16) if step < kill)])
        rest, losses_left = again(checkpoint=path)
        assert losses_left == losses[kept:]
        assert same(state(whole), state(rest)), kills


class Upsampled(nn.Module):
    """A transposed convolution, whose stored tensor is not its matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.ConvTranspose2d(3, 6, 2, stride=2), nn.Linear(6, 4)

    def forward(self, x):
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


@pytest.mark.parametrize("structure", [UniformGrid(2), Unstructured(0.5), Both(Unstructured(0.5), UniformGrid(3))])
def test_matrices_of_transposed_convolutions_are_formed_as_they_are_stored(structure):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Upsampled().eval()
    student, seen = copy.deepcopy(model), []
    site = next(site for site in find(student) if site.name == "up")

    def watched(net, batch):
        seen.append(site_matrix(net.up.weight))
        return forward(net, batch)

    lessons = collect(model, batches(96), forward=forward)
    recover_(student, lessons, RECOVERY, forms={"up": (site, structure)}, forward=watched)
    torch.testing.assert_close(structure.project(seen[-1]), seen[-1], rtol=1e-6, atol=1e-7)


def site_matrix(weight: torch.Tensor) -> torch.Tensor:
    """Rows are outputs: (in, out, height, width) becomes (out, in * height * width)."""
    return weight.detach().transpose(0, 1).flatten(1)


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


def test_a_task_brings_its_own_recovery_unless_another_is_given():
    from eke.compression import Budget, Task
    from eke.compression.prepare import prepare

    net = nn.Linear(3, 2)
    data = [(torch.randn(40, 3), torch.randint(0, 2, (40,)))]
    own = Recovery(steps=7, learning_rate=1e-4)
    task = Task(data, data, data, recovery=own)
    for given, wanted in ((None, own), (Recovery(steps=3), Recovery(steps=3))):
        prepared = prepare(net, task, budget=Budget(size="0.5x"), recovery=given)
        assert prepared.job.recovery == wanted
