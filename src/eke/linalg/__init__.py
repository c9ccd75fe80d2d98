"""Linear algebra that several rooms share."""

from __future__ import annotations

from .metric import Metric, cholesky, damped, damped_cholesky, finite

__all__ = ["Metric", "cholesky", "damped", "damped_cholesky", "finite"]
