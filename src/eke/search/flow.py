"""SynFlow: how much flow leads from all-ones inputs through |weights| to the output; no data, no loss.

    R = sum of outputs,  synflow = sum w dR/dw,  logsynflow = sum w ln(dR/dw + 1),   all parameters as |w|

What normalises or drops branches is taken out. In a chain of L layers each layer conserves R, so synflow = L R. Values
grow with depth beyond float32 (1e47 on NAS-Bench-201), hence float64.

Sources: H. Tanaka et al., SynFlow, 2020; N. Cavagnero et al., FreeREA, 2023 (the logarithm).
Cost: a forward and a backward pass of one sample.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..cost.forward import call
from .size import without_norms
from .subject import gradients, inputs_of, tensor_of, weights
from .sweep import Subject


def synflow(subject: Subject) -> float:
    """Return the sum of w dR/dw."""
    return sum(float((weight * grad).sum()) for weight, grad in _flow(subject))


def logsynflow(subject: Subject) -> float:
    """Return the sum of w ln(dR/dw + 1)."""
    return sum(float((weight * (grad + 1).log()).sum()) for weight, grad in _flow(subject))


def _flow(subject: Subject) -> list[tuple[Tensor, Tensor]]:
    """Return |w| and dR/dw of each layer."""
    model = without_norms(copy.deepcopy(subject.model)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    chosen = weights(model)
    inputs = real(inputs_of(subject.first("synflow")), "synflow")
    ones = tree_map(lambda leaf: torch.ones_like(leaf[:1], dtype=torch.float64), inputs)
    total = tensor_of(call(model, ones)).sum()
    return [(w.detach(), g.abs()) for w, g in zip(chosen.values(), gradients(total, chosen.values()))]


def real(inputs: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """Return inputs that are all tensors of real numbers.

    Args:
        inputs: Of a model.
        name: Of the proxy, for the message.

    Returns:
        The same.

    Raises:
        ValueError: if one is something else.
    """
    for leaf in tree_leaves(inputs):
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"{name} replaces the inputs by numbers of its own, which only works for real ones, got {kind}; leave "
                f"{name!r} out for models of tokens, or score from the embeddings on."
            )
    return inputs
