"""A matrix as factors: one layer becomes two thin ones, or one with Kronecker-sparse factors.

y = W x + b with W = L R becomes the layer R without bias, then the layer L with bias b. A convolution keeps kernel,
stride, padding and dilation in the first and gets a 1x1 (1, 1x1x1) convolution as the second. A chain makes a linear
layer an `nn.KSLinear`. That a model accepts others in place of its layer (and does not, say, read the layer's weight
itself) is seen by running it with two factors of full rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..nn import KSLinear
from ..patterns import Chain
from ..sites import Site, find
from ..structures import EntrySparse, KroneckerSparse, LowRank, Structure
from .task import evaluating

StandIn = int | Chain
"""What takes a layer's place: two layers with so many channels between them, or one with these factors."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stand_in(structure: Structure | None, shape: tuple[int, int]) -> StandIn | EntrySparse | None:
    """Return what takes the place of a layer whose matrix (m, n) gets a structure; None if the layer stays."""
    if isinstance(structure, EntrySparse):
        return structure
    if isinstance(structure, LowRank):
        return structure.rank_of(shape)
    return structure.chain if isinstance(structure, KroneckerSparse) else None


def factor_(model: nn.Module, site: Site, form: StandIn) -> None:
    """Replace a site's module by `nn.Sequential(first, second)` or `KSLinear`, in place; values are not set.

    Args:
        model: The model that has the site.
        site: A linear layer or, for a rank, a convolution without groups.
        form: Channels between the two, or the factors of one.

    Raises:
        ValueError: if the module is of another kind.
    """
    if isinstance(form, Chain):
        _chain_(model, site, form)
        return
    old, rank = site.module(model), form
    weight = site.tensor(model)
    like = {"device": weight.device, "dtype": weight.dtype}
    biased = getattr(old, "bias", None) is not None
    first: nn.Module
    second: nn.Module
    # New layers draw their values from the global generator, which is put back.
    with torch.random.fork_rng(devices=[weight.device.index] if weight.is_cuda else []):
        if isinstance(old, _CONVOLUTIONS) and old.groups == 1:
            kind: Any = next(known for known in _CONVOLUTIONS if isinstance(old, known))
            first = kind(
                old.in_channels, rank, old.kernel_size, stride=old.stride, padding=old.padding, dilation=old.dilation,
                padding_mode=old.padding_mode, bias=False, **like,
            )  # fmt: skip
            second = kind(rank, old.out_channels, 1, bias=biased, **like)
        elif site.kind == "linear":
            rows, columns = site.shape
            first = nn.Linear(columns, rank, bias=False, **like)
            second = nn.Linear(rank, rows, bias=biased, **like)
        else:
            raise ValueError(
                f"Cannot factor {site.name!r} ({site.kind}, groups={site.groups}): leave it out with skip=."
            )
    pair = nn.Sequential(first, second).train(old.training).requires_grad_(weight.requires_grad)
    if biased:
        second.bias = old.bias
    parent, _, attribute = site.module_name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, pair)


def _chain_(model: nn.Module, site: Site, chain: Chain) -> None:
    """Replace a linear layer by one with Kronecker-sparse factors, in place; the bias stays.

    Raises:
        ValueError: if the module is no linear layer, or the chain is of another size.
    """
    old, weight = site.module(model), site.tensor(model)
    if site.kind != "linear" or chain.shape != site.shape:
        raise ValueError(
            f"Cannot make {site.name!r} ({site.kind}, {site.shape}) the chain {chain} of shape {chain.shape}: it takes "
            "the place of linear layers of its own size; leave it out with skip=."
        )
    rows, columns = site.shape
    with torch.random.fork_rng(devices=[weight.device.index] if weight.is_cuda else []):
        new = KSLinear(columns, rows, chain=chain, bias=False, device=weight.device, dtype=weight.dtype)
    new.bias = getattr(old, "bias", None)
    new.train(old.training).factors.requires_grad_(weight.requires_grad)
    parent, _, attribute = site.module_name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)


def fill_chain_(model: nn.Module, name: str, member: Tensor) -> None:
    """Write the factors of a member of its chain into the layer that stands for a matrix, in place.

    Args:
        model: After `factor_`.
        name: Of the factored module.
        member: (m, n).
    """
    layer = model.get_submodule(name)
    assert isinstance(layer, KSLinear)
    with torch.no_grad():
        for parameter, blocks in zip(layer.factors, KroneckerSparse(layer.chain).encode(member).values()):
            parameter.copy_(blocks)


def fill_(model: nn.Module, name: str, left: Tensor, right: Tensor) -> None:
    """Write factors into the two layers that stand for a matrix, in place.

    Args:
        model: After `factor_`.
        name: Of the factored module.
        left: (m, rank).
        right: (rank, n).
    """
    first, second = (model.get_parameter(f"{name}.{part}.weight") for part in (0, 1))
    with torch.no_grad():
        first.copy_(right.reshape(first.shape))
        second.copy_(left.reshape(second.shape))


def factorable(model: nn.Module, sites: Sequence[Site], call: Callable[[nn.Module], Any]) -> list[str]:
    """Return the sites that two factors of full rank can stand in for, the outputs staying the same.

    Args:
        model: Any module; not changed.
        sites: Its matrices.
        call: Runs the model once and returns its outputs.

    Returns:
        Names of sites.
    """
    known = [
        site for site in sites
        if site.hookable and site.groups == 1 and not site.tied and site.kind in ("linear", "conv") and site.module_name
    ]  # fmt: skip
    with evaluating(model):
        wanted = _tensors(call(model))
    if _stands_in(model, known, call, wanted):
        return [site.name for site in known]
    return [site.name for site in known if _stands_in(model, [site], call, wanted)]


def _stands_in(
    model: nn.Module, sites: Sequence[Site], call: Callable[[nn.Module], Any], wanted: Sequence[Tensor]
) -> bool:
    trial = copy.deepcopy(model).eval()
    try:
        for site in sites:
            # Of full rank the identity is a factor.
            rank, matrix = min(site.shape), site.read(trial)
            left, right = torch.eye(rank), torch.eye(rank)
            left, right = (matrix, right) if rank == site.shape[1] else (left, matrix)
            factor_(trial, site, rank)
            fill_(trial, site.name, left, right)
        with torch.no_grad():
            got = _tensors(call(trial))
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    return len(got) == len(wanted) and all(
        a.shape == b.shape and float((a - b).abs().max()) <= 1e-2 * max(1e-6, float(b.abs().max()))
        for a, b in zip(got, wanted)
        if b.is_floating_point() and b.numel()
    )


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def cut_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Return the shape of a site's matrix in a model that was cut."""
    return next(site.shape for site in find(model) if site.name == name)
