"""The layers of a model whose curvature has a form that hooks can measure.

Linear layers and convolutions are one matrix each; the packed projection of `nn.MultiheadAttention` is three groups of
rows (queries, keys, values) with inputs of their own; a table of embeddings has unit vectors for inputs, so only its
output side has a basis; scale and shift of a normalization have the exact diagonal. A bias is a last input column.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..curvature import Calls, Lookups, Rows, Seen, rows_of, shared_rows
from ..sites import Site, find, unwrap

_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm1d,
    nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip


@dataclass
class Layer(ABC):
    """A weight with its bias, and who applies it.

    Args:
        name: Where it is.
        owners: Modules (or parameters) whose calls are its calls; more than one where modules share the weight.
        weight: The parameter.
        bias: Its bias, None without one.
    """

    name: str
    owners: tuple[object, ...]
    weight: nn.Parameter
    bias: nn.Parameter | None

    @abstractmethod
    def rows(self, calls: Calls, seen: Seen) -> Rows | Lookups:
        """Return the examples of calls."""

    @abstractmethod
    def matrix(self, stored: Tensor) -> Tensor:
        """Return (groups, m, n) of a tensor in the shape of the weight."""

    @abstractmethod
    def stored(self, matrix: Tensor) -> Tensor:
        """Return (groups, m, n) in the shape of the weight."""

    @property
    def bases(self) -> tuple[bool, bool]:
        """Whether input and output side have a basis."""
        return True, True

    @property
    def taps(self) -> int:
        """Taps of a convolution's kernel, 1 for others."""
        return 1

    @property
    def spatial(self) -> int:
        """Dimensions that a kernel moves along, 0 for others than convolutions."""
        return 0

    def gradient(self) -> Tensor:
        """Return the gradient as (groups, m, n [+ 1]), float32 or float64."""
        assert self.weight.grad is not None
        matrix = self.matrix(_wide(self.weight.grad))
        if self.bias is None:
            return matrix
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([matrix, _wide(bias).reshape(*matrix.shape[:2], 1)], 2)

    def mix_(self, running: Tensor, share: float) -> None:
        """Replace a share of a running mean of gradients (groups, m, n [+ 1]) by the gradient."""
        assert self.weight.grad is not None
        matrix = self.matrix(_wide(self.weight.grad))
        running[:, :, : matrix.shape[2]].lerp_(matrix, share)
        if self.bias is not None:
            column = running[:, :, -1]
            bias = self.bias.grad
            column.lerp_(torch.zeros_like(column) if bias is None else _wide(bias).reshape(column.shape), share)

    def change_(self, direction: Tensor, rate: float, *, decay: float) -> None:
        """Shrink the parameters by decay, then subtract rate * direction (groups, m, n [+ 1])."""
        parts = [(self.weight, self.stored(direction if self.bias is None else direction[:, :, :-1]))]
        if self.bias is not None:
            parts.append((self.bias, direction[:, :, -1].reshape(self.bias.shape)))
        for parameter, part in parts:
            if decay:
                parameter.mul_(1 - decay)
            parameter.add_(part.to(parameter.dtype), alpha=-rate)


@dataclass
class Matrix(Layer):
    """A linear layer or convolution."""

    site: Site

    def rows(self, calls: Calls, seen: Seen) -> Rows:
        """Return inputs and output gradients."""
        return rows_of(
            self.site, calls, bias=self.bias is not None, sharing=seen.sharing, mean=seen.mean,
            loss_scale=seen.loss_scale, weights=seen.weights,
        )  # fmt: skip

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the site's matrix."""
        return self.site.matrix_of(stored).reshape(self.site.groups, -1, self.site.shape[1])

    def stored(self, matrix: Tensor) -> Tensor:
        """Return the site's tensor."""
        return self.site.stored_of(matrix.reshape(self.site.shape))

    @property
    def taps(self) -> int:
        """Taps of the kernel."""
        geometry = self.site.geometry
        return 1 if geometry is None else torch.Size(geometry.kernel).numel()

    @property
    def spatial(self) -> int:
        """Dimensions of the kernel."""
        return 0 if self.site.geometry is None else len(self.site.geometry.kernel)


