"""From which length on clusters are faster than all pairs: a model of both times, fitted to measurements.

Nanoseconds of one head on one thread of a CPU with AVX-512 (an EPYC of 2022); ratios carry over to other machines
better than the numbers do. Measured by `benchmarks/clustered_attention.py`, which prints the break-even beside it.
"""

from __future__ import annotations

PAIR = 0.03
"""Of softmax attention: a pair of positions and a feature."""
SHARED = 0.04
"""Of clusters: a centre, a key and a feature, k-means included."""
CLUSTER = 4000.0
"""A cluster: its largest keys found and gathered, tiles that it does not fill."""
OWN = 0.06
"""A query, a key that it weighs itself and a feature."""
QUERY = 150.0
"""A query: sorting, copies, its sum of exponentials."""
CALL = 60_000.0
"""A call."""


def pays(shape: tuple[int, int, int], *, clusters: int, topk: int, causal: bool = False) -> bool:
    """Return whether clustered attention is expected to be faster than softmax attention.

    Args:
        shape: Queries, keys, and features of a key and a value together.
        clusters: C.
        topk: k.
        causal: Half the pairs, and blocks of clusters.
    """
    length, keys, features = shape
    exact = PAIR * length * keys * features
    shared = SHARED * clusters * (keys + length) * features + OWN * length * topk * features
    shared += CLUSTER * clusters + QUERY * length + CALL
    if causal:
        block = max(clusters, int((clusters * length) ** 0.5))
        blocks = max(1, length // block)
        return exact / 2 > PAIR * length * block * features + blocks * shared / 2 and blocks > 1
    return exact > shared
