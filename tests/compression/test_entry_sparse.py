"""Sparse layers as candidates: they take the place of dense ones once packed, and are saved and rebuilt bit for bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eke
from eke.compression import Recovery, Task, apply, artifact, candidates
from eke.compression.artifact import Blueprint, stored_bits
from eke.compression.candidates import Decisions, Forms, Widths, offered
from eke.compression.entries import sparsable, with_zeros
from eke.compression.factor import stand_in
from eke.compression.solver import careful, quick
from eke.compression.tables import Counter, designs, mac_terms, parameter_terms, shapes
from eke.compression.timing import fit_timing
from eke.compression.verify import described
from eke.linalg import Metric
from eke.nn import SparseLinear
from eke.nn.sparse_conv import SparseConv2d
from eke.sites import Surgery, channel_groups, find
from eke.structures import EntrySparse, UniformGrid, Unstructured

from .conftest import shorten_measurements

THIN, PACKED = EntrySparse(0.25), EntrySparse(0.1, UniformGrid(6))


class Pixels(nn.Module):
    """Two 1 x 1 convolutions, the first normalised and with a stride, a 3 x 3 one and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm = nn.Conv2d(6, 16, 1, stride=(2, 1), bias=False), nn.BatchNorm2d(16)
        self.wide, self.back = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.wide(F.relu(self.norm(self.mix(x)))))
        return self.head(F.relu(self.back(x)).mean((2, 3)))


def net() -> Pixels:
    torch.manual_seed(0)
    model = Pixels()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def sites_of(model):
    return {site.name: site for site in find(model)}


def decisions_of(model) -> Decisions:
    sites = sites_of(model)
    return Decisions(forms=(
        Forms(sites["mix"], (None, THIN, PACKED), (0.0, 0.1, 0.2)),
        Forms(sites["back"], (None, UniformGrid(4), THIN), (0.0, 0.1, 0.2)),
        Forms(sites["head"], (None, THIN), (0.0, 0.1)),
        Forms(sites["wide"], (None, THIN), (0.0, 0.1)),
    ))  # fmt: skip


PICKS = {"matrix:mix": 2, "matrix:back": 2, "matrix:head": 1, "matrix:wide": 1}


def deployed(model):
    form = apply.blueprint(decisions_of(model), PICKS, apply.Layout((("mix", "norm"),), "channels_last"))
    dense = copy.deepcopy(model)
    for name, structure in form.structures.items():
        site = sites_of(dense)[name]
        site.write_(dense, structure.project(site.read(dense)))
    apply.deploy_(model, form)
    return dense, form


def test_packed_models_run_sparse_and_give_what_dense_ones_with_zeros_give():
    model = net()
    dense, _ = deployed(model)
    assert isinstance(model.mix, SparseConv2d)
    assert isinstance(model.back, SparseConv2d)
    assert isinstance(model.wide, SparseConv2d)
    assert isinstance(model.head, SparseLinear)
    assert model.back.linear.kept == 32  # a quarter of 8 x 16
    assert model.mix.linear.kept <= 10
    x = torch.randn(3, 6, 8, 8)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), dense(x), rtol=1e-4, atol=1e-5)


def test_artifacts_are_rebuilt_bit_for_bit_and_hold_packed_entries(tmp_path):
    model = net()
    _, form = deployed(model)
    tensors = artifact.pack(model, form.structures)
    for name, structure in form.structures.items():
        parts = [t.nbytes for key, t in tensors.items() if key.startswith(f"{name}.weight:")]
        assert (
            8 * sum(parts)
            == structure.bits(sites_of(net())[name].shape)
            == stored_bits(structure, sites_of(net())[name].shape)
        )
    assert isinstance(model.head, SparseLinear)  # packing looks at a copy
    artifact.save(tmp_path / "packed", model, form)
    again = artifact.load(tmp_path / "packed", net())
    assert isinstance(again.mix, SparseConv2d)
    assert artifact.state_digest(again) == artifact.state_digest(model)
    x = torch.randn(3, 6, 8, 8)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    back = with_zeros(model, form.structures)
    assert type(back.mix) is nn.Conv2d
    assert back.mix.stride == (2, 1)
    torch.testing.assert_close(back(x), model(x), rtol=1e-4, atol=1e-5)
    assert with_zeros(back, form.structures) is back


def test_blueprints_are_written_and_read():
    form = Blueprint(Surgery.merge([]), (), "contiguous", {"mix": PACKED, "head": THIN})
    again = Blueprint.from_json(json.loads(json.dumps(form.to_json())))
    assert again.structures == {"mix": PACKED, "head": THIN}
    assert stand_in(PACKED, (8, 8)) is PACKED
    assert stand_in(Unstructured(0.1), (8, 8)) is None


def test_only_layers_that_have_a_sparse_kind_are_offered_one():
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    first = nn.Linear(8, 8)
    model = nn.ModuleDict({
        "first": first, "again": nn.Linear(8, 8), "own": Louder(8, 8), "groups": nn.Conv2d(8, 8, 1, groups=2),
        "mirrored": nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), "three": nn.Conv2d(8, 8, 3),
        "line": nn.Conv1d(8, 8, 1),
        "point": nn.Conv2d(8, 8, 1), "linear": nn.Linear(8, 8), "words": nn.Embedding(8, 8),
    })  # fmt: skip
    model["again"].weight = first.weight
    sites = find(model)
    assert sparsable(model, sites) == ["three", "point", "linear"]
    by_name = {site.name: site for site in sites}
    able = ["point", "linear", "three"]
    assert offered(by_name["linear"], [THIN], able, sparsable=["linear"]) == [THIN]
    assert offered(by_name["linear"], [THIN], [], sparsable=["linear"]) == []
    assert offered(by_name["three"], [THIN], able, sparsable=["linear"]) == []


