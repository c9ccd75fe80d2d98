"""Linear algebra that several rooms share."""

from __future__ import annotations

from .metric import Metric, cholesky, damped

__all__ = ["Metric", "cholesky", "damped"]
