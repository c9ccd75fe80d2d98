"""Optimal brain compression: each row loses its entries one by one, the cheapest first; the others make up for it.

With H = A + damping of a layer's inputs, removing entry q of a row costs w_q^2 / (2 [H^-1]_qq) after the others moved
by -w_q H^-1_:q / [H^-1]_qq; then H^-1 loses row and column q by one step of elimination. Each row is followed to its
end once; how many entries each row loses is decided by the costs of all rows of a layer together, and values are the
least squares on what is left.

Cost: n^3 a row of n entries: minutes for layers of a thousand inputs.
Source: Frantar, Alistarh, "Optimal brain compression", 2022 (ExactOBS with global choice over rows).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..linalg import damped
from .criteria import chosen, input_moments, sites_of
from .masks import MaskSet
from .prune import prunable

_BYTES = 1 << 24
"""Memory of the inverses followed together: they should stay in the cache."""
_NARROW = 256
"""Columns up to which elimination runs in float64; the values are found in float64 always."""
_SHRINK = 0.7
"""Share of the entries left below which what was eliminated is dropped from memory."""


def obc(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Batch],
    *,
    density: float | Mapping[str, float],
    names: Sequence[str] | None = None,
    damping: float = 0.01,
) -> MaskSet:
    """Choose and refit the entries that each layer keeps; the model is not changed (`MaskSet.apply_` does).

    Args:
        model: The model.
        loss: Runs the model; its value does not matter.
        batches: Data.
        density: Share of the entries that each layer keeps, one for all or by parameter name; at least one entry is
            kept.
        names: Parameters to prune; None for the weights of all linear layers and convolutions.
        damping: Added to H, relative to its mean diagonal.

    Returns:
        Masks with the values that belong to them.

    Raises:
        ValueError: if a density is missing or out of range.
    """
    names = prunable(model) if names is None else list(names)
    chosen(model, names)
    sites = sites_of(model, names)
    shares = dict(density) if isinstance(density, Mapping) else dict.fromkeys(names, density)
    for name in names:
        if not 0 < shares.get(name, 0.0) <= 1:
            raise ValueError(f"density must be in (0, 1] for every parameter, got {shares.get(name)} for {name!r}.")
    masks, values = {}, {}
    for name, moment in input_moments(model, loss, batches, sites).items():
        site = sites[name]
        weight = site.matrix_of(site.tensor(model).detach()).double().chunk(site.groups)
        metrics = [damped(a, damping) for a in moment]
        followed = [_follow(w, h) for w, h in zip(weight, metrics)]
        order, cost = (torch.cat([f[k] for f in followed]) for k in (0, 1))
        keep = max(1, round(shares[name] * order.numel()))
        mask = _cheapest(order, cost, order.numel() - keep)
        parts = [_least_squares(w, m, h) for w, m, h in zip(weight, mask.chunk(site.groups), metrics)]
        masks[name] = site.stored_of(mask)
        values[name] = site.stored_of(torch.cat(parts)).to(site.tensor(model))
    return MaskSet(masks, values=values)


def _follow(weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each row of W (m, n) the order in which entries go, and what each costs, both (m, n)."""
    n = weight.shape[1]
    dtype = torch.float64 if n <= _NARROW else torch.float32
    inverse = torch.linalg.inv(h).to(dtype)
    rows = max(1, _BYTES // (n * n * inverse.element_size()))
    parts = [_eliminate(w, inverse) for w in torch.split(weight.to(dtype), rows)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _eliminate(weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    r, n = weight.shape
    w, left = weight.clone(), inverse.repeat(r, 1, 1)
    where = torch.arange(n).repeat(r, 1)
    alive = torch.ones(r, n, dtype=torch.bool)
    order = torch.empty(r, n, dtype=torch.int64)
    cost = torch.empty(r, n, dtype=torch.float64)
    each = torch.arange(r)
    for step in range(n):
        diagonal = left.diagonal(dim1=1, dim2=2)
        score = torch.where(alive, 0.5 * w.square() / diagonal, torch.inf)
        least, q = score.min(1)
        order[:, step], cost[:, step] = where[each, q], least.double()
        column = left[each, :, q]
        pivot = column[each, q][:, None]
        w -= (w[each, q][:, None] / pivot) * column
        left.baddbmm_(column[:, :, None], (column / pivot)[:, None], alpha=-1)
        alive[each, q] = False
        w[each, q] = 0
        # Its pivot is rounding by now and is never read again, but 0 / 0 would be.
        left[each, q, q] = 1
        remaining = n - step - 1
        if 0 < remaining < _SHRINK * alive.shape[1] and alive.shape[1] > 32:
            kept = alive.nonzero()[:, 1].view(r, remaining)
            left = left.gather(1, kept[:, :, None].expand(-1, -1, left.shape[2]))
            left = left.gather(2, kept[:, None].expand(-1, remaining, -1))
            w, where = w.gather(1, kept), where.gather(1, kept)
            alive = torch.ones_like(w, dtype=torch.bool)
    return order, cost


def _cheapest(order: Tensor, cost: Tensor, gone: int) -> Tensor:
    """Return the mask (m, n) after `gone` removals, the cheapest of all rows first."""
    # A row's entries go in their order: an entry is as dear as the dearest before it.
    price = cost.cummax(1).values
    flat = price.flatten().sort(stable=True).indices[:gone]
    removed = torch.zeros_like(price, dtype=torch.bool)
    removed.view(-1)[flat] = True
    return torch.ones_like(removed).scatter(1, order, ~removed)


def _least_squares(weight: Tensor, mask: Tensor, h: Tensor) -> Tensor:
    found = torch.zeros_like(weight)
    right = weight @ h
    for i, kept in enumerate(mask):
        s = kept.nonzero()[:, 0]
        if len(s):
            found[i, s] = torch.linalg.solve(h[s][:, s], right[i, s])
    return found
