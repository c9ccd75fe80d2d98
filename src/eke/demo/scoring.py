"""How witnesses count what is right, and how they deal samples out to splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .._types import Counts


def counted(right: Sequence[Tensor], samples: Sequence[Tensor], *, name: str) -> Counts:
    """Return counts with the outcome of every sample.

    Args:
        right: Whether each sample is right, bool (n,) a batch.
        samples: What identifies the samples, a tensor a batch.
        name: What the share is called in reports.

    Returns:
        Counts that can be compared sample by sample.

    Raises:
        ValueError: if there is no batch.
    """
    if not right:
        raise ValueError(
            f"The evaluation got {len(right)} batches: pass a list or a DataLoader, not an iterator that is used up."
        )
    order = hashlib.sha256()
    for sample in samples:
        order.update(sample.detach().cpu().contiguous().numpy().tobytes())
    outcomes = torch.cat([outcome.flatten() for outcome in right])
    return Counts(int(outcomes.sum()), outcomes.numel(), outcomes, order.hexdigest(), name)


def shuffled(texts: Iterable[str]) -> list[str]:
    """Return texts in the order of their SHA-256: as good as random, and the same on every machine."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
