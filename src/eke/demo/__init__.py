"""Tasks with trained networks: one embedded, small enough to compress in two minutes, and published ones on demand."""

from __future__ import annotations

from .network import Network
from .task import build, images, task
from .witnesses import WITNESSES, Witness

__all__ = ["WITNESSES", "Network", "Witness", "build", "images", "task"]
