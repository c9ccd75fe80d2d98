"""A loss whose labels are drawn from the model: its gradients' second moment is the Fisher, not the empirical one.

Source: Kunstner, Hennig, Balles, "Limitations of the empirical Fisher approximation for natural gradient
descent", 2019.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Loss


def sampled_loss(logits: Callable[[nn.Module, Batch], Tensor], *, generator: torch.Generator | None = None) -> Loss:
    """Return the cross entropy of logits against labels drawn from their own softmax.

    Args:
        logits: `logits(model, batch)`: (samples, ..., classes), the last dimension holding the classes.
        generator: Source of the labels; None takes a new one with a fixed seed, so the global one is not read.

    Returns:
        A loss: mean over samples; several distributions a sample (tokens) are averaged too, as a mean loss does.
    """
    source = torch.Generator().manual_seed(0) if generator is None else generator

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scores = logits(model, batch)
        flat = scores.reshape(-1, scores.shape[-1])
        chances = flat.detach().softmax(-1).to(source.device)
        labels = torch.multinomial(chances, 1, generator=source)[:, 0]
        return F.cross_entropy(flat, labels.to(flat.device))

    return loss
