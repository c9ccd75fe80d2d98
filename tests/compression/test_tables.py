"""Tables of costs: exact where they can be, fitted and anchored where they are measured."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from eke import cost
from eke.compression import candidates, measure, tables
from eke.compression.apply import deploy_, grids_of, shaped, surgery
from eke.compression.deploy import foldable
from eke.compression.plan import total
from eke.sites import channel_groups, find
from eke.structures import UniformGrid

from .nets import samples, trained

STRUCTURES = (UniformGrid(8), UniformGrid(3))


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


def unpriced(model: nn.Module, x: torch.Tensor) -> list[candidates.Widths]:
    """Candidates without losses: what stays matters here, not what it is worth."""
    found = []
    for group in channel_groups(model, x):
        kept = candidates.kept_counts(group.size)
        found.append(candidates.Widths(group, kept, tuple(range(group.size)), (0.0,) * len(kept)))
    return found


@pytest.fixture(scope="module", params=["residual", "joined"])
def world(request):
    model = trained(seed=2) if request.param == "residual" else Joined().eval()
    x = samples(4, seed=6)[0]
    widths = unpriced(model, x)
    grids = [candidates.Grids(site, (*STRUCTURES, None), (0.0, 0.0, 0.0)) for site in find(model)]
    return model, x, widths, grids


def some_picks(widths, *, count: int):
    options = [range(len(w.kept)) for w in widths]
    everything = list(itertools.product(*options))
    generator = np.random.default_rng(0)
    chosen = [everything[i] for i in generator.choice(len(everything), size=count, replace=False)]
    return [{w.choice: o for w, o in zip(widths, combination)} for combination in chosen]


def test_parameters_are_those_of_the_cut_net(world):
    model, _, widths, _ = world
    counter = tables.Counter.of(widths)
    terms = tables.parameter_terms(model, tables.shapes(model, widths), counter)
    for picks in some_picks(widths, count=6):
        net = shaped(model, surgery(widths, picks), folded=(), memory_format="contiguous")
        assert total(terms, picks)["parameters"] == cost.parameters(net)


def test_multiply_adds_are_those_of_the_cut_net(world):
    model, x, widths, _ = world
    counter = tables.Counter.of(widths)
    terms = tables.mac_terms(measure.own_macs(model, (x,)), tables.shapes(model, widths), counter)
    for picks in some_picks(widths, count=6):
        net = shaped(model, surgery(widths, picks), folded=(), memory_format="contiguous")
        assert total(terms, picks)["macs"] == pytest.approx(cost.flops(net, x) / 2, rel=1e-12)


def test_bytes_are_those_of_the_packed_file_up_to_its_header(world):
    model, x, widths, grids = world
    counter, dimensions = tables.Counter.of(widths), tables.shapes(model, widths)
    folded = foldable(model, lambda net: net(x))
    terms = tables.size_terms(model, dimensions, counter, grids=grids, folded=folded)
    for number, picks in enumerate(some_picks(widths, count=4)):
        bits = {g.choice: (number + i) % 3 for i, g in enumerate(grids)}
        net = shaped(model, surgery(widths, picks), folded=(), memory_format="contiguous")
        chosen = grids_of(grids, bits)
        deploy_(net, folded=folded, memory_format="contiguous", grids=chosen)
        stored = sum(t.numel() * t.element_size() for t in measure.pack(net, chosen).values())
        header = float(terms[-1].table)
        assert total(terms, {**picks, **bits})["size"] - header == pytest.approx(stored, abs=1e-6)
        assert abs(measure.packed_bytes(net, chosen) - stored - header) < 0.5 * header


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
        over, features = tables._features(module, dimensions, counter)
        index = tuple(picks[c] for c in over)
        times[module] = sum(v * float(counter.full(f, over)[index]) for v, f in zip(values, features))
    return {**times, "": 1e-3}


def test_the_fit_recovers_times_that_follow_its_model():
    model = trained(seed=2)
    widths = unpriced(model, samples(4, seed=6)[0])
    counter, dimensions = tables.Counter.of(widths), tables.shapes(model, widths)
    truth = {"conv1": (1e-4, 3e-4), "conv2": (2e-4, 1e-4, 5e-5, 4e-3), "classifier": (1e-5, 2e-5)}
    nets = tables.designs(counter, count=20, seed=0)
    times = [synthetic(picks, counter, dimensions, truth) for picks in nets]
    whole = [1.5 * sum(t.values()) + 2e-3 for t in times[:4]]
    timing = tables.fit_timing(nets, times, dimensions=dimensions, counter=counter, whole=whole)
    assert timing.scale == pytest.approx(1.5, rel=1e-6)
    terms = timing.terms(dimensions, counter)
    for picks in some_picks(widths, count=5):
        wanted = 1.5 * sum(synthetic(picks, counter, dimensions, truth).values()) + 2e-3
        assert total(terms, picks)["latency"] == pytest.approx(wanted, rel=1e-6)


def test_fitted_times_never_fall_as_channels_are_kept():
    model = trained(seed=2)
    widths = unpriced(model, samples(4, seed=6)[0])
    counter, dimensions = tables.Counter.of(widths), tables.shapes(model, widths)
    nets = tables.designs(counter, count=12, seed=1)
    generator = np.random.default_rng(0)
    times = [{"conv2": float(t), "": 1e-3} for t in generator.uniform(1e-3, 2e-3, len(nets))]
    timing = tables.fit_timing(nets, times, dimensions=dimensions, counter=counter, whole=[3e-3, 1e-3])
    for term in timing.terms(dimensions, counter):
        for axis in range(term.table.ndim):
            assert (np.diff(term.table, axis=axis) <= 1e-15).all()


def test_designs_hold_the_uncut_and_the_smallest_net_and_every_option():
    counter = tables.Counter({"a": (0, 2, 4), "b": (0, 1)}, {"a": 6, "b": 2})
    nets = tables.designs(counter, count=14, seed=3)
    assert nets[0] == {"a": 0, "b": 0}
    assert nets[1] == {"a": 2, "b": 1}
    assert {net["a"] for net in nets[2:]} == {0, 1, 2}
    assert nets == tables.designs(counter, count=14, seed=3)
    assert tables.designs(tables.Counter({}, {}), count=5, seed=0) == [{}]


def test_peak_memory_of_cut_nets_is_foreseen():
    model = trained(seed=2)
    x = samples(16, seed=6)[0]
    widths = unpriced(model, x)
    terms = measure.memory_terms(model, (x,), widths, folded=(), memory_format="contiguous")
    for picks in some_picks(widths, count=6):
        net = shaped(model, surgery(widths, picks), folded=(), memory_format="contiguous")
        assert total(terms, picks)["peak_memory"] == pytest.approx(cost.peak_memory(net, x), rel=0.15)


def test_shares_fall_from_one():
    counter = tables.Counter({"a": (0, 2, 4)}, {"a": 8})
    assert counter.share("a").tolist() == [1.0, 0.75, 0.5]


def test_choices_name_every_option(world):
    _, _, widths, grids = world
    found = tables.choices(widths, grids)
    assert [c.name for c in found] == [*(w.choice for w in widths), *(g.choice for g in grids)]
    assert found[-1].options == ("UniformGrid(bits=8)", "UniformGrid(bits=3)", "float32")
    assert math.prod(len(c.options) for c in found) > 1
