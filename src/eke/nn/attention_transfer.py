"""Attention transfer: substitutes learn beside the softmax attention whose place they will take.

The converted model runs with its softmax, in evaluation mode and without gradients; every substitute sees the queries,
keys and values of its own layer and learns from them at once, so that one layer's graph is alive at a time.
Losses of a layer: "output", sum |y' - y|^2 / sum |y|^2; "weights", the cross-entropy - sum_j a_ij log a'_ij, mean over
real queries i, which Zhang and others ("The hedgehog and the porcupine", 2024) train with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from .. import training
from .._types import Batch
from .softmax_sites import Forward, call_on
from .substitute import Asked, Lesson, Substitute, substitutes

Objective = Literal["output", "weights"]
_LESS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)
_LEAST = 1e-9
"""Weights below this count as this in logarithms."""


def transfer_attention_(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-2,
    objective: Objective = "output",
    only: Iterable[str] | None = None,
    forward: Forward = call_on,
    seed: int = 0,
) -> list[float]:
    """Teach the substitutes of a converted model what softmax attention does in their places.

    Args:
        model: From `linearize`; its substitutes learn in place, nothing else changes.
        batches: What the model is run on.
        steps: Batches to learn from: each is used in turn, in a new order every time round.
        learning_rate: Of Adam; falls to zero as a cosine.
        objective: "output" or "weights".
        only: Names of the modules whose substitutes learn; None for all.
        forward: Runs the model on a batch.
        seed: Of the order.

    Returns:
        The mean loss over layers, step by step.
    """
    parts = substitutes(model)
    chosen = set(parts if only is None else only)
    learners = {part: [p for p in part.parameters() if p.requires_grad] for n, part in parts.items() if n in chosen}
    learned = [parameter for found in learners.values() for parameter in found]
    if not learned or not steps:
        return [0.0] * steps
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []

    def lesson(part: Substitute, asked: Asked, out: Tensor) -> None:
        if not learners.get(part):
            return
        with torch.enable_grad():
            loss = _by_output(part, asked, out) if objective == "output" else _by_weights(part, asked)
            torch.autograd.backward(loss)
        losses.append(float(loss.detach()))

    def step(_: int, samples: Tensor) -> float:
        losses.clear()
        optimizer.zero_grad()
        forward(model, batches[int(samples[0])])
        optimizer.step()
        schedule.step()
        return sum(losses) / max(1, len(losses))

    with lessons(model, lesson):
        return training.run(step, samples=len(batches), batch_size=1, steps=steps, seed=seed)


@contextmanager
def lessons(model: nn.Module, lesson: Lesson) -> Iterator[None]:
    """Run a converted model with its softmax attention as long as the context lasts.

    Args:
        model: The model; in evaluation mode and without gradients meanwhile.
        lesson: Called with each substitute, what it is asked and what the softmax answers.
    """
    parts, flags = substitutes(model).values(), {module: module.training for module in model.modules()}
    try:
        model.eval()
        for part in parts:
            part.lesson = lesson
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.lesson = None
        for module, flag in flags.items():
            module.training = flag


def balance_(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_on) -> None:
    """Set how much far keys weigh against near ones, head by head, to what brings the outputs nearest.

    The weights tried are factors e^0, e^-2, ..., e^-10 of those with which far keys weigh as much as near ones.

    Args:
        model: From `linearize`; its balances change in place.
        batches: What it is run on.
        forward: Runs it.
    """
    tried: dict[Substitute, list[Tensor]] = {}
    begin = {part: part.balance.detach().clone() for part in substitutes(model).values() if part.balance is not None}

    def lesson(part: Substitute, asked: Asked, out: Tensor) -> None:
        if part not in begin or part.balance is None:
            return
        errors = []
        for less in _LESS:
            part.balance.copy_(begin[part] - less)
            errors.append(_difference(part, asked, out)[0].square().sum((0, 2, 3)))
        before = tried.get(part, [torch.zeros_like(e) for e in errors])
        tried[part] = [a + b for a, b in zip(before, errors)]

    with lessons(model, lesson):
        for batch in batches:
            forward(model, batch)
        for part, errors in tried.items():
            assert part.balance is not None
            best = torch.stack(errors).argmin(0)
            part.balance.copy_(begin[part] - torch.tensor(_LESS, device=best.device)[best])


def output_errors(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_on) -> dict[str, float]:
    """Measure how far each substitute's outputs are from the softmax's, given the softmax model's inputs.

    Args:
        model: From `linearize`; not changed.
        batches: What it is run on.
        forward: Runs it.

    Returns:
        sqrt(sum |y' - y|^2 / sum |y|^2) over real positions, by name of the module.
    """
    sums: dict[Substitute, list[float]] = {part: [0.0, 0.0] for part in substitutes(model).values()}

    def lesson(part: Substitute, asked: Asked, out: Tensor) -> None:
        for place, energy in enumerate(_energies(part, asked, out)):
            sums[part][place] += float(energy)

    with lessons(model, lesson):
        for batch in batches:
            forward(model, batch)
    return {name: (sums[part][0] / max(sums[part][1], 1e-30)) ** 0.5 for name, part in substitutes(model).items()}


def weight_divergences(model: nn.Module, batches: Iterable[Batch], *, forward: Forward = call_on) -> dict[str, float]:
    """Measure the mean Kullback-Leibler divergence of each substitute's weights from the softmax's, in nats a query.

    Args:
        model: From `linearize`; not changed.
        batches: What it is run on; all pairs of positions are met.
        forward: Runs it.

    Returns:
        Divergence by name of the module.
    """
    sums: dict[Substitute, list[float]] = {part: [] for part in substitutes(model).values()}

    def lesson(part: Substitute, asked: Asked, _: Tensor) -> None:
        sums[part].append(float(_by_weights(part, asked) - _entropy(part, asked)))

    with lessons(model, lesson):
        for batch in batches:
            forward(model, batch)
    return {name: sum(sums[part]) / max(1, len(sums[part])) for name, part in substitutes(model).items()}


def _answer(part: Substitute, asked: Asked) -> Tensor:
    out, _ = part(asked.q, asked.k, asked.v, causal=part.causal, real=asked.real, scale=asked.scale)
    return out  # type: ignore[no-any-return]


def _rows(part: Substitute, asked: Asked) -> Tensor | None:
    """Return which queries are real, (batch, queries), where that is known."""
    return asked.real if part.beside and asked.q.shape[2] == asked.k.shape[2] else None


def _difference(part: Substitute, asked: Asked, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return error and outputs in float32, zero where a position is not real."""
    difference, rows = _answer(part, asked) - out, _rows(part, asked)
    if rows is not None:
        # What softmax attention gives where nothing is seen is no number.
        difference, out = (x.masked_fill(~rows[:, None, :, None], 0) for x in (difference, out))
    return difference.float(), out.float()


def _energies(part: Substitute, asked: Asked, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squared error and the squared outputs, summed over real positions."""
    difference, out = _difference(part, asked, out)
    return difference.square().sum(), out.square().sum()


def _by_output(part: Substitute, asked: Asked, out: Tensor) -> Tensor:
    error, energy = _energies(part, asked, out)
    return error / energy.clamp_min(1e-30)


def _softmax_weights(part: Substitute, asked: Asked) -> tuple[Tensor, Tensor]:
    """Return the softmax's weights, and which rows (batch, 1, queries) count."""
    q, k, _, real, scale = asked
    scores = q.float() @ k.float().mT * (part.dim**-0.5 if scale is None else scale)
    seen = torch.ones_like(scores[:, :1], dtype=torch.bool)
    seen = seen.tril(k.shape[2] - q.shape[2]) if part.causal else seen
    seen = seen if real is None else seen & real[:, None, None]
    rows = _rows(part, asked)
    counted = seen.any(-1) if rows is None else seen.any(-1) & rows[:, None]
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0), counted


def _mean(by_row: Tensor, counted: Tensor) -> Tensor:
    counted = counted.expand(by_row.shape)
    return (by_row * counted).sum() / counted.sum().clamp_min(1)


def _by_weights(part: Substitute, asked: Asked) -> Tensor:
    with torch.no_grad():
        wanted, counted = _softmax_weights(part, asked)
    found = part.weights(asked.q.float(), asked.k.float(), causal=part.causal, real=asked.real, scale=asked.scale)
    return _mean(-(wanted * found.clamp_min(_LEAST).log()).sum(-1), counted)


def _entropy(part: Substitute, asked: Asked) -> Tensor:
    wanted, counted = _softmax_weights(part, asked)
    return _mean(-(wanted * wanted.clamp_min(_LEAST).log()).sum(-1), counted)
