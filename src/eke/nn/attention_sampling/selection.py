"""Two rivals of attention sampling behind the same interface: iterative patch selection and perturbed top-k.

Iterative patch selection looks at all patches, a chunk at a time and without derivatives, keeps the `memory` patches
with the highest cross-attention, and learns from these alone. Perturbed top-k picks the k best positions under noise:
Y = E[top-k one-hot(s + sigma Z)], with derivative E[Y Z^T] / sigma; its patches are mixtures while training.
Sources: Bergner and others, "Iterative patch selection for high-resolution image recognition", 2023; Cordonnier and
others, "Differentiable patch selection for image recognition", 2021; Berthet and others, "Learning with differentiable
perturbed optimizers", 2020. Own implementations; details that the papers leave open are reconstructed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer import PatchLayer, Places, Sampled
from .patches import Source


class CrossAttentionPool(nn.Module):
    """Pool features by the attention of one learned query.

    Args:
        dim: Size of the features, a multiple of heads.
        heads: Of the attention.

    Raises:
        ValueError: if dim is not a multiple of heads.
    """

    def __init__(self, dim: int, *, heads: int = 8) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}.")
        self.heads = heads
        self.query = nn.Parameter(torch.randn(heads, dim // heads) / math.sqrt(dim // heads))
        self.keys = nn.Linear(dim, dim)
        self.values = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def scores(self, features: Tensor) -> Tensor:
        """Return the logits of every head, (batch, heads, N), for features (batch, N, dim)."""
        keys = self.keys(features).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnhd,hd->bhn", keys, self.query) / math.sqrt(keys.shape[-1])

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what was pooled (batch, dim) and the mean attention of the heads (batch, N)."""
        attention = torch.softmax(self.scores(features), -1)
        values = self.values(features).unflatten(-1, (self.heads, -1))
        pooled = torch.einsum("bhn,bnhd->bhd", attention, values).flatten(1)
        return self.out(pooled), attention.mean(1)


class _Everywhere(nn.Module):
    """Attention that says nothing: a grid of zeros, for layers that look at all patches."""

    def __init__(self, grid: tuple[int, ...]) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, view: Tensor) -> Tensor:
        return view.new_zeros(len(view), *self.grid)


class IterativePatchSelection(PatchLayer):
    """Keep the patches with the highest attention among all, chunk by chunk, and learn from these.

    Args:
        encoder: From patches (batch, channels, *patch) to features (batch, dim).
        pool: Cross-attention over features; None for `CrossAttentionPool(dim)`.
        dim: Size of the features.
        patch: Size of a patch in pixels, one number for all axes or one for each.
        grid: Positions along each axis.
        memory: Patches that are kept, M.
        chunk: Patches that are looked at together with those kept, I.
        axes: Axes of space.

    Raises:
        ValueError: if a number is not positive, or the grid has another number of axes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        dim: int,
        patch: int | Sequence[int],
        grid: Sequence[int],
        pool: CrossAttentionPool | None = None,
        memory: int = 100,
        chunk: int = 100,
        axes: int = 2,
    ) -> None:
        if len(grid) != axes or min(grid) < 1 or chunk < 1:
            raise ValueError(f"The grid needs {axes} positive numbers and chunk one, got {tuple(grid)} and {chunk}.")
        super().__init__(_Everywhere(tuple(grid)), encoder, patch=patch, samples=memory, axes=axes)
        self.pool = CrossAttentionPool(dim) if pool is None else pool
        self.chunk = chunk

    def forward(
        self, source: Source, view: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Sampled:
        """Look at a batch of images.

        Args:
            source: (batch, channels, *space), or one lazy image for each sample.
            view: Not needed: every patch is looked at.
            generator: Of the order in which patches are looked at while training.

        Returns:
            Pooled features, attention over all positions (0 for those not kept), and the positions kept.
        """
        large = self._size(source)
        assert isinstance(self.attention, _Everywhere)
        places = Places((self.attention.grid,), large, large)
        device = self.pool.query.device
        count = int(torch.Size(self.attention.grid).numel())
        order = self._selected(source, places, count, generator)
        patches, boxes = self.cut(source, order, places)
        pooled, attention = self.pool(self.encode(patches.to(device)))
        whole = torch.zeros(len(source), count, dtype=attention.dtype, device=device).scatter(1, order, attention)
        return Sampled(pooled, whole, order, boxes, places.grids)

    @torch.no_grad()
    def _selected(self, source: Source, places: Places, count: int, generator: torch.Generator | None) -> Tensor:
        """Return the positions that are kept, (batch, min(memory, count))."""
        batch, device = len(source), self.pool.query.device
        if self.training:  # ties must not always go to the same corner
            noise = torch.rand(batch, count, generator=generator, device=device)
            todo = noise.argsort(-1)
        else:
            todo = torch.arange(count, device=device).expand(batch, -1)
        modes = [module.training for module in self.encoder.modules()]
        self.encoder.eval()
        kept, features = todo[:, :0], None
        for part in torch.split(todo, self.chunk, 1):
            found = self.encode(self.cut(source, part, places)[0].to(device))
            kept = torch.cat([kept, part], 1)
            features = found if features is None else torch.cat([features, found], 1)
            if kept.shape[1] > self.samples:
                best = torch.softmax(self.pool.scores(features), -1).mean(1).topk(self.samples, dim=-1).indices
                kept = kept.gather(1, best)
                features = features.gather(1, best.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
        for module, mode in zip(self.encoder.modules(), modes):
            module.training = mode
        return kept


class _Perturbed(torch.autograd.Function):
    """Mean of top-k one-hots under Gaussian noise, with the derivative of perturbed optimizers."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, k: int, noise: Tensor, sigma: float) -> Tensor:
        """Return (batch, k, K) for scores (batch, K), noise (samples, batch, K)."""
        top = (scores + sigma * noise).topk(k, dim=-1).indices.sort(-1).values.permute(1, 2, 0)  # (batch, k, samples)
        ctx.save_for_backward(top, noise)
        ctx.sigma = sigma
        counts = scores.new_zeros(len(scores), k, scores.shape[-1])
        ones = torch.ones((), dtype=scores.dtype, device=scores.device).expand(top.shape)
        return counts.scatter_add(2, top, ones) / len(noise)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return E[<grad, Y> Z] / sigma."""
        top, noise = ctx.saved_tensors
        inner = grads[0].gather(2, top).sum(1)  # (batch, samples)
        slope = torch.einsum("bs,sbk->bk", inner, noise) / (len(noise) * ctx.sigma)
        return slope, None, None, None


def perturbed_topk(
    scores: Tensor, k: int, *, draws: int = 500, sigma: float = 0.05, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mean of the k best positions' one-hots, sorted by position, under Gaussian noise.

    Args:
        scores: (batch, K); differentiable, by E[Y Z^T] / sigma.
        k: Positions to pick.
        draws: Of the noise.
        sigma: Of the noise.
        generator: Of the noise.

    Returns:
        (batch, k, K); each row sums to 1.

    Raises:
        ValueError: if k is not in 1 … K, or draws or sigma are not positive.
    """
    if scores.ndim != 2 or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"perturbed_topk needs scores (batch, K) and k in 1 … K, got {tuple(scores.shape)} and {k}.")
    if draws < 1 or not sigma > 0:
        raise ValueError(f"draws and sigma must be positive, got {draws} and {sigma}.")
    noise = torch.randn(draws, *scores.shape, dtype=scores.dtype, device=scores.device, generator=generator)
    found: Tensor = _Perturbed.apply(scores, k, noise, sigma)
    return found