@dataclass
class Projection(Layer):
    """A weight inside `nn.MultiheadAttention`: (groups * m, n)."""

    groups: int

    def rows(self, calls: Calls, seen: Seen) -> Rows:
        """Return inputs and output gradients; calls are (groups, positions, batch, n) and (positions, batch, m)."""
        return shared_rows(
            calls,
            lambda x: x.transpose(1, 2),
            lambda y: y.reshape(*y.shape[:2], self.groups, -1).permute(2, 1, 0, 3),
            bias=self.bias is not None, name=self.name, seen=seen,
        )  # fmt: skip

    def matrix(self, stored: Tensor) -> Tensor:
        """Return its blocks of rows."""
        return stored.reshape(self.groups, -1, stored.shape[1])

    def stored(self, matrix: Tensor) -> Tensor:
        """Return blocks of rows as one matrix."""
        return matrix.reshape(self.weight.shape)


@dataclass
class Table(Layer):
    """A table of embeddings (height, d)."""

    padding: int | None

    def rows(self, calls: Calls, seen: Seen) -> Lookups:
        """Return what was looked up; a row for padding has no gradient."""
        found = shared_rows(
            calls,
            # Indices travel as float64, which holds them exactly.
            lambda x: x.reshape(1, x.shape[0] if x.dim() else 1, -1, 1).double(),
            lambda y: y.reshape(1, y.shape[0] if y.dim() > 1 else 1, -1, y.shape[-1]),
            bias=False, name=self.name, seen=_summed(seen),
        )  # fmt: skip
        index, g = found.a[0, :, :, 0].long(), found.g[0]
        if self.padding is not None:
            g = g * (index != self.padding)[:, :, None]
        return Lookups(index, g, self.weight.shape[0])

    def matrix(self, stored: Tensor) -> Tensor:
        """Return the table."""
        return stored[None]

    def stored(self, matrix: Tensor) -> Tensor:
        """Return the table."""
        return matrix[0]

    @property
    def bases(self) -> tuple[bool, bool]:
        """Whether gradients, and rows of the table, have a basis."""
        return True, False


