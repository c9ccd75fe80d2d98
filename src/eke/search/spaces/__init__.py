"""Search spaces: which architectures there are, what they cost in closed form, how they are built."""

from __future__ import annotations

from .nb201 import NB201, NasBench201
from .space import Choose, Space

__all__ = ["NB201", "Choose", "NasBench201", "Space"]
