"""What a compressed model learns from: the calibration samples and the original model's answers to them.

Answers are computed once and cached. Where all batches are trees of tensors with one leading sample dimension, samples
are mixed freely between batches; otherwise (ragged batches) the batches themselves are shuffled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .._types import Batch
from .task import Forward, evaluating, logits_of


@dataclass(frozen=True)
class Lessons:
    """Samples with the teacher's answers.

    Args:
        batches: Batches as the loader gave them, or a single one with all samples.
        answers: The teacher's outputs, detached, one tree a batch.
        mixed: Whether `batches` is a single batch whose samples can be indexed.
        samples: Samples, or batches where samples cannot be mixed.
    """

    batches: Sequence[Batch]
    answers: Sequence[Any]
    mixed: bool
    samples: int

    def digest(self) -> str:
        """Return the SHA-256 of all tensors of the batches, in their order."""
        found = hashlib.sha256()
        for leaf in pytree.tree_leaves(list(self.batches)):
            if isinstance(leaf, Tensor):
                found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def take(self, index: Tensor) -> tuple[Batch, Any]:
        """Return the batch made of some samples, and the teacher's answers.

        Args:
            index: Samples (batch,); where samples cannot be mixed, the first is the number of a batch.
        """
        if self.mixed:
            return _pick(self.batches[0], index), _pick(self.answers[0], index)
        chosen = int(index[0])
        return self.batches[chosen], self.answers[chosen]


def collect(
    teacher: nn.Module, batches: Iterable[Batch], *, forward: Forward, max_bytes: float = 2e9, chunk: int = 250
) -> Lessons:
    """Gather the batches and the teacher's answers.

    Args:
        teacher: The original model.
        batches: Calibration batches.
        forward: Calls a model on a batch.
        max_bytes: Bytes of batches after which the rest is left out.
        chunk: Samples a forward pass of the teacher.

    Returns:
        The lessons.

    Raises:
        ValueError: if there is no batch, or the teacher's answer to one is not finite.
    """
    gathered: list[Batch] = []
    size = 0
    for batch in batches:
        gathered.append(batch)
        size += sum(leaf.nbytes for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
        if size > max_bytes:
            break
    if not gathered:
        raise ValueError("Recovery got 0 calibration batches: pass a list or a DataLoader, not a used-up iterator.")
    joined = _join(gathered)
    pieces = gathered if joined is None else _chunks(joined, chunk)
    answers = []
    with evaluating(teacher):
        for piece in pieces:
            answer = forward(teacher, piece)
            if not _finite(answer):
                raise ValueError(_where_not_finite(teacher, gathered, forward))
            answers.append(pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, answer))
    all_answers = _join(answers) if joined is not None else None
    if joined is None or all_answers is None:
        return Lessons(pieces, answers, False, len(pieces))
    return Lessons([joined], [all_answers], True, _length(joined))


def distillation(student: Any, teacher: Any, *, temperature: float = 2.0) -> Tensor:
    """Distance of the student's answers from the teacher's.

    Logits (batch, classes) are compared by the Kullback-Leibler divergence at a temperature (Hinton, Vinyals, Dean,
    "Distilling the knowledge in a neural network", 2015), and so are named logits (batch, tokens, classes), as language
    models return them, token by token; anything else by the squared error relative to the variance of the teacher's
    values. A task may bring a distance of its own (`Task(recovery=Recovery(match=...))`).

    Args:
        student: The student's outputs.
        teacher: The teacher's outputs, the same tree.
        temperature: Of the softmax.

    Returns:
        Scalar tensor.
    """
    try:
        ours, theirs = logits_of(student), logits_of(teacher)
    except TypeError:
        return _relative_error(student, teacher)
    if ours.ndim == 3 and not isinstance(student, Tensor):
        ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)
    if ours.ndim == 2 and ours.shape[1] > 1:
        return F.kl_div(
            F.log_softmax(ours / temperature, 1),
            F.log_softmax(theirs / temperature, 1),
            reduction="batchmean",
            log_target=True,
        ) * (temperature * temperature)
    return _relative_error(student, teacher)


def _relative_error(student: Any, teacher: Any) -> Tensor:
    """Return the mean over all tensors of the squared error relative to the variance of the teacher's values."""
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(student), pytree.tree_leaves(teacher))
        if isinstance(a, Tensor) and a.is_floating_point()
    ]
    return torch.stack([F.mse_loss(a, b) / b.var(unbiased=False).clamp_min(1e-12) for a, b in pairs]).mean()


def _finite(tree: Any) -> bool:
    """Return whether all floating point values are finite."""
    return all(
        bool(torch.isfinite(leaf).all())
        for leaf in pytree.tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )


def _where_not_finite(teacher: nn.Module, batches: Sequence[Batch], forward: Forward) -> str:
    """Return the message that names the loader's batch with the first answer that is not finite."""
    index = next((i for i, batch in enumerate(batches) if not _finite(forward(teacher, batch))), None)
    place = "the calibration batches together" if index is None else f"calibration batch {index}"
    return f"The original model's output on {place} has values that are not finite: check the data and the model."


def _length(tree: Any) -> int:
    return int(next(leaf.shape[0] for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)))


def _pick(tree: Any, index: Tensor) -> Any:
    return pytree.tree_map(lambda leaf: leaf[index], tree)


def _chunks(tree: Any, size: int) -> list[Any]:
    return [_pick(tree, torch.arange(i, min(i + size, _length(tree)))) for i in range(0, _length(tree), size)]


def _join(trees: Sequence[Any]) -> Any | None:
    """Return trees of tensors concatenated along the first dimension, or None where that is not possible."""
    flat = [pytree.tree_flatten(tree) for tree in trees]
    spec = flat[0][1]
    columns = list(zip(*(leaves for leaves, _ in flat)))
    for leaves, other in flat:
        if other != spec or not all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves) or not leaves:
            return None
        if len({leaf.shape[0] for leaf in leaves}) != 1:
            return None
    if any(len({leaf.shape[1:] for leaf in column}) != 1 for column in columns):
        return None
    return pytree.tree_unflatten([torch.cat(column) for column in columns], spec)
