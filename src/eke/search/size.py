"""Scores that need no data: parameters, FLOPs, and the logarithms of the layers' sizes.

    log_numel = sum over convolution and linear weights on a path from input to output of ln(entries)

is 0 for a network whose output does not depend on its input. On NAS-Bench-201 it ranks as ZiCo does (Spearman 0.995
between the two on 80 networks), since ZiCo is at least the sum of ln(active weights): a score that means to see more
than size is to be held against it (`partial_correlation`).

Cost: none without an input; with one, a forward and backward pass of one sample in float64.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..cost.forward import call
from .subject import apart, gradients, tensor_of, weights


def log_numel(model: nn.Module, *inputs: Any) -> float:
    """Return the sum of ln(entries) over the weights of convolutions and linear layers.

    Args:
        model: Any module; it is not touched.
        *inputs: An input of the model. With it, only weights on a path from the input to the output count, found by
            a pass with positive weights; without it all count.

    Returns:
        The score, larger is better.

    Raises:
        ValueError: if there is no such layer.
    """  # noqa: DOC502
    with apart(model) as double:
        chosen = weights(double, frozen=True)
        names = _on_a_path(double, chosen, inputs) if inputs else list(chosen)
        return sum(log(chosen[name].numel()) for name in names)


def _on_a_path(model: nn.Module, chosen: dict[str, nn.Parameter], inputs: tuple[Any, ...]) -> list[str]:
    """Return the weights whose gradient is not zero when all weights and inputs are positive.

    Weights are random means, U(0.5, 1.5) / inputs, so that nothing grows or cancels; what normalises, drops branches or
    adds a constant is taken out.
    """
    generator = torch.Generator().manual_seed(0)
    without_norms(model).double().eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
        fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 1
        with torch.no_grad():
            parameter.copy_(torch.zeros_like(drawn) if name.endswith("bias") else drawn / fan_in)

    def positive(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return (torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5).to(leaf.device)

    output = tensor_of(call(model, tree_map(positive, inputs)))
    weigh = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
    found = gradients((output * weigh.to(output.device)).sum(), chosen.values())
    return [name for name, grad in zip(chosen, found) if bool(grad.any())]


def without_norms(model: nn.Module) -> nn.Module:
    """Replace what normalises by the identity, in place, and return the model.

    Args:
        model: A copy that may be changed.

    Returns:
        The same module.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if is_norm(child):
                setattr(module, name, nn.Identity())
    return model


def is_norm(module: nn.Module) -> bool:
    """Return whether a module normalises: batch, layer, group, instance or root mean square."""
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return isinstance(module, kinds) or type(module).__name__.endswith("RMSNorm")
