"""Attention as pictures: maps over the image in grey, written as PNG without further packages."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .layer import Sampled


def heat_map(seen: Sampled, size: tuple[int, int], *, scale: int = 0) -> Tensor:
    """Return the attention of each image as a picture: 1 where it is largest.

    Args:
        seen: What a layer of two axes returned.
        size: Height and width of the picture.
        scale: Which of the scales.

    Returns:
        (batch, height, width), float32 in [0, 1].

    Raises:
        ValueError: if the attention has no two axes.
    """
    grid = seen.maps()[scale].detach().to(torch.float32)
    if grid.ndim != 3:
        raise ValueError(f"A picture needs attention over two axes, got a grid of {tuple(grid.shape[1:])}.")
    grid = grid / grid.amax((1, 2), keepdim=True)
    return interpolate(grid.unsqueeze(1), size=size, mode="nearest").squeeze(1)


def save_png(picture: Tensor, path: str | Path) -> None:
    """Write a picture.

    Args:
        picture: (height, width) in grey or (3, height, width) in colour, from 0 to 1, or uint8.
        path: Of the file.

    Raises:
        ValueError: if the shape is another.
    """
    if picture.ndim == 2:
        picture = picture.unsqueeze(0)
    if picture.ndim != 3 or picture.shape[0] not in {1, 3}:
        raise ValueError(f"A picture is (height, width) or (3, height, width), got {tuple(picture.shape)}.")
    if picture.dtype != torch.uint8:
        picture = (picture.detach().to(torch.float32).clamp(0, 1) * 255).round().to(torch.uint8)
    channels, height, width = picture.shape
    rows = picture.permute(1, 2, 0).reshape(height, -1).cpu().numpy()
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
