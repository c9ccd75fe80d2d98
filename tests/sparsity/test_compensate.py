"""Survivors make up for what is removed as far as they can; sweeps and eliminations agree with slow ones."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.linalg import Metric
from eke.sparsity import (
    OBD,
    MaskSet,
    QuadraticModel,
    Refit,
    Sweep,
    Wanda,
    magnitude,
    obc,
    prune,
    prune_by_trust,
)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def cross_entropy(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


def single(inputs=9, outputs=4):
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False))


def data(count=60, inputs=9, classes=3, parts=3):
    x = torch.randn(count, inputs) @ torch.randn(inputs, inputs)
    return list(zip(x.chunk(parts), torch.randint(classes, (count,)).chunk(parts)))


def moment(batches):
    x = torch.cat([b[0] for b in batches])
    return x.T @ x


def test_refit_is_least_squares_on_the_kept_columns():
    net, batches = single(), data()
    mask = torch.rand(4, 9) < 0.5
    mask[0] = False
    mask[1] = True
    found = Refit(cross_entropy, batches, damping=0.0)(net, {"0.weight": mask})["0.weight"]
    x, w = torch.cat([b[0] for b in batches]), net[0].weight.detach()
    for i in range(4):
        s = mask[i].nonzero()[:, 0]
        wanted = torch.zeros(9)
        if len(s):
            wanted[s] = torch.linalg.lstsq(x[:, s], (x @ w[i])[:, None]).solution[:, 0]
        torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-8)


def test_removing_one_entry_is_the_step_of_the_optimal_brain_surgeon():
    """w - w_q H^-1_:q / [H^-1]_qq is what least squares on the other columns give."""
    net, batches = single(), data()
    h, w = moment(batches), net[0].weight.detach()
    inverse = torch.linalg.inv(h)
    for q in (0, 5):
        mask = torch.ones(4, 9, dtype=torch.bool)
        mask[:, q] = False
        found = Refit(cross_entropy, batches, damping=0.0)(net, {"0.weight": mask})["0.weight"]
        wanted = w - torch.outer(w[:, q] / inverse[q, q], inverse[q])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_a_sweep_is_the_surgeon_restricted_to_columns_still_to_come():
    net = single()
    batches = [(torch.randn(60, 9) + 2 * torch.randn(60, 1), torch.zeros(60, dtype=torch.long))]
    h, w = moment(batches), net[0].weight.detach()
    mask = torch.rand(4, 9) < 0.6
    found = Sweep(cross_entropy, batches, damping=1e-10)(net, {"0.weight": mask})["0.weight"]
    order = h.diagonal().argsort(descending=True).tolist()
    wanted = w.clone()
    for place, q in enumerate(order):
        free = order[place:]
        inverse = torch.linalg.inv(h[free][:, free])
        error = torch.where(mask[:, q], 0.0, wanted[:, q])
        wanted[:, free] -= torch.outer(error / inverse[0, 0], inverse[0])
    wanted *= mask
    assert Metric(h).loss(wanted - w) < Metric(h).loss(w * mask - w)  # otherwise plain removal is what comes back
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def output_error(net, other, batches):
    with torch.no_grad():
        return sum(float((net(x) - other(x)).square().sum()) for x, _ in batches)


@pytest.mark.parametrize("steps", [1, 4])
def test_compensation_lowers_the_error_and_masks_carry_the_values(steps, tmp_path):
    net, batches = single(12, 6), data(inputs=12)
    errors = {}
    for name, way in (
        ("none", None), ("sweep", Sweep(cross_entropy, batches)), ("refit", Refit(cross_entropy, batches)),
    ):  # fmt: skip
        masks = prune(net, magnitude, 0.4, steps=steps, compensate=way)
        cut = copy.deepcopy(net)
        masks.apply_(cut)
        assert not bool(cut[0].weight[~masks["0.weight"]].any())
        errors[name] = output_error(net, cut, batches)
        masks.save(tmp_path / "masks.safetensors")
        again = copy.deepcopy(net)
        MaskSet.load(tmp_path / "masks.safetensors").apply_(again)
        assert torch.equal(again[0].weight, cut[0].weight)
        # Following an optimizer masks and does not write values again.
        with torch.no_grad():
            cut[0].weight.mul_(2)
        masks.follow(cut, torch.optim.SGD(cut.parameters(), lr=0.1)).remove()
        assert torch.equal(cut[0].weight, 2 * again[0].weight)
    assert errors["refit"] < errors["sweep"] < errors["none"]


def slow_obc(w, h):
    """Entry by entry with the inverse formed anew: the order and the cost of each removal of one row."""
    left, w, order, costs = list(range(len(w))), w.clone(), [], []
    while left:
        inverse = torch.linalg.inv(h[left][:, left])
        score = 0.5 * w[left].square() / inverse.diagonal()
        k = int(score.argmin())
        q = left[k]
        w[left] -= w[q] / inverse[k, k] * inverse[:, k]
        w[q] = 0
        order.append(q)
        costs.append(float(score[k]))
        left.pop(k)
    return order, costs


@pytest.mark.parametrize(("inputs", "density"), [(9, 0.3), (50, 0.1), (50, 0.7)])
def test_optimal_brain_compression_follows_the_slow_elimination(inputs, density):
    net, batches = single(inputs, 5), data(count=200, inputs=inputs)
    masks = obc(net, cross_entropy, batches, density=density, damping=0.01)
    h = moment(batches)
    h += 0.01 * h.diagonal().mean() * torch.eye(inputs)
    w = net[0].weight.detach()
    rows = [slow_obc(row, h) for row in w]
    gone = [0] * 5
    for _ in range(5 * inputs - round(density * 5 * inputs)):
        i = min((i for i in range(5) if gone[i] < inputs), key=lambda i: rows[i][1][gone[i]])
        gone[i] += 1
    wanted = torch.ones(5, inputs, dtype=torch.bool)
    for i in range(5):
        wanted[i, rows[i][0][: gone[i]]] = False
    assert torch.equal(masks["0.weight"], wanted)
    for i in range(5):
        s = wanted[i].nonzero()[:, 0]
        fit = torch.linalg.solve(h[s][:, s], h[s] @ w[i])
        torch.testing.assert_close(masks.values_of["0.weight"][i, s], fit, rtol=0, atol=1e-9)


def test_optimal_brain_compression_of_groups_wide_rows_and_single_precision():
    torch.set_default_dtype(torch.float32)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 16, 3))
    batches = [(torch.randn(40, 4, 6, 6), torch.randint(3, (40,)))]
    masks = obc(net, cross_entropy, batches, density={"0.weight": 0.25, "2.weight": 0.1})
    assert [int(mask.sum()) for mask in masks.values()] == [27, 29]
    cut, plain = copy.deepcopy(net), copy.deepcopy(net)
    masks.apply_(cut)
    prune(net, magnitude, 0.2, scope="layer", steps=1).apply_(plain)
    assert all(torch.isfinite(p).all() for p in cut.parameters())
    wide = nn.Sequential(nn.Linear(300, 4))  # single precision follows it, double precision fits it
    found = obc(wide, cross_entropy, [(torch.randn(500, 300), torch.randint(4, (500,)))], density=0.02)
    assert found.kept == 24
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\] for every parameter, got None for '2.weight'"):
        obc(net, cross_entropy, batches, density={"0.weight": 0.5})
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\] for every parameter, got 1.5 for '0.weight'"):
        obc(net, cross_entropy, batches, density=1.5)


def deep():
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def test_steps_by_trust_reach_the_density_and_stay_within_what_was_predicted():
    net, batches = deep(), data(parts=1)
    criterion = QuadraticModel(cross_entropy, batches)
    seen = []
    masks = prune_by_trust(net, criterion, 0.2, tolerance=0.5, progress=lambda *p: seen.append(p))
    total = sum(m.weight.numel() for m in net if isinstance(m, nn.Linear))
    assert masks.kept == total - round(0.8 * total)
    assert seen[-1] == (total - masks.kept, total - masks.kept)
    kept = [step.kept for step in masks.steps]
    assert kept == sorted(kept, reverse=True)
    assert all(a.after == b.before for a, b in itertools.pairwise(masks.steps))
    assert all(step.ratio <= 0.5 for step in masks.steps if step.damping == 0)
    cut = copy.deepcopy(net)
    masks.apply_(cut)
    with torch.no_grad():
        assert math.isclose(masks.steps[-1].after, float(cross_entropy(cut, batches[0])), rel_tol=1e-12)


def test_little_trust_takes_more_steps():
    net, batches = deep(), data(parts=1)
    counts = [
        len(prune_by_trust(net, QuadraticModel(cross_entropy, batches), 0.2, tolerance=t).steps) for t in (2.0, 0.02)
    ]
    assert counts[0] < counts[1]


def test_damping_grows_where_no_step_is_small_enough():
    """A loss that rises whatever is predicted: nothing but the end of the damping lets steps pass."""
    net = single()
    calls = itertools.count()

    def rising(model, batch):
        return model(batch[0]).sum() * 1e-9 + 0.5 * model(batch[0]).square().sum(1).mean() + next(calls)

    batches = [(torch.randn(20, 9),)]
    masks = prune_by_trust(net, OBD(rising, batches, fisher="empirical"), 0.5, most_steps=3)
    assert masks.kept == 18
    assert any(step.damping > 0 for step in masks.steps)


def test_criteria_without_a_prediction_and_wrong_numbers_are_refused():
    net, batches = deep(), data()
    with pytest.raises(TypeError, match=r"needs LinearModel, QuadraticModel or OBD, got Wanda\("):
        prune_by_trust(net, Wanda(cross_entropy, batches), 0.5)
    with pytest.raises(ValueError, match=r"tolerance must be positive, got 0\.0"):
        prune_by_trust(net, OBD(cross_entropy, batches), 0.5, tolerance=0.0)
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0\.0"):
        prune_by_trust(net, OBD(cross_entropy, batches), 0.0)
    with pytest.raises(ValueError, match=r"Values of 'b' have shape \(2,\), its mask does not exist"):
        MaskSet({"a": torch.ones(2, dtype=torch.bool)}, values={"b": torch.ones(2)})


def test_bad_data_and_losses_are_named():
    net, batches = deep(), data()
    with pytest.raises(ValueError, match="0 batches"):
        prune(net, OBD(cross_entropy, iter([])), 0.5, steps=1)
    with pytest.raises(ValueError, match="loss over 0 batches is unknown: pass a list"):
        prune(net, QuadraticModel(cross_entropy, iter(batches)), 0.5, steps=1)
    with pytest.raises(ValueError, match=r"scalar|shape"):
        prune(net, OBD(lambda model, batch: model(batch[0]), batches), 0.5, steps=1)
    with pytest.raises(ValueError, match=r"nan|finite"):
        prune(net, OBD(lambda model, batch: cross_entropy(model, batch) * math.nan, batches), 0.5, steps=1)
    masks = prune(net, magnitude, 0.5, steps=1)
    masks.parametrize_(net)
    with pytest.raises(ValueError, match=r"'0\.weight' is parametrized already; take that out first"):
        masks.parametrize_(net)
    with pytest.raises(ValueError, match="no weights to prune: Sequential has no linear layer or convolution whose"):
        prune(net, magnitude, 0.5)
