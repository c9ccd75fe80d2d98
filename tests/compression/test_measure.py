"""Scores, drops and costs as they are reported."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eke import Counts, cost
from eke.compression import Samples, accuracy, interval, measure
from eke.compression.intervals import paired_difference, wilson
from eke.compression.spread import worsening

from .nets import batches, samples, state, trained


def counts(*outcomes: int) -> Counts:
    right = torch.tensor(outcomes, dtype=torch.bool)
    return Counts(int(right.sum()), right.numel(), right)


def test_own_macs_sum_to_those_of_the_net():
    model, x = trained(), samples(4, seed=1)[0]
    own = measure.own_macs(model, (x,))
    assert sum(own.values()) == cost.flops(model, x) / 2
    assert set(own) == {"conv1", "conv2", "conv3", "classifier"}


def test_own_macs_of_nested_modules_do_not_count_twice():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    assert measure.own_macs(model, (x,)) == {"0.0": 96.0, "1": 48.0}


def test_costs_do_not_touch_the_model():
    model, x = trained(), samples(4, seed=1)[0]
    before = state(model)
    found = measure.costs(model, (x,))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["size"] == cost.model_bytes(model)
    assert found["peak_memory"] > 4 * found["parameters"]
    assert all(torch.equal(a, state(model)[name]) for name, a in before.items())


def test_keyword_inputs_are_one_mapping():
    assert measure.positional({"x": 1}) == ({"x": 1},)
    assert measure.positional((1, 2)) == (1, 2)
    assert measure.call(nn.Identity(), {"input": 3}) == 3
    assert measure.batch_size({"a": 3, "b": torch.zeros(7, 2)}) == 7
    assert measure.batch_size((3,)) is None


def test_paired_counts_give_the_paired_interval():
    drop = measure.drop_between(counts(1, 1, 1, 0, 1), counts(1, 0, 1, 1, 0), limit=0.5)
    assert drop.points == pytest.approx(20)
    low, high = paired_difference(2, 1, 5)
    assert drop.interval == pytest.approx((100 * low, 100 * high))
    assert "paired" in drop.method
    assert drop.limit == 50


def test_a_drop_is_proved_only_when_the_whole_interval_is_within_the_limit():
    same = counts(*[1] * 400)
    assert measure.drop_between(same, same, limit=0.01).proved
    assert not measure.drop_between(same, same, limit=0.005).proved
    assert not measure.drop_between(same, same, limit=None).proved


def test_counts_without_outcomes_are_compared_unpaired():
    drop = measure.drop_between(Counts(90, 100), Counts(80, 100), limit=0.3)
    assert drop.points == pytest.approx(10)
    assert "unpaired" in drop.method
    paired = measure.drop_between(counts(*[1] * 90, *[0] * 10), counts(*[1] * 80, *[0] * 20), limit=0.3)
    assert drop.interval[1] - drop.interval[0] > paired.interval[1] - paired.interval[0]


def test_a_limit_on_a_plain_score_is_relative_to_it():
    drop = measure.drop_between(-2.0, -2.5, limit=0.1)
    assert drop.points == pytest.approx(0.5)
    assert drop.limit == pytest.approx(0.2)
    assert drop.interval is None


def test_a_score_of_counts_carries_its_interval():
    score = measure.as_score(counts(1, 0, 1, 1))
    assert (score.correct, score.total, score.value) == (3, 4, 0.75)
    assert score.interval == wilson(3, 4)
    assert measure.as_score(0.5).interval is None


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ("0.9", TypeError, "got str for the model"),
        (True, TypeError, "got bool for the model"),
        (float("nan"), ValueError, "returned nan for the model"),
        (float("inf"), ValueError, "returned inf for the model"),
        (Counts(0, 0), ValueError, "counted 0 samples for the model"),
    ],
)
def test_what_is_no_score_is_refused(value, error, text):
    with pytest.raises(error, match=text):
        measure.checked_score(value, of="the model")


def test_a_tensor_with_one_number_is_a_score():
    assert measure.checked_score(torch.tensor(0.25), of="the model") == 0.25


def test_measured_costs_keep_their_units():
    found = measure.as_measured(
        "x", {"macs": 5.0, "parameters": 7.0, "size": 9.0, "peak_memory": 11.0, "latency": 0.002}, counts(1, 1)
    )
    assert (found.flops, found.parameters, found.bytes, found.peak_bytes) == (10, 7, 9, 11)
    assert found.milliseconds == pytest.approx(2.0)


def test_what_costs_no_quality_is_measured_beside_the_original(quick):
    model, x = trained(), samples(4, seed=1)[0]
    folded, memory_format, times = measure.lossless(model, (x,), seconds=0.02)
    assert {norm for _, norm in folded} == {"bn1", "bn2", "bn3"}
    assert memory_format in ("contiguous", "channels_last")
    assert "original" in times
    assert all(t > 0 for t in times.values())


def test_outcomes_in_another_order_are_not_paired():
    first = Counts(2, 4, torch.tensor([True, True, False, False]), "one order")
    second = Counts(2, 4, torch.tensor([False, False, True, True]), "another")
    assert "unpaired" in measure.drop_between(first, second, limit=0.1).method
    again = Counts(2, 4, second.outcomes, "one order")
    assert "unpaired" not in measure.drop_between(first, again, limit=0.1).method


def test_accuracy_knows_the_order_of_its_samples():
    model, data = trained(), batches(64, seed=9)
    first, again, other = accuracy(model, data), accuracy(model, data), accuracy(model, data[::-1])
    assert first.order == again.order
    assert first.order != other.order
    assert first.correct == other.correct


def test_accuracy_counts_a_sample_once():
    with pytest.raises(ValueError, match=r"logits \(batch, classes\), got \(2, 3, 4, 4\) in batch 0"):
        accuracy(nn.Identity(), [(torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.long))])


def errors(*values: float, order: str | None = "x") -> Samples:
    return Samples.mean(torch.tensor(values, dtype=torch.float64), name="error", lower_is_better=True, order=order)


def test_a_drop_of_samples_is_relative_to_the_first_metric():
    before, after = errors(1.0, 2.0, 3.0, 2.0), errors(1.1, 2.1, 3.2, 2.0)
    drop = measure.drop_between(before, after, limit=0.1)
    assert (drop.unit, drop.limit) == ("%", pytest.approx(10))
    assert drop.points == pytest.approx(5)
    found = worsening(before, after)
    assert drop.interval == pytest.approx((100 * found.interval[0], 100 * found.interval[1]))
    assert drop.method == "jackknife over 4 samples, paired"
    assert measure.drop_between(after, before, limit=0.1).points < 0
    assert "unpaired" in measure.drop_between(before, errors(1.1, 2.1, 3.2, 2.0, order="y"), limit=0.1).method


def test_a_drop_of_samples_is_proved_when_the_whole_interval_is_within_the_limit():
    before, after = errors(*[1.0, 2.0] * 50), errors(*[1.02, 2.0] * 50)
    end = measure.drop_between(before, after, limit=None).interval[1]
    assert measure.drop_between(before, after, limit=1.001 * end / 100).proved
    assert not measure.drop_between(before, after, limit=0.999 * end / 100).proved


def test_a_first_error_of_zero_allows_none():
    drop = measure.drop_between(errors(0.0, 0.0), errors(0.0, 0.1), limit=0.01)
    assert (drop.unit, drop.limit) == ("", 0.0)
    assert drop.points == pytest.approx(0.05)
    assert not drop.proved


def test_a_score_of_samples_carries_name_direction_and_interval():
    value = errors(1.0, 2.0, 3.0, 2.0)
    score = measure.as_score(value)
    assert (score.name, score.value, score.lower_is_better, score.percent) == ("error", 2.0, True, False)
    assert score.interval == interval(value)
    assert score.method == "jackknife over 4 samples"
    assert measure.as_number(value) == -2.0


def test_counts_keep_their_name():
    assert measure.as_score(Counts(1, 2, name="recall at 5")).name == "recall at 5"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            errors(1.0),
            "The error of 1 samples cannot be computed without one of them for the model, so it has no inter",
        ),
        (
            Samples.mean(torch.ones(3), weights=torch.tensor([1.0, 0.0, 0.0]), name="share"),
            "The share of 3 samples cannot be computed without one of them for the model",
        ),
        (
            Samples.mean(torch.ones(3), weights=torch.zeros(3), name="share"),
            "The share is nan for the model: check the metric and the data",
        ),
    ],
)
def test_a_metric_that_hangs_on_one_sample_is_refused(value, text):
    with pytest.raises(ValueError, match=text):
        measure.checked_score(value, of="the model")


class Needy(nn.Module):
    """Wants at least so many samples, and counts them."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.seen = least, list[int]()

    def forward(self, x: torch.Tensor, table: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        self.seen.append(len(x))
        if len(x) < self.least:
            raise ValueError(f"{len(x)} samples")
        return scale * x.sum(1) + table.sum()


def test_few_samples_stand_for_all_where_the_model_runs_on_them():
    inputs = (torch.ones(8, 3), torch.ones(5), 2.0)
    x, table, scale = measure.few(Needy(1).eval(), inputs)
    assert (x.shape, table.shape, scale) == ((2, 3), (5,), 2.0)
    assert measure.few(Needy(3).eval(), inputs) is inputs
    assert measure.few(Needy(1).eval(), inputs, samples=8) is inputs
    keywords = measure.few(Needy(1).eval(), {"x": inputs[0], "table": inputs[1]}, samples=3)
    assert {name: len(value) for name, value in keywords.items()} == {"x": 3, "table": 5}
    assert measure.few(Needy(1).eval(), (2.0,)) == (2.0,)
