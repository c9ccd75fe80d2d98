"""The embedded task: a trained network with real images, small enough to compress in two minutes."""

from __future__ import annotations

from .network import Network
from .task import build, images, task

__all__ = ["Network", "build", "images", "task"]
