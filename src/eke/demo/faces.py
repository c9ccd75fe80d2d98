"""The witnesses `mtcnn-pnet`, `mtcnn-rnet`, `mtcnn-onet`: is this a face, and where exactly?

Weights: the three networks of the wheel facenet-pytorch (Esler, MIT), after Zhang, Zhang, Li, Qiao, "Joint face
detection and alignment using multitask cascaded convolutional networks", 2016. They look at 12, 24 and 48 pixels. The
features of R-Net and O-Net are turned (width, height, channels) before their first linear layer, as they were trained.

Data: `lfw_subset` of the wheel scikit-image: 100 faces and 100 other patches of 25 x 25 grey pixels. So few that each
report answer is more than a point: 80 are calibration (each in thirty views: mirrored, cut at the corners, fainter and
stronger), 40 selection, 80 report. The score is the share of patches told apart. Offsets of boxes and landmarks have no
truth here; their loss holds them to the original's answers: the negative log-likelihood of answers drawn around the
original's own, whose squared gradients are the Fisher information.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Counts
from ..compression import Task
from . import wheels
from .scoring import counted, shuffled

Name = Literal["pnet", "rnet", "onet"]

PROJECTS = ("facenet-pytorch", "scikit-image")
"""Wheels that are read."""

SIZES = {"calibration": 40, "selection": 20, "report": 40}
"""Faces, and as many other patches, of each split."""

BATCH = 40
"""Patches a batch."""

SPREAD = 0.1
"""Deviation of the offsets' likelihood, as a share of the box."""

_PIXELS: dict[Name, int] = {"pnet": 12, "rnet": 24, "onet": 48}


class PNet(nn.Module):
    """The proposal network: convolutions only, one answer to every window of 12 x 12 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.pool1 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, 2, h, w) and box offsets (batch, 4, h, w) for images (batch, 3, 2h + 10, 2w + 10)."""
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return {"face": self.conv4_1(x), "offsets": self.conv4_2(x)}


class RNet(nn.Module):
    """The refining network, for images of 24 x 24 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1, self.dense5_2 = nn.Linear(128, 2), nn.Linear(128, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, 2) and box offsets (batch, 4) for images (batch, 3, 24, 24)."""
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.prelu3(self.conv3(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu4(self.dense4(x))
        return {"face": self.dense5_1(x), "offsets": self.dense5_2(x)}


class ONet(nn.Module):
    """The output network, for images of 48 x 48 pixels; it also finds eyes, nose and mouth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.pool3 = nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1, self.dense6_2, self.dense6_3 = nn.Linear(256, 2), nn.Linear(256, 4), nn.Linear(256, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return logits (batch, 2), box offsets (batch, 4), landmarks (batch, 10) for images (batch, 3, 48, 48)."""
        x = self.pool1(self.prelu1(self.conv1(images)))
        x = self.pool2(self.prelu2(self.conv2(x)))
        x = self.pool3(self.prelu3(self.conv3(x)))
        x = self.prelu4(self.conv4(x)).permute(0, 3, 2, 1).flatten(1)
        x = self.prelu5(self.dense5(x))
        return {"face": self.dense6_1(x), "offsets": self.dense6_2(x), "landmarks": self.dense6_3(x)}


_NETWORKS: dict[Name, type[nn.Module]] = {"pnet": PNet, "rnet": RNet, "onet": ONet}


def build(name: Name) -> nn.Module:
    """Return a published network in evaluation mode.

    Args:
        name: Which of the three.
    """
    network = _NETWORKS[name]()
    content = wheels.read("facenet-pytorch", f"facenet_pytorch/data/{name}.pt")
    network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return network.eval()


def patches() -> Tensor:
    """Return 100 faces and then 100 other patches, grey values from 0 to 1, float32 (200, 1, 25, 25)."""
    content = wheels.read("scikit-image", "skimage/data/lfw_subset.npy")
    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float()[:, None]


def members(split: str) -> list[int]:
    """Return the faces of a split by their number; its other patches are 100 further on.

    Args:
        split: "calibration", "selection" or "report".
    """
    first = sum(size for name, size in SIZES.items() if list(SIZES).index(name) < list(SIZES).index(split))
    return [int(text) for text in shuffled(map(str, range(100)))[first : first + SIZES[split]]]


def sized(grey: Tensor, pixels: int) -> Tensor:
    """Return patches as a network takes them.

    Args:
        grey: Grey values from 0 to 1, (n, 1, h, w).
        pixels: Height and width wanted.

    Returns:
        Three equal channels from about -1 to 1, (n, 3, pixels, pixels).
    """
    resized = F.interpolate(grey, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)
    return ((255 * resized - 127.5) / 128).expand(-1, 3, -1, -1).contiguous()


def _views(grey: Tensor, pixels: int) -> list[Tensor]:
    """Return patches whole and without two pixels at each corner, mirrored, in three contrasts, ready for a network."""
    cut = grey.shape[-1] - 2
    corners = [grey[..., y : y + cut, x : x + cut] for y in (0, 2) for x in (0, 2)]
    seen = [sized(view, pixels) for view in (grey, *corners)]
    return [contrast * view for contrast in (1.0, 0.75, 1.25) for one in seen for view in (one, one.flip(-1))]


def _answers(outputs: dict[str, Tensor]) -> Tensor:
    """Return offsets, and landmarks where there are, of the only window (batch, 4 or 14)."""
    return torch.cat([values.flatten(1) for name, values in outputs.items() if name != "face"], 1)


def detection_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a batch: cross-entropy of the class, and of faces the likelihood of the offsets.

    Args:
        model: Returns "face" and "offsets" by name, perhaps "landmarks".
        batch: (images, (classes, answers)).
    """
    images, (classes, answers) = batch
    outputs: dict[str, Tensor] = model(images)
    errors = 0.5 * ((_answers(outputs) - answers) / SPREAD).square().sum(1)
    loss: Tensor = F.cross_entropy(outputs["face"].flatten(1), classes) + (errors * classes).mean()
    return loss


@torch.no_grad()
def face_accuracy(model: nn.Module, batches: Iterable[Batch]) -> Counts:
    """Count the patches that are told right: a face or not.

    Args:
        model: Returns logits under "face"; in evaluation mode.
        batches: Of (images, (classes, answers)).

    Returns:
        Counts of patches.
    """
    right, seen = [], []
    for images, (classes, _) in batches:
        right.append(model(images)["face"].flatten(1).argmax(1) == classes)
        seen.append(images)
    return counted(right, seen, name="patches told apart")


def task(name: Name) -> Task:
    """Return the three splits of `lfw_subset` for one of the networks.

    Args:
        name: Which of the three.
    """
    grey, network, generator = patches(), build(name), torch.Generator().manual_seed(0)

    def batches(split: str) -> list[Batch]:
        chosen = members(split)
        images = grey[[i for face in chosen for i in (face, face + 100)]]
        views = _views(images, _PIXELS[name]) if split == "calibration" else [sized(images, _PIXELS[name])]
        shown, classes = torch.cat(views), torch.tensor([1, 0]).repeat(len(chosen) * len(views))
        with torch.no_grad():
            said = _answers(network(shown))
        answers = said + SPREAD * torch.randn(said.shape, generator=generator)
        return list(zip(torch.split(shown, BATCH), zip(torch.split(classes, BATCH), torch.split(answers, BATCH))))

    return Task(
        batches("calibration"), batches("selection"), batches("report"), loss=detection_loss, score=face_accuracy,
        name=f"mtcnn-{name}: faces of lfw_subset",
    )  # fmt: skip
