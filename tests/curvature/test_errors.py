"""What the estimate refuses, and that it names the culprit."""

from __future__ import annotations

import warnings

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


def root(model, batch):
    """A finite loss whose gradient is infinite where the output is 0."""
    return model(batch).abs().sqrt().mean()


def test_a_gradient_that_is_not_finite_names_the_first_batch_that_has_one():
    """The last of three batches holds one sample of zeros, which a layer without bias maps to 0."""
    bad = batches(3)
    bad[2][5] = 0
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(
        ValueError, match=r"Output gradients of '0' hold 2 of 16 values.*first in batch 2; check that batch.*skip="
    ):
        Curvature.estimate(model, root, bad, sites=find(model))


def test_a_gradient_at_a_module_output_names_module_and_batch():
    bad = batches()
    bad[1][5] = 0
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Identity())
    with pytest.raises(ValueError, match=r"Output gradients of '1' hold 2 of 16 values.*first in batch 1"):
        Curvature.estimate(model, root, bad, sites=[], outputs={"1": -1})


def scaled(scale: float, *, batch: int = 1) -> list[torch.Tensor]:
    found = batches(3)
    found[batch] = found[batch] * scale
    return found


@pytest.mark.parametrize("scale", [1e20, 1e30])
@pytest.mark.parametrize("corrected", [0, 256])
def test_finite_inputs_whose_squares_overflow_name_site_and_batch(scale, corrected):
    model = nn.Sequential(nn.Linear(3, 2))
    message = r"Inputs of '0' reach \d\.\d+e\+\d+, and their squares exceed torch.float32, first in batch 1;.*skip="
    with pytest.raises(ValueError, match=message):
        # The gradient at the output is that of a sum, so that inputs alone are large.
        Curvature.estimate(
            model, lambda m, b: 1e-35 * m(b).mean(), scaled(scale), find(model), corrected_samples=corrected
        )


def test_inputs_whose_squares_overflow_at_the_sum_over_batches_are_refused():
    """2e19 squared is 4e38, above float32; 1.2e19 squared is not, but three samples of it are."""
    model = nn.Sequential(nn.Linear(1, 1))
    for value, samples in ((2e19, 1), (1.2e19, 3)):
        tokens = [torch.full((1, samples, 1), value)]
        with pytest.raises(ValueError, match=r"Inputs of '0' reach .*first in batch 0"):
            Curvature.estimate(model, lambda m, b: 1e-30 * m(b).mean(), tokens, find(model))


def test_finite_gradients_whose_squares_overflow_name_site_and_batch():
    model = nn.Sequential(nn.Linear(3, 2), nn.Identity())
    message = r"Output gradients of '{}' reach \S+, and their squares exceed torch.float32, first in batch 0"
    with pytest.raises(ValueError, match=message.format("0")):
        Curvature.estimate(model, lambda m, b: 1e21 * m(b).mean(), batches(), find(model))
    with pytest.raises(ValueError, match=message.format("1")):
        Curvature.estimate(model, lambda m, b: 1e21 * m(b).mean(), batches(), [], outputs={"1": -1})


def test_finite_factors_whose_product_overflows_name_the_batch():
    """Inputs of 1e12 and gradients of 1e12: each square fits into float32, that of the weight's gradient does not."""
    model = nn.Sequential(nn.Linear(3, 2))
    data = [batch * 1e12 for batch in batches()]
    with pytest.raises(ValueError, match=r"Weight gradients of '0' reach \S+, and their squares exceed.*in batch 0"):
        Curvature.estimate(model, lambda m, b: 1e12 * m(b).mean(), data, find(model))


def test_in_double_precision_large_data_are_no_problem():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    data = [batch.double() * 1e20 for batch in batches()]
    factors = Curvature.estimate(model, lambda m, b: m(b).mean(), data, find(model)).factors("0")
    x = torch.cat(data)
    torch.testing.assert_close(factors.a[0], x.T @ x / len(x))


