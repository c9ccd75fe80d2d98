"""ALISTA's weight for convolutional dictionaries, in closed form on the filters.

The least sum, over all filters k and shifts t, of |<w_m, shifted_t d_k>|^2 with <w_m, d_m> = 1, w_m on its window only.
Its KKT system [Q d_m; d_m^H 0] decouples by filter as in the dense case:

    w_m = Q^-1 d_m / (d_m^H Q^-1 d_m),   Q = sum over k, t of s s^H,   s = shifted_t d_k, cut to the window

Q is what A A^H is for the pixels of one window, (channels h w)^2, however large images are and however many filters
there are. Cost: (channels h w)^3. Source of the problem: Liu, Chen, Wang and Yin, "ALISTA", 2019, theorem 3, who
solve it by gradients in the Fourier domain; the closed form is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .operators import check_dtype, check_finite


def convolutional_weight(filters: Tensor) -> Tensor:
    """Return the filters of least interference with all shifts of all filters that answer their own with one.

    Args:
        filters: D (filters, channels, h, w), real or complex. `Convolutional(weight, size).adjoint` is W^H.

    Returns:
        W in D's shape and dtype; differentiable.

    Raises:
        ValueError: if D has another shape, a filter of zeros, or so little spectrum that Q has no inverse.
    """
    check_dtype(filters, "filters")
    if filters.ndim != 4 or 0 in filters.shape:
        raise ValueError(f"filters must be (filters, channels, h, w), got {tuple(filters.shape)}.")
    check_finite(filters, "filters")
    zero = (filters == 0).flatten(1).all(1)
    if bool(zero.any()):
        raise ValueError(f"Filter {int(zero.nonzero()[0])} of {len(filters)} is zero everywhere. Leave it out.")
    wide = filters.to(torch.complex128 if filters.is_complex() else torch.float64)
    windows = _windows(wide)
    own = wide.flatten(1).T
    factor, info = torch.linalg.cholesky_ex(windows @ windows.mH)
    if int(info):
        raise ValueError(
            f"{len(filters)} filters of shape {tuple(filters.shape[1:])} do not span their window: some image patch is "
            "orthogonal to all shifts of all of them. Add filters, or leave out channels."
        )
    solved = torch.cholesky_solve(own, factor)
    weight = solved / (own.conj() * solved).sum(0).real
    return weight.T.reshape(filters.shape).to(filters.dtype)


def _windows(filters: Tensor) -> Tensor:
    """Return every shift of every filter as seen in the window, (channels h w, filters (2 h - 1) (2 w - 1))."""
    count, channels, h, w = filters.shape
    padded = F.pad(filters, (w - 1, w - 1, h - 1, h - 1))
    shifted = padded.unfold(2, h, 1).unfold(3, w, 1)
    return shifted.permute(1, 4, 5, 0, 2, 3).reshape(channels * h * w, count * (2 * h - 1) * (2 * w - 1))
