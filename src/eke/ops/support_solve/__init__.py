"""Least squares on a support of each sample, from a shared Gram matrix: what exact sparse solvers spend their time on.

    G[s_i, s_i] z_i = c_i[s_i],   x_i = z_i on s_i and 0 elsewhere

torch gathers, factors and solves in turn and writes k^2 indices and numbers a sample to memory; the kernel does all
of it for one sample in the cache. Cost: k^3 / 3 a sample.
"""

from __future__ import annotations

from .native import available, describe, support_solve
from .reference import reference, solve_positive

__all__ = ["available", "describe", "reference", "solve_positive", "support_solve"]
