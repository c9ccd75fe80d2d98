"""Feature maps without parameters: what takes the place of the exponential in attention.

elu(x) + 1 is x + 1 above zero and e^x below: positive, so that a denominator of sums never vanishes.
Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs", 2020.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FeatureMap = Callable[[Tensor], Tensor]


def elu(x: Tensor) -> Tensor:
    """Return x + 1 above zero and e^x below, which is positive everywhere."""
    return torch.nn.functional.elu(x) + 1


def relu(x: Tensor) -> Tensor:
    """Return max(x, 0)."""
    return torch.relu(x)


def identity(x: Tensor) -> Tensor:
    """Return x."""
    return x


NAMED: dict[str, FeatureMap] = {"elu": elu, "relu": relu, "identity": identity}


def find(feature_map: str | FeatureMap | None) -> FeatureMap:
    """Return a feature map by name, or the callable itself.

    Args:
        feature_map: "elu", "relu", "identity", None for identity, or a callable on (..., dim).

    Raises:
        ValueError: if the name is unknown.
    """
    if feature_map is None:
        return identity
    if callable(feature_map):
        return feature_map
    if feature_map not in NAMED:
        raise ValueError(f"feature_map is a callable or one of {', '.join(map(repr, NAMED))}, got {feature_map!r}.")
    return NAMED[feature_map]
