"""The one training loop of the package."""

from __future__ import annotations

from .loop import run

__all__ = ["run"]
