"""Tables of costs: exact where they can be, fitted and anchored where they are measured."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from eke import cost
from eke.compression import candidates, measure, tables
from eke.compression import timing as timing_module
from eke.compression.apply import Layout, blueprint, deploy_, shaped
from eke.compression.artifact import pack
from eke.compression.blocks import removable
from eke.compression.calibrate import plan_loss
from eke.compression.candidates import Block, Decisions, Forms, Widths
from eke.compression.deploy import foldable
from eke.compression.factor import factorable
from eke.compression.plan import total
from eke.sites import channel_groups, find
from eke.structures import NM, Both, LowRank, Rows, UniformGrid, Unstructured

from .nets import Blocky, samples, trained

STRUCTURES = (
    LowRank(0.75), UniformGrid(8), Both(Unstructured(0.5), UniformGrid(4)), NM(2, 4), UniformGrid(3, group=5),
    Rows(0.5), Unstructured(0.1), LowRank(0.5, UniformGrid(6)), LowRank(3, UniformGrid(4, group=2)),
)  # fmt: skip


class Joined(nn.Module):
    """Two branches concatenated, then flattened: two groups cut one tensor, one unit owns four columns."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 16, 1)
        self.mixed = nn.Conv2d(24, 8, 3, stride=4, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.head(torch.relu(self.mixed(both)).flatten(1))


class Mixed(nn.Module):
    """A depthwise convolution, a transposed one, and matrices that are not square."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depth = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up, self.norm = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.BatchNorm2d(16)
        self.last, self.head = nn.Conv2d(16, 16, 3, stride=4), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.up(self.depth(torch.relu(self.wide(x))))))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


NETS = {"residual": lambda: trained(seed=2), "joined": Joined, "blocky": Blocky, "mixed": Mixed}


def unpriced(model: nn.Module, x: torch.Tensor) -> tuple[Widths, ...]:
    """Candidates without losses: what stays matters here, not what it is worth."""
    found = []
    for group in channel_groups(model, x):
        kept = candidates.kept_counts(group.size)
        found.append(Widths(group, kept, tuple(range(group.size)), (0.0,) * len(kept)))
    return tuple(found)


def everything(model: nn.Module, x: torch.Tensor) -> Decisions:
    """Every width, structure and block that the net allows, without losses."""

    def call(net):
        return net(x)

    sites, widths = find(model), unpriced(model, x)
    able = factorable(model, sites, call)
    forms = []
    for site in sites:
        fit = candidates.offered(site, STRUCTURES, able)
        forms.append(Forms(site, (None, *fit), (0.0,) * (1 + len(fit))))
    names = removable(model, sites, call, groups=[w.group for w in widths])
    return Decisions(widths, tuple(forms), tuple(Block(name, "identity", 0.0) for name in names))


@pytest.fixture(scope="module", params=NETS)
def world(request):
    model = NETS[request.param]().eval()
    x = samples(4, seed=6)[0]
    return model, x, everything(model, x)


def some_plans(decisions: Decisions, *, count: int, seed: int = 0) -> list[dict[str, int]]:
    """Random plans; every kind of decision is left alone in some of them."""
    generator = np.random.default_rng(seed)
    plans = []
    for number in range(count):
        picks = {choice: int(generator.integers(len(losses))) for choice, losses in decisions.losses.items()}
        still = ["channels", "matrix", "block", ""][number % 4]
        plans.append({choice: 0 if choice.partition(":")[0] == still else pick for choice, pick in picks.items()})
    return plans


def test_the_worlds_hold_what_they_should(world):
    model, _, decisions = world
    kinds = {type(s) for form in decisions.forms for s in form.structures}
    assert {LowRank, UniformGrid, Both, Rows, Unstructured} <= kinds
    assert decisions.widths
    assert [b.name for b in decisions.blocks] == (["first", "second"] if isinstance(model, Blocky) else [])


def test_parameters_are_those_of_the_planned_net(world):
    model, _, decisions = world
    counter = tables.Counter.of(decisions)
    terms = tables.parameter_terms(model, tables.shapes(model, decisions.widths), counter)
    for picks in some_plans(decisions, count=12):
        net = shaped(model, blueprint(decisions, picks, Layout()))
        assert total(terms, picks)["parameters"] == cost.parameters(net)


def test_multiply_adds_are_those_of_the_planned_net(world):
    model, x, decisions = world
    counter = tables.Counter.of(decisions)
    terms = tables.mac_terms(measure.own_macs(model, (x,)), tables.shapes(model, decisions.widths), counter)
    for picks in some_plans(decisions, count=12):
        net = shaped(model, blueprint(decisions, picks, Layout()))
        assert total(terms, picks)["macs"] == pytest.approx(cost.flops(net, x) / 2, rel=1e-12)


def built(model: nn.Module, decisions: Decisions, picks: dict[str, int], layout: Layout):
    """Return the deployed net of a plan and the structures of its matrices."""
    form = blueprint(decisions, picks, layout)
    net = copy.deepcopy(model).eval()
    form.shape_(net)
    deploy_(net, form)
    return net, form.structures


def test_bytes_are_those_of_the_packed_file_up_to_its_header(world, monkeypatch):
    model, x, decisions = world
    counter, dimensions = tables.Counter.of(decisions), tables.shapes(model, decisions.widths)
    for folded in ((), tuple(foldable(model, lambda net: net(x)))):
        terms = tables.size_terms(model, dimensions, counter, folded=folded)
        with monkeypatch.context() as patch:
            patch.setattr(tables, "HEADER_BYTES", 0.0)
            bare = tables.size_terms(model, dimensions, counter, folded=folded)
        for picks in some_plans(decisions, count=6):
            net, structures = built(model, decisions, picks, Layout(folded))
            stored = sum(t.numel() * t.element_size() for t in pack(net, structures).values())
            assert total(bare, picks)["size"] - 100 == pytest.approx(stored, abs=1e-6)
            header = total(terms, picks)["size"] - stored
            assert abs(measure.packed_bytes(net, structures) - stored - header) < 0.5 * header


def test_tied_matrices_are_stored_and_counted_once():
    model = nn.ModuleDict({"embed": nn.Embedding(50, 8), "head": nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    decisions = Decisions()
    terms = tables.size_terms(model, tables.shapes(model, ()), tables.Counter.of(decisions), folded=())
    assert total(terms, {})["size"] == pytest.approx(measure.packed_bytes(model, {}), abs=150)


def test_what_is_done_inside_a_block_that_is_left_out_costs_nothing():
    model = Blocky().eval()
    decisions = everything(model, samples(2, seed=6)[0])
    priced = decisions.with_losses({
        choice: [0.0, *(float(i + 1) for i in range(len(losses) - 1))] for choice, losses in decisions.losses.items()
    })
    terms = tables.loss_terms(priced)
    for picks in some_plans(priced, count=8):
        assert total(terms, picks)["loss"] == plan_loss(priced, picks)
        gone = {**picks, "block:first": 1}
        inside = {choice: 0 for choice in picks if choice.startswith("matrix:first.")}
        assert total(terms, gone) == total(terms, {**gone, **inside})


def test_a_tensor_cut_by_two_groups_counts_both():
    model = Joined().eval()
    widths = unpriced(model, samples(2, seed=6)[0])
    dimensions = tables.shapes(model, widths)["mixed.weight"]
    assert {choice for choice, _ in dimensions[1].cuts} == {"channels:left", "channels:right"}
    assert tables.shapes(model, widths)["head.weight"][1].cuts == (("channels:mixed", 4),)


def synthetic(picks, counter, dimensions, coefficients):
    """Times that follow the model of the fit exactly."""
    times = {}
    for module, values in coefficients.items():
        over, features = timing_module._features(module, dimensions, counter)
        index = tuple(picks[c] for c in over)
        times[module] = sum(v * float(counter.full(f, over)[index]) for v, f in zip(values, features))
    return {**times, "": 1e-3}


def test_the_fit_recovers_times_that_follow_its_model():
    model = trained(seed=2)
    decisions = Decisions(unpriced(model, samples(4, seed=6)[0]))
    counter, dimensions = tables.Counter.of(decisions), tables.shapes(model, decisions.widths)
    truth = {"conv1": (1e-4, 3e-4), "conv2": (2e-4, 1e-4, 5e-5, 4e-3), "classifier": (1e-5, 2e-5)}
    nets = tables.designs(decisions, count=20, seed=0)
    times = [synthetic(picks, counter, dimensions, truth) for picks in nets]
    whole = [1.5 * sum(t.values()) + 2e-3 for t in times[:4]]
    timing = timing_module.fit_timing(nets, times, dimensions=dimensions, counter=counter, whole=whole)
    assert timing.scale == pytest.approx(1.5, rel=1e-6)
    terms = timing.terms(dimensions, counter)
    for picks in some_plans(decisions, count=5):
        wanted = 1.5 * sum(synthetic(picks, counter, dimensions, truth).values()) + 2e-3
        assert total(terms, picks)["latency"] == pytest.approx(wanted, rel=1e-6)


def test_fitted_times_never_fall_as_channels_are_kept():
    model = trained(seed=2)
    decisions = Decisions(unpriced(model, samples(4, seed=6)[0]))
    counter, dimensions = tables.Counter.of(decisions), tables.shapes(model, decisions.widths)
    nets = tables.designs(decisions, count=12, seed=1)
    generator = np.random.default_rng(0)
    times = [{"conv2": float(t), "": 1e-3} for t in generator.uniform(1e-3, 2e-3, len(nets))]
    timing = timing_module.fit_timing(nets, times, dimensions=dimensions, counter=counter, whole=[3e-3, 1e-3])
    for term in timing.terms(dimensions, counter):
        for axis in range(term.table.ndim):
            assert (np.diff(term.table, axis=axis) <= 1e-15).all()


def test_the_fit_recovers_times_of_factored_layers_and_of_blocks():
    model = Blocky().eval()
    x = samples(2, seed=6)[0]
    decisions = everything(model, x)
    # A few decisions: every time below follows the model of the fit exactly.
    forms = tuple(f for f in decisions.forms if f.site.name in ("second.one", "stem"))
    decisions = Decisions(decisions.widths, forms, decisions.blocks)
    counter, dimensions = tables.Counter.of(decisions), tables.shapes(model, decisions.widths)
    nets = tables.designs(decisions, count=60, seed=0)

    def seconds(picks):
        stays = {block.name: not picks.get(block.choice, 0) for block in decisions.blocks}
        times = {"": 1e-3 + 3e-4 * stays["first"] + 1e-4 * stays["second"]}
        net = shaped(model, blueprint(decisions, picks, Layout()))
        for site in find(net):
            whole = 2e-9 * math.prod(site.shape) + 1e-6
            times[site.name] = 5e-9 * math.prod(site.shape) + 2e-6 if site.name[-2:] in (".0", ".1") else whole
        return times

    times = [seconds(picks) for picks in nets]
    timing = timing_module.fit_timing(nets, times, dimensions=dimensions, counter=counter, whole=[
        sum(t.values()) for t in times[:4]
    ])  # fmt: skip
    assert timing.scale == pytest.approx(1, rel=1e-6)
    assert set(timing.factored) == {"second.one", "stem"}
    terms = timing.terms(dimensions, counter)
    for picks in some_plans(decisions, count=12, seed=3):
        assert total(terms, picks)["latency"] == pytest.approx(sum(seconds(picks).values()), rel=1e-6)


def wide(name: str, size: int, kept: tuple[int, ...]) -> Widths:
    group = channel_groups(nn.Sequential(nn.Linear(2, size), nn.ReLU(), nn.Linear(size, 2)), torch.zeros(1, 2))[0]
    return Widths(replace(group, name=name), kept, tuple(range(size)), (0.0,) * len(kept))


def test_designs_hold_the_uncut_and_the_smallest_net_and_every_option():
    a, b = wide("a", 6, (6, 4, 2)), wide("b", 2, (2, 1))
    decisions = Decisions((a, b))
    nets = tables.designs(decisions, count=14, seed=3)
    assert nets[0] == {a.choice: 0, b.choice: 0}
    assert nets[1] == {a.choice: 2, b.choice: 1}
    assert {net[a.choice] for net in nets[2:]} == {0, 1, 2}
    assert nets == tables.designs(decisions, count=14, seed=3)
    assert tables.designs(Decisions(), count=5, seed=0) == [{}]


def test_designs_vary_what_changes_a_nets_shape_alone():
    model = Blocky().eval()
    decisions = everything(model, samples(2, seed=6)[0])
    forms = {form.choice: form for form in decisions.forms}
    nets = tables.designs(decisions, count=60, seed=0)
    widths = {w.choice for w in decisions.widths}
    assert set(nets[0]) == {b.choice for b in decisions.blocks} | widths | {c for c in forms if forms[c].factored}
    assert set(nets[0].values()) == {0}
    for choice, form in forms.items():
        seen = {net[choice] for net in nets}
        assert seen == {0, *(i for i, s in enumerate(form.structures) if isinstance(s, LowRank))}
    assert all({net[b.choice] for net in nets} == {0, 1} for b in decisions.blocks)
    assert all(set(net) == widths for net in tables.designs(decisions, count=9, seed=0, widths_only=True))


def test_peak_memory_of_cut_nets_is_foreseen():
    model = trained(seed=2)
    x = samples(16, seed=6)[0]
    decisions = Decisions(unpriced(model, x))
    terms = measure.memory_terms(model, (x,), decisions, layout=Layout())
    for picks in some_plans(decisions, count=6):
        net = shaped(model, blueprint(decisions, picks, Layout()))
        assert total(terms, picks)["peak_memory"] == pytest.approx(cost.peak_memory(net, x), rel=0.15)


def test_shares_fall_from_one():
    counter = tables.Counter({"a": (0, 2, 4)}, {"a": 8})
    assert counter.share("a").tolist() == [1.0, 0.75, 0.5]


def test_choices_name_every_option(world):
    decisions = world[2]
    found = {c.name: c.options for c in tables.choices(decisions)}
    assert {name: len(options) for name, options in found.items()} == {n: len(x) for n, x in decisions.losses.items()}
    form, width = decisions.forms[0], decisions.widths[0]
    assert found[form.choice] == ("as it is", *(repr(s) for s in form.structures[1:]))
    assert found[width.choice] == tuple(str(kept) for kept in width.kept)
    assert all(found[block.choice] == ("stays", "identity") for block in decisions.blocks)


def test_a_curve_recovers_a_power_of_the_fit_and_stays_straight_where_little_varies():
    fitted = np.geomspace(1e-4, 1e-2, 9)
    factor, exponent = timing_module._curve(fitted, 3.0 * fitted**1.2)
    assert (factor, exponent) == (pytest.approx(3.0), pytest.approx(1.2))
    assert timing_module._curve(np.full(9, 1e-3), np.linspace(1e-3, 2e-3, 9)) == (1.0, 1.0)
    assert timing_module._curve(fitted[:3], fitted[:3] ** 2) == (1.0, 1.0)
    assert timing_module._curve(fitted, fitted**3)[1] == pytest.approx(1.4)
