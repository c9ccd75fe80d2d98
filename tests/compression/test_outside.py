"""A structure and a solver from outside take part in everything without a change to eke."""

from __future__ import annotations

import json

import pytest
import torch

from eke import Budget, compress, load
from eke.compression import apply
from eke.compression.apply import Layout
from eke.compression.artifact import PLAN, WEIGHTS, read_plan, save, stored_bits
from eke.compression.candidates import Decisions, Forms
from eke.compression.recover import Recovery
from eke.compression.task import cross_entropy
from eke.cost import read_tensors
from eke.curvature import Curvature
from eke.sites import find
from eke.structures import NM, Packable, Structure, UniformGrid

from .nets import STEPS, Tiny, batches, outputs, same, state, tiny_task, trained


class Mine:
    """Every entry is plus or minus a power of two that its row shares."""

    exactness = "heuristic"

    def __repr__(self):
        return "Mine()"

    def check(self, shape):
        """Every matrix will do."""

    def bits(self, shape):
        return 8 * (-(-shape[0] * shape[1] // 8) + shape[0])

    def project(self, v, score=None):
        exponents = v.abs().mean(1, keepdim=True).clamp_min(2.0**-60).log2().round()
        return torch.ldexp(torch.where(v < 0, -1.0, 1.0).to(v), exponents.int())

    def encode(self, v):
        signs = torch.nn.functional.pad((v < 0).flatten().int(), (0, -v.numel() % 8)).view(-1, 8)
        packed = (signs << torch.arange(8)).sum(1).to(torch.uint8)
        return {"signs": packed, "exponents": v[:, 0].abs().log2().to(torch.int8)}

    def decode(self, packed, shape):
        signs = (packed["signs"].int()[:, None] >> torch.arange(8)).flatten()[: shape[0] * shape[1]] & 1
        return torch.ldexp(1.0 - 2.0 * signs.view(shape), packed["exponents"].int()[:, None])


class Balanced:
    """Rows that sum to zero; without `encode` it is stored as it is."""

    exactness = "exact"

    def __repr__(self):
        return "Balanced()"

    def check(self, shape):
        if shape[1] < 2:
            raise ValueError(f"Balanced needs at least 2 columns, got {shape}.")

    def bits(self, shape):
        return 32 * shape[0] * (shape[1] - 1)

    def project(self, v, score=None):
        return v - v.mean(1, keepdim=True)


def my_solver(structure, weight, metric):
    """Projected steps along the loss's slope; the best member met is kept."""
    w, best = weight.double(), structure.project(weight).double()
    step = 1 / (torch.linalg.matrix_norm(metric.a.double(), 2) * torch.linalg.matrix_norm(metric.g.double(), 2))
    member = best
    for _ in range(20):
        member = structure.project(member - step * (metric.g.double() @ (member - w) @ metric.a.double())).double()
        if metric.loss(member - w) < metric.loss(best - w):
            best = member
    return best.to(weight)


class Counting:
    """A solver that remembers what it was asked."""

    def __init__(self, solver):
        self.solver, self.seen = solver, []

    def __call__(self, structure, weight, metric):
        found = self.solver(structure, weight, metric)
        self.seen.append((structure, tuple(weight.shape), metric.loss(found - weight.to(found))))
        return found


def run(model, **options):
    return compress(model, tiny_task(), **{"budget": Budget(size="0.05x"), "recovery": STEPS, **options})


def test_the_two_are_a_structure_and_one_of_them_packs():
    assert isinstance(Mine(), Structure)
    assert isinstance(Mine(), Packable)
    assert isinstance(Balanced(), Structure)
    assert not isinstance(Balanced(), Packable)


@pytest.fixture(scope="module")
def model():
    return trained(seed=1)


def test_structure_and_solver_from_outside_are_planned_stored_and_loaded(quick, model, tmp_path):
    solver = Counting(my_solver)
    result = run(model, structures=[Mine()], solver=solver)
    chosen = result.blueprint.structures
    assert result.met
    assert chosen
    assert all(isinstance(structure, Mine) for structure in chosen.values())
    assert {repr(structure) for structure, _, _ in solver.seen} == {"Mine()"}
    assert result.after.bytes <= 0.05 * result.before.bytes
    assert any(line.change.endswith("Mine()") for line in result.evidence.plan)

    folder = result.save(tmp_path / "a")
    tensors, _ = read_tensors(folder / WEIGHTS)
    for name in chosen:
        site = next(site for site in find(result.model) if site.name == name)
        parts = {key: t for key, t in tensors.items() if key.startswith(f"{site.parameter_name}:")}
        assert {key.rpartition(":")[2] for key in parts} == {"signs", "exponents"}
        assert 8 * sum(t.numel() * t.element_size() for t in parts.values()) == Mine().bits(site.shape)
        assert torch.equal(Mine().project(site.read(result.model)), site.read(result.model))
    loaded = load(folder, Tiny(), structures=[UniformGrid(4), Mine()])
    assert same(state(loaded), state(result.model))
    assert torch.equal(outputs(loaded), outputs(result.model))


def test_without_it_the_artifact_is_refused_by_name(quick, model, tmp_path):
    folder = run(model, structures=[Mine()]).save(tmp_path / "a")
    for given in ((), (Balanced(),)):
        with pytest.raises(
            ValueError,
            match=r"The plan uses the structure 'Mine\(\)', which is not eke's own: pass it, load\(folder, model, "
            r"structures=\[\.\.\.\]\)",
        ):
            load(folder, Tiny(), structures=given)


def test_it_competes_with_structures_of_eke(quick, model):
    result = run(model, structures=[Mine(), UniformGrid(8), UniformGrid(4)], budget=Budget(size="0.16x"))
    kinds = {type(structure) for structure in result.blueprint.structures.values()}
    assert result.met
    assert UniformGrid in kinds
    offered = {choice for choice in result.plan.picks if choice.startswith("matrix:")}
    assert len(offered) == 4


def test_without_recovery_every_effort_is_made_for_a_structure_from_outside(quick, model, tmp_path):
    result = run(model, structures=[Mine()], recovery=Recovery(steps=0))
    assert result.met
    assert set(map(repr, result.blueprint.structures.values())) == {"Mine()"}
    assert same(state(load(result.save(tmp_path), Tiny(), structures=[Mine()])), state(result.model))


def test_an_interrupted_run_with_it_is_continued(quick, model, tmp_path):
    whole = run(model, structures=[Mine()], solver=my_solver, folder=tmp_path / "whole").save(tmp_path / "a")

    def interrupt(stage, share, text):
        if stage == "plan":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, structures=[Mine()], solver=my_solver, folder=tmp_path / "run", progress=interrupt)
    result = run(model, structures=[Mine()], solver=my_solver, folder=tmp_path / "run", resume=True)
    assert (result.save(tmp_path / "b") / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_solver_from_outside_serves_eke_s_own_structures(quick, model):
    solver = Counting(my_solver)
    result = run(model, structures=[UniformGrid(4), UniformGrid(2)], solver=solver)
    assert result.met
    assert {repr(structure) for structure, _, _ in solver.seen} == {"UniformGrid(bits=4)", "UniformGrid(bits=2)"}
    plain = Counting(lambda structure, weight, metric: structure.project(weight))
    run(model, structures=[UniformGrid(4), UniformGrid(2)], solver=plain)
    # The same questions come first, for the candidates; nobody does worse than the projection it starts from.
    pairs = list(zip(solver.seen[:8], plain.seen[:8]))
    assert all(mine[:2] == theirs[:2] for mine, theirs in pairs)
    assert all(mine[2] <= theirs[2] * (1 + 1e-6) for mine, theirs in pairs)


def test_a_structure_that_does_not_pack_is_stored_as_it_is(model, tmp_path):
    data, sites = batches(64, seed=1), find(model)
    curvature = Curvature.estimate(model, cross_entropy, data, sites=sites)
    forms = tuple(Forms(site, (None, Balanced()), (0.0, 0.1)) for site in sites)
    picks = {form.choice: 1 for form in forms}
    decisions = Decisions((), forms)
    planned = apply.draft(model, decisions, picks, sites=sites, curvature=curvature, solver=my_solver, layout=Layout())
    net = planned.finished()
    apply.deploy_(net, planned.blueprint)
    save(tmp_path, net, planned.blueprint)
    tensors, _ = read_tensors(tmp_path / WEIGHTS)
    assert tensors["conv2.weight:values"].shape == (32, 16 * 9)
    assert stored_bits(Balanced(), (32, 144)) == 8 * tensors["conv2.weight:values"].numel() * 4
    assert float(net.conv2.weight.flatten(1).sum(1).abs().max()) < 1e-5
    loaded = load(tmp_path, Tiny(), structures=[Balanced()])
    assert same(state(loaded), state(net))
    with pytest.raises(ValueError, match=r"The plan uses the structure 'Balanced\(\)', which is not eke's own"):
        load(tmp_path, Tiny())


def test_a_structure_that_saves_no_stored_byte_is_not_chosen_for_bytes(quick, model):
    result = run(model, structures=[Balanced(), UniformGrid(4)], budget=Budget(size="0.3x"))
    assert result.met
    assert not [s for s in result.blueprint.structures.values() if isinstance(s, Balanced)]


def test_the_plan_says_what_it_needs(quick, model, tmp_path):
    folder = run(model, structures=[Mine()]).save(tmp_path / "a")
    structures = read_plan(folder)["structures"]
    assert {json.dumps(found, sort_keys=True) for found in structures.values()} == {
        '{"kind": "outside", "text": "Mine()"}'
    }
    assert (folder / PLAN).stat().st_size < 1e5


@pytest.mark.parametrize("wrong", [3, "UniformGrid(4)", UniformGrid, object()])
def test_what_is_no_structure_is_refused(model, wrong):
    with pytest.raises(TypeError, match=r"structures must have project, bits, check and exactness, got "):
        run(model, structures=[UniformGrid(4), wrong])


def test_a_structure_without_a_name_of_its_own_is_refused(model):
    class Nameless(Mine):
        __repr__ = object.__repr__

    with pytest.raises(TypeError, match=r"recognised by their repr, and that of <.*Nameless object at 0x"):
        compress(model, tiny_task(), budget=Budget(size="0.5x"), structures=[Nameless()])


def test_a_structure_that_fits_nowhere_is_warned_of_with_the_reason(model, quick):
    with pytest.warns(UserWarning, match=r"NM\(n=3, m=7\) is used at none of 4 matrices: at 'conv1', .*skip="):
        found = compress(
            model, tiny_task(), budget=Budget(size="0.9x"), structures=[NM(3, 7), UniformGrid(4)], recovery=STEPS
        )
    assert set(map(repr, found.blueprint.structures.values())) <= {"UniformGrid(bits=4)"}
