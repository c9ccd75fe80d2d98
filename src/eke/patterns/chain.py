"""A chain of Kronecker-sparse factors X_1 X_2 ... X_L, leftmost first, and its exact algebra.

Two neighbours are chainable upwards when a_1 | a_2, d_2 | d_1 and r = a_1 c_1 / a_2 = b_2 d_2 / d_1 is whole. Then the
product of their supports is r times one support of the same kind,

    (a_1, b_1, c_1, d_1) * (a_2, b_2, c_2, d_2) = (a_1, b_1 d_1 / d_2, a_2 c_2 / a_1, d_2)

made of blocks b_1 x c_2 of rank at most r. A chain goes down when its transpose goes up. A pair with r >= min(b_1, c_2)
is redundant: its product holds every matrix on its support, with fewer parameters.
Source: Le, Zheng, Riccietti, Gribonval, "Butterfly factorization with error guarantees", 2025.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from .kronecker import KSPattern

Direction = Literal["ascending", "descending"]
"""Which way a chain goes: "ascending" where a grows and d shrinks from left to right."""


@dataclass(frozen=True, slots=True, init=False)
class Chain:
    """A product of Kronecker-sparse factors, leftmost first; a layer applies the last one first.

    Args:
        patterns: `KSPattern`s, or tuples (a, b, c, d).

    Raises:
        ValueError: if there is no factor, or the columns of one are not the rows of the next.
    """

    patterns: tuple[KSPattern, ...]

    def __init__(self, patterns: Sequence[KSPattern | tuple[int, int, int, int]]) -> None:
        factors = tuple(p if isinstance(p, KSPattern) else KSPattern(*four(p)) for p in patterns)
        if not factors:
            raise ValueError(f"Chain needs at least one factor, got {patterns!r}; one dense factor is (1, m, n, 1).")
        for i, (left, right) in enumerate(itertools.pairwise(factors), 1):
            if left.shape[1] != right.shape[0]:
                raise ValueError(
                    f"Factors {i} and {i + 1} of the chain, {left} and {right}, cannot be multiplied: the left one has "
                    f"a*c*d = {left.shape[1]} columns, the right one a*b*d = {right.shape[0]} rows."
                )
        object.__setattr__(self, "patterns", factors)

    def __len__(self) -> int:
        return len(self.patterns)

    def __iter__(self) -> Iterator[KSPattern]:
        return iter(self.patterns)

    def __getitem__(self, index: int) -> KSPattern:
        return self.patterns[index]

    def __str__(self) -> str:
        return " ".join(str(pattern) for pattern in self.patterns)

    @classmethod
    def radix(cls, rows: Sequence[int], cols: Sequence[int], *, ranks: Sequence[int] | None = None) -> Self:
        """Return the ascending chain that splits rows as q_1 ... q_L and columns as p_1 ... p_L.

        Its factors are a_l = p_1 ... p_{l-1}, b_l = q_l r_{l-1}, c_l = p_l r_l, d_l = q_{l+1} ... q_L with
        r_0 = r_L = 1: every ascending chain of a full matrix has this form.

        Args:
            rows: q_1 ... q_L, positive; their product is the number of rows.
            cols: p_1 ... p_L, positive; their product is the number of columns.
            ranks: r_1 ... r_{L-1}, ranks of the blocks at each interface; None for 1.

        Returns:
            The chain of L factors.

        Raises:
            ValueError: if the lengths differ.
        """
        between = [1] * (len(rows) - 1) if ranks is None else list(ranks)
        if not rows or len(rows) != len(cols) or len(between) != len(rows) - 1:
            raise ValueError(
                "Chain.radix needs L row factors, L column factors and L - 1 ranks with L >= 1, got "
                f"{len(rows)}, {len(cols)} and {len(between)}."
            )
        r = [1, *between, 1]
        return cls([
            KSPattern(math.prod(cols[:i]), q * r[i], p * r[i + 1], math.prod(rows[i + 1 :]))
            for i, (q, p) in enumerate(zip(rows, cols))
        ])

    @classmethod
    def butterfly(cls, n: int, *, rank: int = 1) -> Self:
        """Return the square dyadic chain, log2(n) factors with 2 n rank^2 entries inside.

        Args:
            n: Rows and columns, a power of two, at least 2.
            rank: Of the blocks at each interface; where it is too large the chain is redundant.

        Returns:
            Factors (2^(l-1), 2, 2, 2^(L-l)) for l = 1 ... L where rank is 1.

        Raises:
            ValueError: if n is not a power of two.
        """
        levels = n.bit_length() - 1 if isinstance(n, int) else 0
        if levels < 1 or n != 2**levels:
            raise ValueError(
                f"Chain.butterfly needs a power of two of at least 2, got {n!r}; Chain.mixed_radix takes other sizes."
            )
        return cls.radix([2] * levels, [2] * levels, ranks=[rank] * (levels - 1))

    @classmethod
    def monarch(cls, rows: int, cols: int, blocks: int) -> Self:
        """Return the two factors (1, k, k, rows/k) and (k, rows/k, cols/k, 1) with k blocks.

        Args:
            rows: Of the matrix.
            cols: Of the matrix.
            blocks: Dense blocks of the right factor; divides rows and cols.

        Returns:
            The chain, with rows*k + rows*cols/k parameters.

        Raises:
            ValueError: if blocks does not divide rows and cols.
        """
        if not isinstance(blocks, int) or blocks < 1 or rows % blocks or cols % blocks:
            raise ValueError(
                f"Chain.monarch needs blocks that divide rows and cols, got {blocks!r} for a {rows} x {cols} matrix; "
                f"allowed: {divisors(math.gcd(rows, cols))}."
            )
        return cls([(1, blocks, blocks, rows // blocks), (blocks, rows // blocks, cols // blocks, 1)])

    @classmethod
    def low_rank(cls, rows: int, cols: int, rank: int) -> Self:
        """Return the factors (1, rows, rank, 1) and (1, rank, cols, 1) of a matrix of low rank.

        Args:
            rows: Of the matrix.
            cols: Of the matrix.
            rank: At most min(rows, cols).

        Returns:
            The chain, with rank * (rows + cols) parameters.

        Raises:
            ValueError: if the rank is out of range.
        """
        if not isinstance(rank, int) or not 1 <= rank <= min(rows, cols):
            raise ValueError(f"Chain.low_rank needs a rank of 1 to min(rows, cols) = {min(rows, cols)}, got {rank!r}.")
        return cls([(1, rows, rank, 1), (1, rank, cols, 1)])

    @classmethod
    def mixed_radix(cls, rows: int, cols: int, *, rank: int = 1) -> Self:
        """Return a butterfly for any two sizes that are not prime.

        The prime factors of both sizes in ascending order; where one has more of them, its two smallest are merged.

        Args:
            rows: Of the matrix.
            cols: Of the matrix.
            rank: Of the blocks at each interface.

        Returns:
            The chain; (12, 18) gives (1, 2, 2, 6) (2, 2, 3, 3) (6, 3, 3, 1).

        Raises:
            ValueError: if a size is 1 or prime, which leaves one dense factor.
        """
        q, p = primes(rows), primes(cols)
        if min(len(q), len(p)) < 2:
            raise ValueError(
                f"Chain.mixed_radix finds nothing to split in {rows} x {cols}: a side is 1 or prime. Pad the matrix, "
                "or use Chain.low_rank or enumerate_chains."
            )
        while len(q) != len(p):
            longer = max(q, p, key=len)
            longer[:2] = [longer[0] * longer[1]]
            longer.sort()
        return cls.radix(q, p, ranks=[rank] * (len(q) - 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the product."""
        return self.patterns[0].shape[0], self.patterns[-1].shape[1]

    @property
    def parameters(self) -> int:
        """Number of free entries of all factors."""
        return sum(pattern.parameters for pattern in self.patterns)

    @property
    def flops(self) -> int:
        """Multiplications and additions of one product with a vector, factor by factor."""
        return sum(pattern.flops for pattern in self.patterns)

    @property
    def transpose(self) -> Chain:
        """The chain of the transposed matrix: factors reversed and transposed; up becomes down."""
        return Chain([pattern.transpose for pattern in reversed(self.patterns)])

    @property
    def chainable(self) -> bool:
        """Whether every pair of neighbours is chainable in one direction, so that `factorize` knows the chain."""
        return not all(self._broken().values())

    @property
    def direction(self) -> Direction:
        """Which way the chain goes; "ascending" where both hold.

        Raises:
            ValueError: if it is not chainable, with the pairs and the conditions that fail.
        """
        broken = self._broken()
        for direction, why in broken.items():
            if not why:
                return direction
        raise ValueError(
            f"The chain {self} is not chainable. Ascending, {broken['ascending']}; "
            f"descending, {broken['descending']}. Take factors from Chain.radix or enumerate_chains."
        )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank r of the blocks at each interface; ValueError if the chain is not chainable."""
        if self.direction == "descending":
            return self.transpose.ranks[::-1]
        return tuple(left.a * left.c // right.a for left, right in zip(self.patterns, self.patterns[1:]))

    def product(self, start: int = 0, stop: int | None = None) -> KSPattern:
        """Return the pattern of the product of factors start ... stop - 1, counted from 0.

        Args:
            start: First factor.
            stop: Behind the last factor; None for the end.

        Returns:
            One pattern.

        Raises:
            ValueError: if the range is empty, or the chain is not chainable.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start < stop <= len(self):
            raise ValueError(f"Chain.product needs 0 <= start < stop <= {len(self)}, got {start} and {stop}.")
        if self.direction == "descending":
            return self.transpose.product(len(self) - stop, len(self) - start).transpose
        first, last = self.patterns[start], self.patterns[stop - 1]
        rows, cols = first.shape[0], last.shape[1]
        return KSPattern(first.a, rows // (first.a * last.d), cols // (first.a * last.d), last.d)

    def redundant(self) -> tuple[int, ...]:
        """Return the interfaces s = 1 ... L-1 at which neighbours s and s+1 are a redundant pair."""
        pairs = zip(self.ranks, self.patterns, self.patterns[1:])
        return tuple(s for s, (r, left, right) in enumerate(pairs, 1) if r >= min(left.b, right.c))

    def reduce(self) -> tuple[Chain, tuple[int, ...]]:
        """Merge redundant pairs into their products until none is left.

        The set of matrices stays the same and the parameters get fewer.

        Returns:
            The chain without redundancy, and the interfaces of this one, in the order in which they were removed.
        """
        kept = list(range(len(self) + 1))
        removed: list[int] = []
        while True:
            chain = Chain([self.product(i, j) for i, j in itertools.pairwise(kept)])
            redundant = chain.redundant()
            if not redundant:
                return chain, tuple(removed)
            removed.append(kept.pop(redundant[0]))

    def _broken(self) -> dict[Direction, str]:
        """Return for each direction the first pair and condition that fails, or nothing."""
        pairs = list(enumerate(zip(self.patterns, self.patterns[1:]), 1))
        up = (_ascends(left, right, f"factors {i} and {i + 1}") for i, (left, right) in pairs)
        down = (_ascends(y.transpose, x.transpose, f"factors {i} and {i + 1}", True) for i, (x, y) in pairs)
        return {"ascending": next(filter(None, up), ""), "descending": next(filter(None, down), "")}


def _ascends(left: KSPattern, right: KSPattern, names: str, transposed: bool = False) -> str:
    """Return why a pair is not chainable upwards, or nothing.

    Args:
        left: Left factor, or the transpose of the right one.
        right: Right factor, or the transpose of the left one.
        names: The pair as the message calls it.
        transposed: Whether the two are transposes, so that indices and b, c change places in the message.
    """
    if not (right.a % left.a or left.d % right.d or left.a * left.c % right.a or right.b * right.d % left.d):
        return ""
    one, two, b, c = ("2", "1", "c", "b") if transposed else ("1", "2", "b", "c")
    shown = f"{right.transpose} {left.transpose}" if transposed else f"{left} {right}"
    if right.a % left.a:
        return f"{names}, {shown}, need a{one} | a{two}, but {left.a} does not divide {right.a}"
    if left.d % right.d:
        return f"{names}, {shown}, need d{two} | d{one}, but {right.d} does not divide {left.d}"
    if left.a * left.c % right.a:
        return f"{names}, {shown}, need a{two} | a{one}*{c}{one}, but {right.a} does not divide {left.a * left.c}"
    return f"{names}, {shown}, need d{one} | {b}{two}*d{two}, but {left.d} does not divide {right.b * right.d}"


def four(entries: Sequence[int]) -> tuple[int, int, int, int]:
    """Return the entries of a pattern as a tuple.

    Raises:
        ValueError: if they are not four.
    """
    if isinstance(entries, str) or not isinstance(entries, Sequence) or len(entries) != 4:
        raise ValueError(f"A factor is a KSPattern or four integers (a, b, c, d), got {entries!r}.")
    a, b, c, d = entries
    return a, b, c, d


def primes(n: int) -> list[int]:
    """Return the prime factors of n in ascending order."""
    found, p = [], 2
    while p * p <= n:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return [*found, n] if n > 1 else found


def divisors(n: int) -> list[int]:
    """Return the divisors of n in ascending order."""
    return [k for k in range(1, n + 1) if n % k == 0]
