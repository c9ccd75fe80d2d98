"""Search spaces: which architectures there are, what they cost in closed form, how they are built."""

from __future__ import annotations

from .choices import Choices, TimmResNet, TimmViT
from .mobile import MobileNet
from .nb201 import NB201, NasBench201
from .space import Choose, Space

SPACES: dict[str, type[Space]] = {
    "nb201": NasBench201,
    "mobile": MobileNet,
    "resnet": TimmResNet,
    "vit": TimmViT,
}
"""Spaces that have a name."""

__all__ = ["NB201", "SPACES", "Choices", "Choose", "MobileNet", "NasBench201", "Space", "TimmResNet", "TimmViT"]
