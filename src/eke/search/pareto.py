"""Which of several points no other one beats in everything."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def pareto(points: ArrayLike) -> list[int]:
    """Return the points that no other one dominates: as good everywhere and better somewhere.

    Args:
        points: (n, k), larger is better; equal points do not dominate each other.

    Returns:
        Their places, in order.

    Raises:
        ValueError: if the points are no table, or one is not a number.
    """
    table = np.asarray(points, dtype=np.float64)
    if table.ndim != 2 or np.isnan(table).any():
        raise ValueError(
            f"pareto needs numbers (points, objectives), got {table.shape} with {np.isnan(table).sum()} NaN."
        )
    # in lexicographic order a point can only be dominated by one before it
    order = np.lexsort(-table.T[::-1])
    kept: list[int] = []
    for place in order:
        rivals = table[kept]
        beaten = (rivals >= table[place]).all(1) & (rivals > table[place]).any(1)
        if not beaten.any():
            kept.append(int(place))
    return sorted(kept)
