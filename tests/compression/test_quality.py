"""Other tasks than classification through the whole job: what is recorded, reported and continued."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from eke import Budget, Counts, compress
from eke._types import quotient
from eke.compression import (
    Metric,
    Samples,
    Task,
    causal_cross_entropy,
    dense_cross_entropy,
    mean_absolute_error,
    mean_iou,
    perplexity,
    r_squared,
    squared_loss,
)
from eke.compression.checkpoint import Run
from eke.compression.measure import checked_score
from eke.compression.result import plain
from eke.compression.verify import _plain, _readable, _score, few_samples

from .nets import STEPS, samples

HALF = Budget(max_drop="1%", size="0.5x")


class Words(nn.Module):
    """A small network that reads words (batch, length) and writes logits (batch, length, words), as an object."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self, words: int = 12, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.hidden, self.head = nn.Linear(width, 2 * width), nn.Linear(2 * width, words)

    def forward(self, input_ids):
        return {"logits": self.head(torch.relu(self.hidden(self.embedding(input_ids))))}


def built(make, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def sentences(count: int, seed: int) -> list[dict]:
    words = torch.randint(0, 12, (count, 7), generator=torch.Generator().manual_seed(seed))
    words[:, 1::2] = words[:, ::2][:, :3] // 2
    return [{"input_ids": part, "labels": part} for part in words.split(16)]


def images(count: int, seed: int, target) -> list[tuple]:
    x, _ = samples(count, seed=seed)
    return list(zip(x.split(16), target(x).split(16)))


def net(outputs: int, *, dense: bool = False) -> nn.Module:
    end = nn.Conv2d(16, outputs, 1) if dense else nn.Sequential(nn.Flatten(), nn.Linear(16 * 64, outputs))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), end)


def splits(make) -> list:
    return [make(96, 1), make(64, 2), make(80, 3)]


CASES = {
    "perplexity": (
        lambda: built(Words),
        lambda: Task(*splits(sentences), loss=causal_cross_entropy, score=perplexity),
        "perplexity",
        True,
    ),
    "mean absolute error": (
        lambda: built(lambda: net(1)),
        lambda: Task(
            *splits(lambda n, s: images(n, s, lambda x: x.mean((1, 2, 3)))),
            loss=squared_loss,
            score=mean_absolute_error,
        ),
        "mean absolute error",
        True,
    ),
    "mean IoU": (
        lambda: built(lambda: net(3, dense=True)),
        lambda: Task(
            *splits(lambda n, s: images(n, s, lambda x: x.argmax(1))), loss=dense_cross_entropy, score=mean_iou
        ),
        "mean IoU",
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_tasks_go_through_the_whole_job(quick, tmp_path, case):
    build, task, name, lower = CASES[case]
    result = compress(build(), task(), budget=HALF, recovery=STEPS)
    score = result.after.score
    assert (score.name, score.lower_is_better) == (name, lower)
    assert score.value == pytest.approx(task().score(result.model, task().report).value)
    assert score.interval[0] < score.value < score.interval[1]
    line = result.budget_lines[0]
    assert (line.name, line.asked, line.unit, line.limit) == ("drop", "1%", "%", 1.0)
    sign = 1 if lower else -1
    wanted = 100 * sign * (score.value - result.before.score.value) / abs(result.before.score.value)
    assert line.measured == pytest.approx(wanted)
    assert line.met is (wanted <= 1)
    assert {split.name: split.samples for split in result.evidence.splits}["report"] == 80
    said = result.document().verdict.text
    assert f"{name} " in said
    assert f"{abs(wanted):.2f}\u00a0% {'worse' if wanted > 0 else 'better'})" in said
    folder = result.save(tmp_path / "saved")
    recorded = json.loads((folder / "plan.json").read_text())["checks"]["selection"]
    assert (recorded["metric"], recorded["samples"]) == (name, 64)
    page = (folder / "report.html").read_text()
    assert ("lower is better" in page) is lower


def test_a_continued_run_reads_the_report_scores_it_recorded(quick, tmp_path, monkeypatch):
    build, task, _, _ = CASES["perplexity"]
    opened = []
    original = task()

    def score(model, batches):
        opened.append(batches is known.report)
        return perplexity(model, batches)

    known = replace(original, score=score)
    model = build()
    options = {"budget": HALF, "recovery": STEPS, "folder": tmp_path / "run"}
    first = compress(model, known, **options)
    assert sum(opened) == 3
    again = compress(model, known, resume=True, **options)
    assert sum(opened) == 3
    assert again.after.score == first.after.score
    assert again.budget_lines[0] == first.budget_lines[0]


def gains(values: list[float], name: str = "gain") -> Samples:
    return Samples.mean(torch.tensor(values, dtype=torch.float64), name=name, order="x")


@pytest.mark.parametrize(
    "score",
    [
        0.1,
        Counts(1, 2),
        Counts(1, 2, torch.tensor([True, False]), "x", "recall at 5"),
        gains([0.1, 1 / 3, -2e-300]),
    ],
)
def test_a_recorded_score_is_read_back_to_the_last_bit(tmp_path, score):
    stored = Run(tmp_path / "run", {}, resume=False).put("report", {"after": _plain(score)})["after"]
    assert _readable(stored, score)
    again = _score(stored, score)
    if isinstance(score, Samples):
        assert torch.equal(again.sums, score.sums)
        assert (again.metric, again.order) == (score.metric, "x")
    elif isinstance(score, Counts):
        assert (again.correct, again.total, again.order, again.name) == (1, 2, score.order, score.name)
        assert again.outcomes is None or torch.equal(again.outcomes, score.outcomes)
    else:
        assert again == score


def test_a_recorded_metric_is_read_with_the_one_of_its_name_alone():
    stored = _plain(gains([1.0, 2.0]))
    assert not _readable(stored, gains([1.0], name="other"))
    assert not _readable(stored, 0.5)
    assert _readable(0.5, gains([1.0]))


def test_few_samples_are_warned_about():
    assert few_samples(gains([1.0] * 50)) == ()
    assert few_samples(Counts(1, 2)) == ()
    [text] = few_samples(gains([1.0] * 49))
    assert text.startswith("The gain rests on 49 samples: intervals hold their 95 % from about 50 on")


def test_scores_are_plain_values():
    assert plain(0.5) == {"value": 0.5}
    assert plain(Counts(1, 2)) == {"value": 0.5, "correct": 1, "total": 2}
    assert plain(gains([1.0, 2.0])) == {"value": 1.5, "metric": "gain", "samples": 2}


def test_a_metric_of_ones_own_needs_totals_alone(quick):
    """Geometric mean of errors, from the sum of their logarithms."""
    metric = Metric("geometric error", lambda t: torch.exp(quotient(t)), lower_is_better=True, positive=True)

    def score(model, batches):
        rows = []
        for x, y in batches:
            errors = (model(x)[:, 0] - y).abs().clamp_min(1e-6)
            rows.append(torch.stack([errors.log(), torch.ones_like(errors)], 1))
        return Samples(torch.cat(rows), metric)

    _, task, _, _ = CASES["mean absolute error"]
    result = compress(built(lambda: net(1)), replace(task(), score=score), budget=HALF, recovery=STEPS)
    assert result.after.score.name == "geometric error"


def test_r_squared_of_samples_is_a_score():
    data = images(32, 0, lambda x: x.mean((1, 2, 3)))
    assert checked_score(r_squared(built(lambda: net(1)), data), of="the model").metric.name == "R\u00b2"
