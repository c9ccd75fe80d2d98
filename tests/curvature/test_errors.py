"""What the estimate refuses, and that it names the culprit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from eke.curvature import Curvature
from eke.curvature.factors import output_quadratic
from eke.sites import find

MODEL = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
SITES = find(MODEL)


def mean_square(model, batch):
    return (model(batch) ** 2).mean()


def batches(count: int = 2) -> list[torch.Tensor]:
    return [torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_no_batches():
    consumed = iter(batches())
    list(consumed)
    with pytest.raises(ValueError, match="0 batches; an iterator that was read before is empty"):
        Curvature.estimate(MODEL, mean_square, consumed, sites=SITES)


def test_a_loss_that_is_not_finite_names_the_batch():
    bad = batches()
    bad[1][0, 0] = float("inf")
    with pytest.raises(ValueError, match="The loss of batch 1 is nan"):
        Curvature.estimate(MODEL, lambda m, b: mean_square(m, b) + 0 * b.sum(), bad, sites=SITES)


def test_data_that_are_not_finite_name_site_count_and_batch():
    bad = batches()
    bad[1][0, :2] = float("inf")  # tanh hides it from the loss
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    nn.init.ones_(model[0].weight)
    with pytest.raises(ValueError, match="Inputs of '0' hold 2 of 24 values that are not finite, first in batch 1"):
        Curvature.estimate(model, mean_square, bad, sites=find(model))


def test_a_gradient_that_is_not_finite_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="Output gradients of '0' hold 24 of 24 values"):
        Curvature.estimate(model, lambda m, b: (m(b) * 0).abs().sqrt().sum(), batches(), sites=find(model))


def test_a_loss_without_the_model():
    with pytest.raises(ValueError, match="does not depend on the output of any of"):
        Curvature.estimate(MODEL, lambda m, b: b.mean(), batches(), sites=SITES)


def test_a_loss_that_is_no_scalar():
    with pytest.raises(ValueError, match=r"one number as a tensor, got a tensor of shape \(8, 1\)"):
        Curvature.estimate(MODEL, lambda m, b: m(b), batches(), sites=SITES)
    with pytest.raises(ValueError, match="one number as a tensor, got float"):
        Curvature.estimate(MODEL, lambda m, b: float(m(b).sum()), batches(), sites=SITES)


def test_an_unused_site_is_left_out_with_a_warning():
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.used(x)

    model = Half()
    with pytest.warns(UserWarning, match=r"does not use \['unused'\]"):
        curvature = Curvature.estimate(model, mean_square, batches(), sites=find(model))
    with pytest.raises(KeyError, match=r"site 'unused'.*Did you mean 'used'"):
        curvature.factors("unused")


def test_too_few_samples_are_warned_with_the_number_needed():
    model = nn.Sequential(nn.Linear(3, 1))
    with pytest.warns(UserWarning, match="'0' has 3 inputs but only 2 rows were seen.*at least 3 samples"):
        Curvature.estimate(model, mean_square, [batches(1)[0][:2]], sites=find(model))


def test_sites_that_cannot_be_hooked_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"can be hooked.*got \['0'\]"):
        Curvature.estimate(model, mean_square, [torch.zeros(4, dtype=torch.long)], sites=find(model))


def test_outputs_that_are_no_tensor_are_refused():
    model = nn.Sequential(nn.LSTM(3, 2))
    with pytest.raises(TypeError, match="'0' returns tuple"):
        Curvature.estimate(model, lambda m, b: m(b)[0].mean(), batches(), sites=[], outputs={"0": -1})


def test_a_wrong_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors' is no 'eke curvature 2' file"):
        Curvature.load(tmp_path / "other.safetensors")


def test_a_change_with_the_wrong_channels_is_refused():
    with pytest.raises(ValueError, match=r"has 3 channels in dimension 1, got a change of \(2, 4, 5\)"):
        output_quadratic(torch.eye(3), torch.zeros(2, 4, 5), 1)
