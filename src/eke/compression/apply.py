"""Make the planned model: a new one, cut, its survivors compensated, its matrices replaced, its normalisations renewed.

The user's model is never touched: every function here works on a copy of its own or says `_`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..curvature import Curvature
from ..linalg import Metric
from ..patterns import Chain
from ..sites import Site, Surgery, find
from ..solvers import remove_columns
from ..structures import EntrySparse, KroneckerSparse, LowRank, Structure
from .artifact import Blueprint
from .attention_forms import put_in_
from .blocks import leave_out_
from .candidates import Decisions
from .deploy import Pair
from .entries import skip_any_, skip_zeros_
from .factor import StandIn, factor_, fill_, fill_chain_, stand_in
from .lessons import Lessons
from .solver import Solver, fitting, solved
from .task import Forward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Layout:
    """What costs no quality and is the same for every plan.

    Args:
        folded: Pairs of layer and normalisation to fold.
        memory_format: "contiguous" or "channels_last".
    """

    folded: tuple[Pair, ...] = ()
    memory_format: str = "contiguous"


@dataclass(frozen=True)
class Draft:
    """A planned model before recovery.

    Args:
        net: Cut and factored, survivors compensated; its other matrices are still free.
        blueprint: What was done, and what each matrix must become.
        members: What the solver made of each matrix with a structure, by site name.
    """

    net: nn.Module
    blueprint: Blueprint
    members: Mapping[str, Tensor]

    def finished(self) -> nn.Module:
        """Return a copy whose matrices are the members that the solver found."""
        net = copy.deepcopy(self.net)
        self.finish_(net)
        return net

    def finish_(self, net: nn.Module) -> None:
        """Write the members into `net`, in place."""
        for site in find(net):
            if site.name in self.members:
                site.write_(net, self.members[site.name])


def stays(site: Site, surgery: Surgery) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of a site's matrix that a surgery leaves, as indices."""
    m, n = site.shape
    index = torch.arange(m * n).view(m, n)
    stored = index.t() if site.transposed else index
    stored = stored.reshape(site.stored_shape)
    for dim, kept in surgery.slices.get(site.parameter_name, {}).items():
        stored = stored.index_select(dim, torch.tensor(kept))
    left = stored.t() if site.transposed else stored.reshape(stored.shape[0], -1)
    return left[:, 0] // n, left[0] % n


def blueprint(decisions: Decisions, picks: Mapping[str, int], layout: Layout) -> Blueprint:
    """Return what a plan does to the architecture.

    Args:
        decisions: The candidates.
        picks: Option index by decision; absent ones leave things as they are.
        layout: Folding and memory format.

    Returns:
        The blueprint. A structure that has no member of the shape that is left after cutting is dropped.
    """
    surgery = decisions.surgery(picks)
    sites = {form.site.name: form.site for form in decisions.forms}
    structures: dict[str, Structure] = {}
    factored: dict[str, StandIn] = {}
    for name, structure in decisions.structures(picks).items():
        site = sites[name]
        shape = left_shape(site, surgery)
        fit = fitting(structure, shape)
        other = stand_in(fit, shape)
        if other is not None and not isinstance(other, EntrySparse):
            factored[site.module_name] = other
            if isinstance(fit, LowRank) and fit.grid is not None:
                structures |= {f"{name}.0": fit.grid, f"{name}.1": fit.grid}
        elif fit is not None:
            structures[name] = fit
    converted = {name: form for name, (form, _) in decisions.converted(picks).items()}
    return Blueprint(
        surgery, layout.folded, layout.memory_format, structures, decisions.removed(picks), factored, converted
    )


def left_shape(site: Site, surgery: Surgery) -> tuple[int, int]:
    """Return the shape of a site's matrix after a surgery."""
    if site.parameter_name not in surgery.slices or site.kind == "conv_transpose" or site.groups > 1:
        slices = surgery.slices.get(site.parameter_name, {})
        sizes = [len(slices.get(dim, range(size))) for dim, size in enumerate(site.stored_shape)]
        first = 1 if site.transposed or site.kind == "conv_transpose" else 0
        rows = site.shape[0] * sizes[first] // site.stored_shape[first]
        return rows, torch.Size(sizes).numel() // max(1, rows)
    left = stays(site, surgery)
    return len(left[0]), len(left[1])


def shaped(model: nn.Module, form: Blueprint) -> nn.Module:
    """Return a net of the planned shape for measurements, in evaluation mode; its values are not right.

    Args:
        model: The original.
        form: What to do to it.

    Returns:
        A new model.
    """
    net = copy.deepcopy(model).eval()
    form.reshape_(net)
    skip_any_(net, form.structures)
    return net


