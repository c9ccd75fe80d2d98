"""What the kernel must agree with: all samples at once by torch, real or complex, on any device.

With c = rank / n, z = y - P r and e = |z|^2 / rank (1 - c) / c, a step is

    q = r + z / c,  p_i = P(x_i is no zero | q_i ~ N(x_i, e)),  x = its posterior mean, zero where p_i <= share d
    S = {i: p_i > 1/2}; if the other p_i sum to less than `doubt`:  least squares on S; done if P x = y, else r = x
    otherwise  r = (x - u q) / (1 - u),  u e the mean posterior variance; density d and variance v of EM

P q = P r + z / c because P y = y and P P = P, so only P x is computed.
Sources: Rangan, Schniter and Fletcher, "Vector approximate message passing", 2017; Vila and Schniter, 2013 (EM). Trying
least squares by the number of entries missed, and all in the range of P, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_TINY = 1e-14
"""Least error variance, y being of unit variance: float's rounding."""


@dataclass(frozen=True)
class Rules:
    """Numbers that steer the search.

    Args:
        density: First guess of the share of nonzeros.
        share: Entries less likely than this times the density are left out of products.
        doubt: Least squares are tried when fewer nonzeros than this are thought to be missed.
        rounding: |P x - y| / |y| of answers that count as exact, in units of rounding.
        pivot: Least squares with pivots below this part of the largest prove nothing: their columns are too much alike.
        longest: Answers longer than so many times y, the shortest solution, are not taken.
    """

    density: float = 0.15
    share: float = 1.0
    doubt: float = 1.0
    rounding: float = 200.0
    pivot: float = 1e-4
    longest: float = 10.0


@dataclass(frozen=True)
class State:
    """What is known of each sample between steps; all but x in units in which y has mean square n / rank.

    Args:
        x: Posterior mean, or the exact answer where it is found, (batch, n).
        message: r, (batch, n).
        image: P r, (batch, n).
        density: d, (batch, 1).
        spread: v, (batch, 1).
        found: Whether x is exact, (batch, 1).
        steps: Steps taken, (batch, 1).
        scale: Unit of y, (batch, 1).
    """

    x: Tensor
    message: Tensor
    image: Tensor
    density: Tensor
    spread: Tensor
    found: Tensor
    steps: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Range:
    """The range of A^H.

    Args:
        projection: P = A^+ A, (n, n) or (batch, n, n).
        rank: Its rank.
        rules: Numbers that steer the search.
    """

    projection: Tensor
    rank: int
    rules: Rules = field(default_factory=Rules)

    def project(self, x: Tensor) -> Tensor:
        """Return P x, (batch, n)."""
        if self.projection.ndim == 2:
            return x @ self.projection.T
        return (self.projection @ x.unsqueeze(-1)).squeeze(-1)

    def system(self, support: Tensor) -> Tensor:
        """Return P[s, s] for each row s of support (batch, k), (batch, k, k)."""
        rows, columns = support.unsqueeze(-1), support.unsqueeze(-2)
        if self.projection.ndim == 2:
            return self.projection[rows, columns]
        return self.projection[torch.arange(len(support), device=support.device)[:, None, None], rows, columns]


