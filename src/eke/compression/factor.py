"""A matrix as two factors: one layer becomes two thin ones.

y = W x + b with W = L R becomes the layer R without bias, then the layer L with bias b. A convolution keeps kernel,
stride, padding and dilation in the first and gets a 1x1 (1, 1x1x1) convolution as the second. That a model accepts the
pair in place of its layer (and does not, say, read the layer's weight itself) is seen by running it with full rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..sites import Site, find
from .task import evaluating

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def factor_(model: nn.Module, site: Site, rank: int) -> None:
    """Replace a site's module by `nn.Sequential(first, second)` of a rank, in place; values are not set.

    Args:
        model: The model that has the site.
        site: A linear layer or a convolution without groups.
        rank: Channels between the two.

    Raises:
        ValueError: if the module is of another kind.
    """
    old = site.module(model)
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
