"""Retraining keeps what is removed removed, and each way starts where it says."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.sparsity import Training, fine_tune_, from_scratch, magnitude, prune, rewind_rate_, rewind_weights_


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 8), nn.Dropout(0.1), nn.Tanh(), nn.Linear(8, 3))


def parts(steps=30, *, rates=None):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 9, generator=generator)
    y = (x[:, :3]).argmax(1)

    def loss(model, batch):
        if rates is not None:
            rates.append(None)
        return F.cross_entropy(model(batch[0]), batch[1])

    return x, y, Training(
        loss, lambda i: (x[i], y[i]), samples=60, batch_size=20, steps=steps, seed=3,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=1e-3),
        rate=lambda share: 1.0 if share < 0.5 else 0.1,
    )  # fmt: skip


def gone(model, masks):
    return all(not bool(dict(model.named_parameters())[n][~mask].any()) for n, mask in masks.items())


def pruned(model):
    masks = prune(model, magnitude, 0.4, steps=1)
    masks.apply_(model)
    return masks


def rates_of(training, run):
    """Learning rates of the steps that `run` takes."""
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(round(self.param_groups[0]["lr"], 6))
            return super().step(closure)

    run(dataclasses.replace(training, optimizer=lambda p: Watched(p, lr=0.5, momentum=0.9)))
    return seen


def test_training_learns_and_puts_flags_back():
    model, (x, y, training) = net().eval(), parts(60)
    losses = training.train_(model)
    assert not model.training
    assert len(losses) == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert float((model(x).argmax(1) == y).double().mean()) > 0.8


@pytest.mark.parametrize("way", ["fine-tune", "rate", "weights", "scratch"])
def test_what_is_removed_stays_removed(way):
    model, (_, _, training) = net(), parts()
    early = copy.deepcopy(model.state_dict())
    training.train_(model)
    masks = pruned(model)
    before = copy.deepcopy(model)
    if way == "fine-tune":
        assert len(fine_tune_(model, masks, training, steps=7)) == 7
    elif way == "rate":
        assert len(rewind_rate_(model, masks, training, steps=20)) == 20
    elif way == "weights":
        assert len(rewind_weights_(model, masks, training, steps=30, early=early)) == 30
    else:
        model = from_scratch(before, masks, training)
    assert gone(model, masks)
    assert not torch.equal(model[0].weight, before[0].weight)


def test_each_way_has_its_learning_rates():
    _, _, training = parts(10)
    model = net()
    masks = pruned(model)
    assert rates_of(training, lambda t: t.train_(model)) == [0.5] * 5 + [0.05] * 5
    assert rates_of(training, lambda t: fine_tune_(model, masks, t, steps=3)) == [0.05] * 3
    assert rates_of(training, lambda t: rewind_rate_(model, masks, t, steps=7)) == [0.5] * 2 + [0.05] * 5
    early = model.state_dict()
    assert rates_of(training, lambda t: rewind_weights_(model, masks, t, steps=6, early=early)) == [0.5] + [0.05] * 5
    assert rates_of(training, lambda t: from_scratch(model, masks, t)) == [0.5] * 5 + [0.05] * 5


def test_rewound_weights_with_full_masks_repeat_the_training():
    """With nothing removed, going back to a checkpoint and on is the training itself, but for momentum at its start."""
    _, _, training = parts(12)
    model = nn.Sequential(net()[0], net()[3])
    early = copy.deepcopy(model.state_dict())
    training.train_(model)
    masks = prune(model, magnitude, 1.0, steps=1)
    again = copy.deepcopy(model)
    rewind_weights_(again, masks, training, steps=12, early=early)
    torch.testing.assert_close(again[0].weight, model[0].weight)


def test_from_scratch_leaves_the_model_and_starts_fresh():
    _, _, training = parts(1)
    model = nn.Sequential(net()[0], net()[3])
    masks = pruned(model)
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    one = from_scratch(model, masks, training)
    torch.manual_seed(1)
    two = from_scratch(model, masks, training, reset=lambda m: [layer.reset_parameters() for layer in m])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(one[0].weight, two[0].weight)
    assert float((one[0].weight - model[0].weight).detach().abs().max()) > 0.05


def test_wrong_numbers_are_refused():
    _, _, training = parts(10)
    model = net()
    masks = pruned(model)
    with pytest.raises(ValueError, match="steps must be from 1 to any number, got 0"):
        fine_tune_(model, masks, training, steps=0)
    for way in (
        lambda: rewind_rate_(model, masks, training, steps=11),
        lambda: rewind_weights_(model, masks, training, steps=11, early=model.state_dict()),
    ):
        with pytest.raises(ValueError, match="steps must be from 1 to 10, got 11"):
            way()
    with pytest.raises(ValueError, match="Training needs steps >= 1, got 0"):
        parts(0)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"Module '4' has parameters and no reset_parameters"):
        from_scratch(nn.Sequential(*net(), Bare()), masks, training)