@dataclass
class Norm(Layer):
    """Scale and shift of a normalization: a diagonal, so one column without any basis."""

    module: nn.Module

    def rows(self, calls: Calls, seen: Seen) -> Rows:
        """Return whole gradients of examples, with the input 1."""
        ready = [(number, self._gradients(x, gradient)) for number, x, gradient in calls]
        found = shared_rows(
            [(number, y.new_ones(y.shape[:2]), y) for number, y in ready],
            lambda x: x[None, :, :, None],
            lambda y: y[None],
            bias=False, name=self.name, seen=_summed(seen),
        )  # fmt: skip
        return Rows(found.a[:, :, :1], found.g.sum(2, keepdim=True))

    def _gradients(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Return gradients (examples, locations, entries of scale and then shift)."""
        x, gradient = _wide(x), _wide(gradient)
        module = self.module
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            shape = list(module.normalized_shape)
            layer = isinstance(module, nn.LayerNorm)
            normed = F.layer_norm(x, shape, eps=module.eps or 0.0) if layer else F.rms_norm(x, shape, eps=module.eps)
            samples = len(x) if x.dim() > len(shape) else 1
            parts = [part.reshape(samples, -1, self.weight.numel()) for part in (gradient * normed, gradient)]
        else:
            if isinstance(module, nn.GroupNorm):
                normed = F.group_norm(x, module.num_groups, eps=module.eps)
            elif isinstance(module, nn.modules.instancenorm._InstanceNorm):
                normed = F.instance_norm(x, eps=module.eps)
            else:
                normed = F.batch_norm(x, None, None, training=True, eps=module.eps)  # type: ignore[arg-type]
            parts = [part.flatten(2).transpose(1, 2) if part.dim() > 2 else part[:, None]
                     for part in (gradient * normed, gradient)]  # fmt: skip
        return torch.cat(parts if self.bias is not None else parts[:1], 2)

    def matrix(self, stored: Tensor) -> Tensor:
        """Return a column."""
        return stored.reshape(1, -1, 1)

    def stored(self, matrix: Tensor) -> Tensor:
        """Return the parameter of a column."""
        return matrix.reshape(self.weight.shape)

    @property
    def bases(self) -> tuple[bool, bool]:
        """No side has a basis."""
        return False, False

    def gradient(self) -> Tensor:
        """Return the gradients of scale and shift below each other, (1, entries, 1)."""
        parts = [self.weight] if self.bias is None else [self.weight, self.bias]
        whole = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
        return torch.cat([_wide(part).flatten() for part in whole])[None, :, None]

    def change_(self, direction: Tensor, rate: float, *, decay: float) -> None:
        """Shrink the parameters by decay, then subtract rate * direction (1, entries, 1)."""
        size = self.weight.numel()
        for parameter, part in ((self.weight, direction[0, :size, 0]), (self.bias, direction[0, size:, 0])):
            if parameter is not None:
                if decay:
                    parameter.mul_(1 - decay)
                parameter.add_(part.reshape(parameter.shape).to(parameter.dtype), alpha=-rate)


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers whose curvature EKFAC can measure, of those that need a gradient.

    Weights that share memory with something else than another layer of the same kind are left out.
    """
    model = unwrap(model)
    found: list[Layer] = []
    for site in find(model):
        weight = site.tensor(model)
        if not weight.requires_grad:
            continue
        layer: Layer | None = None
        if site.kind == "attention":
            layer = _projection(model, site, weight)
        elif site.kind == "embedding":
            layer = _table(model, site, weight)
        elif site.hookable and site.kind in {"linear", "conv", "conv_transpose"}:
            layer = _matrix(model, site, weight)
        if layer is not None:
            found.append(layer)
    counts: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if type(module) in _NORMS and weight is not None and weight.requires_grad and counts[id(weight)] == 1:
            bias = module._parameters.get("bias")
            found.append(Norm(name, (module,), weight, _trained(bias), module))
    return found


def _matrix(model: nn.Module, site: Site, weight: nn.Parameter) -> Matrix | None:
    owners = [site.module(model)]
    for name in site.tied:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute != "weight" or type(module) is not type(owners[0]) or module.weight is not weight:
            return None
        owners.append(module)
    biases = {id(bias): bias for bias in (getattr(module, site.bias_name, None) for module in owners)}
    bias = next(iter(biases.values())) if len(biases) == 1 else None
    return Matrix(site.name, tuple(owners), weight, _trained(bias), site)


def _projection(model: nn.Module, site: Site, weight: nn.Parameter) -> Projection | None:
    owner = site.module_name
    packed = site.parameter == "in_proj_weight"
    module: Any = site.module(model)
    if not isinstance(module, nn.MultiheadAttention):
        owner = owner.rpartition(".")[0]
        module = model.get_submodule(owner)
    if type(module) is not nn.MultiheadAttention or site.tied:
        return None
    bias = module.in_proj_bias if packed else module.out_proj.bias if site.parameter == "weight" else None
    return Projection(site.name, (weight,), weight, _trained(bias), 3 if packed else 1)


def _table(model: nn.Module, site: Site, weight: nn.Parameter) -> Table | None:
    module = site.module(model)
    plain = type(module) is nn.Embedding and not (module.sparse or module.scale_grad_by_freq or module.max_norm)
    if not plain or site.tied:
        return None
    return Table(site.name, (module,), weight, None, module.padding_idx)  # type: ignore[arg-type]


def attentions(model: nn.Module, layers: list[Layer]) -> list[nn.MultiheadAttention]:
    """Return the attentions that apply one of the layers."""
    inside = {id(layer.weight) for layer in layers if isinstance(layer, Projection)}
    return [
        module
        for module in unwrap(model).modules()
        if type(module) is nn.MultiheadAttention and inside & {id(p) for p in module.parameters()}
    ]


def _summed(seen: Seen) -> Seen:
    """Return how locations are read that no mean input can stand for."""
    return seen if seen.sharing == "expand" else replace(seen, sharing="sum")


def _trained(bias: object) -> nn.Parameter | None:
    return bias if isinstance(bias, nn.Parameter) and bias.requires_grad else None


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
