"""Chains: chainability, products, transposes, redundancy and the named ones, against products of supports."""

from __future__ import annotations

import pytest
import torch

from eke.patterns import Chain, KSPattern, enumerate_chains

CHAINS = [
    Chain.butterfly(8),
    Chain.butterfly(8, rank=2),
    Chain.monarch(12, 18, 6),
    Chain.low_rank(5, 7, 3),
    Chain.mixed_radix(12, 18),
    Chain([(1, 2, 3, 12), (3, 3, 8, 4), (12, 8, 3, 1)]),
    Chain([(2, 3, 4, 2), (4, 4, 2, 1)]),
    Chain([(1, 4, 4, 1), (1, 4, 4, 1)]),
    Chain([(1, 6, 5, 1)]),
]
CHAINS += [chain.transpose for chain in CHAINS]
every_chain = pytest.mark.parametrize("chain", CHAINS, ids=str)


def supports(chain: Chain) -> torch.Tensor:
    """The product of the supports as matrices of 0 and 1: how many paths there are between a row and a column."""
    product = chain[0].support().double()
    for pattern in list(chain)[1:]:
        product = product @ pattern.support().double()
    return product


@every_chain
def test_product_pattern_is_the_product_of_the_supports(chain):
    for start in range(len(chain)):
        for stop in range(start + 1, len(chain) + 1):
            part = Chain(chain.patterns[start:stop])
            paths = 1
            for rank in part.ranks:
                paths *= rank
            assert torch.equal(supports(part), paths * chain.product(start, stop).support().double())


@every_chain
def test_transpose_reverses_and_swaps_the_direction(chain):
    back = chain.transpose
    assert back.transpose == chain
    assert back.shape == chain.shape[::-1]
    assert back.ranks == chain.ranks[::-1]
    assert (back.parameters, back.flops) == (chain.parameters, chain.flops)
    assert chain.flops == 2 * chain.parameters == 2 * sum(a * b * c * d for a, b, c, d in chain)
    if any(x.a != y.a for x, y in zip(chain, list(chain)[1:])):
        assert {chain.direction, back.direction} == {"ascending", "descending"}


@every_chain
def test_products_are_associative(chain):
    if chain.direction == "ascending" and len(chain) > 2:
        for s in range(1, len(chain)):
            two = Chain([chain.product(0, s), chain.product(s)])
            assert two.product() == chain.product()
            assert two.ranks == (chain.ranks[s - 1],)


@every_chain
def test_reduction_leaves_no_redundancy_and_fewer_parameters(chain):
    reduced, removed = chain.reduce()
    assert reduced.redundant() == ()
    assert len(reduced) + len(removed) == len(chain)
    assert reduced.product() == chain.product()
    assert (reduced.parameters < chain.parameters) == bool(removed)


def test_named_chains_have_their_known_patterns():
    assert [tuple(p) for p in Chain.butterfly(8)] == [(1, 2, 2, 4), (2, 2, 2, 2), (4, 2, 2, 1)]
    assert Chain.butterfly(1024).parameters == 2 * 1024 * 10
    assert [tuple(p) for p in Chain.monarch(12, 18, 6)] == [(1, 6, 6, 2), (6, 2, 3, 1)]
    assert [tuple(p) for p in Chain.low_rank(5, 7, 3)] == [(1, 5, 3, 1), (1, 3, 7, 1)]
    assert [tuple(p) for p in Chain.mixed_radix(12, 18)] == [(1, 2, 2, 6), (2, 2, 3, 3), (6, 3, 3, 1)]
    four_blocks = Chain.radix((16, 4), (4, 16), ranks=[4])
    assert [tuple(p) for p in four_blocks] == [(1, 16, 16, 4), (4, 16, 16, 1)]
    assert four_blocks.parameters == 2048
    assert Chain([(1, 4, 4, 1), (1, 4, 4, 1)]).reduce()[0] == Chain([(1, 4, 4, 1)])
    assert Chain([(1, 2, 3, 12), (3, 3, 8, 4), (12, 8, 3, 1)]).ranks == (1, 2)
    assert Chain([(1, 2, 3, 12), (3, 3, 8, 4), (12, 8, 3, 1)]).parameters == 648


@pytest.mark.parametrize(
    ("rows", "cols", "counts", "ranks_one"),
    [
        (4, 4, [6, 1, 0], None),
        (8, 8, [21, 33, 9], [9, 9, 1]),
        (12, 18, [71, 394, 446], [25, 49, 9]),
        (16, 16, [58, 330], None),
    ],
)
def test_enumeration_has_the_known_counts(rows, cols, counts, ranks_one):
    for length, count in enumerate(counts, 2):
        found = list(enumerate_chains(rows, cols, length=length))
        assert len(found) == len(set(found)) == count
        assert all(chain.product() == KSPattern(1, rows, cols, 1) and not chain.redundant() for chain in found)
        if ranks_one is not None:
            assert sum(set(chain.ranks) == {1} for chain in found) == ranks_one[length - 2]


