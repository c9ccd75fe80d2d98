"""Bad input: a clear error that says what was given, what is allowed and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from eke import Budget, Counts, compress
from eke.compression import Task, cross_entropy
from eke.compression.advice import describe
from eke.compression.checks import check_batches, check_report, check_task, count_samples
from eke.compression.task import accuracy, evaluating, logits_of, split_batch
from eke.compression.trial import check_runs

from .nets import STEPS, batches, same, samples, state, tiny_task

BUDGET = Budget(size="0.25x", macs="0.5x")


def run(model, data, **options):
    return compress(model, data, **{"loss": cross_entropy, "budget": BUDGET, "recovery": STEPS, **options})


def broken(index: int, value: float, *, what: int = 0) -> list:
    data = [(x.clone(), y.clone()) for x, y in batches()]
    data[index][what][3] = value
    return data


def loss_of_nan_at(index: int):
    """A loss that is NaN on one batch of the data alone."""
    bad = batches()[index][1]

    def loss(model, batch):
        value = cross_entropy(model, batch)
        return value * float("nan") if torch.equal(batch[1], bad) else value

    return loss


BAD = {
    "no module": (
        lambda m: run(print, batches()),
        TypeError,
        r"eke needs a torch\.nn\.Module, got builtin_function",
    ),
    "no loss": (
        lambda m: run(m, batches(), loss=None),
        TypeError,
        r"needs loss=, a function loss\(model, batch\) .* eke\.compression\.cross_entropy",
    ),
    "iterator": (
        lambda m: run(m, iter(batches())),
        ValueError,
        r"batches is an iterator \(list_iterator\) .* pass the DataLoader itself, or list\(batches\)",
    ),
    "generator": (lambda m: run(m, (b for b in batches())), ValueError, r"batches is an iterator \(generator\)"),
    "no iterable": (lambda m: run(m, 3), TypeError, r"batches must be a list or a DataLoader, got int"),
    "empty": (
        lambda m: run(m, []),
        ValueError,
        r"batches gave 0 batches: pass a list or a DataLoader that is not empty",
    ),
    "NaN in the data": (
        lambda m: run(m, broken(2, float("nan"))),
        ValueError,
        r"Calibration batch 2 holds 192 values that are not finite: clean",
    ),
    "infinity in the data": (
        lambda m: run(m, broken(4, float("inf"))),
        ValueError,
        r"Calibration batch 4 holds 192 values that are not finite",
    ),
    "wrong dtype": (
        lambda m: run(m, [(x.double(), y) for x, y in batches()]),
        ValueError,
        r"does not run on calibration batch 0, \(float64 \(32, 3, 8, 8\), int64 \(32,\)\) "
        r"\(parameters are torch\.float32\): .* Make the loader yield",
    ),
    "wrong shape": (
        lambda m: run(m, [(x[:, :2], y) for x, y in batches()]),
        ValueError,
        r"does not run on calibration batch 0, \(float32 \(32, 2, 8, 8\).*3 channels",
    ),
    "wrong target dtype": (
        lambda m: run(m, [(x, y.float()) for x, y in batches()]),
        ValueError,
        r"cross_entropy needs int64 targets .* got targets torch\.float32 \(32,\) and logits \(32, 4\): convert",
    ),
    "wrong target count": (
        lambda m: run(m, [(x, y[:5]) for x, y in batches()]),
        ValueError,
        r"cross_entropy needs int64 targets .* got targets torch\.int64 \(5,\)",
    ),
    "unknown class": (
        lambda m: run(m, [(x, y + 1) for x, y in batches()]),
        ValueError,
        r"Targets must lie in \[0, 3\] for logits \(32, 4\), got 1 to 4",
    ),
    "three items": (
        lambda m: run(m, [(x, y, y) for x, y in batches()]),
        (TypeError, ValueError),
        r"A batch must be \(inputs, targets\), a dictionary or a tensor, got tuple of 3 items: pass your own forward=",
    ),
    "no targets": (
        lambda m: run(m, [x for x, _ in batches()]),
        TypeError,
        r"batch has no tensor of targets, got NoneType: yield \(inputs, targets\) or pass your own loss",
    ),
    "loss is a float": (
        lambda m: run(m, batches(), loss=lambda m, b: 1.0),
        TypeError,
        r"loss\(model, batch\) must return a scalar tensor, got float",
    ),
    "loss per sample": (
        lambda m: run(m, batches(), loss=lambda m, b: torch.ones(3)),
        ValueError,
        r"must return a scalar tensor, got shape \(3,\): take the mean",
    ),
    "NaN loss at once": (
        lambda m: run(m, batches(), loss=loss_of_nan_at(0)),
        ValueError,
        r"loss\(model, batch\) is nan on calibration batch 0: check the loss",
    ),
    "NaN loss later": (
        lambda m: run(m, batches(), loss=loss_of_nan_at(3)),
        ValueError,
        r"loss\(model, batch\) is nan on calibration batch 3: check",
    ),
    "NaN metric": (
        lambda m: run(m, batches(), evaluate=lambda m: float("nan")),
        ValueError,
        r"evaluate returned nan for the original model: check the metric",
    ),
    "metric of another type": (
        lambda m: run(m, batches(), evaluate=lambda m: "good"),
        TypeError,
        r"evaluate must return a float, eke\.Counts or eke\.compression\.Samples, got str for the original model",
    ),
    "nothing evaluated": (
        lambda m: run(m, batches(), evaluate=lambda m: Counts(0, 0)),
        ValueError,
        r"evaluate counted 0 samples for the original model",
    ),
    "0 candidates": (
        lambda m: run(m, batches(), skip=("conv1", "conv2", "conv3", "classifier")),
        ValueError,
        r"There is nothing to compress: 0 channel groups and 0 matrices of Tiny with 0 sites can be changed "
        r"\(skip=\['conv1'",
    ),
    "unknown module to skip": (lambda m: run(m, batches(), skip=("conv9",)), ValueError, r"conv9"),
    "selection too small for the drop": (
        lambda m: run(m, batches(), evaluate=lambda m: Counts(90, 100), budget=Budget(max_drop="1%", size="0.5x")),
        ValueError,
        r"100 samples cannot prove a drop of at most 1 points with 95 % confidence, .* at least 381 are needed\. Give",
    ),
    "report too small for the drop": (
        lambda m: compress(m, tiny_task(), budget=Budget(max_drop="1%"), recovery=STEPS),
        ValueError,
        r"160 samples cannot prove a drop of at most 1 points .* at least 381 are needed",
    ),
    "empty report": (
        lambda m: compress(m, Task(batches(), batches(), []), budget=BUDGET),
        ValueError,
        r"The report split gave 0 samples",
    ),
    "empty selection": (
        lambda m: compress(m, Task(batches(), [], batches()), budget=BUDGET),
        ValueError,
        r"The selection split gave 0 samples",
    ),
    "selection is an iterator": (
        lambda m: compress(m, Task(batches(), iter(batches()), batches()), budget=BUDGET),
        ValueError,
        r"The selection split is an iterator \(list_iterator\) that is used up after one pass",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_the_model_is_left_alone(quick, taught, case):
    call, error, message = BAD[case]
    before = state(taught)
    with pytest.raises(error, match=message):
        call(taught)
    assert same(before, state(taught))
    assert not taught.training
    assert all(p.grad is None for p in taught.parameters())


@pytest.mark.parametrize("change", [lambda x: x.double(), lambda x: x[:, :2]])
def test_a_later_batch_that_does_not_fit_is_named(quick, taught, change):
    data = batches()
    data[2] = (change(data[2][0]), data[2][1])
    with pytest.raises(ValueError, match=r"does not run on calibration batch 2, "):
        run(taught, data)


def test_a_loader_can_be_read_as_often_as_needed():
    loader = DataLoader(TensorDataset(*samples(50, seed=0)), batch_size=16)
    count, first = check_batches(loader)
    assert count == 50
    assert torch.equal(first[0], samples(50, seed=0)[0][:16])


@pytest.mark.parametrize(
    ("batch", "count"),
    [
        (torch.ones(7, 2), 7),
        ((torch.ones(3), torch.ones(3)), 3),
        ({"a": torch.ones(5, 1)}, 5),
        ("text", 1),
        (torch.tensor(2.0), 1),
    ],
)
def test_samples_are_counted_along_the_first_dimension(batch, count):
    assert count_samples(batch) == count


def test_a_batch_is_described_by_types_and_shapes():
    batch = ({"ids": torch.ones(2, 3, dtype=torch.long)}, [torch.ones(2)], "text")
    assert describe(batch) == "({ids: int64 (2, 3)}, (float32 (2,)), str)"


def test_a_plain_score_needs_no_number_of_samples():
    check_report(0.9, 0.01)
    check_report(Counts(5, 10), None)
    check_report(Counts(300, 381), 0.01)


def test_nan_logits_name_the_batch(taught):
    data = [(x, y) for x, y in batches(96)]
    data[1] = (torch.full_like(data[1][0], float("nan")), data[1][1])
    with pytest.raises(ValueError, match=r"Batch 1 of the evaluation gave 128 NaN logits"):
        accuracy(taught, data)


def test_an_empty_evaluation_is_refused(taught):
    with pytest.raises(ValueError, match=r"The evaluation got 0 batches: pass a list or a DataLoader"):
        accuracy(taught, [])


def test_accuracy_counts_every_sample_in_order(taught):
    data = batches(90, size=32)
    counts = accuracy(taught, data)
    with torch.no_grad():
        wanted = torch.cat([taught(x).argmax(1) == y for x, y in data])
    assert counts.total == 90
    assert counts.correct == int(wanted.sum())
    assert torch.equal(counts.outcomes, wanted)


@pytest.mark.parametrize(
    ("batch", "inputs", "targets"),
    [
        ((1, 2), (1,), 2),
        (((1, 3), 2), (1, 3), 2),
        (({"a": 1}, 2), {"a": 1}, 2),
        ({"a": 1, "labels": 2}, {"a": 1}, 2),
        ({"a": 1, "label": 2}, {"a": 1}, 2),
        ({"a": 1}, {"a": 1}, None),
    ],
)
def test_batches_are_split_into_inputs_and_targets(batch, inputs, targets):
    assert split_batch(batch) == (inputs, targets)


class Output:
    logits = torch.ones(2, 3)


@pytest.mark.parametrize("outputs", [torch.ones(2, 3), {"logits": torch.ones(2, 3)}, Output(), (torch.ones(2, 3), 5)])
def test_logits_are_found_in_common_outputs(outputs):
    assert torch.equal(logits_of(outputs), torch.ones(2, 3))


@pytest.mark.parametrize("outputs", [{}, (), "text", ["text"], {"hidden": torch.ones(2)}])
def test_outputs_without_logits_are_refused(outputs):
    with pytest.raises(TypeError, match=r"No logits in the model's output of type \w+: pass your own loss= and score="):
        logits_of(outputs)


def test_evaluating_restores_every_flag_even_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.Dropout())).train()
    model[2].eval()
    flags = [m.training for m in model.modules()]

    def stop_inside() -> None:
        with evaluating(model) as inside:
            assert not any(m.training for m in inside.modules())
            assert not torch.is_grad_enabled()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop_inside()
    assert [m.training for m in model.modules()] == flags
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("split", ["selection", "report"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.double(), r"\(float64 \(32, 3, 8, 8\), int64 \(32,\)\) \(parameters are torch\.float32\)"),
        (lambda x: x[:, :2], r"\(float32 \(32, 2, 8, 8\), .*3 channels"),
        (lambda x: {"wrong": x}, r"\(\{wrong: float32 \(32, 3, 8, 8\)\}"),
    ],
)
def test_a_later_batch_of_a_split_that_does_not_fit_is_named(taught, split, change, words):
    parts = {"calibration": batches(), "selection": batches(), "report": batches()}
    parts[split][3] = (change(parts[split][3][0]), parts[split][3][1])
    flags = [module.training for module in taught.modules()]
    with pytest.raises(ValueError, match=rf"The model does not run on {split} batch 3, {words}"):
        check_task(Task(**parts), None, taught)
    assert [module.training for module in taught.modules()] == flags
    check_task(Task(**parts), None)


def test_a_score_of_ones_own_may_call_the_model_in_another_way(taught):
    report = [(x, y, y) for x, y in batches()]
    with pytest.warns(UserWarning, match=r"does not run on report batch 0, .*Your own score has to cope with it"):
        check_task(Task(batches(), batches(), report, score=lambda model, data: 0.5), None, taught)


def test_the_model_runs_once_for_a_form(taught):
    seen = []

    def forward(model, batch):
        seen.append(tuple(batch[0].shape))
        return model(batch[0])

    many = [(torch.ones(2, 3, 8, 8 + size), torch.zeros(2, dtype=torch.long)) for size in range(12)]
    check_task(Task(batches(), batches(70, size=32), many, forward=forward), None, taught)
    assert seen == [(32, 3, 8, 8), *((2, 3, 8, 8 + size) for size in range(8))]


@pytest.mark.parametrize(
    ("error", "words"), [(KeyError("mask"), "KeyError: 'mask'"), (AttributeError("no x"), "AttributeError: no x")]
)
def test_a_missing_key_or_attribute_names_the_batch(taught, error, words):
    def forward(model, batch):
        raise error

    with pytest.raises(ValueError, match=rf"does not run on calibration batch 4, .*: {words}\. Make the loader"):
        check_runs(taught, batches()[0], loss=cross_entropy, forward=forward, index=4)


class Doubled(torch.nn.Module):
    """A classifier that takes its images under another name and scale than the default call gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, *, pixels: torch.Tensor) -> torch.Tensor:
        return self.linear(pixels)


def test_the_default_loss_and_score_call_the_model_as_the_task_does():
    generator = torch.Generator().manual_seed(0)
    model = Doubled()
    data = [(torch.randn(8, 4, generator=generator), torch.randint(0, 3, (8,), generator=generator))]
    task = Task(data, data, data, forward=lambda net, batch: net(pixels=batch[0]))
    logits = model.linear(data[0][0])
    torch.testing.assert_close(task.loss(model, data[0]), torch.nn.functional.cross_entropy(logits, data[0][1]))
    assert task.score(model, data).correct == int((logits.argmax(1) == data[0][1]).sum())
    assert task.counts_samples
    assert not Task(data, data, data, score=lambda net, batches: 0.0).counts_samples
