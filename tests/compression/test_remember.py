"""A remembering solver gives what the solver gives, and asks it once for each question."""

from __future__ import annotations

import torch

from eke.compression.remember import Remembering
from eke.compression.solver import quick
from eke.linalg import Metric
from eke.structures import NM, UniformGrid


def moment(size, seed):
    x = torch.randn(3 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


class Counting:
    def __init__(self):
        self.asked = 0

    def __call__(self, structure, weight, metric):
        self.asked += 1
        return quick(structure, weight, metric)


def test_the_same_question_is_asked_once_and_another_one_anew():
    solver = Counting()
    remembering = Remembering(solver)
    weight, metric = torch.randn(4, 8), Metric(moment(8, 0), moment(4, 1))
    first = remembering(UniformGrid(4), weight, metric)
    assert torch.equal(first, quick(UniformGrid(4), weight, metric))
    first.zero_()  # the answer is the asker's own
    again = remembering(UniformGrid(4), weight.clone(), Metric(moment(8, 0), moment(4, 1)))
    assert torch.equal(again, quick(UniformGrid(4), weight, metric))
    assert solver.asked == 1
    others = [
        (UniformGrid(3), weight, metric),
        (NM(2, 4), weight, metric),
        (UniformGrid(4), weight + 1, metric),
        (UniformGrid(4), weight, Metric(moment(8, 2), moment(4, 1))),
        (UniformGrid(4), weight, Metric(moment(8, 0), moment(4, 2))),
        (UniformGrid(4), weight[:, :4], Metric(moment(8, 0)[:4, :4], moment(4, 1))),
    ]
    for number, (structure, matrix, measure) in enumerate(others, start=2):
        assert torch.equal(remembering(structure, matrix, measure), quick(structure, matrix, measure))
        assert solver.asked == number


def test_the_oldest_answers_are_forgotten_and_large_ones_not_kept():
    solver = Counting()
    remembering = Remembering(solver, entries=128)
    metric = Metric(moment(8, 0), moment(4, 1))
    weights = [torch.randn(4, 8) for _ in range(5)]
    for weight in weights:
        remembering(UniformGrid(4), weight, metric)
    remembering(UniformGrid(4), weights[-1], metric)
    assert solver.asked == 5
    remembering(UniformGrid(4), weights[0], metric)
    assert solver.asked == 6
    large = torch.randn(8, 8)
    for _ in range(2):
        remembering(UniformGrid(4), large, Metric(moment(8, 0), moment(8, 1)))
    assert solver.asked == 8
