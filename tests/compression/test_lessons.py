"""Lessons: samples and the teacher's answers stay together; distillation is a distance."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.compression.lessons import collect, distillation
from eke.compression.task import forward


def linear() -> nn.Module:
    model = nn.Linear(3, 5).double()
    with torch.no_grad():
        model.weight.copy_(torch.arange(15.0).view(5, 3))
    return model


def pairs(*counts: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, dtype=torch.float64, generator=generator), torch.randint(0, 5, (n,), generator=generator))
        for n in counts
    ]


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 4, 1), (300, 300), (7,)])
def test_samples_of_all_batches_mix_and_keep_their_answers(counts):
    batches, model = pairs(*counts), linear()
    lessons = collect(model, batches, forward=forward)
    assert lessons.mixed
    assert lessons.samples == sum(counts)
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    index = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(2))[:5]
    (taken, labels), answers = lessons.take(index)
    assert torch.equal(taken, inputs[index])
    assert torch.equal(labels, targets[index])
    torch.testing.assert_close(answers, model(inputs)[index].detach(), rtol=1e-12, atol=1e-12)
    assert not answers.requires_grad


class Ragged(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize(
    "batches",
    [
        [torch.ones(2, 5), torch.ones(2, 7)],
        [(torch.ones(2, 5), torch.zeros(2, dtype=torch.long)), (torch.ones(3, 6), torch.zeros(3, dtype=torch.long))],
        [(torch.ones(2, 5), "a remark"), (torch.ones(2, 5), "another")],
        [(torch.ones(4, 5), torch.ones(2))],
    ],
)
def test_batches_that_cannot_be_joined_stay_whole(batches):
    lessons = collect(
        Ragged(), batches, forward=lambda model, batch: model(batch if torch.is_tensor(batch) else batch[0])
    )
    assert not lessons.mixed
    assert lessons.samples == len(batches)
    for index in range(len(batches)):
        batch, answer = lessons.take(torch.tensor([index]))
        assert batch is batches[index]
        assert torch.equal(answer, torch.ones(len(answer)))


def test_answers_without_a_sample_dimension_keep_batches_whole():
    class Total(nn.Module):
        def forward(self, x):
            return x.sum()

    lessons = collect(Total(), pairs(4, 4), forward=forward)
    assert not lessons.mixed
    assert lessons.samples == 1


def test_dictionaries_of_inputs_and_outputs_are_mixed():
    class Net(nn.Module):
        def forward(self, *, x, mask):
            return {"logits": x * mask, "hidden": x}

    batches = [
        {"x": torch.full((2, 3), float(i)), "mask": torch.ones(2, 3), "labels": torch.zeros(2)} for i in range(3)
    ]
    lessons = collect(Net(), batches, forward=forward)
    batch, answers = lessons.take(torch.tensor([5, 0]))
    assert lessons.samples == 6
    assert torch.equal(batch["x"][:, 0], torch.tensor([2.0, 0.0]))
    assert torch.equal(answers["logits"][:, 0], torch.tensor([2.0, 0.0]))


def test_the_teacher_answers_in_evaluation_mode_and_keeps_its_flags():
    model = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), nn.BatchNorm1d(5)).double().train()
    model[2].eval()
    count = model[2].num_batches_tracked.clone()
    lessons = collect(model, pairs(4), forward=forward)
    assert [m.training for m in model] == [True, True, False]
    assert torch.equal(model[2].num_batches_tracked, count)
    model.eval()
    assert torch.equal(lessons.answers[0], model(pairs(4)[0][0]).detach())


def test_batches_beyond_the_memory_limit_are_left_out():
    assert collect(linear(), pairs(4, 4, 4), forward=forward, max_bytes=4 * (3 + 1) * 8 + 1).samples == 8


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match=r"Recovery got 0 calibration batches: pass a list or a DataLoader"):
        collect(linear(), [], forward=forward)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("counts", [(4, 4, 4), (300, 300, 300)])
def test_an_answer_that_is_not_finite_names_the_batch_of_the_loader(bad, counts):
    batches = pairs(*counts)
    batches[1][0][2, 0] = bad
    with pytest.raises(
        ValueError, match=r"original model's output on calibration batch 1 has values that are not finite"
    ):
        collect(linear(), batches, forward=forward)


def test_ragged_answers_that_are_not_finite_name_the_batch():
    with pytest.raises(ValueError, match=r"on calibration batch 2 has values that are not finite"):
        collect(Ragged(), [torch.ones(2, 5), torch.ones(2, 7), torch.full((2, 4), torch.nan)], forward=forward)


def test_an_answer_that_is_not_finite_only_in_larger_batches_says_so():
    class Overflow(nn.Module):
        def forward(self, x):
            return x * (float("inf") if len(x) > 4 else 1.0)

    with pytest.raises(ValueError, match=r"on the calibration batches together has values that are not finite"):
        collect(Overflow(), pairs(4, 4), forward=forward)


def logits(seed: int) -> torch.Tensor:
    return torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TREES = {
    "logits": lambda x: x,
    "dictionary": lambda x: {"logits": x},
    "tuple": lambda x: (x, x.sum(1)),
    "features": lambda x: x[:, None, :],
    "one column": lambda x: x[:, :1],
    "no logits": lambda x: {"a": x, "b": x[:, None]},
}


@pytest.mark.parametrize("tree", TREES)
def test_distillation_is_zero_at_equality_and_positive_elsewhere(tree):
    make = TREES[tree]
    assert float(distillation(make(logits(0)), make(logits(0)))) == pytest.approx(0, abs=1e-15)
    for seed in range(1, 6):
        assert float(distillation(make(logits(seed)), make(logits(0)))) > 1e-3


def test_distillation_of_logits_is_the_divergence_of_softened_answers():
    ours, theirs, t = logits(1), logits(2), 3.0
    p, q = F.softmax(theirs / t, 1), F.softmax(ours / t, 1)
    wanted = t * t * (p * (p / q).log()).sum(1).mean()
    assert float(distillation(ours, theirs, temperature=t)) == pytest.approx(float(wanted), rel=1e-12)


def test_distillation_of_logits_ignores_a_shift_of_all_classes():
    assert float(distillation(logits(1) + 7, logits(1))) == pytest.approx(0, abs=1e-12)


def test_distillation_of_features_does_not_depend_on_their_unit():
    ours, theirs = logits(1)[:, None], logits(2)[:, None]
    wanted = float(((ours - theirs) ** 2).mean() / theirs.var(unbiased=False))
    assert float(distillation(ours, theirs)) == pytest.approx(wanted, rel=1e-12)
    assert float(distillation(50 * ours, 50 * theirs)) == pytest.approx(wanted, rel=1e-12)


def test_the_gradient_of_distillation_leads_to_the_teacher():
    ours = logits(1).requires_grad_()
    distillation(ours, logits(2)).backward()
    step = (ours - 0.1 * ours.grad).detach()
    assert float(distillation(step, logits(2))) < float(distillation(ours.detach(), logits(2)))