def test_tables_count_what_the_sparse_model_has():
    model = net()
    decisions = decisions_of(model)
    counter, dimensions = Counter.of(decisions), shapes(model, ())
    x = torch.randn(3, 6, 8, 8)
    for picks in ({}, {"matrix:mix": 1}, {"matrix:back": 1}, PICKS, {"matrix:head": 1}):
        shaped = apply.shaped(model, apply.blueprint(decisions, picks, apply.Layout()))
        assert total(parameter_terms(model, dimensions, counter), picks) == eke.cost.parameters(shaped)
        macs = mac_terms({"mix": 96 * 96.0, "back": 128 * 96.0, "head": 96.0, "wide": 2304 * 96.0}, dimensions, counter)
        assert total(macs, picks) == eke.cost.flops(shaped, x) / 2


def total(terms, picks) -> float:
    return sum(float(term.table[tuple(picks.get(c, 0) for c in term.over)]) for term in terms)


def test_times_are_those_measured_and_follow_cuts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    group = channel_groups(model, torch.randn(2, 32))[0]
    sites = sites_of(model)
    widths = Widths(group, (64, 32), tuple(range(64)), (0.0, 0.1))
    decisions = Decisions((widths,), (Forms(sites["0"], (None, THIN, EntrySparse(0.1)), (0.0, 0.1, 0.2)),))
    counter, dimensions = Counter.of(decisions), shapes(model, (widths,))
    chosen = designs(decisions, count=16, seed=0)
    assert {d["matrix:0"] for d in chosen} == {0, 1, 2}

    def measured(design):
        left = 0.5 if design[widths.choice] else 1.0
        return {"0": left * {0: 4e-3, 1: 2e-3, 2: 1e-3}[design["matrix:0"]], "2": left * 1e-3, "": 0.0}

    times = [measured(design) for design in chosen]
    timing = fit_timing(
        chosen, times, dimensions=dimensions, counter=counter, whole=[sum(t.values()) for t in times[:4]]
    )
    terms = timing.terms(dimensions, counter)
    for cut in (0, 1):
        dense, thin, thinner = (total(terms, {widths.choice: cut, "matrix:0": option}) for option in (0, 1, 2))
        left = 0.5 if cut else 1.0
        assert dense - thin == pytest.approx(left * 2e-3, rel=0.02)
        assert dense - thinner == pytest.approx(left * 3e-3, rel=0.02)


@pytest.mark.parametrize("structure", [EntrySparse(0.2), EntrySparse(0.2, UniformGrid(4))], ids=repr)
def test_survivors_make_up_for_what_goes(structure):
    torch.manual_seed(0)
    x = torch.randn(300, 32, dtype=torch.float64) @ torch.randn(32, 32, dtype=torch.float64)
    weight, metric = torch.randn(24, 32), Metric(x.T @ x / 300, torch.eye(24, dtype=torch.float64))
    plain = metric.loss(structure.project(weight) - weight)
    one, few = (metric.loss(solver(structure, weight, metric) - weight) for solver in (quick, careful))
    assert one < plain
    assert few < 0.7 * plain
    found = careful(structure, weight, metric)
    assert torch.equal(structure.project(found), found)


def test_reports_say_that_zeros_are_skipped():
    assert described(THIN, (8, 8)) == "25 % of the entries, run without the others"
    assert described(PACKED, (8, 8)) == "10 % of the entries, 6 bits, run without the others"


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"needs a density in \(0, 1\], got 1.5"):
        EntrySparse(1.5)
    with pytest.raises(TypeError, match="needs a grid with a level for 0"):
        EntrySparse(0.5, UniformGrid(1))
    with pytest.raises(TypeError, match=r"composes Unstructured, NM or Rows with a UniformGrid, got .* 4;"):
        EntrySparse(0.5, 4)


def batches(seed: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(7)
    centres = torch.randn(4, 32)
    torch.manual_seed(seed)
    labels = [torch.randint(4, (64,)) for _ in range(count)]
    return [(centres[y] + 0.7 * torch.randn(64, 32), y) for y in labels]


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def test_compress_takes_them_under_a_budget_and_its_artifact_comes_back(tmp_path, monkeypatch):
    shorten_measurements(monkeypatch.setattr)
    # Narrower layers would keep the budget as well: sparse ones are to be looked at.
    monkeypatch.setattr(candidates, "channel_candidates", lambda *_: [])
    model = perceptron().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in 10 * batches(1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    task = Task(
        calibration=batches(1), selection=batches(2), report=batches(3),
        loss=eke.compression.cross_entropy, score=eke.compression.accuracy,
    )  # fmt: skip
    found = eke.compress(
        model.eval(), task, budget=eke.Budget(macs="0.4x", size="0.4x"), structures=[THIN, PACKED], skip=["4"],
        recovery=Recovery(steps=4, batch_size=32),
    )  # fmt: skip
    assert all(isinstance(found.model[i], SparseLinear) for i in (0, 2))
    x = torch.randn(8, 32)
    folder = found.save(tmp_path / "artifact")
    again = artifact.load(folder, perceptron())
    with torch.no_grad():
        torch.testing.assert_close(again(x), found.model(x), rtol=1e-5, atol=1e-5)
    assert artifact.state_digest(again) == artifact.state_digest(found.model)
    lines = {line.site: line.change for line in found.evidence.plan}
    assert "run without the others" in lines["0"]
    assert (folder / "model.safetensors").stat().st_size < 0.4 * eke.cost.model_bytes(model) + 600
    assert type(model[0]) is nn.Linear
