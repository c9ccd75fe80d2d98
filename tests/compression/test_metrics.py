"""Metrics against values computed one by one, against closed forms, and against what they must refuse."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eke.compression import (
    Samples,
    Task,
    causal_cross_entropy,
    contrastive_loss,
    dense_cross_entropy,
    embedding_of,
    mean_absolute_error,
    mean_iou,
    mean_reciprocal_rank,
    mean_squared_error,
    perplexity,
    pixel_accuracy,
    r_squared,
    recall_at,
    squared_loss,
    token_accuracy,
    token_cross_entropy,
    top_k_accuracy,
)
from eke.compression.task import accuracy, cross_entropy, forward, logits_of

SCORES = [
    top_k_accuracy, mean_squared_error, mean_absolute_error, r_squared, token_accuracy, perplexity, pixel_accuracy,
    mean_iou, recall_at, mean_reciprocal_rank,
]  # fmt: skip


class Says(nn.Module):
    """Returns its input: what a test wants a model to say; as an object with logits where asked."""

    def __init__(self, wrapped: bool = False) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x=None, *, input_ids=None, attention_mask=None, said=None):
        found = x if said is None else said
        return SimpleNamespace(logits=found, loss=None) if self.wrapped else found


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classes(*shape: int, upto: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, upto, shape, generator=torch.Generator().manual_seed(seed))


def cut(x: torch.Tensor, y: torch.Tensor) -> list:
    """Unequal batches: the last one is smaller."""
    return list(zip(x.split(4), y.split(4)))


# Classification


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_counts_targets_among_the_k_best(k):
    x, y = draw(10, 6), classes(10, upto=6)
    wanted = [int(t) in sorted(range(6), key=lambda c: -row[c])[:k] for row, t in zip(x.tolist(), y)]
    found = top_k_accuracy(Says(), cut(x, y), k=k)
    assert found.outcomes.tolist() == wanted
    assert (found.correct, found.total, found.name) == (sum(wanted), 10, f"top-{k} accuracy")
    if k == 1:
        assert found.correct == accuracy(Says(), cut(x, y)).correct


def test_a_constant_model_scores_nothing():
    assert top_k_accuracy(Says(), cut(torch.zeros(8, 6), classes(8, upto=6)), k=5).correct == 0


# Regression


@pytest.mark.parametrize("shape", [(9,), (9, 3), (9, 2, 2)])
def test_errors_are_means_over_all_values(shape):
    x, y = draw(*shape), draw(*shape, seed=1)
    errors = [a - b for a, b in zip(x.flatten().tolist(), y.flatten().tolist())]
    assert mean_squared_error(Says(), cut(x, y)).value == pytest.approx(sum(e * e for e in errors) / len(errors))
    assert mean_absolute_error(Says(), cut(x, y)).value == pytest.approx(sum(map(abs, errors)) / len(errors))
    assert float(squared_loss(Says(), (x, y))) == pytest.approx(sum(e * e for e in errors) / len(errors))


def test_errors_are_better_when_lower():
    score = mean_squared_error(Says(), cut(draw(9), draw(9, seed=1)))
    assert score.score == -score.value < 0


def test_a_missing_last_dimension_is_not_broadcast():
    x, y = draw(8, 1), draw(8, seed=1)
    assert mean_squared_error(Says(), cut(x, y)).value == pytest.approx(float(((x[:, 0] - y) ** 2).mean()))


def test_r_squared_is_one_minus_the_ratio_of_squares():
    y = draw(12, 2, seed=1) + 1e6
    x = y + 0.3 * draw(12, 2)
    wanted = []
    for a, b in zip(x.T.tolist(), y.T.tolist()):
        mean = math.fsum(b) / len(b)
        wanted.append(1 - sum((q - p) ** 2 for p, q in zip(a, b)) / sum((q - mean) ** 2 for q in b))
    # Targets of 1e6 with deviations of 1 leave 1e-10 of a float64.
    assert r_squared(Says(), cut(x, y)).value == pytest.approx(sum(wanted) / 2, abs=1e-8)
    assert r_squared(Says(), cut(y, y)).value == 1
    mean = y.mean(0, keepdim=True).expand_as(y)
    assert r_squared(Says(), cut(mean, y)).value == pytest.approx(0, abs=1e-8)


# Tokens


def test_token_accuracy_counts_what_is_neither_ignored_nor_masked():
    x, y = draw(6, 5, 4), classes(6, 5, upto=4)
    y[0, :3] = -100
    y[3] = -100
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 1])[:, None]).long()
    batches = [{"said": x[i : i + 4], "attention_mask": mask[i : i + 4], "labels": y[i : i + 4]} for i in (0, 4)]
    right = counted = 0
    for row, labels, shown in zip(x.tolist(), y.tolist(), mask.tolist()):
        for logits, label, seen in zip(row, labels, shown):
            if seen and label != -100:
                counted += 1
                right += max(range(4), key=lambda c: logits[c]) == label
    found = token_accuracy(Says(wrapped=True), batches)
    assert found.value == right / counted
    assert len(found.sums) == 6
    cost = token_cross_entropy(Says(), batches[0])
    kept = (y[:4] != -100) & (mask[:4] == 1)
    assert float(cost) == pytest.approx(float(F.cross_entropy(x[:4][kept], y[:4][kept])))


def nll(logits: list[float], label: int) -> float:
    return math.log(sum(map(math.exp, logits))) - logits[label]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_perplexity_is_exp_of_the_mean_over_all_tokens(shift, masked):
    x, y = draw(5, 6, 7), classes(5, 6, upto=7)
    y[1, 2:] = -100
    mask = (torch.arange(6) < torch.tensor([6, 6, 4, 2, 3])[:, None]).long()
    costs = []
    for row, labels, shown in zip(x.tolist(), y.tolist(), mask.tolist()):
        for place, (label, seen) in enumerate(zip(labels, shown)):
            said = place - 1 if shift else place
            if label != -100 and said >= 0 and (seen or not masked):
                costs.append(nll(row[said], label))
    batches = [{"said": x[i : i + 3], "labels": y[i : i + 3]} for i in (0, 3)]
    if masked:
        batches = [{**b, "attention_mask": mask[3 * i : 3 * i + 3]} for i, b in enumerate(batches)]
    found = perplexity(Says(wrapped=True), batches, shift=shift)
    assert found.value == pytest.approx(math.exp(sum(costs) / len(costs)))
    whole = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    assert float(causal_cross_entropy(Says(), whole, shift=shift)) == pytest.approx(sum(costs) / len(costs))


def test_without_labels_the_inputs_are_what_is_predicted():
    x, words = draw(3, 5, 4), classes(3, 5, upto=4)
    bare = perplexity(Says(), [{"said": x, "input_ids": words}])
    assert bare.value == perplexity(Says(), [{"said": x, "input_ids": words, "labels": words}]).value


def test_a_uniform_model_is_as_perplexed_as_it_has_words():
    assert perplexity(Says(), [(torch.zeros(3, 4, 50), classes(3, 4, upto=50))]).value == pytest.approx(50)


def test_half_precision_is_scored_in_single():
    x, y = draw(4, 5, 9).bfloat16(), classes(4, 5, upto=9)
    assert perplexity(Says(), [(x, y)]).value == pytest.approx(perplexity(Says(), [(x.float(), y)]).value, rel=1e-6)


def test_the_losses_have_gradients_and_are_zero_without_labels():
    x = draw(2, 4, 5).requires_grad_()
    causal_cross_entropy(Says(), (x, classes(2, 4, upto=5))).backward()
    assert float(x.grad.abs().sum()) > 0
    for loss in (causal_cross_entropy, token_cross_entropy):
        assert float(loss(Says(), (x.detach(), torch.full((2, 4), -100)))) == 0
    maps = draw(2, 3, 4, 4)
    assert float(dense_cross_entropy(Says(), (maps, torch.full((2, 4, 4), 255)))) == 0


# Dense prediction


def iou(predicted: list, targets: list, count: int) -> float:
    shares = []
    for c in range(count):
        pairs = [(p == c, t == c) for p, t in zip(predicted, targets) if t != 255]
        union = sum(p or t for p, t in pairs)
        if union:
            shares.append(sum(p and t for p, t in pairs) / union)
    return sum(shares) / len(shares)


def test_mean_iou_is_over_the_totals_of_each_class():
    x, y = draw(6, 5, 3, 4), classes(6, 3, 4, upto=3)
    x[:, 3] = -9
    y[0, 1] = 255
    predicted, targets = x.argmax(1).flatten().tolist(), y.flatten().tolist()
    found = mean_iou(Says(), cut(x, y))
    # Class 3 is neither there nor predicted, class 4 is predicted alone.
    assert found.value == pytest.approx(iou(predicted, targets, 5))
    assert found.sums.shape == (6, 10)
    counted = [p == t for p, t in zip(predicted, targets) if t != 255]
    assert pixel_accuracy(Says(), cut(x, y)).value == pytest.approx(sum(counted) / len(counted))


def test_smaller_logits_are_enlarged():
    small, y = draw(2, 3, 4, 4), classes(2, 8, 8, upto=3)
    large = F.interpolate(small, size=(8, 8), mode="bilinear", align_corners=False)
    assert mean_iou(Says(), [(small, y)]).value == mean_iou(Says(), [(large, y)]).value
    assert dense_cross_entropy(Says(), (small, y)) == pytest.approx(float(F.cross_entropy(large, y)))


def test_maps_in_a_dictionary_are_found():
    x = draw(2, 3)
    assert logits_of({"out": x, "aux": x + 1}) is x
    assert logits_of({"out": x + 1, "logits": x}) is x


# Retrieval


def test_ranks_are_those_of_the_whole_list():
    queries, passages = draw(11, 4), draw(11, 4, seed=1)
    ranks = []
    for i, q in enumerate(queries.tolist()):
        likeness = [sum(a * b for a, b in zip(q, p)) / math.hypot(*q) / math.hypot(*p) for p in passages.tolist()]
        ranks.append(1 + sum(other > likeness[i] for other in likeness))
    batches = cut(queries, passages)
    assert mean_reciprocal_rank(Says(), batches).value == pytest.approx(sum(1 / r for r in ranks) / 11)
    for k in (1, 3, 10):
        found = recall_at(Says(), batches, k=k)
        assert found.outcomes.tolist() == [r <= k for r in ranks]
        assert found.name == f"recall at {k}"


def test_a_model_that_embeds_all_alike_ranks_in_the_middle():
    same = torch.ones(9, 4)
    assert mean_reciprocal_rank(Says(), cut(same, same)).value == pytest.approx(1 / 5)
    assert recall_at(Says(), cut(same, same), k=4).correct == 0


def test_the_contrastive_loss_is_the_cross_entropy_of_cosines():
    queries, passages = draw(5, 3), draw(5, 3, seed=1)
    cosines = F.cosine_similarity(queries[:, None], passages[None], dim=2)
    wanted = sum(nll((row / 0.1).tolist(), i) for i, row in enumerate(cosines)) / 5
    assert float(contrastive_loss(Says(), (queries, passages), temperature=0.1)) == pytest.approx(wanted)


def test_embeddings_are_found_or_pooled():
    x, hidden = draw(2, 3), draw(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert embedding_of(x, (x,)) is x
    assert embedding_of({"pooler_output": x, "last_hidden_state": hidden}, {}) is x
    pooled = embedding_of(SimpleNamespace(last_hidden_state=hidden), {"attention_mask": mask})
    torch.testing.assert_close(pooled, torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)]))
    torch.testing.assert_close(embedding_of(SimpleNamespace(last_hidden_state=hidden), ()), hidden.mean(1))
    batches = [({"input_ids": None, "said": x}, {"said": x})]
    assert recall_at(Says(), batches).share == 1


# Everywhere


def everywhere() -> dict:
    """A small data set for each score."""
    flat, images, words = draw(8), draw(8, 3, 2, 2), draw(8, 5, 7)
    return {
        top_k_accuracy: cut(draw(8, 9), classes(8, upto=9)),
        mean_squared_error: cut(flat, draw(8, seed=1)),
        mean_absolute_error: cut(flat, draw(8, seed=1)),
        r_squared: cut(flat, draw(8, seed=1)),
        token_accuracy: cut(words, classes(8, 5, upto=7)),
        perplexity: cut(words, classes(8, 5, upto=7)),
        pixel_accuracy: cut(images, classes(8, 2, 2, upto=3)),
        mean_iou: cut(images, classes(8, 2, 2, upto=3)),
        recall_at: cut(draw(8, 4), draw(8, 4, seed=1)),
        mean_reciprocal_rank: cut(draw(8, 4), draw(8, 4, seed=1)),
    }


@pytest.mark.parametrize("score", SCORES)
def test_a_score_does_not_depend_on_the_batches(score):
    data = everywhere()[score]
    joined = [tuple(torch.cat(side) for side in zip(*data))]
    one, other = score(Says(), data), score(Says(), joined)
    if isinstance(one, Samples):
        assert one.value == pytest.approx(other.value, rel=1e-12)
        torch.testing.assert_close(one.sums, other.sums, rtol=1e-12, atol=1e-12)
    else:
        assert one.outcomes.tolist() == other.outcomes.tolist()


@pytest.mark.parametrize("score", SCORES)
def test_a_score_knows_the_order_of_its_samples(score):
    data = everywhere()[score]
    assert score(Says(), data).order == score(Says(), data).order
    assert score(Says(), data).order != score(Says(), data[::-1]).order


@pytest.mark.parametrize("score", SCORES)
def test_a_score_leaves_the_model_in_its_mode(score):
    model = Says().train()
    score(model, everywhere()[score])
    assert model.training


@pytest.mark.parametrize("score", SCORES)
def test_an_evaluation_without_batches_is_refused(score):
    with pytest.raises(ValueError, match=r"The evaluation got 0 batches: pass a list or a DataLoader"):
        score(Says(), iter([]))


@pytest.mark.parametrize("score", [s for s in SCORES if s not in (recall_at, mean_reciprocal_rank)])
def test_nan_outputs_are_refused_by_batch(score):
    data = everywhere()[score]
    data[1][0].view(-1)[1:3] = float("nan")
    with pytest.raises(ValueError, match="Batch 1 of the evaluation gave 2 NaN outputs: check the model and the data"):
        score(Says(), data)


@pytest.mark.parametrize("score", SCORES)
def test_missing_targets_are_refused(score):
    with pytest.raises(TypeError, match=r"no tensor of targets, got NoneType|pair \(queries, passages\), got Tensor"):
        score(Says(), [draw(4, 5)])


@pytest.mark.parametrize("score", SCORES)
def test_the_score_of_a_task_calls_the_model_as_the_task_does(score):
    data = everywhere()[score]
    calls = []

    def own(model, batch):
        calls.append(batch)
        return forward(model, batch)

    task = Task(data, data, data, loss=squared_loss, score=functools.partial(score), forward=own)
    task.score(Says(), data)
    assert calls
    bound = Task(data, data, data, score=functools.partial(score, forward=forward), forward=own)
    assert bound.score.keywords["forward"] is own


def test_a_loss_of_the_users_own_is_left_as_it_is():
    def own(model, batch, forward=None):
        return torch.zeros(())

    task = Task([], [], [], loss=own, score=len, forward=lambda model, batch: None)
    assert task.loss is own
    assert task.score is len
    assert task.counts_samples is False


@pytest.mark.parametrize(("score", "counts"), [(accuracy, True), (top_k_accuracy, True), (perplexity, False)])
def test_a_task_knows_whether_samples_are_counted(score, counts):
    assert Task([], [], [], score=score).counts_samples is counts
    assert Task([], [], [], score=functools.partial(score, forward=forward)).counts_samples is counts


REFUSED = {
    "top-k of too many": (
        lambda: top_k_accuracy(Says(), [(draw(4, 5), classes(4, upto=5))], k=5),
        r"top_k_accuracy needs k in \[1, 4\] for 5 classes, got 5",
    ),
    "top-k of maps": (
        lambda: top_k_accuracy(Says(), [(draw(4, 5, 2), classes(4, 2, upto=5))]),
        r"needs integer targets \(batch,\) for logits \(batch, classes\), got torch\.int64 \(4, 2\) and \(4, 5, 2\) in "
        "batch 0",
    ),
    "top-k of shares": (
        lambda: top_k_accuracy(Says(), [(draw(4, 5), draw(4))], k=2),
        r"needs integer targets .* got torch\.float64 \(4,\)",
    ),
    "unknown class": (
        lambda: top_k_accuracy(Says(), [(draw(4, 5), classes(4, upto=5) + 3)], k=2),
        r"Targets must lie in \[0, 4\] for 5 classes or be ignore, got 3 to \d in batch 0",
    ),
    "regression of another shape": (
        lambda: mean_squared_error(Says(), [(draw(4, 2), draw(4))]),
        r"Predictions and targets must have one shape, got \(4, 2\) and \(4,\) in batch 0: reshape one of them",
    ),
    "loss of another shape": (
        lambda: squared_loss(Says(), (draw(4), draw(4, 1))),
        r"must have one shape, got \(4,\) and \(4, 1\) in the batch",
    ),
    "infinite error": (
        lambda: mean_absolute_error(Says(), [(torch.tensor([1.0, math.inf]), torch.zeros(2))]),
        r"values that are not finite in 1 of 2 samples: check the model's outputs and the targets",
    ),
    "NaN target": (
        lambda: mean_squared_error(Says(), [(torch.zeros(3), torch.tensor([0.0, math.nan, 1.0]))]),
        r"values that are not finite in 1 of 3 samples",
    ),
    "constant targets": (
        lambda: r_squared(Says(), [(draw(4, 2), torch.stack([torch.arange(4.0), torch.ones(4)], 1))]),
        "R\u00b2 needs targets that vary, but output 1 has the same one for all 4 samples: score mean_absolute_error",
    ),
    "tokens in torch's layout": (
        lambda: token_accuracy(Says(), [(draw(4, 7, 5), classes(4, 5, upto=7))]),
        r"labels \(batch, length\) are needed for logits \(batch, length, classes\), got torch\.int64 \(4, 5\) and "
        r"\(4, 7, 5\) in batch 0: logits \(batch, classes, \.\.\.\) belong to cross_entropy",
    ),
    "mask of another shape": (
        lambda: token_accuracy(
            Says(), [{"said": draw(4, 5, 7), "labels": classes(4, 5, upto=7), "attention_mask": torch.ones(4, 6)}]
        ),
        r"The attention mask must be \(batch, length\) = \(4, 5\), got \(4, 6\) in batch 0",
    ),
    "no token counts": (
        lambda: perplexity(Says(), [(draw(4, 5, 7), torch.full((4, 5), -100))]),
        r"No token counts in 4 sequences: all labels are ignore=-100 or hidden",
    ),
    "unknown word": (
        lambda: perplexity(Says(), [(draw(4, 5, 7), classes(4, 5, upto=7) + 5)]),
        r"Targets must lie in \[0, 6\] for 7 classes or be ignore, got 5 to",
    ),
    "impossible word": (
        lambda: perplexity(Says(), [(torch.tensor([[[0.0, -math.inf]] * 3]), torch.tensor([[0, 1, 0]]))]),
        r"1 labels in batch 0 have the likelihood zero, so the perplexity is infinite: check masked logits",
    ),
    "maps of another shape": (
        lambda: mean_iou(Says(), [(draw(4, 3, 2, 2), classes(4, upto=3))]),
        r"targets \(batch, height, width\) are needed .* got torch\.int64 \(4,\) and \(4, 3, 2, 2\) in batch 0",
    ),
    "no pixel counts": (
        lambda: mean_iou(Says(), [(draw(4, 3, 2, 2), torch.full((4, 2, 2), 255))]),
        r"No pixel counts in 4 images: all targets are ignore=255",
    ),
    "class of maps": (
        lambda: pixel_accuracy(Says(), [(draw(4, 3, 2, 2), classes(4, 2, 2, upto=9))]),
        r"Targets must lie in \[0, 2\] for 3 classes or be ignore",
    ),
    "recall at too many": (
        lambda: recall_at(Says(), [(draw(4, 3), draw(4, 3))], k=4),
        r"recall_at needs k in \[1, 3\] for 4 passages, got 4",
    ),
    "NaN embedding": (
        lambda: recall_at(Says(), [(torch.full((2, 3), math.nan), draw(2, 3))]),
        r"Batch 0 of the evaluation gave 2 embeddings that are not finite",
    ),
    "unequal sides": (
        lambda: contrastive_loss(Says(), (draw(4, 3), draw(5, 3))),
        r"embeddings \(batch, width\) of one shape, got \(4, 3\) and \(5, 3\) in the batch: pass embed=",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_outputs_without_embeddings_are_refused():
    with pytest.raises(TypeError, match="No embeddings in the model's output of type SimpleNamespace: pass embed="):
        embedding_of(SimpleNamespace(other=1), ())


def test_the_default_loss_of_a_task_is_unchanged():
    assert Task([], [], []).loss is cross_entropy
