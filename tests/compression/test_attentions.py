"""Softmax attentions as candidates of compress: predicted by what changes, priced by what it takes, kept."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import eke
from eke.compression import Clusters, Conversion, Recovery, Task
from eke.compression.apply import draft
from eke.compression.artifact import Blueprint
from eke.compression.attention_forms import put_in_
from eke.compression.attentions import attention_candidates, attention_costs, with_attention
from eke.compression.candidates import Attention, Block, Decisions
from eke.compression.plan import Term, total
from eke.compression.prepare import prepare
from eke.compression.tables import Counter
from eke.nn.cluster_conversion import ClusteredSubstitute
from eke.nn.substitute import substitutes

LENGTH, WIDTH = 48, 16


class Attending(nn.Module):
    """A small attention of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Reader(nn.Module):
    """Two attentions, and four classes of what the mean says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Attending(), Attending(), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean(1))


def reader() -> nn.Module:
    torch.manual_seed(0)
    net = Reader().eval()
    for attention in (net.first, net.second):
        attention.qkv.weight.data *= 3
    return net


def task(net: nn.Module, length: int = LENGTH) -> Task:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(8, length, WIDTH, generator=generator) for _ in range(6)]
    with torch.no_grad():
        batches = [(x, net(x).argmax(-1)) for x in inputs]
    return Task(batches[:4], batches[4:5], batches[5:], loss=eke.compression.cross_entropy)


def job_of(net: nn.Module, asked: object, length: int = LENGTH):
    return prepare(
        net, task(net, length), budget=eke.Budget(macs="0.9x"), recovery=Recovery(steps=0), seconds=0.3,
        attentions=asked,
    ).job  # fmt: skip


def test_predictions_are_those_of_the_definition():
    net = reader()
    asked = Conversion(windows=(0,), steps=3)
    job = job_of(net, asked)
    found = {a.name: a for a in attention_candidates(job, asked)}
    assert list(found) == ["first", "second"]
    # By definition: the change of the second attention's module output, pulled through nothing but what follows it.
    part, samples = found["second"].parts[0], []
    for x, y in job.batches:
        with torch.no_grad():
            before = x + net.first(x)
            q, k, v = (z.unflatten(-1, (2, -1)).transpose(1, 2) for z in net.second.qkv(before).chunk(3, -1))
            soft = F.scaled_dot_product_attention(q, k, v)
            change = part(q, k, v, causal=False)[0] - soft
        at = soft.clone().requires_grad_()
        out = net.head((before + net.second.out(at.transpose(1, 2).flatten(2))).mean(1))
        gradient = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), at)[0]
        samples.append((gradient * change).double().flatten(1).sum(1))
    u = torch.cat(samples)
    wanted = max(0.0, float(u.mean())) + 0.5 * float(u.square().mean())
    assert found["second"].losses == (0.0, pytest.approx(wanted, rel=1e-4))


def test_a_window_of_all_positions_costs_nothing():
    net, asked = reader(), Conversion(windows=(LENGTH,), steps=0)
    for attention in attention_candidates(job_of(net, asked), asked):
        assert attention.losses[1] < 1e-6


def test_long_inputs_save_work_and_short_ones_do_not():
    asked = Conversion(windows=(0,), steps=0)
    saved = {}
    for length in (8, 400):
        net = reader()
        job = job_of(net, asked, length)
        rows = attention_costs(job, attention_candidates(job, asked), timed=False)
        saved[length] = [row[1] for row in rows["macs"]]
        assert set(rows) == {"macs", "parameters", "size"}
        # A square matrix a head, for queries and for keys.
        assert rows["parameters"] == [[0.0, 2 * 2 * 8 * 8]] * 2
    assert all(macs < 0 for macs in saved[400])
    assert min(saved[8]) > max(saved[400]) / 400 * 8


def test_what_is_saved_is_taken_from_constants():
    attentions = [Attention("first", (None, {}, {}), (0.0, 0.1, 0.2), (0.0,) * 3, (None, None))]
    terms = [Term((), "macs", np.asarray(30.0)), Term(("other",), "macs", np.asarray([9.0, 1.0]))]
    counter = Counter.of(Decisions(attentions=tuple(attentions)))
    for row, wanted in (([0.0, -20.0, 5.0], [30.0, 10.0, 35.0]), ([0.0, -50.0, 5.0], [30.0, 0.0, 35.0])):
        found = with_attention(terms, attentions, {"macs": [row]}, counter=counter)
        totals = [total(found, {"other": 1, "attention:first": option})["macs"] - 1 for option in range(3)]
        assert totals == wanted
        assert all((term.table >= 0).all() for term in found)
    inside = Counter.of(Decisions(blocks=(Block("first", "zero", 1.0),), attentions=tuple(attentions)))
    terms = [Term((), "macs", np.asarray(30.0)), Term(("block:first",), "macs", np.asarray([25.0, 0.0]))]
    found = with_attention(terms, attentions, {"macs": [[0.0, -20.0, 5.0]]}, counter=inside)
    gone = [total(found, {"block:first": 1, "attention:first": option})["macs"] for option in range(3)]
    assert gone == [30.0] * 3
    assert total(found, {"block:first": 0, "attention:first": 1})["macs"] == 35.0


def test_a_plan_converts_what_it_picks():
    net, asked = reader(), Conversion(windows=(0, 4), steps=2)
    found = attention_candidates(job_of(net, asked), asked)
    decisions = Decisions(attentions=tuple(found))
    assert set(decisions.losses) == {"attention:first", "attention:second"}
    made = draft(
        net, decisions, {"attention:second": 2}, sites=(), curvature=None, solver=None,
        layout=eke.compression.apply.Layout(),
    ).net  # fmt: skip
    parts = substitutes(made)
    assert list(parts) == ["second"]
    assert parts["second"].window == 4
    learned = found[1].parts[1].state_dict()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in parts["second"].state_dict().items())
    assert substitutes(net) == {}


@pytest.fixture(scope="module")
def compressed():
    net = reader()
    asked = Conversion(windows=(4, 0), steps=20)
    result = eke.compress(
        net, task(net, 200), budget=eke.Budget(macs="0.7x"), skip=["head"], structures=(),
        recovery=Recovery(steps=0), seconds=0.3, attentions=asked,
    )  # fmt: skip
    return net, result


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compress_converts_attention_where_it_saves(compressed, tmp_path):
    net, result = compressed
    assert substitutes(result.model)
    assert substitutes(net) == {}
    assert any(option for name, option in result.plan.picks.items() if name.startswith("attention:"))
    result.save(tmp_path / "artifact")
    again = eke.compression.load(tmp_path / "artifact", reader())
    x = task(net, 200).report[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    with pytest.raises(ValueError, match=r"differ in the tensors|which this model lacks"):
        eke.compression.load(tmp_path / "artifact", nn.Sequential(nn.Linear(3, 3)))


def test_blueprints_carry_conversions_as_plain_values():
    net, asked = reader(), Conversion(windows=(4,), steps=0)
    found = attention_candidates(job_of(net, asked), asked)
    form = {found[0].name: found[0].forms[1]}
    blueprint = Blueprint(Decisions().surgery({}), (), "contiguous", {}, {}, {}, form)
    document = blueprint.to_json()
    assert Blueprint.from_json(document) == blueprint
    # What an earlier version wrote converts nothing.
    assert Blueprint.from_json({k: v for k, v in document.items() if k != "converted"}).converted == {}
    broken = copy.deepcopy(document)
    broken["converted"]["first"]["heads"] = "2"
    with pytest.raises(ValueError, match=r"The plan converts an attention to .*, which lacks one of"):
        Blueprint.from_json(broken)
    other = reader()
    with pytest.raises(ValueError, match=r"The plan converts \['third'\], which this model lacks"):
        put_in_(other, {"third": form["first"]})


@pytest.mark.parametrize("settings", [{"windows": ()}, {"windows": (0, -1)}, {"steps": -1}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"Conversion needs windows of 0 or more positions .* got windows="):
        Conversion(**settings)


def test_clusters_are_candidates_beside_windows():
    net, asked = reader(), (Conversion(windows=(4,), steps=0), Clusters(clusters=(4, 16), topk=2, exact_below=0))
    job = job_of(net, asked)
    found = attention_candidates(job, asked)
    labels = "linear: hedgehog, window 4", "clustered: 4 clusters, 2 keys", "clustered: 16 clusters, 2 keys"
    assert [a.labels for a in found] == [("softmax", *labels)] * 2
    # By definition: clusters of the original's own queries, in the second attention alone.
    samples = []
    for x, y in job.batches:
        with torch.no_grad():
            before = x + net.first(x)
            q, k, v = (z.unflatten(-1, (2, -1)) for z in net.second.qkv(before).chunk(3, -1))
            soft = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v))).transpose(1, 2)
            change = eke.ops.clustered_attention(q, k, v, clusters=4, topk=2) - soft
        at = soft.clone().requires_grad_()
        out = net.head((before + net.second.out(at.flatten(2))).mean(1))
        gradient = torch.autograd.grad(F.cross_entropy(out, y, reduction="sum"), at)[0]
        samples.append((gradient * change).double().flatten(1).sum(1))
    u = torch.cat(samples)
    assert found[1].losses[2] == pytest.approx(max(0.0, float(u.mean())) + 0.5 * float(u.square().mean()), rel=1e-4)
    # Each way of conversion is a net of its own: what clusters save is known from the shapes.
    rows = attention_costs(job, found, timed=False)
    pairs, heads, features = LENGTH * LENGTH, 2, 16
    for clusters, option in ((4, 2), (16, 3)):
        each = heads * features * (clusters * LENGTH + LENGTH * 2 - pairs)
        assert [row[option] for row in rows["macs"]] == pytest.approx([len(job.inputs[0]) * each] * 2)
    assert [row[2:] for row in rows["parameters"]] == [[0.0, 0.0]] * 2


def test_ways_of_conversion_may_be_asked_for_different_attentions():
    net = reader()
    asked = (Conversion(windows=(0,), steps=0, match="second"), Clusters(clusters=(4,), exact_below=0))
    job = job_of(net, asked, 200)
    together = {a.name: a.labels for a in attention_candidates(job, asked)}
    assert {name: len(labels) for name, labels in together.items()} == {"first": 2, "second": 3}
    options = sorted(attention_candidates(job, asked), key=lambda a: a.name)
    linear, clustered = (attention_costs(job, attention_candidates(job, one), timed=False) for one in asked)
    for order in (options, options[::-1]):
        rows = attention_costs(job, order, timed=False)
        for name, found in rows.items():
            first, second = found if order is options else found[::-1]
            assert first == clustered[name][0]
            assert second == [*linear[name][0], clustered[name][1][1]]
    assert linear["macs"][0][1] != clustered["macs"][1][1]


def test_clustered_attention_is_rebuilt_from_plain_values():
    net, asked = reader(), Clusters(clusters=(4,), topk=2, exact_below=0)
    found = attention_candidates(job_of(net, asked), asked)
    blueprint = Blueprint(Decisions().surgery({}), (), "contiguous", {}, {}, {}, {"second": found[1].forms[1]})
    document = json.loads(json.dumps(blueprint.to_json()))
    assert Blueprint.from_json(document) == blueprint
    made = draft(
        net, Decisions(attentions=tuple(found)), {"attention:second": 1}, sites=(), curvature=None, solver=None,
        layout=eke.compression.apply.Layout(),
    ).net  # fmt: skip
    again, x = reader(), torch.randn(2, LENGTH, WIDTH)
    put_in_(again, Blueprint.from_json(document).converted)
    assert torch.equal(again(x), made(x))
    assert not torch.equal(again(x), net(x))
    del document["converted"]["second"]["exact_below"]
    with pytest.raises(ValueError, match=r"The plan converts an attention to .*lacks one of .*'exact_below'"):
        Blueprint.from_json(document)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compress_clusters_attention_where_it_saves(tmp_path):
    net = reader()
    result = eke.compress(
        net, task(net, 200), budget=eke.Budget(macs="0.7x"), skip=["head"], structures=(),
        recovery=Recovery(steps=0), seconds=0.3, attentions=Clusters(clusters=(4, 8), topk=4, exact_below=0),
    )  # fmt: skip
    parts = substitutes(result.model)
    assert parts
    assert all(isinstance(part, ClusteredSubstitute) for part in parts.values())
    changes = {line.site: line.change for line in result.evidence.plan}
    assert all(changes[f"attention:{name}"].startswith("clustered: ") for name in parts)
    result.save(tmp_path / "artifact")
    again = eke.compression.load(tmp_path / "artifact", reader())
    x = task(net, 200).report[0][0]
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))


@pytest.mark.parametrize("settings", [{"clusters": ()}, {"clusters": (4, 0)}, {"topk": -1}, {"exact_below": -1}])
def test_clusters_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"Clusters needs clusters of 1 or more, .* got clusters="):
        Clusters(**settings)


def test_what_is_no_way_of_conversion_is_refused():
    with pytest.raises(TypeError, match=r"attentions takes .*Conversion.*Clusters.* got 'clustered'"):
        job_of(reader(), "clustered")
    with pytest.raises(TypeError, match=r"attentions takes .* got 25"):
        job_of(reader(), (Clusters(), 25))
    for asked in ((), (Clusters((4,)), Clusters((8,)))):
        with pytest.raises(ValueError, match=r"attentions takes one Conversion and one Clusters at most"):
            job_of(reader(), asked)
