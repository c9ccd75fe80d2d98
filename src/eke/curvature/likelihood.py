"""Gradients at a model's outputs whose second moment is the Fisher matrix of its own distribution.

For logits z of a categorical, p = softmax(z): a drawn label y gives p - e_y; exactly, diag(p) - p p^T is the sum over
classes c of v v^T with v = sqrt(p_c) (e_c - p). Independent Bernoullis: p - y, or sqrt(p (1 - p)) e_j. Gaussians of
variance 1: a standard normal, or e_j.

Source: Kunstner, Hennig, Balles, "Limitations of the empirical Fisher approximation for natural gradient descent",
2019; Dangel, Kunstner, Hennig, "BackPACK", 2020 (roots of the loss's Hessian).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Likelihood = Literal["categorical", "bernoulli", "gaussian"]
"""What a model's outputs are the parameters of."""


def pulls(outputs: Tensor, likelihood: Likelihood, *, exact: bool, generator: torch.Generator | None) -> list[Tensor]:
    """Return gradients of examples' losses at the outputs.

    Args:
        outputs: (examples, ..., classes or components).
        likelihood: What they are the parameters of.
        exact: All columns of a root of the Hessian, whose outer products add up to it; or one drawn gradient.
        generator: Source of what is drawn.

    Returns:
        Tensors of the shape of the outputs.

    Raises:
        ValueError: if the likelihood is unknown, or outputs with more than two dimensions are to be exact.
    """
    z = outputs.detach()
    if likelihood not in {"categorical", "bernoulli", "gaussian"}:
        raise ValueError(f'likelihood is "categorical", "bernoulli" or "gaussian", got {likelihood!r}.')
    if exact and z.dim() != 2:
        raise ValueError(f'fisher="exact" needs outputs (examples, classes), got {tuple(z.shape)}; use fisher="mc".')
    if likelihood == "categorical":
        p = z.softmax(-1)
        if exact:
            eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            return [p[:, c : c + 1].sqrt() * (eye[c] - p) for c in range(z.shape[1])]
        labels = torch.multinomial(p.flatten(0, -2), 1, generator=generator).reshape(p.shape[:-1])
        return [p - torch.nn.functional.one_hot(labels, p.shape[-1])]
    if not exact:
        if likelihood == "gaussian":
            return [torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)]
        p = z.sigmoid()
        return [p - torch.bernoulli(p, generator=generator)]
    root = torch.ones_like(z) if likelihood == "gaussian" else (z.sigmoid() * (-z).sigmoid()).sqrt()
    eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    return [root * line for line in eye]
