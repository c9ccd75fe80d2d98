"""A matrix as a product of Kronecker-sparse factors, with a certificate.

The product pattern of a chain is split at one interface after the other, each time into the best two factors
(`fixed_support`). If all other factors have orthonormal blocks, what a split drops is dropped from the whole product
and nothing else changes; from left to right, or right to left, the squared errors then add up, and the error is at
most sqrt(L - 1) times the best possible. One factor at a time carries the values; small QR steps move it.
Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees", 2025; canonical forms as for
tensor trains (Oseledets, "Tensor-train decomposition", 2011). Cost: O(m n) for a butterfly from left to right.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._errors import suggest
from ..ops import pair_splits
from ..patterns import Chain, KSPattern, from_dense
from . import weighted
from .bounds import normalized, times_power
from .factorization import Factorization, product
from .fixed_support import (
    Interface,
    Side,
    expand,
    onto_left,
    onto_right,
    shift_left,
    shift_right,
    split,
    split_pairs,
)
from .metric import Metric

Order = Literal["left", "right", "balanced"] | Sequence[int]
"""In which order the interfaces 1 ... L-1 are split: left to right, right to left, middle first, or a permutation."""

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def factorize(
    matrix: Tensor,
    chain: Chain,
    *,
    order: Order = "left",
    orthonormalize: bool = True,
    refine: int = 0,
    metric: Metric | None = None,
) -> Factorization:
    """Approximate a matrix by a product of factors with the patterns of a chain.

    Works in double precision and rounds the factors once. A matrix of which squares would leave the range of numbers is
    scaled by a power of two, which its factors share. Not differentiable: the factors are detached.

    Args:
        matrix: (..., m, n), float or complex of 32 or 64 bits a number; a stack is factorized matrix by matrix.
        chain: Ascending or descending, possibly with redundant pairs, of shape (m, n).
        order: In which order interfaces are split; "left" and "right" come with a proved bound.
        orthonormalize: Whether each split minimises the error of the whole product instead of its own; without it
            singular values are shared equally between the factors.
        refine: Sweeps over neighbouring pairs (single factors with a metric) afterwards, each of which can only lower
            the error.
        metric: Measure changes by tr(D^T G D A) instead of |D|^2, for one real matrix. Starts from the exact solution
            for the part of A and G that the outer factors can absorb; `refine` sees all of it.

    Returns:
        The factors with their measured error and bounds.

    Raises:
        TypeError: if the matrix is not a tensor of such a dtype, or the chain is no `Chain`.
        ValueError: if shapes do not fit, an entry is not finite, the chain is not chainable, the order is no
            permutation, refine is negative, or a metric is given for a stack or a complex matrix.
    """  # noqa: DOC502
    check_matrix(matrix, chain)
    _check_metric(matrix, metric)
    if not isinstance(refine, int) or isinstance(refine, bool) or refine < 0:
        raise ValueError(f"factorize needs refine >= 0 sweeps, got {refine!r}.")
    interfaces = _interfaces(order, chain)
    proved = orthonormalize and metric is None and interfaces in (sorted(interfaces), sorted(interfaces, reverse=True))
    dense, exponents = normalized(matrix)
    if chain.direction == "descending":
        blocks = _ascending(
            dense.mT, chain.transpose, [len(chain) - s for s in interfaces],
            orthonormalize=orthonormalize, refine=refine, metric=weighted.transposed(metric, matrix),
        )  # fmt: skip
        blocks = [block.transpose(-3, -2) for block in reversed(blocks)]
    else:
        blocks = _ascending(
            dense, chain, interfaces, orthonormalize=orthonormalize, refine=refine, metric=metric
        )  # fmt: skip
    share = exponents // len(chain)
    powers = [share] * (len(chain) - 1) + [exponents - (len(chain) - 1) * share]
    blocks = [times_power(block, power, dims=4) for block, power in zip(blocks, powers)]
    return Factorization(
        chain, [block.to(matrix.dtype).contiguous() for block in blocks], matrix.detach(), proved=proved, metric=metric
    )


def _ascending(
    dense: Tensor, chain: Chain, order: list[int], *, orthonormalize: bool, refine: int, metric: Metric | None
) -> list[Tensor]:
    """Return the factors of matrices in double precision for an ascending chain."""
    reduced, removed = chain.reduce()
    kept = [s for s in range(1, len(chain)) if s not in removed]
    order = [kept.index(s) + 1 for s in order if s in kept]
    if metric is None:
        values = from_dense(dense, reduced.product())
        blocks = _split_all(values, reduced, order, orthonormalize)
        if refine:
            blocks = _swept(values, reduced, blocks, refine)
    else:
        white = weighted.Whitening.of(metric, reduced)
        values = from_dense(white.apply(dense), reduced.product())
        blocks = white.undo(_split_all(values, reduced, order, orthonormalize))
        if refine:
            blocks = weighted.swept(dense, reduced, blocks, metric=metric, sweeps=refine)
    return _expanded(blocks, chain, kept, removed)


def _split_all(values: Tensor, chain: Chain, order: list[int], orthonormalize: bool) -> list[Tensor]:
    """Return the factors of the values of the product pattern, split at all interfaces in an order.

    The factor that carries the values is `center`: all on its left have left-orthonormal blocks, all on its right
    right-orthonormal ones, so it moves only as far as the next split needs.
    """
    bounds, items, center = [0, len(chain)], [values], 0
    side: Side = "left"
    step = 0
    while step < len(order):
        s = order[step]
        k = next(i for i, (lo, hi) in enumerate(itertools.pairwise(bounds)) if lo < s < hi)
        if orthonormalize:
            _move(items, [chain.product(i, j) for i, j in itertools.pairwise(bounds)], center, k)
            run = _pairs_in_a_row(order[step:], chain, bounds[k], bounds[k + 1])
            if run and pair_splits.available(items[k]):
                items[k : k + 1] = split_pairs(items[k], chain.patterns[bounds[k] : bounds[k] + run + 1])
                bounds[k + 1 : k + 1] = range(s, s + run)
                center, step = k + run, step + run
                continue
            if step + 1 < len(order):
                side = "left" if order[step + 1] > s else "right"
        else:
            side = "both"
        between = Interface.between(chain.product(bounds[k], s), chain.product(s, bounds[k + 1]))
        items[k : k + 1] = split(items[k], between, side)
        bounds.insert(k + 1, s)
        center, step = k + 1 if side == "left" else k, step + 1
    return items


def _pairs_in_a_row(order: list[int], chain: Chain, lo: int, hi: int) -> int:
    """Return how many of the next splits take one factor after the other off the left, each of two rows and rank 1."""
    run, ranks = 0, chain.ranks
    while (
        lo + run + 1 < hi and order[run : run + 1] == [lo + run + 1] and chain[lo + run].b == 2 == 1 + ranks[lo + run]
    ):
        run += 1
    # The last of them leaves the values on its right only if the next split is there.
    if run and run < len(order) and order[run] < lo + run:
        run -= 1
    return run if chain[hi - 1].d == 1 else 0


def _move(items: list[Tensor], patterns: list[KSPattern], center: int, target: int) -> None:
    """Move the carrier of the values from one item to another, in place."""
    while center < target:
        between = Interface.between(patterns[center], patterns[center + 1])
        items[center : center + 2] = shift_right(items[center], items[center + 1], between)
        center += 1
    while center > target:
        between = Interface.between(patterns[center - 1], patterns[center])
        items[center - 1 : center + 1] = shift_left(items[center - 1], items[center], between)
        center -= 1


def _swept(values: Tensor, chain: Chain, blocks: list[Tensor], sweeps: int) -> list[Tensor]:
    """Return better factors: with all others fixed, each pair of neighbours in turn becomes the best it can be.

    A matrix of the stack for which rounding made the error larger keeps its first factors.
    """
    start, last = list(blocks), len(chain) - 1
    patterns = list(chain)
    items = list(blocks)
    _move(items, patterns, last, 0)
    for sweep in range(sweeps):
        forward = sweep % 2 == 0
        rest = values
        for step in range(last):
            i = step if forward else last - 1 - step
            pair = rest
            lo, hi = (i, len(chain)) if forward else (0, i + 2)
            if forward:
                for j in range(last, i + 1, -1):
                    pair = onto_right(pair, items[j], Interface.between(chain.product(lo, j), chain[j]))
            else:
                for j in range(i):
                    pair = onto_left(pair, items[j], Interface.between(chain[j], chain.product(j + 1, hi)))
            between = Interface.between(chain[i], chain[i + 1])
            items[i : i + 2] = split(pair, between, "left" if forward else "right")
            if step + 1 < last and forward:
                rest = onto_left(rest, items[i], Interface.between(chain[i], chain.product(i + 1)))
            elif step + 1 < last:
                rest = onto_right(rest, items[i + 1], Interface.between(chain.product(0, i + 1), chain[i + 1]))
    before, after = (
        torch.linalg.vector_norm((product(chain, found) - values).flatten(-4), dim=-1) for found in (start, items)
    )
    better = (after < before)[..., None, None, None, None]
    return [torch.where(better, new, old) for new, old in zip(items, start)]


def _expanded(blocks: list[Tensor], chain: Chain, kept: list[int], removed: tuple[int, ...]) -> list[Tensor]:
    """Return the factors with the interfaces that `Chain.reduce` removed, last one first; the product stays."""
    bounds, items = [0, *kept, len(chain)], list(blocks)
    for s in reversed(removed):
        k = next(i for i, (lo, hi) in enumerate(itertools.pairwise(bounds)) if lo < s < hi)
        between = Interface.between(chain.product(bounds[k], s), chain.product(s, bounds[k + 1]))
        items[k : k + 1] = expand(items[k], between)
        bounds.insert(k + 1, s)
    return items


def _interfaces(order: Order, chain: Chain) -> list[int]:
    """Return the permutation of 1 ... L-1 that an order means."""  # noqa: DOC501
    every = list(range(1, len(chain)))
    if order == "left":
        return every
    if order == "right":
        return every[::-1]
    if order == "balanced":
        queue, found = [(0, len(chain))], []
        for lo, hi in queue:
            if hi - lo > 1:
                found.append((lo + hi) // 2)
                queue += [(lo, found[-1]), (found[-1], hi)]
        return found
    if not isinstance(order, Sequence):
        raise ValueError(f"order must be 'left', 'right', 'balanced' or a list of all interfaces, got {order!r}.")
    if isinstance(order, str):
        raise ValueError(f"Unknown order {order!r}.{suggest(order, ('left', 'right', 'balanced'))}")
    given: list[int] = list(order)
    if not all(isinstance(s, int) for s in given) or sorted(given) != every:
        raise ValueError(
            f"order must name each interface 1 ... {len(chain) - 1} of {len(chain)} factors once, got {given}."
        )
    return given


def check_matrix(matrix: Tensor, chain: Chain) -> None:
    """Refuse what cannot be factorized with a chain; `normalized` looks at the entries.

    Raises:
        TypeError: if it is not a tensor of 32 or 64 bits a number, or the chain is no `Chain`.
        ValueError: if its shape is not that of the chain.
    """
    if not isinstance(chain, Chain):
        raise TypeError(f"factorize needs a Chain, got {chain!r}; write Chain([(a, b, c, d), ...]).")
    if not isinstance(matrix, Tensor) or matrix.dtype not in _DTYPES:
        given = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"factorize needs a tensor of float32, float64, complex64 or complex128, got {given}.")
    if matrix.ndim < 2 or tuple(matrix.shape[-2:]) != chain.shape:
        raise ValueError(
            f"The chain {chain} describes {chain.shape[0]} x {chain.shape[1]} matrices, got {tuple(matrix.shape)}."
        )


def _check_metric(matrix: Tensor, metric: Metric | None) -> None:
    if metric is None:
        return
    if matrix.ndim != 2 or matrix.is_complex():
        raise ValueError(
            f"A metric measures one real matrix, got {tuple(matrix.shape)} of {matrix.dtype}; factorize the matrices "
            "of a stack one by one."
        )
    metric.check(tuple(matrix.shape))
