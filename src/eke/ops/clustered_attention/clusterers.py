"""Groups of queries that may share their attention: k-means in the metric of the keys, on the sphere, on hashes.

    KMeans()                  Lloyd's steps with squared distances x^T A x, A the covariance of the keys: the variance
                              over the keys of the difference of two queries' logits, all that a softmax sees
    KMeans(metric="plain")    on the queries as they are
    Spherical()               by the cosine
    Hamming()                 on the signs of random projections, with bitwise majorities (the paper's)

Starts are queries at even distances, so that nothing depends on padding or on what else is in the batch; an empty
cluster keeps its centre; of equal distances the lowest cluster wins. Cost a step: N C D, or N C popcounts.
Sources: Vyas, Katharopoulos, Fleuret, 2020 (Hamming); Lloyd, 1982; Dhillon, Modha, 2001 (spherical).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from . import grouping

_SEED = 0


@dataclass(frozen=True)
class Asked:
    """Queries to be grouped.

    Args:
        q: (batch, heads, length, D), float32 or float64.
        k: The keys that they attend to, (batch, heads, keys, D).
        clusters: For each head.
        mask: Which keys are real, (batch, keys), or None.
        query_mask: Which queries are real, (batch, length), or None.
        generator: Where randomness comes from; None for the same draw in every call.
        start: Centres to start from, (1 or batch, heads, largest of clusters, D), or None.
    """

    q: Tensor
    k: Tensor
    clusters: Sequence[int]
    mask: Tensor | None = None
    query_mask: Tensor | None = None
    generator: torch.Generator | None = None
    start: Tensor | None = None


Clusterer = Callable[[Asked], Tensor]
"""`clusterer(asked)`: the cluster of each query, (batch, heads, length) of int64; -1 for queries that are not real."""


@dataclass(frozen=True)
class KMeans:
    """Lloyd's algorithm on the queries.

    Args:
        iterations: Times that queries are assigned; centres move between them.
        metric: "keys": distances are those of the logits over these keys; "plain": of the queries.

    Raises:
        ValueError: if iterations are not positive or the metric is unknown.
    """

    iterations: int = 5
    metric: Literal["keys", "plain"] = "keys"

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)
        if self.metric not in {"keys", "plain"}:
            raise ValueError(f"KMeans.metric is 'keys' or 'plain', got {self.metric!r}.")

    @torch.no_grad()
    def __call__(self, asked: Asked) -> Tensor:
        """Return the cluster of each query, (batch, heads, length)."""
        metric = grouping.covariance(asked.k, asked.mask) if self.metric == "keys" else None
        return _lloyd(asked, asked.q, asked.start, self.iterations, metric=metric, sphere=False)


@dataclass(frozen=True)
class Spherical:
    """Lloyd's algorithm on the directions of the queries, by the cosine.

    Args:
        iterations: As for `KMeans`.

    Raises:
        ValueError: if iterations are not positive.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)

    @torch.no_grad()
    def __call__(self, asked: Asked) -> Tensor:
        """Return the cluster of each query, (batch, heads, length)."""
        points, start = (None if x is None else normalize(x, dim=-1) for x in (asked.q, asked.start))
        assert points is not None
        return _lloyd(asked, points, start, self.iterations, metric=None, sphere=True)


@dataclass(frozen=True)
class Hamming:
    """Lloyd's algorithm on hashes: bit b is [W_b . q > t_b] with W and t from N(0, 1); centres are bitwise majorities.

    Args:
        bits: Of a hash, 1 to 63.
        iterations: As for `KMeans`.
        thresholds: Whether t is drawn; else it is 0 and hashes see directions alone.

    Raises:
        ValueError: if bits or iterations are out of range.
    """

    bits: int = 63
    iterations: int = 10
    thresholds: bool = True

    def __post_init__(self) -> None:
        _check_iterations(self.iterations)
        if not 1 <= self.bits <= 63:
            raise ValueError(f"Hamming.bits must lie in 1 to 63 (a hash is one 64-bit integer), got {self.bits!r}.")

    def planes(self, dim: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw W (bits, dim) and t (bits,) on the CPU, the same for all heads and rows of a batch.

        Args:
            dim: Of the queries.
            generator: On the CPU; None for the same planes in every call.

        Returns:
            W and t.
        """
        generator = torch.Generator().manual_seed(_SEED) if generator is None else generator
        drawn = torch.randn(self.bits, dim + 1, generator=generator, device=generator.device)
        return drawn[:, :-1], drawn[:, -1] * self.thresholds

    @torch.no_grad()
    def __call__(self, asked: Asked) -> Tensor:
        """Return the cluster of each query, (batch, heads, length)."""
        w, t = (x.to(asked.q) for x in self.planes(asked.q.shape[-1], asked.generator))
        start = None if asked.start is None else asked.start.expand(asked.q.shape[0], -1, -1, -1)
        return grouping.hashes(
            asked.q, (w, t), _places(asked), start=start, real=asked.query_mask, clusters=asked.clusters,
            iterations=self.iterations,
        )  # fmt: skip


def _lloyd(
    asked: Asked, points: Tensor, start: Tensor | None, iterations: int, *, metric: Tensor | None, sphere: bool
) -> Tensor:
    if start is None:
        start = points.gather(2, _places(asked).unsqueeze(-1).expand(-1, -1, -1, points.shape[-1]))
    centres = start.to(points.dtype).expand(points.shape[0], -1, -1, -1)
    return grouping.points(
        points, centres, asked.query_mask, metric=metric, clusters=asked.clusters, iterations=iterations, sphere=sphere
    )


def _places(asked: Asked) -> Tensor:
    """Return positions at even distances among the real ones, each head with its own number; the rest repeats them."""
    batch, heads, length, _ = asked.q.shape
    generator, real = asked.generator, asked.query_mask
    shift = 0.5 if generator is None else float(torch.rand((), generator=generator, device=generator.device))
    lengths = torch.full((batch,), length) if real is None else real.sum(1).cpu()
    places = torch.arange(max(asked.clusters), dtype=torch.float64).expand(batch, heads, -1) + shift
    wanted = torch.tensor(asked.clusters, dtype=torch.float64).view(1, heads, 1)
    rank = (places * (lengths.view(-1, 1, 1) / wanted)).long()
    rank = rank.minimum((lengths - 1).clamp_min(0).view(-1, 1, 1)).to(asked.q.device)
    if real is None:
        return rank
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    return order[:, None, :].expand(-1, heads, -1).gather(2, rank)


def _check_iterations(iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"A clusterer needs at least one iteration, got {iterations!r}.")
