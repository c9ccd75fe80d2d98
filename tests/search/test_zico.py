"""ZiCo against hand calculation, against all gradients stacked, and its invariances."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke import search
from eke.search.spaces import NB201
from eke.search.subject import cross_entropy
from eke.search.variation import Spread

SMALL = dataclasses.replace(NB201, resolution=8, channels=4, cells=1)


def batches(count=3, size=6, classes=10, resolution=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, resolution, resolution, generator=g),
            torch.randint(0, classes, (size,), generator=g),
        )
        for _ in range(count)
    ]


def network(ops="dcbdec", seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return SMALL.decode(ops)


def linear_with_gradients(rows):
    """A model whose weight gradient in batch i is rows[i], and the loss that makes it so."""
    model = nn.Linear(2, 1, bias=False)
    return model, [torch.tensor(row) for row in rows], lambda m, batch: (m.weight * batch).sum()


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1.0, -2.0], [3.0, 2.0]], math.log(3.0)),
        ([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]], math.log(2 / math.sqrt(2 / 3))),
    ],
)
def test_hand_examples(rows, expected):
    model, data, loss = linear_with_gradients(rows)
    assert search.zico(model, data, loss=loss) == pytest.approx(expected, abs=1e-12)


def stacked(model, data):
    """The definition, with all gradients kept."""
    model.train()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    kept = {name: [] for name in names}
    for x, y in data:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for name in names:
            kept[name].append(model.get_submodule(name).weight.grad.double().flatten())
    total, active = 0.0, 0.0
    for grads in kept.values():
        g = torch.stack(grads)
        mean, deviation = g.abs().mean(0), g.std(0, unbiased=False)
        on = deviation != 0
        s = float((mean[on] / deviation[on]).sum())
        total += math.log(s) if s > 0 else 0.0
        active += math.log(int(on.sum())) if on.any() else 0.0
    return total, active


@pytest.mark.parametrize("count", [2, 3, 5])
def test_streaming_equals_stacking(count):
    data = batches(count)
    expected, active = stacked(network(), data)
    found = search.zico(network(), data)
    assert found == pytest.approx(expected, abs=1e-9)
    if count == 2:
        assert found >= active - 1e-5


def test_score_ignores_scale_order_and_repetition():
    data = batches(3)
    score = search.zico(network(), data)
    scaled = search.zico(network(), data, loss=lambda m, b: 1000 * cross_entropy(m, b))
    assert scaled == pytest.approx(score, abs=1e-4)
    assert search.zico(network(), data[::-1]) == pytest.approx(score, abs=1e-6)
    assert search.zico(network(), [*data, *data]) == pytest.approx(score, abs=1e-6)


def test_ratio_is_bounded_below():
    g = torch.Generator().manual_seed(1)
    for count in (2, 3, 7):
        spread = Spread()
        for _ in range(count):
            spread.add(torch.randn(400, generator=g, dtype=torch.float64))
        assert float(spread.ratios().min()) >= 1 / math.sqrt(count - 1) - 1e-12
    spread = Spread()
    for value in (0.0, 4.0, 0.0):
        spread.add(torch.tensor([value]))
    assert float(spread.ratios()) == pytest.approx(1 / math.sqrt(2))


def test_equal_gradients_have_no_spread_at_all():
    spread = Spread()
    for _ in range(7):
        spread.add(torch.tensor([0.1, 1e-30, 3e7]))
    assert spread.ratios().numel() == 0


def test_layers_sum_to_the_score_and_tell_size_from_the_rest():
    layers = search.zico_layers(network(), batches(2))
    assert sum(layer.log_sum for layer in layers) == pytest.approx(search.zico(network(), batches(2)))
    assert all(layer.active <= layer.entries for layer in layers)
    rest = sum(layer.log_sum - math.log(layer.active) for layer in layers if layer.active)
    assert sum(layer.log_mean for layer in layers) == pytest.approx(rest)


def test_disconnected_network_scores_zero():
    assert search.zico(SMALL.decode("aaaaaa"), batches(2)) == 0.0


def test_layers_that_do_not_run_add_nothing():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.used(x)

    data = [(torch.randn(5, 4), torch.arange(5) % 3) for _ in range(2)]
    layers = {layer.name: layer.log_sum for layer in search.zico_layers(Spare(), data)}
    assert layers["spare.weight"] == 0.0 < layers["used.weight"]


def test_frozen_and_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.c.weight.requires_grad_(False)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    data = [(torch.randn(5, 4), torch.arange(5) % 4) for _ in range(2)]
    assert [layer.name for layer in search.zico_layers(Tied(), data)] == ["a.weight"]


def test_nothing_of_the_model_changes():
    model = network().eval()
    model.blocks[0].train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    search.zico(model, batches(2))
    search.log_numel(model, SMALL.example())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "head.weight")


def test_token_labels_and_named_inputs():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(11, 6), nn.Linear(6, 4)

        def forward(self, ids):
            return {"logits": 0}["logits"] + self.out(self.embed(ids))

    g = torch.Generator().manual_seed(0)
    data = []
    for _ in range(2):
        labels = torch.randint(0, 4, (3, 5), generator=g)
        labels[0, 0] = -100
        data.append({"ids": torch.randint(0, 11, (3, 5), generator=g), "labels": labels})
    assert search.zico(Tagger(), data) > 0


def test_bad_batches_are_named():
    data = batches(2)
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        search.zico(network(), data[:1])
    with pytest.raises(ValueError, match="All 2 batches give the same gradients"):
        search.zico(network(), [data[0], data[0]])
    with pytest.raises(ValueError, match=r"Batch 0: a batch has no labels: got Tensor.*Add labels"):
        search.zico(network(), [x for x, _ in data])
    with pytest.raises(ValueError, match=r"Batch 1: labels go from \d+ to 10, the model has 10 outputs.*0\.\.9"):
        search.zico(network(), [data[0], (data[1][0], data[1][1] * 0 + torch.arange(6) + 5)])
    with pytest.raises(ValueError, match="Batch 0: labels must be whole numbers"):
        search.zico(network(), [(x, F.one_hot(y, 10).float()) for x, y in data])
    with pytest.raises(ValueError, match=r"shape \(6,\), got torch.int64 of \(5,\); give `loss=`"):
        search.zico(network(), [(x, y[:5]) for x, y in data])
    with pytest.raises(ValueError, match=r"Batch 0: all of the 6 labels are -100"):
        search.zico(network(), [(x, y * 0 - 100) for x, y in data])
    pixels = [(torch.randn(2, 3, 8, 8), torch.zeros(2, 8, 8, dtype=torch.long)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"shape \(2, 5, 8\), got torch.int64 of \(2, 8, 8\); give `loss=`"):
        search.zico(nn.Conv2d(3, 5, 1), pixels)
    with pytest.raises(FloatingPointError, match="Batch 1: the loss is nan"):
        search.zico(network(), [data[0], (data[1][0] * math.nan, data[1][1])])
    with pytest.raises(ValueError, match=r"ReLU has no trainable convolution or linear layer.*unfreeze"):
        search.zico(nn.ReLU(), data)


def test_gradients_that_are_not_finite_are_named():
    model, data, _ = linear_with_gradients([[0.0, 1.0], [0.0, 2.0]])
    with torch.no_grad():
        model.weight.zero_()
    with pytest.raises(FloatingPointError, match="gradient of 'weight' is not finite"):
        search.zico(model, data, loss=lambda m, b: (m.weight.abs().sqrt() * b).sum())


def test_outputs_and_models_that_cannot_be_used_are_named():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x):
            return {"y": self.layer(x)}

    data = [(torch.randn(3, 2), torch.zeros(3, dtype=torch.long))] * 2
    with pytest.raises(TypeError, match="The model returned dict"):
        search.zico(Strange(), data)
    stuck = nn.Linear(2, 2)
    stuck.kept = stuck(torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="Linear cannot be copied"):
        search.zico(stuck, data)
