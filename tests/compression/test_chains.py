"""Chains of factors as candidates: layers take their place, values are those of the member, times are measured."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eke
from eke.compression import Recovery, Task, apply, candidates
from eke.compression.artifact import Blueprint
from eke.compression.candidates import Decisions, Forms, offered
from eke.compression.deploy import fold_batchnorm_
from eke.compression.factor import factor_, fill_chain_, stand_in
from eke.compression.solver import careful, finest, quick
from eke.compression.tables import Counter, designs, mac_terms, parameter_terms, shapes, size_terms
from eke.compression.timing import fit_timing
from eke.linalg import Metric
from eke.nn import KSLinear
from eke.patterns import Chain
from eke.sites import Surgery, find
from eke.structures import KroneckerSparse, LowRank, UniformGrid

from .conftest import shorten_measurements

UP, DOWN = Chain.monarch(64, 32, 4), Chain.monarch(32, 64, 4)
FULL = Chain([(1, 32, 32, 2), (2, 32, 16, 1)])
"""Of full rank at its interface: every 64 x 32 matrix is a member."""


class Perceptron(nn.Module):
    """Three layers, the first one normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(32, 64, bias=False), nn.BatchNorm1d(64)
        self.down, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.down(F.relu(self.norm(self.up(x))))))


def net() -> Perceptron:
    torch.manual_seed(0)
    model = Perceptron()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def site_of(model, name):
    return next(site for site in find(model) if site.name == name)


def test_a_chain_of_full_rank_leaves_the_model_as_it_is():
    model, other = net(), net()
    factor_(other, site_of(other, "up"), FULL)
    fill_chain_(other, "up", model.up.weight.detach())
    x = torch.randn(5, 32)
    assert isinstance(other.up, KSLinear)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)
    fold_batchnorm_(other, [("up", "norm")])
    assert isinstance(other.norm, nn.Identity)
    torch.testing.assert_close(other(x), model(x), rtol=1e-4, atol=1e-4)


