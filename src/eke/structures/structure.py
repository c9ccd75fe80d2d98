"""A structure is a set of matrices: what pruning, factorisation and quantisation have in common.

`project(v, score)` returns a member near `v` in the weighted distance sum(score * (v - p)**2): `score` holds
non-negative weights of the squared errors, (n,) for one weight a column (the diagonal of E[x x^T]) or (m, n) (the
diagonal of the Kronecker curvature). `bits(shape)` is what a member really takes when packed. `exactness` says how
near `project` comes: "exact" (no member is closer), a number c >= 1 (within c times the least distance), "heuristic".
A class with these four members is a structure; nothing has to be inherited or registered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Exactness = Literal["exact", "heuristic"] | float
"""How near a projection comes: "exact", within a factor c of the least distance, or "heuristic"."""

ColumnRule = Callable[[Tensor, int], Tensor]
"""`rule(column, j)`: the allowed values (m,) nearest to what column j (m,) should be."""


@runtime_checkable
class Structure(Protocol):
    """A set of matrices (m, n)."""

    @property
    def exactness(self) -> Exactness:
        """How near `project` comes to the closest member."""

    def project(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return a member near v (m, n) in the distance weighted by score (n,) or (m, n)."""

    def bits(self, shape: tuple[int, int]) -> int:
        """Return the bits of a packed member: 8 times its bytes."""

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ValueError if no member has this shape."""


@runtime_checkable
class Sweepable(Protocol):
    """A structure whose columns can be fixed one after the other, as column sweeps need."""

    def by_columns(self, v: Tensor, score: Tensor | None = None) -> ColumnRule:
        """Fix scales or supports from v (m, n) and return the rule that rounds one column."""


@runtime_checkable
class Packable(Protocol):
    """A structure whose members are stored packed, in the bytes that `bits` says."""

    def encode(self, v: Tensor) -> Mapping[str, Tensor]:
        """Return the tensors that a member v (m, n) is stored as, of `bits` bits together."""

    def decode(self, packed: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the member (m, n) again, equal bit for bit."""


@runtime_checkable
class Supported(Protocol):
    """A structure whose members are zero outside a support, which solvers refit."""

    def support(self, v: Tensor, score: Tensor | None = None) -> Tensor:
        """Return the entries that the projection of v (m, n) keeps, bool (m, n)."""


def straight_through(structure: Structure, v: Tensor, score: Tensor | None = None) -> Tensor:
    """Project in the forward pass and pass the gradient through unchanged.

    Args:
        structure: The set to project on.
        v: Matrix (m, n); the result is differentiable in it with derivative 1.
        score: Weights of the squared error, (n,) or (m, n).

    Returns:
        The projection (m, n), exactly `structure.project(v)` in value.

    Source:
        Bengio, Léonard, Courville, "Estimating or propagating gradients through stochastic neurons", 2013.
    """
    projected: Tensor = _StraightThrough.apply(v, structure.project(v.detach(), score))
    return projected


class _StraightThrough(torch.autograd.Function):
    """Return the second argument, send the gradient to the first; exact where v + (p - v) would round."""

    @staticmethod
    def forward(_ctx: object, v: Tensor, projected: Tensor) -> Tensor:
        return projected.to(v.dtype)

    @staticmethod
    def backward(_ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def check_shape(structure: object, shape: tuple[int, ...]) -> None:
    """Refuse what is not the shape of a matrix.

    Raises:
        ValueError: if shape is not two positive numbers.
    """
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"{structure} acts on matrices (m, n) with at least one entry, got the shape {tuple(shape)}; "
            "flatten a convolution to (m, c*k*k) first, as `Site.read` does."
        )


def check_matrix(structure: object, v: Tensor, score: Tensor | None) -> Tensor | None:
    """Check the arguments of `project` and bring the score to the shape and dtype of v.

    Args:
        structure: Named in messages.
        v: Matrix (m, n), finite floating point.
        score: Weights, (n,) or (m, n), non-negative and finite, or None.

    Returns:
        The score as (m, n) in the dtype of v, or None.

    Raises:
        TypeError: if v is not floating point.
        ValueError: if a shape does not fit or a value is not finite or negative.
    """
    check_shape(structure, tuple(v.shape))
    if not v.is_floating_point():
        raise TypeError(f"{structure}.project needs a floating point matrix, got {v.dtype}.")
    bad = int((~torch.isfinite(v)).sum())
    if bad:
        raise ValueError(
            f"{structure}.project got {bad} of {v.numel()} entries that are not finite; check the weights."
        )
    if score is None:
        return None
    if tuple(score.shape) not in {(v.shape[1],), tuple(v.shape)}:
        raise ValueError(
            f"score must have shape ({v.shape[1]},) or {tuple(v.shape)} for a matrix {tuple(v.shape)}, "
            f"got {tuple(score.shape)}."
        )
    if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise ValueError(
            f"score holds weights of squared errors: finite and >= 0, got a minimum of {float(score.min())}."
        )
    return score.to(v.dtype).expand_as(v)
