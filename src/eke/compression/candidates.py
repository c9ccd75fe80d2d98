"""Candidates: every change that could be made, each with the loss that it is predicted to cost.

A channel group may keep fewer of its channels. Which go first is decided by block-OBS over all matrices that read them,
each removal with the survivors' least-squares compensation (`solvers`); a candidate's predicted loss is that of the
curvature, 1/2 tr(D^T G D A), summed over the readers. A matrix may be stored on a grid of fewer bits; its candidate's
loss is that of the rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..curvature import Curvature
from ..sites import ChannelGroup, Site
from ..solvers import Consumer, greedy_removal
from ..structures import Structure

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of a channel group that may stay."""


@dataclass(frozen=True)
class Widths:
    """Candidates of one channel group.

    Args:
        group: The group.
        kept: Units that stay, one number a candidate; the first is all of them.
        order: Units in the order in which they go.
        losses: Predicted loss of each candidate.
    """

    group: ChannelGroup
    kept: tuple[int, ...]
    order: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def choice(self) -> str:
        """Name of the decision."""
        return f"channels:{self.group.name}"

    def keep(self, option: int) -> list[int]:
        """Return the units that stay under a candidate, ascending."""
        return sorted(self.order[self.group.size - self.kept[option] :])


@dataclass(frozen=True)
class Grids:
    """Candidates of one matrix: how its entries are stored.

    Args:
        site: The matrix.
        structures: One a candidate; None stores float32 and is always the last.
        losses: Predicted loss of each candidate.
    """

    site: Site
    structures: tuple[Structure | None, ...]
    losses: tuple[float, ...]

    @property
    def choice(self) -> str:
        """Name of the decision."""
        return f"bits:{self.site.name}"


def kept_counts(size: int, *, multiple: int = 8, shares: Sequence[float] = SHARES) -> tuple[int, ...]:
    """Return the numbers of units that a group of `size` may keep, all of them first.

    Args:
        size: Units of the group.
        multiple: Numbers below `size` are multiples of this (vector registers), or of less for small groups.
        shares: Shares that may stay.

    Returns:
        Descending numbers.
    """
    step = max(1, min(multiple, size // 4))
    counts = {max(step, round(share * size / step) * step) for share in shares if share < 1}
    return (size, *sorted((count for count in counts if count < size), reverse=True))


def readers(
    group: ChannelGroup, sites: Mapping[str, Site], model: nn.Module, curvature: Curvature
) -> list[Consumer] | None:
    """Describe the matrices that read a group's channels.

    Args:
        group: The group.
        sites: By module name.
        model: The model.
        curvature: Its factors at these sites.

    Returns:
        One consumer a matrix, or None if the curvature of one is not known.
    """
    found = []
    for member in group.consumers:
        site = sites.get(member.module_name)
        if site is None or site.name not in curvature.names or site.groups != 1:
            return None
        factors = curvature.factors(site.name)
        found.append(Consumer(weight=site.read(model), a=factors.a[0], g=factors.g[0], blocks=member.columns))
    return found or None


def channel_candidates(
    model: nn.Module, groups: Sequence[ChannelGroup], sites: Sequence[Site], curvature: Curvature
) -> list[Widths]:
    """Propose widths for every channel group whose readers have a known curvature.

    Args:
        model: The model.
        groups: Proved channel groups.
        sites: The model's matrices.
        curvature: Estimated at the hookable ones.

    Returns:
        Candidates, one entry a group.
    """
    by_module = {site.module_name: site for site in sites if site.hookable}
    proposed = []
    for group in groups:
        consumers = readers(group, by_module, model, curvature)
        kept = kept_counts(group.size)
        if consumers is None or len(kept) < 2:
            continue
        removal = greedy_removal(consumers, group.size - kept[-1])
        gone = [int(channel) for channel in removal.channels]
        order = (*gone, *sorted(set(range(group.size)) - set(gone)))
        losses = (0.0, *(max(0.0, float(removal.losses[group.size - count - 1])) for count in kept[1:]))
        proposed.append(Widths(group, kept, order, losses))
    return proposed


def grid_candidates(
    model: nn.Module, sites: Sequence[Site], curvature: Curvature, structures: Sequence[Structure]
) -> list[Grids]:
    """Propose grids for every matrix with a known curvature.

    Args:
        model: The model.
        sites: The model's matrices.
        curvature: Estimated at the hookable ones.
        structures: Grids to consider.

    Returns:
        Candidates, one entry a matrix.
    """
    proposed = []
    for site in sites:
        if site.name not in curvature.names:
            continue
        matrix = site.read(model)
        score = curvature.diagonal(site.name).to(matrix)
        losses = [
            max(0.0, float(curvature.quadratic(site.name, s.project(matrix, score) - matrix))) for s in structures
        ]
        proposed.append(Grids(site, (*structures, None), (*losses, 0.0)))
    return proposed


def to_json(widths: Sequence[Widths], grids: Sequence[Grids]) -> dict[str, Any]:
    """Return what a continued run needs to rebuild the candidates."""
    return {
        "widths": {w.group.name: {"kept": w.kept, "order": w.order, "losses": w.losses} for w in widths},
        "grids": {g.site.name: list(g.losses) for g in grids},
    }


def from_json(
    document: Mapping[str, Any],
    groups: Sequence[ChannelGroup],
    sites: Sequence[Site],
    structures: Sequence[Structure],
) -> tuple[list[Widths], list[Grids]]:
    """Rebuild candidates from `to_json` on the same model.

    Args:
        document: From `to_json`.
        groups: The model's channel groups.
        sites: The model's matrices.
        structures: Grids that were considered.

    Returns:
        Widths and grids.
    """
    by_group = {group.name: group for group in groups}
    by_site = {site.name: site for site in sites}
    widths = [
        Widths(by_group[name], tuple(w["kept"]), tuple(w["order"]), tuple(w["losses"]))
        for name, w in document["widths"].items()
    ]
    grids = [Grids(by_site[n], (*structures, None), tuple(losses)) for n, losses in document["grids"].items()]
    return widths, grids
