"""The embedded task: a trained network and three splits of Fashion-MNIST, checked against their digests.

Calibration: 5 000 of the 55 000 images that the network was trained on, and their mirror images. Selection: 2 000 of
the other 5 000 training images. Report: 5 000 test images. Nothing is trained or downloaded here; the script that
trained the network is `tools/train_demo.py`.

Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms",
2017 (MIT licence).
"""

from __future__ import annotations

import hashlib
import io
import json
from importlib.resources import files

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from ..compression import Task
from .network import Network

MEAN, DEVIATION = 0.2860, 0.3530
"""Mean and standard deviation of the pixels, as shares of white."""

BATCH = 64
"""Images a batch."""

_DATA = files(__package__) / "data"


def _read(name: str) -> bytes:
    """Return the bytes of a package file.

    Raises:
        ValueError: if its digest is not the recorded one.
    """
    content = (_DATA / name).read_bytes()
    wanted = json.loads((_DATA / "manifest.json").read_text())["sha256"][name]
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise ValueError(
            f"The demo's {name} was changed: SHA-256 {found[:12]}..., expected {wanted[:12]}...; reinstall eke."
        )
    return content


def images(split: str) -> tuple[Tensor, Tensor]:
    """Return the normalised images of a split and their classes.

    Args:
        split: "calibration", "selection" or "report".

    Returns:
        Images float32 (n, 1, 28, 28) and classes int64 (n,).

    Raises:
        ValueError: if there is no such split, or its file was changed.
    """
    if split not in ("calibration", "selection", "report"):
        raise ValueError(f"The demo has the splits 'calibration', 'selection' and 'report', got {split!r}.")
    with np.load(io.BytesIO(_read(f"{split}.npz"))) as arrays:
        pixels, classes = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    return (pixels.float() / 255 - MEAN).div_(DEVIATION)[:, None], classes.long()


def build() -> Network:
    """Return the trained network in evaluation mode."""
    network = Network()
    network.load_state_dict(load_tensors(_read("weights.safetensors")))
    return network.eval()


def batched(pixels: Tensor, classes: Tensor, *, size: int = BATCH) -> list[tuple[Tensor, Tensor]]:
    """Return samples as batches of (images, classes); the last may be smaller."""
    return list(zip(torch.split(pixels, size), torch.split(classes, size)))


def task() -> Task:
    """Return the three splits with cross-entropy and accuracy."""
    pixels, classes = images("calibration")
    calibration = batched(torch.cat([pixels, pixels.flip(-1)]), torch.cat([classes, classes]))
    return Task(calibration, batched(*images("selection")), batched(*images("report")), name="Fashion-MNIST demo")
