"""Finding members of structures: what a solver is, which one is used unless one is given, and asking one.

A member V of a structure near a matrix W is sought in the metric 1/2 tr((V - W)^T G (V - W) A). Where recovery follows,
one step finds a good start. Else a few steps of alternating directions price what may be done (they leave about half of
what one step does, and up to four times the best that is known), and only what is done at last is sought to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..curvature import Curvature
from ..linalg import WIDE, Metric, factorize
from ..sites import Site
from ..solvers import admm, reconstruct, sweep, swept, weighted_factors
from ..structures import KroneckerSparse, LowRank, Structure, Supported, Sweepable

Solver = Callable[[Structure, Tensor, Metric], Tensor]
"""`solver(structure, weight, metric)`: a member of the structure (m, n) near the weight in the metric."""


def fitting(structure: Structure, shape: tuple[int, int]) -> Structure | None:
    """Return the structure, or None (stay as it is) where it has no member of this shape."""
    try:
        structure.check(shape)
    except ValueError:
        return None
    return structure


EFFORT = 1e9
"""Sum of m n (m + n) over all matrices (m, n) of a model up to which no single step is enough if nothing is learned."""
_STEPS, _PENALTIES = 10, (0.15, 0.8)
"""Of alternating directions: few steps start later and end earlier than many."""


def quick(structure: Structure, weight: Tensor, metric: Metric) -> Tensor:
    """Return a good member in one step, the default where recovery follows: a sweep for supports, the closed form for
    ranks, the whitened projection for chains of factors, that weighted by the metric's diagonal for all else.

    Sweeps of matrices above `WIDE` rows or columns are compared with projection on some rows only.
    """  # noqa: D205
    if isinstance(structure, LowRank):
        left, right = weighted_factors(structure, weight, metric)
        if structure.grid is not None:
            left, right = (structure.grid.project(factor.float()).double() for factor in (left, right))
        return (left @ right).to(torch.promote_types(weight.dtype, torch.float32))
    if isinstance(structure, KroneckerSparse):
        return _factors(structure, weight, metric, refine=0)
    if isinstance(structure, Supported) and isinstance(structure, Sweepable):
        if max(weight.shape) > WIDE:
            return swept(structure, weight, metric).to(torch.promote_types(weight.dtype, torch.float32))
        return sweep(structure, weight, metric, revisits=0).weight
    return structure.project(weight, metric.score((weight.shape[0], weight.shape[1])).to(weight))


def careful(structure: Structure, weight: Tensor, metric: Metric) -> Tensor:
    """Return a better member than `quick` by a few steps, the default where nothing is learned: some ten times its cost
    for supports and grids, the same for ranks.
    """  # noqa: D205
    if isinstance(structure, LowRank):
        return quick(structure, weight, metric)
    if isinstance(structure, KroneckerSparse):
        return _factors(structure, weight, metric, refine=2)
    return admm(structure, weight, metric, steps=_STEPS, rho=_PENALTIES).to(
        torch.promote_types(weight.dtype, torch.float32)
    )


def finest(structure: Structure, weight: Tensor, metric: Metric) -> Tensor:
    """Return the best member that is found with patience: what stays where nothing is learned."""
    if isinstance(structure, KroneckerSparse):
        return _factors(structure, weight, metric, refine=8)
    return reconstruct(structure, weight, metric).weight


def _factors(structure: KroneckerSparse, weight: Tensor, metric: Metric, *, refine: int) -> Tensor:
    """Return a product of factors near the weight in the metric, after some sweeps."""
    found = factorize(weight.double(), structure.chain, metric=metric, refine=refine).to_dense()
    return found.to(torch.promote_types(weight.dtype, torch.float32))


def default_solver(sites: Sequence[Site], *, learns: bool) -> Solver:
    """Return the solver that is used unless one is given.

    Args:
        sites: The model's matrices.
        learns: Whether recovery follows.

    Returns:
        `quick` where something is learned afterwards, or where anything else would take hours; else `careful`, whose
        members of the last plan `finest` replaces.
    """
    work = sum(m * n * (m + n) for m, n in (site.shape for site in sites if site.kind != "embedding"))
    if learns or work > EFFORT:
        return quick
    return careful


def metric_of(curvature: Curvature, site: Site) -> Metric:
    """Return the metric of a site without groups."""
    factors = curvature.factors(site.name)
    return Metric(factors.a[0], factors.g[0])


def solved(solver: Solver, structure: Structure, weight: Tensor, metric: Metric, *, name: str) -> Tensor:
    """Return what a solver finds, once it is seen to be a matrix of the right shape.

    Args:
        solver: Finds the member.
        structure: The structure.
        weight: The matrix (m, n).
        metric: Measures the change.
        name: Of the site, for messages.

    Returns:
        (m, n).

    Raises:
        ValueError: if the matrix has another shape or values that are not finite.
    """
    found = solver(structure, weight, metric)
    if found.shape != weight.shape or not bool(torch.isfinite(found).all()):
        raise ValueError(
            f"The solver returned {tuple(found.shape)} with {int((~torch.isfinite(found)).sum())} values that are not "
            f"finite for {structure} at {name!r}, a matrix {tuple(weight.shape)}."
        )
    return found
