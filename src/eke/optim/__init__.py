"""Optimizers that use the curvature of a loss."""

from __future__ import annotations

from .ekfac import EKFAC

__all__ = ["EKFAC"]