def reference(space: Range, y: Tensor, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with P x = y that has fewer nonzeros than y has dimensions.

    Args:
        space: P and its rank.
        y: A^+ b, (batch, n).
        iterations: Most steps.

    Returns:
        x (batch, n), which rows of it are exact (batch,), and steps taken (batch,).
    """
    state = begin(space, y)
    for _ in range(iterations):
        if bool(state.found.all()):
            break
        state = advance(space, y, state)
    return settled(space, y, state), state.found.squeeze(-1), state.steps.squeeze(-1)


def settled(space: Range, y: Tensor, state: State) -> Tensor:
    """Return x, (batch, n), and the shortest solution where the search ran away."""
    longest = space.rules.longest * torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return torch.where(torch.linalg.vector_norm(state.x, dim=-1, keepdim=True) <= longest, state.x, y)


def begin(space: Range, y: Tensor, x0: Tensor | None = None) -> State:
    """Return the state before the first step.

    Args:
        space: P and its rank.
        y: A^+ b, (batch, n).
        x0: Start, (batch, n); None for zeros.

    Returns:
        The state.
    """
    scale = torch.linalg.vector_norm(y, dim=-1, keepdim=True) / space.rank**0.5
    zero = scale == 0
    scale = torch.where(zero, torch.ones_like(scale), scale)
    start = torch.zeros_like(y) if x0 is None else x0 / scale
    density = torch.full_like(scale, space.rules.density)
    return State(
        x=start * scale,
        message=start,
        image=start if x0 is None else space.project(start),
        density=density,
        spread=1 / density,
        found=zero,
        steps=torch.zeros_like(scale, dtype=torch.int64),
        scale=scale,
    )


def advance(space: Range, y: Tensor, state: State) -> State:
    """Return the state after a step; samples that are found stay as they are."""
    rules, n, c = space.rules, y.shape[-1], space.rank / y.shape[-1]
    left = y / state.scale - state.image
    e = (left.abs().square().sum(-1, keepdim=True) / space.rank * (1 - c) / c).clamp_min(_TINY)
    q, turned = state.message + left / c, state.image + left / c
    a = state.spread / (state.spread + e)
    degrees = 1.0 if y.is_complex() else 0.5
    power = q.abs().square()
    odds = torch.logit(state.density) + degrees * torch.log(e / (state.spread + e))
    p = torch.sigmoid(odds + degrees * a / e * power)
    missed = torch.where(p > 0.5, 0, p).sum(-1, keepdim=True)
    x, image, found, sane = _least_squares(space, y, p, missed < rules.doubt)
    mean = a * p * q
    kept = torch.where(p > rules.share * state.density, mean, 0)
    count = p.sum(-1, keepdim=True)
    u = ((a * count + a.square() / e * (p * (1 - p) * power).sum(-1, keepdim=True)) / n).clamp(1e-12, 1 - 1e-6)
    count = count.clamp_min(1e-6 * n)
    fresh = State(
        x=torch.where(found, x, mean * state.scale),
        message=torch.where(sane, x / state.scale, (kept - u * q) / (1 - u)),
        image=torch.where(sane, image / state.scale, (space.project(kept) - u * turned) / (1 - u)),
        density=torch.where(sane, state.density, (count / n).clamp_max(0.999)),
        spread=torch.where(sane, state.spread, a.square() * (p * power).sum(-1, keepdim=True) / count + a * e),
        found=found,
        steps=state.steps + 1,
        scale=state.scale,
    )
    return State(**{name: torch.where(state.found, old, getattr(fresh, name)) for name, old in vars(state).items()})


def _least_squares(space: Range, y: Tensor, p: Tensor, tried: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return least squares on the likely entries of the samples that are tried.

    Args:
        space: P and its rank.
        y: (batch, n).
        p: Probabilities, (batch, n).
        tried: (batch, 1).

    Returns:
        x and P x (batch, n), zero where nothing was tried; which are exact, and which are of use, (batch, 1).
    """
    rules, likely = space.rules, p > 0.5
    count = likely.sum(-1, keepdim=True)
    tried = tried & (count > 0) & (count <= most(space.rank, y.shape[-1]))
    x, image, sane = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(tried)
    rows = tried.squeeze(-1).nonzero().squeeze(-1)
    if not len(rows):
        return x, image, tried, tried
    # supports of one length: what is too much has ones on the diagonal, and zeros on the right
    k = int(count[rows].max())
    support = p[rows].topk(k, dim=-1).indices
    inside = likely[rows].gather(1, support)
    part = space if space.projection.ndim == 2 else Range(space.projection[rows], space.rank, rules)
    both = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    eye = torch.eye(k, dtype=y.dtype, device=y.device)
    factor, info = torch.linalg.cholesky_ex(torch.where(both, part.system(support), eye))
    right = torch.where(inside, y[rows].gather(1, support), 0)
    solved = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).real.square()
    sound = (info == 0).unsqueeze(-1) & (pivots.amin(-1, keepdim=True) > rules.pivot * pivots.amax(-1, keepdim=True))
    x[rows] = torch.zeros_like(y[rows]).scatter(1, support, torch.where(sound & inside, solved, 0))
    image[rows] = part.project(x[rows])
    size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    sane[rows] = sound
    sane &= torch.linalg.vector_norm(x, dim=-1, keepdim=True) <= rules.longest * size
    level = rules.rounding * torch.finfo(y.dtype).eps
    exact = sane & (torch.linalg.vector_norm(y - image, dim=-1, keepdim=True) <= level * size)
    # entries of the support that are none come out as rounding
    clean = torch.where(x.abs() > level * x.abs().amax(-1, keepdim=True), x, 0)
    return torch.where(exact, clean, x), image, exact, sane


def most(rank: int, n: int) -> int:
    """Return the most entries of a support: with as many as dimensions every b is explained."""
    return min(3 * rank // 4 or 1, n)