def test_the_bias_and_the_flags_stay():
    model = net()
    model.down.requires_grad_(False)
    bias, state = model.down.bias, torch.get_rng_state()
    factor_(model, site_of(model, "down"), DOWN)
    assert model.down.bias is bias
    assert not model.down.training
    assert not any(p.requires_grad for p in model.down.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_only_linear_layers_of_the_size_take_a_chain():
    model = nn.Sequential(nn.Conv2d(32, 64, 1), nn.Linear(64, 32))
    with pytest.raises(ValueError, match=r"Cannot make '0' \(conv, \(64, 32\)\) the chain"):
        factor_(model, site_of(model, "0"), UP)
    with pytest.raises(ValueError, match=r"Cannot make '1' \(linear, \(32, 64\)\) the chain .* of shape \(64, 32\)"):
        factor_(model, site_of(model, "1"), UP)
    conv, linear = find(model)
    structures = [KroneckerSparse(UP), KroneckerSparse(DOWN)]
    assert offered(conv, structures, ["0", "1"]) == []
    assert offered(linear, structures, ["0", "1"]) == [KroneckerSparse(DOWN)]
    assert offered(linear, structures, ["0"]) == []


def test_stand_ins():
    assert stand_in(LowRank(0.5), (64, 32)) == 16
    assert stand_in(KroneckerSparse(UP), (64, 32)) == UP
    assert stand_in(UniformGrid(4), (64, 32)) is None
    assert stand_in(None, (64, 32)) is None


@pytest.mark.parametrize("solver", [quick, careful, finest])
def test_solvers_work_in_the_metric(solver):
    torch.manual_seed(0)
    x, weight = (
        torch.randn(300, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64),
        torch.randn(64, 32),
    )
    metric = Metric(x.T @ x / 300, torch.eye(64, dtype=torch.float64))
    structure = KroneckerSparse(UP)
    found = solver(structure, weight, metric)
    assert metric.loss(found - weight) < 0.95 * metric.loss(structure.project(weight) - weight)
    again = structure.project(found)
    # A member, up to float32.
    torch.testing.assert_close(again, found, rtol=1e-4, atol=1e-4)


def test_more_patience_is_no_worse():
    torch.manual_seed(1)
    x, weight = (
        torch.randn(300, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64),
        torch.randn(64, 32),
    )
    metric = Metric(x.T @ x / 300, torch.eye(64, dtype=torch.float64))
    losses = [metric.loss(solver(KroneckerSparse(UP), weight, metric) - weight) for solver in (quick, careful, finest)]
    assert losses[0] * (1 + 1e-6) >= losses[1]
    assert losses[1] * (1 + 1e-6) >= losses[2]


def decisions_of(model) -> Decisions:
    up, down = site_of(model, "up"), site_of(model, "down")
    return Decisions(forms=(
        Forms(up, (None, LowRank(8), KroneckerSparse(UP)), (0.0, 0.1, 0.2)),
        Forms(down, (None, UniformGrid(4), KroneckerSparse(DOWN)), (0.0, 0.1, 0.2)),
    ))  # fmt: skip


def test_tables_count_what_the_replaced_model_has():
    model = net()
    decisions = decisions_of(model)
    counter, dimensions = Counter.of(decisions), shapes(model, ())
    x = torch.randn(3, 32)
    for picks in ({}, {"matrix:up": 2}, {"matrix:up": 1, "matrix:down": 2}, {"matrix:up": 2, "matrix:down": 2}):
        shaped = apply.shaped(model, apply.blueprint(decisions, picks, apply.Layout()))
        terms = parameter_terms(model, dimensions, counter)
        assert total(terms, picks, decisions) == sum(p.numel() for p in shaped.parameters())
        macs = mac_terms({"up": 3 * 2048.0, "down": 3 * 2048.0}, dimensions, counter)
        wanted = sum(eke.cost.flops(m, y) / 2 for m, y in ((shaped.up, x), (shaped.down, torch.randn(3, 64))))
        assert total(macs, picks, decisions) == wanted
    sizes = size_terms(model, dimensions, counter, folded=())
    less = total(sizes, {}, decisions) - total(sizes, {"matrix:up": 2}, decisions)
    assert less == pytest.approx(4 * (2048 - UP.parameters), abs=200)


def total(terms, picks, decisions) -> float:
    choices = [form.choice for form in decisions.forms]
    return sum(
        float(term.table[tuple(picks.get(c, 0) for c in term.over)]) for term in terms if set(term.over) <= set(choices)
    )


def test_times_of_chains_are_those_measured():
    model = net()
    decisions = decisions_of(model)
    counter, dimensions = Counter.of(decisions), shapes(model, ())
    chosen = designs(decisions, count=12, seed=0)
    assert {design["matrix:up"] for design in chosen} == {0, 1, 2}
    assert {design["matrix:down"] for design in chosen} == {0, 2}

    def measured(design):
        found = {"down": 5e-3 if design["matrix:down"] == 2 else 4e-3, "head": 1e-3, "norm": 1e-3, "": 1e-3}
        up = {0: {"up": 4e-3}, 1: {"up.0": 1e-3, "up.1": 1e-3}, 2: {"up": 3e-3}}
        return {**found, **up[design["matrix:up"]]}

    times = [measured(design) for design in chosen]
    whole = [sum(t.values()) for t in times[:4]]
    timing = fit_timing(chosen, times, dimensions=dimensions, counter=counter, whole=whole)
    terms = timing.terms(dimensions, counter)

    def seconds(picks):
        return total(terms, picks, decisions)

    # What costs more than the dense layer is known to cost more: such an option saves bytes alone.
    assert seconds({"matrix:up": 2}) - seconds({}) == pytest.approx(-1e-3, rel=1e-3)
    assert seconds({"matrix:up": 1}) - seconds({}) == pytest.approx(-2e-3, rel=1e-3)
    assert seconds({"matrix:down": 2}) - seconds({}) == pytest.approx(1e-3, rel=1e-3)
    assert seconds({"matrix:down": 1}) == pytest.approx(seconds({}), rel=1e-9)
    assert np.isfinite([float(t.table.max()) for t in terms]).all()


def test_blueprints_are_written_and_read():
    form = Blueprint(Surgery.merge([]), (), "contiguous", {}, factored={"up": UP, "down": 4})
    again = Blueprint.from_json(json.loads(json.dumps(form.to_json())))
    assert again.factored == {"up": UP, "down": 4}
    model = net()
    again.shape_(model)
    assert isinstance(model.up, KSLinear)
    assert isinstance(model.down, nn.Sequential)
    for wrong in ([], [[1, 2]], "4", [[1, 2, 3, "4"]]):
        with pytest.raises(ValueError, match="where whole numbers are needed or, for chains, lists of four"):
            Blueprint.from_json({**form.to_json(), "factored": {"up": wrong}})


def batches(seed: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    centres = torch.randn(4, 32)
    torch.manual_seed(seed)
    labels = [torch.randint(4, (64,)) for _ in range(count)]
    return [(centres[y] + 0.7 * torch.randn(64, 32), y) for y in labels]


@pytest.fixture(scope="module")
def result():
    task = Task(
        calibration=batches(1), selection=batches(2), report=batches(3),
        loss=eke.compression.cross_entropy, score=eke.compression.accuracy,
    )  # fmt: skip
    model = net().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in 10 * batches(1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    structures = [KroneckerSparse(UP), KroneckerSparse(DOWN)]
    with pytest.MonkeyPatch.context() as patch:
        shorten_measurements(patch.setattr)
        # Narrower layers would keep the budget as well: chains are to be looked at.
        patch.setattr(candidates, "channel_candidates", lambda *_: [])
        budget = eke.Budget(macs="0.8x", size="0.8x")
        found = eke.compress(
            model.eval(), task, budget=budget, structures=structures, skip=["head"],
            recovery=Recovery(steps=4, batch_size=32),
        )  # fmt: skip
    return model, found


def test_compress_puts_chains_in_place_and_reloads_them(result, tmp_path):
    model, found = result
    before = copy.deepcopy(model)
    assert any(isinstance(module, KSLinear) for module in found.model.modules())
    assert found.met
    assert found.after.parameters == sum(p.numel() for p in found.model.parameters())
    folder = found.save(tmp_path / "artifact")
    loaded = eke.load(folder, model)
    x = torch.randn(6, 32)
    assert torch.equal(loaded(x), found.model(x))
    assert [type(m) for m in before.modules()] == [type(m) for m in model.modules()]
    assert any("Kronecker-sparse factors" in line.change for line in found.evidence.plan)