def draft(
    model: nn.Module,
    decisions: Decisions,
    picks: Mapping[str, int],
    *,
    sites: Sequence[Site],
    curvature: Curvature,
    solver: Solver,
    layout: Layout,
) -> Draft:
    """Carry out a plan: cut and compensate, leave blocks out, factor, and find the member of each structure.

    Args:
        model: The original.
        decisions: The candidates.
        picks: Option index by decision.
        sites: The model's matrices.
        curvature: At these.
        solver: Finds members, in the metric of what is left of each matrix.
        layout: Folding and memory format; applied later.

    Returns:
        The model and what its matrices must become.
    """
    form = blueprint(decisions, picks, layout)
    net = cut(model, decisions, picks, sites=sites, curvature=curvature)
    for name, kind in form.removed.items():
        leave_out_(net, name, kind)
    put_in_(net, form.converted, {name: part for name, (_, part) in decisions.converted(picks).items()})
    here = {site.name: site for site in find(net)}
    members: dict[str, Tensor] = {}
    for site in (f.site for f in decisions.forms):
        other = form.factored.get(site.module_name)
        structure = form.structures.get(site.name) if other is None else _whole(other)
        if structure is None:
            continue
        matrix = here[site.name].read(net)
        member = _member(structure, matrix, curvature, site, form.surgery, solver)
        if other is None:
            members[site.name] = member
            continue
        factor_(net, here[site.name], other)
        if isinstance(other, Chain):
            fill_chain_(net, site.name, member)
            continue
        left, right = LowRank(other).factors(member)
        fill_(net, site.name, left, right)
        for part, factor in ((f"{site.name}.0", right), (f"{site.name}.1", left)):
            if part in form.structures:
                members[part] = form.structures[part].project(factor.float())
    return Draft(net, form, members)


def _whole(form: StandIn) -> Structure:
    """Return the structure of the matrix that factors stand for."""
    return KroneckerSparse(form) if isinstance(form, Chain) else LowRank(form)


def _member(
    structure: Structure, matrix: Tensor, curvature: Curvature, site: Site, surgery: Surgery, solver: Solver
) -> Tensor:
    if site.kind == "embedding":
        return structure.project(matrix)
    factors = curvature.factors(site.name)
    if site.groups > 1 or site.kind == "conv_transpose":
        score = factors.diagonal.to(matrix) if tuple(matrix.shape) == site.shape else None
        return structure.project(matrix, score)
    rows, columns = stays(site, surgery)
    a, g = factors.a[0][columns][:, columns], factors.g[0][rows][:, rows]
    return solved(solver, structure, matrix, Metric(a, g), name=site.name)


def cut(
    model: nn.Module,
    decisions: Decisions,
    picks: Mapping[str, int],
    *,
    sites: Sequence[Site],
    curvature: Curvature,
) -> nn.Module:
    """Return the cut model, each matrix that loses columns compensated by least squares on its inputs.

    Args:
        model: The original.
        decisions: The candidates.
        picks: Option index by decision.
        sites: The model's matrices.
        curvature: Second moments of their inputs.

    Returns:
        A new model in evaluation mode.
    """
    net = copy.deepcopy(model).eval()
    by_parameter = {site.parameter_name: site for site in sites if site.name in curvature.names}
    columns: dict[str, list[Tensor]] = {}
    for width in decisions.widths:
        option = picks.get(width.choice, 0)
        if option:
            dropped = width.group.dropped(width.keep(option))
            for member in width.group.consumers:
                columns.setdefault(member.parameter, []).append(member.columns[dropped].flatten())
    for parameter, parts in columns.items():
        site = by_parameter.get(parameter)
        if site is None:
            continue
        _compensate_(net, site, torch.cat(parts), curvature)
    decisions.surgery(picks).apply_(net)
    return net


def _compensate_(net: nn.Module, site: Site, removed: torch.Tensor, curvature: Curvature) -> None:
    matrix, factors = site.read(net), curvature.factors(site.name)
    bias = getattr(site.module(net), site.bias_name, None)
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


def on_structures(model: nn.Module, structures: Mapping[str, Structure]) -> dict[str, tuple[Site, Structure]]:
    """Pair the sites of a planned model with their structures.

    Args:
        model: The planned model.
        structures: Structure by site name.

    Returns:
        Site of this model and structure, by site name.
    """
    return {site.name: (site, structures[site.name]) for site in find(model) if site.name in structures}


def deploy_(model: nn.Module, form: Blueprint) -> None:
    """Project the matrices on their structures, fold, project again, set the memory format and skip zeros, in place.

    Folding multiplies each row, which a grid with one scale a row follows up to the rounding of that scale: the codes
    stay, and the second projection puts the products back on the grid exactly.

    Args:
        model: The recovered model.
        form: Its blueprint.
    """
    for site, structure in on_structures(model, form.structures).values():
        site.write_(model, structure.project(site.read(model)))
    form.finish_(model)
    for site, structure in on_structures(model, form.structures).values():
        site.write_(model, structure.project(site.read(model)))
    skip_zeros_(model, form.structures)
