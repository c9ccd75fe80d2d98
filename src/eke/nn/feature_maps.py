"""Feature maps with parameters for linear attention: (..., heads, dim) to (..., heads, features), never negative.

T2R: relu(W x + b). Hedgehog: [softmax(W x), softmax(-W x)], W = I at the start. FAVOR+: exp(w_i . x - |x|^2 / 2) /
sqrt(features) with x scaled by dim^(-1/4) and the w_i in orthogonal groups, whose expected product is exp(q . k /
sqrt(dim)), the softmax's kernel.
Sources: Kasai and others, "Finetuning pretrained transformers into RNNs", 2021; Zhang and others, "The hedgehog and the
porcupine", 2024; Choromanski and others, "Rethinking attention with performers", 2021.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def _check(name: str, **numbers: int) -> None:
    """Refuse sizes below one.

    Raises:
        ValueError: naming the size.
    """
    for what, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} needs a positive {what}, got {number!r}.")


class T2R(nn.Module):
    """relu(W x + b), with a matrix for every head.

    Args:
        heads: Heads.
        dim: Inputs of a head.
        features: Outputs of a head; None for dim.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, heads: int, dim: int, features: int | None = None) -> None:
        super().__init__()
        features = dim if features is None else features
        _check("T2R", heads=heads, dim=dim, features=features)
        self.weight = nn.Parameter(torch.randn(heads, dim, features) / math.sqrt(dim))
        self.bias = nn.Parameter(torch.zeros(heads, features))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., heads, features) for x (..., heads, dim)."""
        return torch.relu(torch.einsum("...hd,hdf->...hf", x, self.weight) + self.bias)


class Hedgehog(nn.Module):
    """[softmax(W x), softmax(-W x)], with a square matrix for every head that starts as the identity.

    Args:
        heads: Heads.
        dim: Inputs of a head; it has twice as many features.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        _check("Hedgehog", heads=heads, dim=dim)
        self.weight = nn.Parameter(torch.eye(dim).repeat(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., heads, 2 dim) for x (..., heads, dim)."""
        y = torch.einsum("...hd,hdf->...hf", x, self.weight)
        return torch.cat([torch.softmax(y, -1), torch.softmax(-y, -1)], -1)


class FAVOR(nn.Module):
    """Positive random features of the softmax's kernel exp(q . k / sqrt(dim)), the same for all heads.

    Args:
        dim: Inputs of a head.
        features: Outputs of a head; None for dim.
        generator: Source of randomness; None for torch's own.

    Raises:
        ValueError: if a size is not positive.
    """

    directions: Tensor

    def __init__(self, dim: int, features: int | None = None, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.features = dim if features is None else features
        _check("FAVOR", dim=dim, features=self.features)
        self.register_buffer("directions", torch.empty(self.features, dim))
        self.redraw(generator=generator)

    @torch.no_grad()
    def redraw(self, *, generator: torch.Generator | None = None) -> None:
        """Draw other directions: orthogonal ones in groups of dim, each as long as a normal vector.

        Args:
            generator: Source of randomness; None for torch's own.
        """
        dim = self.directions.shape[1]
        groups = []
        for _ in range(-(-self.features // dim)):
            square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
            lengths = torch.randn(dim, dim, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
            q, r = torch.linalg.qr(square)
            # Only with these signs is every direction as likely as any other.
            groups.append(lengths * (q * r.diagonal().sign()))
        self.directions.copy_(torch.cat(groups)[: self.features])

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., features) for x (..., dim)."""
        x = x * x.shape[-1] ** -0.25
        return torch.exp(x @ self.directions.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(self.features)
