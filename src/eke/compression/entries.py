"""Layers that skip the entries their matrices do not keep.

While a plan is carried out and learns, a matrix with few entries is a dense layer with zeros, as every other matrix;
once it is packed an `nn.SparseLinear` (on every patch for a convolution) takes the layer's place. What is stored is
what the structure packs, so that a model is saved and rebuilt by way of the dense layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..nn import SparseLinear
from ..nn.sparse_conv import SparseConv2d
from ..sites import Site, find
from ..structures import EntrySparse, Structure


def sparsable(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """Return the sites whose layer a sparse one can stand in for: linear ones and plain convolutions."""
    return [site.name for site in sites if not site.tied and _fits(site.module(model))]


def _fits(module: nn.Module) -> bool:
    return type(module) is nn.Linear or SparseConv2d.fits(module)


def entries_of(structures: Mapping[str, Structure]) -> dict[str, EntrySparse]:
    """Return those of the structures that run sparse, by site name."""
    return {name: structure for name, structure in structures.items() if isinstance(structure, EntrySparse)}


def skip_zeros_(model: nn.Module, structures: Mapping[str, Structure]) -> None:
    """Put sparse layers in the place of dense ones whose matrices are members, in place.

    Args:
        model: Its matrices are members of their structures.
        structures: Structure by site name; only entries are looked at.
    """
    wanted = entries_of(structures)
    for site in find(model) if wanted else ():
        if site.name in wanted:
            _replace_(model, site, site.read(model) != 0)


def skip_any_(model: nn.Module, structures: Mapping[str, Structure]) -> None:
    """Do as `skip_zeros_` with as many entries at random places, for measurements of costs, in place."""
    wanted = entries_of(structures)
    for site in find(model) if wanted else ():
        if site.name in wanted:
            count = wanted[site.name].kept(site.shape)
            generator = torch.Generator().manual_seed(0)
            places = torch.randperm(site.shape[0] * site.shape[1], generator=generator)[:count]
            mask = torch.zeros(site.shape[0] * site.shape[1], dtype=torch.bool)
            mask[places] = True
            _replace_(model, site, mask.view(site.shape))


def with_zeros(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """Return the model with dense layers again where sparse ones stand: itself if there are none, else a copy."""
    wanted = [name for name in entries_of(structures) if _is_sparse(model.get_submodule(name))]
    if not wanted:
        return model
    model = copy.deepcopy(model)
    for name in wanted:
        _set_(model, name, _dense(model.get_submodule(name)))
    return model


def shape_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the shape of the matrix of a sparse layer, None for other modules."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if not _is_sparse(module):
        return None
    linear = module.linear if isinstance(module, SparseConv2d) else module
    assert isinstance(linear, SparseLinear)
    return linear.out_features, linear.in_features


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, SparseLinear | SparseConv2d)


def _replace_(model: nn.Module, site: Site, mask: Tensor) -> None:
    old = site.module(model)
    new: nn.Module
    if isinstance(old, nn.Conv2d):
        new = SparseConv2d.from_dense(old, mask.view(site.stored_shape))
    else:
        assert isinstance(old, nn.Linear)
        new = SparseLinear.from_dense(old, mask)
    _set_(model, site.module_name, new)


def _dense(module: nn.Module) -> nn.Module:
    linear = module.linear if isinstance(module, SparseConv2d) else module
    assert isinstance(linear, SparseLinear)
    bias = linear.bias
    new: nn.Linear | nn.Conv2d
    if isinstance(module, SparseConv2d):
        weight, window = module.to_dense().detach().contiguous(), module.window
        new = nn.Conv2d(
            weight.shape[1], weight.shape[0], window.size, stride=window.stride, padding=window.padding,
            dilation=window.dilation, bias=bias is not None, device="meta",
        )  # fmt: skip
    else:
        weight = linear.to_dense().detach()
        new = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    new.weight, new.bias = nn.Parameter(weight, requires_grad=linear.values.requires_grad), bias
    return new.train(module.training)


def _set_(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)
