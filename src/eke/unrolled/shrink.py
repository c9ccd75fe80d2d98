"""What makes iterates sparse: soft and hard thresholds, and the selection of a support by order statistics.

    soft(z, t) = z max(|z| - t, 0) / |z|            keeps signs, and phases of complex numbers
    selected(z, t, p) = z where |z| is among the floor(p n) largest and >= t, soft(z, t) elsewhere

Thresholds are numbers or tensors that broadcast against z (batch, n): (batch, 1) for one a sample. Equal magnitudes
enter together, so more than floor(p n) may pass; p = 0 is soft and p = 1 hard thresholding. Nobody sorts: magnitudes
below t never matter, so as many are ordered as the smallest selection asks for.
Source of the selection: Chen, Liu, Wang and Yin, "Theoretical linear convergence of unfolded ISTA", 2018. Its quantile
interpolates and lets the largest entry pass at p = 0; the order statistic here does not.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Added to shares before p n is rounded down: 12.999999 of 100 is meant to be 13."""


def soft_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    """Return z with every magnitude lowered by the threshold, zero at least.

    Args:
        z: Real or complex, any shape.
        threshold: >= 0; broadcasts against z.

    Returns:
        The same shape; differentiable in both.
    """
    if not z.is_complex():
        return z - torch.clamp(z, -threshold, threshold)  # type: ignore[arg-type]  # numbers and tensors alike
    magnitude = z.abs()
    return z * ((magnitude - threshold).clamp_min(0) / magnitude.clamp_min(torch.finfo(z.dtype).tiny))


def hard_threshold(z: Tensor, threshold: float | Tensor) -> Tensor:
    """Return z where its magnitude reaches the threshold, zero elsewhere; the same shape."""
    level = threshold.detach() if isinstance(threshold, Tensor) else threshold
    # a product with 0 and 1 is several times faster than `where`
    return z * z.detach().abs().ge_(level)


def kth_largest(magnitude: Tensor, k: int) -> Tensor:
    """Return the k-th largest entry of each row, (batch, 1), for 1 <= k <= n."""
    if torch.onnx.is_in_onnx_export():
        return magnitude.topk(k, dim=-1).values[..., -1:]
    n = magnitude.shape[-1]
    return magnitude.kthvalue(n + 1 - k, dim=-1, keepdim=True).values


def keep_largest(z: Tensor, k: int) -> Tensor:
    """Return a mask of the k entries of largest magnitude in each row, exactly k also among equals.

    Args:
        z: (batch, n).
        k: From 0 to n.

    Returns:
        (batch, n), bool.

    Raises:
        ValueError: if k is out of range.
    """
    n = z.shape[-1]
    if not 0 <= k <= n:
        raise ValueError(f"k must be from 0 to {n}, the number of entries, got {k}.")
    mask = torch.zeros(z.shape, dtype=torch.bool, device=z.device)
    return mask.scatter_(-1, z.detach().abs().topk(k, dim=-1, sorted=False).indices, True)


def select_support(z: Tensor, threshold: float | Tensor, share: float | Tensor) -> Tensor:
    """Return z unshrunk where its magnitude is among the largest and reaches the threshold, softened elsewhere.

    Args:
        z: (batch, n), real or complex.
        threshold: >= 0; broadcasts against z.
        share: p in [0, 1]: the floor(p n) largest of a row may pass; a number, or one a sample, (batch, 1).

    Returns:
        (batch, n); differentiable in z and threshold, not in share.
    """
    magnitude = z.detach().abs()
    level = threshold.detach() if isinstance(threshold, Tensor) else threshold
    if isinstance(share, Tensor) and not _traced():
        room = _count(_checked_shares(share), z.shape[-1])
        reached = magnitude.clone().ge_(level)
        if bool((reached.sum(-1, keepdim=True) <= room).all()):
            return z * reached
    return torch.where(passing(magnitude, level, share), z, soft_threshold(z, threshold))


def passing(magnitude: Tensor, threshold: float | Tensor, share: float | Tensor) -> Tensor:
    """Return which entries pass unshrunk.

    Args:
        magnitude: |z|, (batch, n).
        threshold: Least magnitude; broadcasts against z.
        share: p in [0, 1], a number or (batch, 1).

    Returns:
        (batch, n), bool.

    Raises:
        ValueError: if a share is outside [0, 1].
    """
    n = magnitude.shape[-1]
    reached = magnitude >= threshold
    if not isinstance(share, Tensor):
        if not 0 <= share <= 1:
            raise ValueError(f"share is the part of entries that may pass, from 0 to 1, got {share!r}.")
        count = min(n, int(share * n + ROUNDING * n))
        if count == 0:
            return torch.zeros_like(reached)
        return reached if count == n else reached & (magnitude >= kth_largest(magnitude, count))
    k = _count(share, n)
    if _traced():
        last = magnitude.sort(dim=-1, descending=True).values.gather(-1, (k - 1).clamp_min(0))
        return reached & (k > 0) & (magnitude >= last)
    k = _count(_checked_shares(share), n).expand(*magnitude.shape[:-1], 1)
    passes = reached & (k > 0)
    # rows whose selection holds all that reach the threshold need no order
    short = ((k > 0) & (k < reached.sum(-1, keepdim=True))).squeeze(-1)
    if bool(short.any()):
        rows, wanted = magnitude[short], k[short]
        last = rows.topk(int(wanted.max()), dim=-1).values.gather(-1, wanted - 1)
        passes[short] &= rows >= last
    return passes


def _traced() -> bool:
    """Return whether operations are recorded, so that values cannot decide which ones run."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()


def _count(share: Tensor, n: int) -> Tensor:
    """Return floor(p n)."""
    return (share.detach() * n + ROUNDING * n).floor().to(torch.int64).clamp(0, n)


def _checked_shares(share: Tensor) -> Tensor:
    if not bool(((share >= 0) & (share <= 1)).all()):
        raise ValueError(f"share must be from 0 to 1, got values from {float(share.min())} to {float(share.max())}.")
    return share