class Sides(nn.Module):
    """Two layers, each with its own half of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.left(x[:, :3])) + torch.tanh(self.right(x[:, 3:]))


@pytest.mark.parametrize(("column", "name"), [(0, "left"), (4, "right")])
def test_of_several_sites_the_one_with_bad_data_is_named(column, name):
    bad = [torch.cat(pair, 1) for pair in zip(batches(3), batches(3))]
    bad[1][2, column] = float("inf")
    model = Sides()
    with pytest.raises(ValueError, match=f"Inputs of '{name}' hold 1 of 24 values .* first in batch 1"):
        Curvature.estimate(model, mean_square, bad, sites=find(model))


def test_leaving_the_named_site_out_is_a_way_on():
    """What the message advises works: without the site that sees infinite data the others are estimated."""
    bad = batches()
    bad[1][0, :2] = float("inf")
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    nn.init.ones_(model[0].weight)
    with pytest.raises(ValueError, match=r"Inputs of '0'.*leave the site out with skip="):
        Curvature.estimate(model, mean_square, bad, sites=find(model))
    factors = Curvature.estimate(model, mean_square, bad, sites=find(model, skip=["0"])).factors("2")
    assert bool(torch.isfinite(factors.a).all())
    assert bool(torch.isfinite(factors.g).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stop_at_the_first_batch(value):
    model = nn.Sequential(nn.Linear(3, 1))
    nn.init.constant_(model[0].weight, value)
    with pytest.raises(ValueError, match=r"The loss of batch 0 is (nan|inf); check that batch and the model's outputs"):
        Curvature.estimate(model, mean_square, batches(), sites=find(model))


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


NARROW = [
    (nn.Linear(7, 2), (7,), 7, 7),
    (nn.Linear(7, 2), (3, 7), 7, 3),  # three tokens a sample
    (nn.Conv2d(8, 4, 3, padding=1), (8, 3, 3), 72, 8),  # nine locations a sample
    (nn.Conv2d(8, 4, 3, padding=1, groups=2), (8, 3, 3), 36, 4),
]


@pytest.mark.parametrize(("layer", "shape", "width", "needed"), NARROW, ids=[str(case[0]) for case in NARROW])
def test_the_number_of_samples_named_is_the_least_that_silences_the_warning(layer, shape, width, needed):
    model, sites = nn.Sequential(layer), find(nn.Sequential(layer))
    x = torch.randn(needed, *shape, generator=torch.Generator().manual_seed(0))
    message = f"Site '0' has {width} inputs but only .* rows were seen.*at least {needed} samples"
    with pytest.warns(UserWarning, match=message):
        Curvature.estimate(model, mean_square, [x[: needed - 1]], sites=sites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors = Curvature.estimate(model, mean_square, [x], sites=sites, corrected_samples=0).factors("0")
    assert all(int(torch.linalg.matrix_rank(a, rtol=1e-6)) == width for a in factors.a)


def test_with_few_locations_the_rows_that_entered_are_counted():
    """Of 9 locations a sample 1 is used: 9 samples have 81 active rows, but A of 72 inputs has rank 9."""
    model = nn.Sequential(nn.Conv2d(8, 4, 3, padding=1))
    x = torch.randn(72, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    message = r"72 inputs but only 9 rows were seen.*at least 72 samples \(.*\), or raise max_locations=1\."
    with pytest.warns(UserWarning, match=message):
        few = Curvature.estimate(model, mean_square, [x[:9]], find(model), max_locations=1).factors("0")
    assert int(torch.linalg.matrix_rank(few.a[0], rtol=1e-6)) == 9
    with pytest.warns(UserWarning, match="only 71 rows"):
        Curvature.estimate(model, mean_square, [x[:71]], find(model), max_locations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Curvature.estimate(model, mean_square, [x], find(model), max_locations=1)


def test_a_lattice_that_misses_every_location_in_use_says_so():
    """The loss reads the last location of 3, the lattice of the only batch the first."""
    model = nn.Sequential(nn.Conv1d(2, 2, 1))
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"only 0 rows were seen.*a batch more.*or raise max_locations=1\."):
        factors = Curvature.estimate(
            model, lambda m, b: (m(b)[..., -1] ** 2).mean(), [x], find(model), max_locations=1
        ).factors("0")
    assert float(factors.a.abs().max()) == 0


def test_too_few_samples_warn_once_a_site_by_name():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    with pytest.warns(UserWarning, match="rank-deficient") as caught:
        Curvature.estimate(model, mean_square, [batches(1)[0][:4]], sites=find(model))
    found = [str(warning.message) for warning in caught if "rank-deficient" in str(warning.message)]
    assert len(found) == 1
    assert "'2' has 5 inputs but only 4 rows" in found[0]


def test_sites_that_cannot_be_hooked_are_refused():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match=r"inputs and outputs can be seen.*got \['0'\]"):
        Curvature.estimate(model, mean_square, [torch.zeros(4, dtype=torch.long)], sites=find(model))


def test_outputs_that_are_no_tensor_are_refused():
    class Named(nn.Linear):
        def forward(self, x):
            return {"y": super().forward(x)}

    model = nn.Sequential(Named(3, 2))
    with pytest.raises(TypeError, match="'0' returns dict"):
        Curvature.estimate(model, lambda m, b: m(b)["y"].mean(), batches(), sites=[], outputs={"0": -1})


def test_a_wrong_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors' is no 'eke curvature 2' file"):
        Curvature.load(tmp_path / "other.safetensors")


def test_a_change_with_the_wrong_channels_is_refused():
    with pytest.raises(ValueError, match=r"has 3 channels in dimension 1, got a change of \(2, 4, 5\)"):
        output_quadratic(torch.eye(3), torch.zeros(2, 4, 5), 1)
