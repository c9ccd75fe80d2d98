"""Initial values and learning rates for layers whose weight is a product of small cores.

A core with fan-in f and fan-out g starts as normal with std = sqrt(1 / f) * min(1, sqrt(g / f)), and its learning rate
under Adam is lr * D / (f * k) with D the layer's inputs and k its number of cores: every core's update then changes the
features as much as one of a dense layer, so that a rate tuned for the dense net stays right.
Source: Qiu, Potapczynski, Finzi, Goldblum, Wilson, "Compute better spent", 2024.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import nn


class Core(NamedTuple):
    """One trained factor of a layer's weight."""

    parameter: nn.Parameter
    fan_in: int
    fan_out: int


@runtime_checkable
class HasCores(Protocol):
    """A layer whose weight is a product of cores."""

    in_features: int

    def cores(self) -> list[Core]:
        """Return the cores of the weight."""
        ...


def initial_std(fan_in: int, fan_out: int) -> float:
    """Return the standard deviation with which a core starts.

    Args:
        fan_in: Terms of each of the core's sums.
        fan_out: Outputs that share one of its inputs.
    """
    return math.sqrt(1 / fan_in) * min(1.0, math.sqrt(fan_out / fan_in))


def param_groups(model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
    """Group a model's parameters by the learning rate that fits their structure, for Adam and its kin.

    Args:
        model: With layers such as `KSLinear` among any others.
        lr: Learning rate of a dense layer; everything but cores keeps it.

    Returns:
        Groups {"params", "lr"} for a torch optimizer, each trainable parameter in one of them.

    Raises:
        ValueError: if lr is not positive.
    """
    if not lr > 0:
        raise ValueError(f"param_groups needs a positive learning rate, got {lr!r}.")
    multiplier: dict[nn.Parameter, float] = {}
    for module in model.modules():
        if isinstance(module, HasCores):
            cores = module.cores()
            for core in cores:
                multiplier[core.parameter] = module.in_features / (core.fan_in * len(cores))
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(multiplier.get(parameter, 1.0), []).append(parameter)
    return [{"params": parameters, "lr": lr * factor} for factor, parameters in sorted(groups.items())]
