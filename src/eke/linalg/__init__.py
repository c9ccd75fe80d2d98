"""Linear algebra that several rooms share."""

from __future__ import annotations

from .metric import MANY, WIDE, Metric, cholesky, damped, damped_cholesky, finite

__all__ = ["MANY", "WIDE", "Metric", "cholesky", "damped", "damped_cholesky", "finite"]
