"""Every chain of a matrix size, by a closed form.

The ascending chains of L factors whose product is a full m x n matrix are the ordered factorizations m = q_1 ... q_L
and n = p_1 ... p_L with ranks r_1 ... r_{L-1} (`Chain.radix`). One is free of redundancy iff

    r_l < min(q_l r_{l-1}, p_{l+1} r_{l+1})   for l = 1 ... L-1,   r_0 = r_L = 1

which bounds the ranks, and q_l p_l >= 2 for every l, which bounds L. Factor l has
(p_1 ... p_l) (q_l ... q_L) r_{l-1} r_l parameters, so a limit on them prunes the search. Derived from the pair
conditions of `Chain`, checked against brute force. Cost: a constant time for each chain, and there are many.
"""

from __future__ import annotations

from collections.abc import Iterator

from .chain import Chain, divisors, primes


def enumerate_chains(
    rows: int, cols: int, *, length: int | None = None, max_params: int | None = None
) -> Iterator[Chain]:
    """Return every ascending chain of a size that has no redundant pair, shorter ones first.

    Args:
        rows: Of the matrix.
        cols: Of the matrix.
        length: Number of factors; None for all lengths, from the one dense factor on.
        max_params: Largest number of parameters; None for no limit.

    Returns:
        An iterator over chains, each once.

    Raises:
        ValueError: if a size, the length or the limit is not a positive integer.
    """
    for name, value in (("rows", rows), ("cols", cols), ("length", length), ("max_params", max_params)):
        optional = value is None and name in ("length", "max_params")
        if not optional and (not isinstance(value, int) or value < 1):
            raise ValueError(f"enumerate_chains needs {name} to be a positive integer, got {value!r}.")
    longest = max(1, len(primes(rows)) + len(primes(cols)))
    lengths = range(1, longest + 1) if length is None else (length,)
    limit = float("inf") if max_params is None else max_params
    return (chain for size in lengths for chain in _of_length(rows, cols, size, limit))


def _of_length(rows: int, cols: int, length: int, limit: float) -> Iterator[Chain]:
    """Return the chains of one length: a walk that fixes (q_l, p_l, r_l) from left to right.

    What remains of a side bounds the ranks: r_l is below the number of rows on its left and of columns on its right.
    """
    q, p, r = [0] * length, [0] * length, [1] * (length + 1)

    def walk(level: int, rows_left: int, cols_left: int, spent: int) -> Iterator[Chain]:
        last = level == length - 1
        for q[level] in (rows_left,) if last else divisors(rows_left):
            for p[level] in (cols_left,) if last else divisors(cols_left):
                # The condition at the interface on the left needs p_l and r_l, at the one on the right q_l and r_l.
                size = cols // cols_left * p[level] * rows_left * r[level]
                most = 1 if last else min(q[level] * r[level] - 1, cols_left // p[level])
                least = 1 if level == 0 else r[level] // p[level] + 1
                for rank in range(least, most + 1):
                    if spent + size * rank > limit:
                        break
                    r[level + 1] = rank
                    if last:
                        yield Chain.radix(q, p, ranks=r[1:-1])
                    else:
                        yield from walk(level + 1, rows_left // q[level], cols_left // p[level], spent + size * rank)

    return walk(0, rows, cols, 0)
