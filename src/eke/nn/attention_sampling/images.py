"""Images that stay on disk: what is read is what is looked at.

`NumpyImage` reads a .npy file or an array through a memory map, `TiffImage` a tiled TIFF, tile by tile. Both give crops
and views of small size, averaged over blocks while a strip of them is in memory.
Cost: a crop reads its own pixels (TIFF: the tiles it touches); a small view reads the image once, with memory for a
strip of at most a million values, or a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from ..._errors import require

_STRIP = 1 << 20
"""Values of a strip while a small view is made: a million."""


class ImageSource(Protocol):
    """What patches are cut from: shape is (channels, *space)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *space)."""

    def crop(self, corner: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return (channels, *size) from a corner on, zero outside the image."""


class NumpyImage:
    """An image in a .npy file or an array, read where it is looked at.

    Args:
        source: Path of a .npy file, which is memory-mapped, or an array.
        channels: Where its channels are: "first", "last", or None if it has none.

    Raises:
        ValueError: if it has no axis of space.
    """

    def __init__(
        self, source: str | Path | np.ndarray[Any, Any], *, channels: Literal["first", "last"] | None = "first"
    ) -> None:
        array = source if isinstance(source, np.ndarray) else np.load(source, mmap_mode="r", allow_pickle=False)
        if channels is None:
            array = array[None]
        elif channels == "last":
            array = np.moveaxis(array, -1, 0)
        if array.ndim < 2:
            raise ValueError(f"An image needs channels and at least one axis of space, got shape {array.shape}.")
        self._array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """(channels, *space)."""
        return tuple(self._array.shape)

    def crop(self, corner: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return (channels, *size) from a corner on, zero outside the image."""
        first, last, shift = _overlap(corner, size, self.shape[1:])
        part = self._array[(slice(None), *(slice(a, b) for a, b in zip(first, last)))]
        return _placed(part, shift, size)


class TiffImage:
    """A tiled TIFF image of which only the tiles that are looked at are decoded.

    Args:
        path: Of the file.
        page: Which of its images; pyramids often keep smaller ones behind the first.

    Raises:
        ValueError: if the page is not tiled, or not an image of (height, width) or (height, width, channels).
    """

    def __init__(self, path: str | Path, *, page: int = 0) -> None:
        tifffile = require("tifffile", extra="tiff", purpose="Reading TIFF")
        self._file = tifffile.TiffFile(path)
        self._page = self._file.pages[page]
        if not self._page.is_tiled or self._page.axes not in {"YX", "YXS"}:
            kind = "tiled" if self._page.is_tiled else "not tiled"
            self._file.close()
            raise ValueError(
                f"{path}: page {page} is {kind} with axes {self._page.axes}; needed is a tiled image YX or YXS. "
                "Write one with tifffile.imwrite(..., tile=(256, 256)), or use a memory-mapped .npy file."
            )
        shape = self._page.shape
        self.shape = (shape[2] if len(shape) == 3 else 1, *shape[:2])

    def crop(self, corner: Sequence[int], size: Sequence[int]) -> Tensor:
        """Return (channels, *size) from a corner on, zero outside the image."""
        first, last, shift = _overlap(corner, size, self.shape[1:])
        found = np.zeros((*(b - a for a, b in zip(first, last)), self.shape[0]), dtype=self._page.dtype)
        high, wide = self._page.tilelength, self._page.tilewidth
        across = -(-self.shape[2] // wide)
        for row in range(first[0] // high, -(-last[0] // high)):
            for column in range(first[1] // wide, -(-last[1] // wide)):
                tile = self._tile(row * across + column)
                if tile is None:
                    continue
                top, left = row * high, column * wide
                y = slice(max(first[0], top), min(last[0], top + tile.shape[0]))
                x = slice(max(first[1], left), min(last[1], left + tile.shape[1]))
                found[y.start - first[0] : y.stop - first[0], x.start - first[1] : x.stop - first[1]] = tile[
                    y.start - top : y.stop - top, x.start - left : x.stop - left
                ]
        return _placed(np.moveaxis(found, -1, 0), shift, size)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _tile(self, number: int) -> np.ndarray[Any, Any] | None:
        """Return one tile, (height, width, channels), or None for one that was left out of the file."""
        offset, count = self._page.dataoffsets[number], self._page.databytecounts[number]
        if not count:
            return None
        handle = self._file.filehandle
        handle.seek(offset)
        decoded = self._page.decode(handle.read(count), number)[0]
        return None if decoded is None else decoded[0]


def small_view(image: ImageSource, size: Sequence[int]) -> Tensor:
    """Average an image over blocks into a small one, strip by strip.

    Block i of n along an axis of m pixels covers floor(i m / n) up to ceil((i + 1) m / n), as adaptive pooling does.

    Args:
        image: The image.
        size: Of the view, one number for each axis of space, none larger than the image's.

    Returns:
        (channels, *size), float32, in the units of the image.

    Raises:
        ValueError: if the size has another number of axes, or is larger than the image.
    """
    space = image.shape[1:]
    if len(size) != len(space) or any(not 1 <= a <= b for a, b in zip(size, space)):
        raise ValueError(f"A view of an image of {space} pixels must be no larger on any axis, got {tuple(size)}.")
    across = int(np.prod(space[1:]))
    step = max(1, _STRIP // (image.shape[0] * across))
    found = torch.empty(image.shape[0], *size)
    for row in range(size[0]):
        first, last = row * space[0] // size[0], -(-(row + 1) * space[0] // size[0])
        total = torch.zeros(image.shape[0], *space[1:])
        for start in range(first, last, step):
            strip = image.crop((start, *[0] * (len(space) - 1)), (min(step, last - start), *space[1:]))
            total += strip.sum(1, dtype=torch.float32)
        # Written in place: small results kept between large strips would leave holes that nothing fits into.
        found[:, row] = pooled(total / (last - first), size[1:])
    return found


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the means of x (..., *space) over blocks as in adaptive pooling, (..., *size), axis by axis."""
    for axis, wanted in enumerate(size, start=x.ndim - len(size)):
        line = x.movedim(axis, -1)
        x = torch.nn.functional.adaptive_avg_pool1d(line.reshape(1, -1, line.shape[-1]), wanted)
        x = x.reshape(*line.shape[:-1], wanted).movedim(-1, axis)
    return x


def _overlap(
    corner: Sequence[int], size: Sequence[int], space: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return first and last pixel of a crop that lie inside, and how far into the crop they begin."""
    first = [min(max(0, a), whole) for a, whole in zip(corner, space)]
    last = [max(low, min(whole, a + b)) for low, a, b, whole in zip(first, corner, size, space)]
    return first, last, [max(0, -a) for a in corner]


def _placed(part: np.ndarray[Any, Any], shift: Sequence[int], size: Sequence[int]) -> Tensor:
    """Return a crop of zeros with the part that lies inside."""
    if part.shape[1:] == tuple(size):
        return torch.from_numpy(np.ascontiguousarray(part).copy())
    whole = np.zeros((part.shape[0], *size), dtype=part.dtype)
    whole[(slice(None), *(slice(a, a + b) for a, b in zip(shift, part.shape[1:])))] = part
    return torch.from_numpy(whole)
