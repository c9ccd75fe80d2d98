"""Make the planned model: a new one, cut, its survivors compensated, its normalisations recalibrated.

The user's model is never touched: every function here works on a copy of its own or says `_`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..curvature import Curvature
from ..sites import Site, Surgery, find
from ..solvers import remove_columns
from ..structures import UniformGrid
from .artifact import Blueprint
from .candidates import Grids, Widths
from .deploy import Pair, fold_batchnorm_, set_memory_format_
from .lessons import Lessons
from .task import Forward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def surgery(widths: Sequence[Widths], picks: Mapping[str, int]) -> Surgery:
    """Return the surgery of a plan.

    Args:
        widths: Candidates of the channel groups.
        picks: Option index by decision.

    Returns:
        The surgery, empty if all channels stay.
    """
    chosen = [(width, picks.get(width.choice, 0)) for width in widths]
    return Surgery.merge(width.group.cut(width.keep(option)) for width, option in chosen if option)


def shaped(model: nn.Module, cuts: Surgery, *, folded: Sequence[Pair], memory_format: str) -> nn.Module:
    """Return a net of the planned shape for measurements, in evaluation mode; its values are not compensated.

    Args:
        model: The original.
        cuts: Channels that stay.
        folded: Pairs to fold.
        memory_format: "contiguous" or "channels_last".

    Returns:
        A new model.
    """
    net = copy.deepcopy(model).eval()
    Blueprint(cuts, tuple(folded), memory_format, {}).reshape_(net)
    return net


def cut(
    model: nn.Module,
    widths: Sequence[Widths],
    picks: Mapping[str, int],
    *,
    sites: Sequence[Site],
    curvature: Curvature,
) -> nn.Module:
    """Return the cut model, each matrix that loses columns compensated by least squares on its inputs.

    Args:
        model: The original.
        widths: Candidates of the channel groups.
        picks: Option index by decision.
        sites: The model's matrices.
        curvature: Second moments of their inputs.

    Returns:
        A new model in evaluation mode.
    """
    net = copy.deepcopy(model).eval()
    by_module = {site.module_name: site for site in sites if site.name in curvature.names}
    columns: dict[str, list[torch.Tensor]] = {}
    for width in widths:
        option = picks.get(width.choice, 0)
        if option:
            dropped = width.group.dropped(width.keep(option))
            for member in width.group.consumers:
                columns.setdefault(member.module_name, []).append(member.columns[dropped].flatten())
    for module_name, parts in columns.items():
        site = by_module.get(module_name)
        if site is None:
            continue
        _compensate_(net, site, torch.cat(parts), curvature)
    surgery(widths, picks).apply_(net)
    return net


def _compensate_(net: nn.Module, site: Site, removed: torch.Tensor, curvature: Curvature) -> None:
    matrix, factors = site.read(net), curvature.factors(site.name)
    bias = getattr(site.module(net), "bias", None)
    removal = remove_columns(
        matrix,
        factors.a[0],
        removed,
        g=factors.g[0],
        mean=factors.mean[0] if bias is not None else None,
        bias=bias.detach() if bias is not None else None,
        locations=factors.locations,
    )
    stays = torch.ones(matrix.shape[1], dtype=torch.bool)
    stays[removed] = False
    matrix[:, stays] = removal.weight.to(matrix)
    matrix[:, ~stays] = 0
    site.write_(net, matrix)
    if bias is not None and removal.bias is not None:
        with torch.no_grad():
            bias.copy_(removal.bias)


def recalibrate_(
    model: nn.Module, lessons: Lessons, *, forward: Forward, batch_size: int = 256, most: int = 2048
) -> None:
    """Estimate the running statistics of batch normalisation anew, in place.

    Args:
        model: The cut model in evaluation mode; it ends in it.
        lessons: Samples.
        forward: Calls the model on a batch.
        batch_size: Samples a forward pass.
        most: Samples in all.
    """
    norms = [m for m in model.modules() if isinstance(m, _NORMS) and m.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        with torch.no_grad():
            if lessons.mixed:
                count = min(most, lessons.samples)
                # Pieces of nearly equal size: a last one of a single sample would have no variance.
                for index in torch.tensor_split(torch.arange(count), max(1, count // batch_size)):
                    forward(model, lessons.take(index)[0])
            else:
                for number in range(min(lessons.samples, 1 + most // batch_size)):
                    forward(model, lessons.take(torch.tensor([number]))[0])
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            norm.training = False


def grids_of(grids: Sequence[Grids], picks: Mapping[str, int]) -> dict[str, UniformGrid]:
    """Return the chosen grid of each matrix that gets one, by site name.

    Args:
        grids: Candidates of the matrices.
        picks: Option index by decision.

    Returns:
        Grids by site name.
    """
    chosen = {grid.site.name: grid.structures[picks[grid.choice]] for grid in grids}
    return {name: structure for name, structure in chosen.items() if isinstance(structure, UniformGrid)}


def on_grids(model: nn.Module, grids: Mapping[str, UniformGrid]) -> dict[str, tuple[Site, UniformGrid]]:
    """Pair the sites of a cut model with their grids.

    Args:
        model: The cut model.
        grids: Grid by site name.

    Returns:
        Site of this model and grid, by site name.
    """
    return {site.name: (site, grids[site.name]) for site in find(model) if site.name in grids}


def deploy_(model: nn.Module, *, folded: Sequence[Pair], memory_format: str, grids: Mapping[str, UniformGrid]) -> None:
    """Project the matrices on their grids, fold, project again and set the memory format, in place.

    Folding multiplies each row, which a grid with one scale a row follows up to the rounding of that scale: the codes
    stay, and the second projection puts the products back on the grid exactly.

    Args:
        model: The recovered model.
        folded: Pairs to fold.
        memory_format: "contiguous" or "channels_last".
        grids: Grid by site name.
    """
    for site, grid in on_grids(model, grids).values():
        site.write_(model, grid.project(site.read(model)))
    fold_batchnorm_(model, folded)
    for site, grid in on_grids(model, grids).values():
        site.write_(model, grid.project(site.read(model)))
    set_memory_format_(model, memory_format)