@pytest.mark.parametrize(("rows", "cols"), [(4, 4), (4, 6), (2, 8)])
def test_enumeration_of_pairs_equals_brute_force(rows, cols):
    """Every pair of patterns of bounded size, filtered by the definition."""
    sizes = [(a, b, c, d) for a in range(1, 9) for b in range(1, 25) for c in range(1, 25) for d in range(1, 9)]
    left = [s for s in sizes if s[0] == 1 and s[1] * s[3] == rows]
    right = [s for s in sizes if s[3] == 1 and s[0] * s[2] == cols]
    pairs = set()
    for x in left:
        for y in right:
            if x[0] * x[2] * x[3] == y[0] * y[1] * y[3]:
                chain = Chain([x, y])
                # Of the pairs that are chainable both ways (a = d = 1) there is one chain, which is ascending.
                if chain.chainable and chain.direction == "ascending" and not chain.redundant():
                    pairs.add(chain)
    assert set(enumerate_chains(rows, cols, length=2)) == pairs


def test_enumeration_within_a_limit_is_the_filtered_one():
    every = list(enumerate_chains(12, 18))
    assert min(chain.parameters for chain in every) == 30
    assert every[0] == Chain([(1, 12, 18, 1)])
    for limit in (29, 30, 60, 100):
        assert list(enumerate_chains(12, 18, max_params=limit)) == [c for c in every if c.parameters <= limit]
    assert list(enumerate_chains(1, 1)) == [Chain([(1, 1, 1, 1)])]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain([]), r"at least one factor, got \[\]"),
        (lambda: Chain([(1, 2, 2)]), r"four integers \(a, b, c, d\), got \(1, 2, 2\)"),
        (lambda: Chain(["1222"]), r"four integers \(a, b, c, d\), got '1222'"),
        (
            lambda: Chain([(1, 2, 2, 2), (2, 2, 2, 2)]),
            r"Factors 1 and 2 of the chain, \(1, 2, 2, 2\) and \(2, 2, 2, 2\), .* 4 columns, the right one a\*b\*d = 8",
        ),
        (lambda: Chain.butterfly(12), r"power of two of at least 2, got 12; Chain.mixed_radix"),
        (lambda: Chain.butterfly(1), r"power of two of at least 2, got 1"),
        (lambda: Chain.butterfly(8.0), r"power of two of at least 2, got 8.0"),
        (
            lambda: Chain.monarch(12, 18, 4),
            r"divide rows and cols, got 4 for a 12 x 18 .*: \[1, 2, 3, 6\]",
        ),
        (lambda: Chain.low_rank(5, 7, 6), r"rank of 1 to min\(rows, cols\) = 5, got 6"),
        (lambda: Chain.mixed_radix(7, 14), r"nothing to split in 7 x 14: a side is 1 or prime"),
        (lambda: Chain.radix((2, 2), (2,)), r"L - 1 ranks with L >= 1, got 2, 1 and 1"),
        (lambda: Chain.butterfly(8).product(2, 2), r"0 <= start < stop <= 3, got 2 and 2"),
        (lambda: enumerate_chains(0, 4), r"rows to be a positive integer, got 0"),
        (lambda: enumerate_chains(4, 4, length=0), r"length to be a positive integer, got 0"),
        (lambda: enumerate_chains(4, 4, max_params=1.5), r"max_params to be a positive integer, got 1.5"),
    ],
)
def test_what_is_no_chain_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("patterns", "up", "down"),
    [
        ([(2, 2, 3, 2), (3, 2, 2, 2)], r"need a1 \| a2, but 2 does not", r"need a2 \| a1, but 3 does not"),
        ([(1, 2, 6, 2), (2, 2, 2, 3)], r"need d2 \| d1, but 3 does not", r"need a2 \| a1, but 2 does not"),
        ([(1, 2, 2, 4), (4, 2, 2, 1)], r"need a2 \| a1\*c1, but 4 does not divide 2", r"need a2 \| a1, but 4 does not"),
        ([(1, 2, 3, 4), (1, 6, 2, 2)], r"$^", r"$^"),
    ],
)  # fmt: skip
def test_a_chain_that_is_not_chainable_says_which_pair_and_why(patterns, up, down):
    chain = Chain(patterns)
    if up == "$^":
        assert chain.chainable
        return
    assert not chain.chainable
    pair = r"factors 1 and 2, \({}, {}, {}, {}\) \({}, {}, {}, {}\), ".format(*patterns[0], *patterns[1])
    for direction, why in (("Ascending", up), ("descending", down)):
        with pytest.raises(ValueError, match=f"{direction}, {pair}{why}"):
            _ = chain.direction


def test_a_butterfly_after_its_mirror_is_a_chain_without_a_direction():
    chain = Chain([*Chain.butterfly(4), *Chain.butterfly(4).transpose])
    assert not chain.chainable
    with pytest.raises(ValueError, match=r"Ascending, factors 3 and 4.*descending, factors 1 and 2"):
        _ = chain.ranks
