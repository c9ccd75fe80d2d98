"""Patches of signals, images and volumes at given corners: from tensors all at once, from lazy sources one by one.

A grid of attention over a small view maps to the large one as if every position saw `receptive_field` pixels of the
small view: corner = round(receptive_field / 2 * scale + s * step + step / 2 - patch / 2), scale = large / small,
step = (small - receptive_field) * scale / grid. What lies outside the source is zero.
Source: Katharopoulos and Fleuret, 2019.
Cost: O(N * patch) whatever the size of the source.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .images import ImageSource

Source = Tensor | Sequence[ImageSource]
"""A batch: a tensor (batch, channels, *space), or one lazy image for each sample."""


def corners(
    order: Tensor,
    *,
    grid: Sequence[int],
    small: Sequence[int],
    large: Sequence[int],
    patch: Sequence[int],
    receptive_field: int = 0,
) -> Tensor:
    """Return the first pixel of each patch.

    Args:
        order: Positions of the grid in row-major order, (batch, N).
        grid: Size of the grid of attention, one number for each axis of space.
        small: Size of the view from which the attention came.
        large: Size of the source.
        patch: Size of the patches.
        receptive_field: Pixels of the small view that one position sees, if the network does not pad.

    Returns:
        Corners in pixels of the source, (batch, N, axes), int64; they can lie outside.

    Raises:
        ValueError: if the sizes do not have one number for each axis, or a patch is larger than the source.
    """
    axes = len(grid)
    if not axes or any(len(sizes) != axes for sizes in (small, large, patch)):
        raise ValueError(
            "grid, small, large and patch need one number for each axis of space, got "
            f"{tuple(grid)}, {tuple(small)}, {tuple(large)}, {tuple(patch)}."
        )
    check_patch(patch, large)
    if not 0 <= receptive_field < min(small):
        raise ValueError(f"receptive_field must lie in 0 … {min(small) - 1}, got {receptive_field}.")
    places = torch.stack(torch.unravel_index(order, tuple(grid)), -1).to(torch.float64)
    sizes = torch.tensor([list(grid), list(small), list(large), list(patch)], dtype=torch.float64, device=order.device)
    scale = sizes[2] / sizes[1]
    step = (sizes[1] - receptive_field) * scale / sizes[0]
    return (receptive_field / 2 * scale + places * step + step / 2 - sizes[3] / 2).round().long()


def check_patch(patch: Sequence[int], large: Sequence[int]) -> None:
    """Refuse patches that no source can fill.

    Raises:
        ValueError: naming both sizes.
    """
    if any(not 1 <= size <= whole for size, whole in zip(patch, large)):
        raise ValueError(f"A patch of {tuple(patch)} pixels does not fit into a source of {tuple(large)}.")


def gather(source: Source, places: Tensor, patch: Sequence[int]) -> Tensor:
    """Cut patches out.

    Args:
        source: (batch, channels, *space), any dtype; or one lazy image for each sample, of which nothing but the
            patches is read.
        places: Corners, (batch, N, axes), int64; a patch may hang over the border, where it is zero.
        patch: Size of the patches, one number for each axis.

    Returns:
        (batch, N, channels, *patch), of the source's dtype.

    Raises:
        ValueError: if the numbers of samples or axes do not fit.
    """
    samples = len(source)
    axes = len(patch)
    if places.ndim != 3 or places.shape[0] != samples or places.shape[2] != axes:
        raise ValueError(
            f"Corners must be (batch, N, axes) = ({samples}, N, {axes}) for this source and patch, got "
            f"{tuple(places.shape)}."
        )
    if not isinstance(source, Tensor):
        cut = [
            torch.stack([image.crop(tuple(corner), patch) for corner in rows])
            for image, rows in zip(source, places.tolist())
        ]
        return torch.stack(cut).to(places.device)
    if source.ndim != axes + 2:
        raise ValueError(f"A patch of {axes} axes needs a source (batch, channels, *space), got {tuple(source.shape)}.")
    index: list[Tensor] = []
    inside = torch.ones((), dtype=torch.bool, device=source.device)
    for axis, size in enumerate(patch):
        line = places[..., axis, None].to(source.device) + torch.arange(size, device=source.device)  # (batch, N, size)
        line = line.reshape(*line.shape[:2], *(size if other == axis else 1 for other in range(axes)))
        whole = source.shape[2 + axis]
        inside = inside & (line >= 0) & (line < whole)
        index.append(line.clamp(0, whole - 1))
    rows = torch.arange(samples, device=source.device).reshape(-1, *[1] * (axes + 1))
    # The axis of channels last, so that one index of the source serves all channels.
    pixels: Tensor = source.movedim(1, -1)[(rows, *index)]
    return torch.where(inside.unsqueeze(-1), pixels, 0).movedim(-1, 2)


def shrink(patches: Tensor, factor: int) -> Tensor:
    """Average blocks of factor pixels along every axis of space.

    Args:
        patches: (batch, N, channels, *space), floating point, each axis a multiple of the factor.
        factor: Pixels of a block along each axis.

    Returns:
        (batch, N, channels, *space / factor).
    """
    if factor == 1:
        return patches
    sizes = [part for size in patches.shape[3:] for part in (size // factor, factor)]
    blocks = patches.reshape(*patches.shape[:3], *sizes)
    return blocks.mean(dim=tuple(range(4, blocks.ndim, 2)))
