"""What a site's matrix multiplies, as columns, for all or some locations of each sample.

Patches of a padded input are a strided view, so they cost one copy, already in the order a matrix product wants.
A lattice of every k-th location, shifted from batch to batch, serves large images, where neighbouring patches say the
same. Locations are in row-major order of the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from ..sites import Geometry, Site


@dataclass(frozen=True)
class Lattice:
    """Every `step`-th location from `start`, per spatial dimension of an output of `size`."""

    size: tuple[int, ...]
    start: tuple[int, ...]
    step: tuple[int, ...]

    @property
    def counts(self) -> list[int]:
        """Locations per dimension."""
        return [len(range(*triple)) for triple in zip(self.start, self.size, self.step)]

    def of(self, rows: Tensor) -> Tensor:
        """Return the chosen ones of (samples, locations)."""
        maps = rows.view(rows.shape[0], *self.size)
        for dim, (start, step) in enumerate(zip(self.start, self.step), start=1):
            maps = maps[(slice(None),) * dim + (slice(start, None, step),)]
        return maps.flatten(1)


def lattice(size: tuple[int, ...], most: int | None, turn: int) -> Lattice:
    """Choose at most `most` locations of an output; `turn` shifts the lattice so that all locations get their turn.

    Args:
        size: Spatial size of the output.
        most: Largest number of locations, None for all.
        turn: Number of the batch.

    Returns:
        The lattice.
    """
    step = [1] * len(size)
    while most is not None and math.prod(-(-length // k) for length, k in zip(size, step)) > max(most, 1):
        # Thin the dimension that still has most locations.
        axis = max(range(len(size)), key=lambda i: size[i] / step[i])
        step[axis] += 1
    start = []
    for k in step:
        turn, offset = divmod(turn, k)
        start.append(offset)
    return Lattice(size, tuple(start), tuple(step))


def input_columns(site: Site, x: Tensor, chosen: Lattice | None) -> Tensor:
    """Return what the site's matrix multiplies, one column a sample and location.

    Args:
        site: A visible site.
        x: Input of its module.
        chosen: Locations of a convolution's output to use; None for all.

    Returns:
        (groups, n, samples * locations).
    """
    if site.geometry is not None and not site.geometry.transposed and chosen is not None:
        return _patches(x, site.geometry, chosen)
    rows = site.inputs_to_rows(x)  # (samples, locations, groups, n)
    return rows.permute(2, 3, 0, 1).flatten(2)


def _patches(x: Tensor, geometry: Geometry, chosen: Lattice) -> Tensor:
    dims = len(geometry.kernel)
    x = x if x.dim() == dims + 2 else x[None]
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    if any(sides):
        x = F.pad(x, sides, mode="constant" if geometry.padding_mode == "zeros" else geometry.padding_mode)
    for dim, (start, stride) in enumerate(zip(chosen.start, geometry.stride), start=2):
        x = x[(slice(None),) * dim + (slice(start * stride, None),)]
    sample, channel, *space = x.stride()
    counts = chosen.counts
    # (channels, kernel..., samples, locations...)
    windows = x.as_strided(
        (x.shape[1], *geometry.kernel, x.shape[0], *counts),
        (
            channel,
            *(d * s for d, s in zip(geometry.dilation, space)),
            sample,
            *(k * step * s for k, step, s in zip(geometry.stride, chosen.step, space)),
        ),
        x.storage_offset(),
    )
    return windows.reshape(geometry.groups, -1, x.shape[0] * math.prod(counts))
