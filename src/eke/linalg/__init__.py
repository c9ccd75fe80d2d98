"""Linear algebra that several rooms share."""

from __future__ import annotations

from .metric import WIDE, Metric, cholesky, damped, damped_cholesky, finite

__all__ = ["WIDE", "Metric", "cholesky", "damped", "damped_cholesky", "finite"]
