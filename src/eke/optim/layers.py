"""The layers of a model whose weight is one matrix that hooks can watch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..sites import Site, find


@dataclass
class Layer:
    """One matrix with its bias as the last input column, and the modules that apply it.

    Args:
        site: Where it is.
        modules: More than one where modules share the weight.
        weight: The parameter.
        bias: Its bias, None without one.
    """

    site: Site
    modules: tuple[nn.Module, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None

    def gradient(self) -> Tensor:
        """Return the gradient as (groups, m / groups, n [+ 1]), float32 or float64."""
        assert self.weight.grad is not None
        groups = self.site.groups
        matrix = _wide(self.site.matrix_of(self.weight.grad)).reshape(groups, -1, self.site.shape[1])
        if self.bias is None:
            return matrix
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([matrix, _wide(bias).reshape(groups, -1, 1)], 2)

    def change_(self, direction: Tensor, rate: float, *, decay: float) -> None:
        """Shrink the parameters by decay, then subtract rate * direction (groups, m / groups, n [+ 1])."""
        n = self.site.shape[1]
        parts = [(self.weight, self.site.stored_of(direction[:, :, :n].reshape(self.site.shape)))]
        if self.bias is not None:
            parts.append((self.bias, direction[:, :, n].reshape(self.bias.shape)))
        for parameter, part in parts:
            if decay:
                parameter.mul_(1 - decay)
            parameter.add_(part.to(parameter.dtype), alpha=-rate)


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers that EKFAC can watch: linear layers and convolutions that need a gradient.

    Weights that share memory with something else than another layer of the same kind are left out.
    """
    found = []
    for site in find(model):
        if not site.hookable or site.kind not in {"linear", "conv", "conv_transpose"}:
            continue
        weight = site.tensor(model)
        owners = [site.module(model)]
        for name in site.tied:
            owner, _, attribute = name.rpartition(".")
            module = model.get_submodule(owner)
            if attribute != "weight" or type(module) is not type(owners[0]) or module.weight is not weight:
                break
            owners.append(module)
        if len(owners) != 1 + len(site.tied) or not weight.requires_grad:
            continue
        biases = {id(bias): bias for bias in (getattr(module, site.bias_name, None) for module in owners)}
        bias = next(iter(biases.values())) if len(biases) == 1 else None
        trained = isinstance(bias, nn.Parameter) and bias.requires_grad
        found.append(Layer(site, tuple(owners), weight, bias if trained else None))
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