class PerturbedTopK(PatchLayer):
    """Encode the k best patches, made differentiable by noise; while training patches are mixtures.

    Args:
        attention: From views (batch, channels, *small) to scores (batch, 1, *grid) or (batch, *grid).
        encoder: From patches (batch, channels, *patch) to features (batch, ...).
        patch: Size of a patch in pixels, one number for all axes or one for each.
        samples: Patches to encode for each image, k.
        axes: Axes of space.
        receptive_field: Pixels of the view that one position sees, if the attention network does not pad.
        view_size: Size of the view to be made of images that come without one.
        draws: Of the noise.
        sigma: Of the noise; scores are brought to [0, 1] first.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(
        self,
        attention: nn.Module,
        encoder: nn.Module,
        *,
        patch: int | Sequence[int],
        samples: int,
        axes: int = 2,
        receptive_field: int = 0,
        view_size: Sequence[int] | None = None,
        draws: int = 500,
        sigma: float = 0.05,
    ) -> None:
        super().__init__(
            attention, encoder, patch=patch, samples=samples, axes=axes, receptive_field=receptive_field,
            view_size=view_size,
        )  # fmt: skip
        if draws < 1 or not sigma > 0:
            raise ValueError(f"draws and sigma must be positive, got {draws} and {sigma}.")
        self.draws, self.sigma = draws, sigma

    def forward(
        self, source: Source, view: Tensor | None = None, *, generator: torch.Generator | None = None
    ) -> Sampled:
        """Look at a batch of images.

        Args:
            source: (batch, channels, *space), or one lazy image for each sample.
            view: Small views; None to make them of view_size.
            generator: Of the noise.

        Returns:
            Mean of the encodings, softmax of the scores, the best positions.

        Raises:
            ValueError: if there are fewer positions than patches to encode.
        """
        scores, places = self.look(source, view)
        if self.samples > scores.shape[1]:
            raise ValueError(f"{self.samples} patches cannot be taken from {scores.shape[1]} positions.")
        low, high = scores.amin(-1, keepdim=True), scores.amax(-1, keepdim=True)
        scores = (scores - low) / (high - low + 1e-5)
        order = scores.topk(self.samples, dim=-1).indices
        if not self.training:
            patches, boxes = self.cut(source, order, places)
            features = self.encode(patches.to(scores.device)).mean(1)
        else:
            picked = perturbed_topk(scores, self.samples, draws=self.draws, sigma=self.sigma, generator=generator)
            # Positions that no draw picked have weight 0 in every image: their patches are not read.
            used = picked.detach().sum((0, 1)).nonzero().squeeze(1)
            patches, _ = self.cut(source, used.expand(len(scores), -1), places)
            mixed = torch.einsum("bkn,bn...->bk...", picked[..., used], patches.to(scores.device))
            features = self.encode(mixed).mean(1)
            _, boxes = self.cut(source, order, places)
        return Sampled(features, torch.softmax(scores, -1), order, boxes, places.grids)
