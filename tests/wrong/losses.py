"""Losses and scores that are none, have no gradient, or are not called as people think."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import eke
from eke import Counts
from eke.compression import cross_entropy

from .row import BUDGET, STEPS, Row, Wrapped, compress, net, on_task, splits


def loses_key(model, batch):
    raise KeyError("target")


def silent(model, batch):
    with torch.no_grad():
        return cross_entropy(model, batch)


def backward(model, batch):
    loss = cross_entropy(model, batch)
    loss.backward()
    return loss


def shrinks(model, batch):
    with torch.no_grad():
        next(model.parameters()).mul_(0.9)
    return cross_entropy(model, batch)


def of_another_model():
    model = net()
    return compress(model, loss=lambda _, batch: cross_entropy(model, batch))


def one_output(**options):
    parts = [[(x, y.float()) for x, y in part] for part in splits()]
    return eke.compress(net(classes=1), eke.Task(*parts, **options), budget=BUDGET, recovery=STEPS, seconds=0.02)


def binary(model, batch):
    return F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], (batch[1] > 0).float())


def no_accuracy(model):
    return {}["accuracy"]


def memory(model, batches):
    raise RuntimeError("not enough memory")


HOW = "eke calls `loss(model, batch)`; the model given to it is one of eke's copies."
OWN = "`lambda model, batch: your_loss(model(batch[0]), batch[1])`."
MEAN = "Return the mean loss of the batch, a tensor with one number."
SCORE = "A score is a number that is larger when the model is better, or counts of right answers."
NUMBER = "Return a float, or `eke.Counts(correct, total)`."

ROWS = [
    Row(
        "no loss",
        lambda _: compress(loss=None),
        TypeError,
        "eke needs loss=, a function loss(model, batch) that returns the mean loss; for classifiers "
        "eke.compression.cross_entropy.",
        "Batches alone do not say what the model is for.",
        "Pass `loss=`, or an `eke.Task`, which has one.",
    ),
    Row(
        "a name",
        lambda _: compress(loss="cross_entropy"),
        TypeError,
        "loss must be a function, called as loss(model, batch), got 'cross_entropy'.",
        HOW,
        "`loss=eke.compression.cross_entropy`.",
    ),
    Row(
        "a loss of outputs and targets",
        lambda _: compress(loss=nn.CrossEntropyLoss()),
        ValueError,
        "loss(model, batch) raised TypeError: ... loss is called with the model and a batch, not with outputs and "
        "targets: "
        "take eke.compression.cross_entropy, or lambda model, batch: your_loss(model(batch[0]), batch[1]).",
        HOW,
        OWN,
    ),
    Row(
        "a function of torch.nn.functional",
        lambda _: compress(loss=F.mse_loss),
        ValueError,
        "loss is called with the model and a batch, not with outputs and targets",
        HOW,
        OWN,
    ),
    Row(
        "a loss with other arguments",
        lambda _: compress(loss=lambda outputs: outputs.mean()),
        TypeError,
        "loss is called as loss(model, batch), but what was given takes (outputs): too many positional arguments.",
        HOW,
        OWN,
    ),
    Row(
        "a loss that raises",
        lambda _: compress(loss=loses_key),
        ValueError,
        "loss(model, batch) raised KeyError: 'target' on calibration batch 0, (float32 (32, 8), int64 (32,)), where "
        "the "
        "model returned float32 (32, 3).",
        "The error came from your loss.",
        "The traceback above the message has its line.",
    ),
    Row(
        "a float",
        lambda _: compress(loss=lambda m, b: float(cross_entropy(m, b))),
        TypeError,
        "loss(model, batch) must return a scalar tensor, got float.",
        "A float has no gradient.",
        "Leave `.item()` and `float()` out.",
    ),
    Row(
        "nothing",
        lambda _: compress(loss=lambda m, b: None),
        TypeError,
        "loss(model, batch) must return a scalar tensor, got NoneType.",
        "It may lack its `return`.",
        MEAN,
    ),
    Row(
        "a tuple",
        lambda _: compress(loss=lambda m, b: (cross_entropy(m, b), 1)),
        TypeError,
        "loss(model, batch) must return a scalar tensor, got tuple.",
        "Only the loss is needed.",
        MEAN,
    ),
    Row(
        "one loss a sample",
        lambda _: compress(loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")),
        ValueError,
        "loss(model, batch) must return a scalar tensor, got shape (32,): take the mean.",
        "Batches are weighed by their mean.",
        "`.mean()`.",
    ),
    Row(
        "a detached loss",
        lambda _: compress(loss=lambda m, b: cross_entropy(m, b).detach()),
        ValueError,
        "loss(model, batch) has no gradient on calibration batch 0: return it without item(), detach(), float() or "
        "torch.no_grad().",
        "What a change costs is predicted from gradients.",
        "Leave `.detach()` out.",
    ),
    Row(
        "a loss under torch.no_grad()",
        lambda _: compress(loss=silent),
        ValueError,
        "loss(model, batch) has no gradient on calibration batch 0",
        "What a change costs is predicted from gradients.",
        "An evaluation function is no loss: leave `torch.no_grad()` out.",
    ),
    Row(
        "a loss that calls another model",
        lambda _: of_another_model(),
        ValueError,
        "loss(model, batch) does not depend on the parameters of the model it is given (calibration batch 0): it must "
        "call "
        "that model, and no other one from outside.",
        HOW,
        "Use the argument, not a variable of the same name.",
    ),
    Row(
        "a loss of the batch alone",
        lambda _: compress(loss=lambda m, b: torch.ones((), requires_grad=True)),
        ValueError,
        "loss(model, batch) does not depend on the parameters of the model it is given",
        HOW,
        "Call the model in it.",
    ),
    Row(
        "a loss that calls backward",
        lambda _: compress(loss=backward),
        ValueError,
        "loss(model, batch) raised RuntimeError: ... Only return the mean loss: eke calls backward itself.",
        "A training step is no loss.",
        MEAN,
    ),
    Row(
        "a loss that changes parameters",
        lambda _: compress(loss=shrinks),
        ValueError,
        "loss(model, batch) changed parameters on calibration batch 0: only return the loss.",
        "Optimizer steps and weight clipping do not belong into it.",
        MEAN,
    ),
    Row(
        "a loss that is NaN",
        lambda _: compress(loss=lambda m, b: cross_entropy(m, b) * float("nan")),
        ValueError,
        "loss(model, batch) is nan on calibration batch 0: check the loss and its targets.",
        "A logarithm of 0, or a division by the number of nothing.",
        "Look at that batch.",
    ),
    Row(
        "a model that returns its loss first",
        lambda _: compress(Wrapped(lambda inner, x: (inner(x).sum(), inner(x)))),
        ValueError,
        "where the model returned (float32 (), float32 (32, 3)): ... Its first output is one number: say where "
        "the logits are, forward=lambda model, batch: ...[1].",
        "The default loss takes the first output as the logits.",
        "`forward=lambda model, batch: model(batch[0])[1]`.",
    ),
    Row(
        "one output a sample, with the default loss",
        lambda _: one_output(),
        ValueError,
        "got targets torch.float32 (32,) and logits (32, 1): ... The model has one output a sample: give a loss= and a "
        "score= of one output, such as eke.compression.squared_loss and mean_squared_error, or your own with "
        "binary_cross_entropy_with_logits.",
        "The default loss and score are those of classifiers with an output a class.",
        "[Other losses and scores](how-to/metrics.md).",
    ),
    Row(
        "one output a sample, with the default score",
        lambda _: one_output(loss=binary),
        ValueError,
        "accuracy needs logits (batch, classes) of two classes and more and whole targets (batch,), got logits (32, 1) "
        "and targets torch.float32 (32,) in batch 0: convert them or pass your own score=.",
        "The largest of one output is always the first.",
        "[Other losses and scores](how-to/metrics.md).",
    ),
    Row(
        "a number as evaluate",
        lambda _: compress(evaluate=0.9),
        TypeError,
        "evaluate must be a function, called as evaluate(model), got 0.9.",
        "Every plan's model is evaluated.",
        "`evaluate=lambda model: ...`.",
    ),
    Row(
        "evaluate with two arguments",
        lambda _: compress(evaluate=lambda model, loader: 0.9),
        TypeError,
        "evaluate is called as evaluate(model), but what was given takes (model, loader): missing a required argument: "
        "'loader'.",
        "Only the model is passed.",
        "`evaluate=lambda model: your_function(model, loader)`.",
    ),
    Row(
        "report with two arguments",
        lambda _: compress(report=lambda model, loader: 0.9),
        TypeError,
        "report is called as report(model)",
        "Only the model is passed.",
        "`report=lambda model: ...`.",
    ),
    Row(
        "evaluate that raises",
        lambda _: compress(evaluate=no_accuracy),
        ValueError,
        "evaluate(model) raised KeyError: 'accuracy': it is called with the model in evaluation mode and returns a "
        "float, "
        "larger is better, or eke.Counts.",
        "The error came from your function.",
        "The traceback above the message has its line.",
    ),
    Row(
        "a score with one argument",
        lambda _: on_task(score=lambda model: 0.9),
        TypeError,
        "score is called as score(model, batches), but what was given takes (model): too many positional arguments.",
        "A task's score gets the batches of a split.",
        "`score=lambda model, batches: ...`.",
    ),
    Row(
        "a score that raises",
        lambda _: on_task(score=memory),
        ValueError,
        "score(model, batches) raised RuntimeError: not enough memory",
        "The error came from your function.",
        "The traceback above the message has its line.",
    ),
    Row(
        "a score of None",
        lambda _: compress(evaluate=lambda model: None),
        TypeError,
        "evaluate must return a float, ... got NoneType for the original model.",
        "It may lack its `return`.",
        NUMBER,
    ),
    Row(
        "a score as text",
        lambda _: compress(evaluate=lambda model: "0.93"),
        TypeError,
        "evaluate must return a float, ... got str for the original model.",
        SCORE,
        NUMBER,
    ),
    Row(
        "a score as (correct, total)",
        lambda _: compress(evaluate=lambda model: (93, 100)),
        TypeError,
        "got tuple for the original model: (correct, total) is eke.Counts(correct, total).",
        SCORE,
        "`eke.Counts(correct, total)`.",
    ),
    Row(
        "one score a sample",
        lambda _: compress(evaluate=lambda model: torch.ones(32)),
        TypeError,
        "evaluate must return a float, ... got Tensor for the original model.",
        SCORE,
        NUMBER,
    ),
    Row(
        "a score that is NaN",
        lambda _: compress(evaluate=lambda model: float("nan")),
        ValueError,
        "evaluate returned nan for the original model: check the metric and the data.",
        "A metric of no samples, or a division by 0.",
        "Call it on the original model yourself.",
    ),
    Row(
        "a score of no samples",
        lambda _: compress(evaluate=lambda model: Counts(0, 0)),
        ValueError,
        "evaluate counted 0 samples for the original model: pass a loader that can be iterated more than once.",
        "Its loader was used up.",
        "Iterate a loader, not an iterator.",
    ),
]
