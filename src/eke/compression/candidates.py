"""Candidates: every change that could be made, each with the loss that it is predicted to cost.

A channel group may keep fewer of its channels. Which go first is decided by block-OBS over all matrices that read them,
each removal with the survivors' least-squares compensation (`solvers`). A matrix may be replaced by a member of a
structure (a grid, a support, a rank, several at once); a solver finds the member. A block that maps a tensor to one of
its shape may be left out. The predicted loss of a change D of matrices is that of the curvature to second order,
<gradient, D> + 1/2 tr(D^T G D A) with corrected eigenvalues; changes of several matrices add.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..curvature import Curvature
from ..linalg import MANY, Metric
from ..sites import ChannelGroup, Site, Surgery
from ..solvers import Consumer, greedy_removal, remove_columns
from ..structures import NM, Both, EntrySparse, KroneckerSparse, LowRank, Structure, UniformGrid, Unstructured
from .attention_forms import described
from .factor import stand_in
from .solver import Solver, fitting, metric_of, quick, solved

SHARES = (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125)
"""Shares of a channel group that may stay."""

STRUCTURES: tuple[Structure, ...] = (
    *(UniformGrid(bits) for bits in (8, 6, 5, 4, 3)),
    Both(Unstructured(0.5), UniformGrid(4)),
    Both(NM(2, 4), UniformGrid(4)),
    Both(Unstructured(0.25), UniformGrid(4)),
    LowRank(0.5, UniformGrid(6)),
    LowRank(0.25, UniformGrid(6)),
)
"""Structures that matrices may take by default."""


@dataclass(frozen=True)
class Widths:
    """Candidates of one channel group.

    Args:
        group: The group.
        kept: Units that stay, one number a candidate; the first is all of them.
        order: Units in the order in which they go.
        losses: Predicted loss of each candidate.
        rises: The first-order part of each loss; () for none.
    """

    group: ChannelGroup
    kept: tuple[int, ...]
    order: tuple[int, ...]
    losses: tuple[float, ...]
    rises: tuple[float, ...] = ()

    @property
    def choice(self) -> str:
        """Name of the decision."""
        return f"channels:{self.group.name}"

    def keep(self, option: int) -> list[int]:
        """Return the units that stay under a candidate, ascending."""
        return sorted(self.order[self.group.size - self.kept[option] :])


@dataclass(frozen=True)
class Forms:
    """Candidates of one matrix: what it may become.

    Args:
        site: The matrix.
        structures: One a candidate, from most to fewest stored bits; the first is None and leaves it as it is.
        losses: Predicted loss of each candidate.
        rises: The first-order part of each loss; () for none.
    """

    site: Site
    structures: tuple[Structure | None, ...]
    losses: tuple[float, ...]
    rises: tuple[float, ...] = ()

    @property
    def choice(self) -> str:
        """Name of the decision."""
        return f"matrix:{self.site.name}"

    @property
    def factored(self) -> tuple[int, ...]:
        """Candidates that replace the layer by factors."""
        return tuple(i for i, s in enumerate(self.structures) if stand_in(s, self.site.shape) is not None)


BlockKind = Literal["identity", "zero", "identity and none", "zero and none"]


@dataclass(frozen=True)
class Block:
    """The candidate to leave a module out.

    Args:
        name: Of the module.
        kind: What it becomes: its input, or zero (a branch whose shortcut is added outside); with None beside it where
            the module returns two things.
        loss: Predicted loss of that.
        rise: Its first-order part.
    """

    name: str
    kind: BlockKind
    loss: float
    rise: float = 0.0

    @property
    def choice(self) -> str:
        """Name of the decision; option 0 keeps the module, option 1 leaves it out."""
        return f"block:{self.name}"

    def holds(self, module_name: str) -> bool:
        """Return whether a module is this one or inside it."""
        return module_name == self.name or module_name.startswith(f"{self.name}.")


@dataclass(frozen=True)
class Attention:
    """Candidates of one softmax attention: linear beyond windows, or on clusters.

    Args:
        name: Of the module that attends.
        forms: What it becomes, plain values, one a candidate; the first is None and leaves it as it is.
        losses: Predicted loss of each candidate.
        rises: The first-order part of each loss.
        parts: What was learned, one a candidate but the first.
    """

    name: str
    forms: tuple[Mapping[str, Any] | None, ...]
    losses: tuple[float, ...]
    rises: tuple[float, ...]
    parts: tuple[Any, ...] = field(compare=False, repr=False)

    @property
    def choice(self) -> str:
        """Name of the decision."""
        return f"attention:{self.name}"

    @property
    def labels(self) -> tuple[str, ...]:
        """What each candidate is, in words."""
        return tuple("softmax" if form is None else described(form) for form in self.forms)


@dataclass(frozen=True)
class Decisions:
    """Everything that may be decided about a model."""

    widths: tuple[Widths, ...] = ()
    forms: tuple[Forms, ...] = ()
    blocks: tuple[Block, ...] = ()
    attentions: tuple[Attention, ...] = ()

    @property
    def losses(self) -> dict[str, tuple[float, ...]]:
        """Predicted losses of the options, by decision."""
        found = {w.choice: w.losses for w in self.widths} | {f.choice: f.losses for f in self.forms}
        found |= {a.choice: a.losses for a in self.attentions}
        return found | {b.choice: (0.0, b.loss) for b in self.blocks}

    @property
    def rises(self) -> dict[str, tuple[float, ...]]:
        """First-order parts of the predicted losses, by decision."""
        found = {w.choice: w.rises or (0.0,) * len(w.losses) for w in self.widths}
        found |= {f.choice: f.rises or (0.0,) * len(f.losses) for f in self.forms}
        found |= {a.choice: a.rises for a in self.attentions}
        return found | {b.choice: (0.0, b.rise) for b in self.blocks}

    def with_losses(self, losses: Mapping[str, Sequence[float]]) -> Decisions:
        """Return the same decisions with other predicted losses."""
        return Decisions(
            tuple(replace(w, losses=tuple(losses[w.choice])) for w in self.widths),
            tuple(replace(f, losses=tuple(losses[f.choice])) for f in self.forms),
            tuple(replace(b, loss=float(losses[b.choice][1])) for b in self.blocks),
            tuple(replace(a, losses=tuple(losses[a.choice])) for a in self.attentions),
        )

    def surgery(self, picks: Mapping[str, int]) -> Surgery:
        """Return the channels that stay under a plan; the empty surgery if all do."""
        chosen = [(width, picks.get(width.choice, 0)) for width in self.widths]
        return Surgery.merge(width.group.cut(width.keep(option)) for width, option in chosen if option)

    def removed(self, picks: Mapping[str, int]) -> dict[str, BlockKind]:
        """Return what the modules become that a plan leaves out, by name."""
        return {block.name: block.kind for block in self.blocks if picks.get(block.choice, 0)}

    def converted(self, picks: Mapping[str, int]) -> dict[str, tuple[Mapping[str, Any], Any]]:
        """Return form and learned part of each attention that a plan converts and keeps, by name of the module."""
        gone = [block for block in self.blocks if picks.get(block.choice, 0)]
        found = {}
        for attention in self.attentions:
            option = picks.get(attention.choice, 0)
            form = attention.forms[option]
            if form is not None and not any(block.holds(attention.name) for block in gone):
                found[attention.name] = (form, attention.parts[option - 1])
        return found

    def structures(self, picks: Mapping[str, int]) -> dict[str, Structure]:
        """Return the structure of each matrix that a plan replaces and keeps, by site name."""
        gone = [block for block in self.blocks if picks.get(block.choice, 0)]
        found = {}
        for form in self.forms:
            structure = form.structures[picks.get(form.choice, 0)]
            if structure is not None and not any(block.holds(form.site.module_name) for block in gone):
                found[form.site.name] = structure
        return found

    def block_of(self, module_name: str) -> Block | None:
        """Return the block that holds a module."""
        return next((block for block in self.blocks if block.holds(module_name)), None)


def replaced(
    structure: Structure,
    weight: Tensor,
    curvature: Curvature,
    site: Site,
    *,
    solver: Solver,
    metric: Metric | None = None,
) -> Tensor:
    """Return what a solver makes of a site's matrix.

    Args:
        structure: A structure that has members of this shape.
        weight: The matrix (m, n).
        curvature: With factors of the site.
        site: The site, with groups it is only projected.
        solver: Finds the member.
        metric: That of the site's factors; None makes one.

    Returns:
        (m, n).
    """
    if site.groups > 1:
        return structure.project(weight, curvature.diagonal(site.name).to(weight))
    return solved(solver, structure, weight, metric or metric_of(curvature, site), name=site.name)


def predicted(
    curvature: Curvature, changes: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
) -> tuple[float, float]:
    """Predict the loss of changes of matrices to second order.

    Args:
        curvature: At the sites.
        changes: Change (m, n) by site name; pairs are taken one by one.

    Returns:
        The quadratic term, and the slope: that of the data seen, 0 where it falls (on other data it mostly does not).
    """
    quadratic = slope = 0.0
    for name, delta in changes.items() if isinstance(changes, Mapping) else changes:
        quadratic += max(0.0, curvature.quadratic(name, delta))
        slope += curvature.linear(name, delta)
    return quadratic, max(0.0, slope)


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
        sites: By name of the parameter.
        model: The model.
        curvature: Its factors at these sites.

    Returns:
        One consumer a matrix, or None if the curvature of one is not known.
    """
    found = []
    for member in group.consumers:
        site = sites.get(member.parameter)
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
        curvature: Estimated at the visible ones.

    Returns:
        Candidates, one entry a group.
    """
    by_parameter = {site.parameter_name: site for site in sites if site.visible}
    proposed = []
    for group in groups:
        consumers = readers(group, by_parameter, model, curvature)
        kept = kept_counts(group.size, multiple=8 if group.unit != "heads" else 1)
        if consumers is None or len(kept) < 2:
            continue
        names = [by_parameter[member.parameter].name for member in group.consumers]
        parts = [(0.0, 0.0)]
        price = functools.partial(_price, curvature, list(zip(names, consumers)), parts)
        stops = {group.size - count: price for count in kept[1:]}
        removal = greedy_removal(consumers, group.size - kept[-1], stops=stops)
        gone = [int(channel) for channel in removal.channels]
        order = (*gone, *sorted(set(range(group.size)) - set(gone)))
        proposed.append(Widths(group, kept, order, tuple(q + r for q, r in parts), tuple(r for _, r in parts)))
    return proposed


def _price(
    curvature: Curvature,
    consumers: Sequence[tuple[str, Consumer]],
    parts: list[tuple[float, float]],
    units: Tensor,
    changes: Sequence[Callable[[], Tensor]],
) -> None:
    """Append the predicted loss of removing units, which is no less than that of removing fewer."""
    # What the order knows of a small matrix is found anew, and compared with no compensation.
    each = (
        (name, change() if consumer.weight.numel() > MANY else removal_change(consumer, units))
        for (name, consumer), change in zip(consumers, changes)
    )
    new = predicted(curvature, each)
    parts.append((max(new[0], parts[-1][0]), max(new[1], parts[-1][1])))


def removal_change(consumer: Consumer, units: Tensor) -> Tensor:
    """Return the change (m, n) of a matrix that loses the columns of some units and is compensated."""
    removed = consumer.blocks[units].flatten()
    left = remove_columns(consumer.weight, consumer.a, removed, g=consumer.g).weight
    stays = torch.ones(consumer.weight.shape[1], dtype=torch.bool)
    stays[removed] = False
    change = -consumer.weight.double()
    change[:, stays] += left.double()
    return change


def form_candidates(
    model: nn.Module,
    sites: Sequence[Site],
    curvature: Curvature,
    structures: Sequence[Structure],
    *,
    solver: Solver = quick,
    factorable: Sequence[str] = (),
    sparsable: Sequence[str] = (),
) -> list[Forms]:
    """Propose structures for every matrix with a known curvature; where one has no member of the shape it is left out.

    Args:
        model: The model.
        sites: The model's matrices.
        curvature: Estimated at the visible ones.
        structures: Structures to consider.
        solver: Finds a member.
        factorable: Names of the sites that may become other layers.
        sparsable: Names of those that may become sparse ones.

    Returns:
        Candidates, one entry a matrix.
    """
    proposed = []
    for site in sites:
        if site.name not in curvature.names:
            continue
        matrix = site.read(model)
        # One metric for all structures: what solvers derive from it is derived once.
        metric = metric_of(curvature, site) if site.groups == 1 else None
        fit = offered(site, structures, factorable, sparsable=sparsable)
        parts = [(0.0, 0.0)]
        for structure in fit:
            member = replaced(structure, matrix, curvature, site, solver=solver, metric=metric)
            change = member.double() - matrix.double()
            parts.append(predicted(curvature, {site.name: change}))
        proposed.append(Forms(site, (None, *fit), tuple(q + r for q, r in parts), tuple(r for _, r in parts)))
    return proposed


def offered(
    site: Site, structures: Sequence[Structure], factorable: Sequence[str], *, sparsable: Sequence[str] = ()
) -> list[Structure]:
    """Return the structures that save bytes at a site, from most to fewest stored bits; factors and sparse layers only
    where they can stand in for the module.
    """  # noqa: D205
    plain = 32 * site.shape[0] * site.shape[1]
    found = [s for s in structures if fitting(s, site.shape) is not None and s.bits(site.shape) < plain]
    found = [s for s in found if stand_in(s, site.shape) is None or site.name in factorable]
    found = [s for s in found if not isinstance(s, KroneckerSparse) or site.kind == "linear"]
    found = [s for s in found if not isinstance(s, EntrySparse) or site.name in sparsable]
    return sorted(found, key=lambda s: -s.bits(site.shape))


def to_json(decisions: Decisions) -> dict[str, Any]:
    """Return what a continued run needs to rebuild the decisions."""
    return {
        "widths": {w.group.name: {"kept": w.kept, "order": w.order} for w in decisions.widths},
        "forms": {f.site.name: [repr(s) for s in f.structures] for f in decisions.forms},
        "blocks": {b.name: b.kind for b in decisions.blocks},
        "losses": decisions.losses,
        "rises": decisions.rises,
    }


def from_json(
    document: Mapping[str, Any],
    groups: Sequence[ChannelGroup],
    sites: Sequence[Site],
    structures: Sequence[Structure],
) -> Decisions:
    """Rebuild decisions from `to_json` on the same model.

    Args:
        document: From `to_json`.
        groups: The model's channel groups.
        sites: The model's matrices.
        structures: Structures that were considered.

    Returns:
        The decisions.
    """
    by_group = {group.name: group for group in groups}
    by_site = {site.name: site for site in sites}
    by_name: dict[str, Structure | None] = {repr(s): s for s in structures} | {repr(None): None}
    losses, rises = document["losses"], document["rises"]
    widths = [
        Widths(
            by_group[name],
            tuple(w["kept"]),
            tuple(w["order"]),
            tuple(losses[f"channels:{name}"]),
            tuple(rises[f"channels:{name}"]),
        )
        for name, w in document["widths"].items()
    ]
    forms = [
        Forms(
            by_site[name],
            tuple(by_name[s] for s in found),
            tuple(losses[f"matrix:{name}"]),
            tuple(rises[f"matrix:{name}"]),
        )
        for name, found in document["forms"].items()
    ]
    blocks = [
        Block(name, kind, losses[f"block:{name}"][1], rises[f"block:{name}"][1])
        for name, kind in document["blocks"].items()
    ]
    return Decisions(tuple(widths), tuple(forms), tuple(blocks))
