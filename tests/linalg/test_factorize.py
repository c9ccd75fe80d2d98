"""Factorizations: exact members, optimal pairs, proved bounds, known values, every order, dtype and direction."""

from __future__ import annotations

import functools
import itertools
import math
from itertools import pairwise

import pytest
import torch

from eke.linalg import (
    Metric,
    best_chain,
    bit_reversal,
    factorize,
    fixed_support,
    fourier,
    hadamard,
    interface_errors,
    spectrum,
)
from eke.linalg.fixed_support import Interface, expand, multiply
from eke.ops import ks_chain_matmul, pair_splits
from eke.patterns import Chain, KSPattern, divisors, enumerate_chains, to_dense

CHAINS = [
    Chain.butterfly(16),
    Chain.monarch(12, 18, 6),
    Chain.low_rank(5, 7, 3),
    Chain.mixed_radix(12, 18),
    Chain.radix((2, 2, 3), (3, 2, 3), ranks=[1, 2]),
    Chain([(1, 2, 3, 12), (3, 3, 8, 4), (12, 8, 3, 1)]),
    Chain([(2, 3, 4, 2), (4, 4, 2, 1)]),
    Chain([(2, 2, 2, 4), (4, 2, 2, 2), (8, 2, 2, 1)]),
    Chain([(1, 4, 4, 1), (1, 4, 4, 1)]),
    Chain.butterfly(8, rank=2),
    Chain([(1, 6, 5, 1)]),
]
CHAINS += [chain.transpose for chain in CHAINS]
ORDERS = ["left", "right", "balanced"]
every_chain = pytest.mark.parametrize("chain", CHAINS, ids=str)
every_order = pytest.mark.parametrize("order", ORDERS)
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def dense_product(blocks: list[torch.Tensor]) -> torch.Tensor:
    """The product of the dense factors: the definition."""
    return functools.reduce(torch.matmul, [to_dense(block) for block in blocks])


def member(chain: Chain, *stack: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return dense_product([noise(*stack, *p, seed=seed + i, dtype=dtype) for i, p in enumerate(chain)])


def hilbert(n: int) -> torch.Tensor:
    i = torch.arange(n, dtype=torch.float64)
    return 1 / (i[:, None] + i + 1)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y))


@every_chain
@every_order
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_member_is_recovered(chain, order, dtype):
    matrix = member(chain, seed=1, dtype=dtype)
    found = factorize(matrix, chain, order=order)
    tolerance = 1e-13 if torch.finfo(dtype).bits == 64 else 2e-6
    assert [tuple(block.shape) for block in found.blocks] == [tuple(pattern) for pattern in chain]
    assert {block.dtype for block in found.blocks} == {dtype}
    assert distance(dense_product(found.blocks), matrix) <= tolerance
    assert found.error <= tolerance
    assert found.lower_bound <= tolerance
    torch.testing.assert_close(found.to_dense(), dense_product(found.blocks), rtol=1e-4, atol=1e-4)


@every_chain
@every_order
@pytest.mark.parametrize("orthonormalize", [True, False])
def test_the_error_is_measured_and_above_the_lower_bound(chain, order, orthonormalize):
    matrix = noise(*chain.shape, seed=2)
    found = factorize(matrix, chain, order=order, orthonormalize=orthonormalize)
    assert found.error == pytest.approx(distance(dense_product(found.blocks), matrix), rel=1e-12)
    assert found.lower_bound <= found.error * (1 + 1e-12)
    # With three factors, middle first is left to right.
    proved = orthonormalize and (order != "balanced" or len(chain) <= 3)
    assert (found.upper_bound is not None) == proved
    if proved:
        assert found.error <= found.upper_bound * (1 + 1e-12)
        assert found.upper_bound <= math.sqrt(max(1, len(chain) - 1)) * found.lower_bound * (1 + 1e-12)


def truncated(matrix: torch.Tensor, chain: Chain, s: int) -> torch.Tensor:
    """The best product of two matrices on the supports left and right of interface s, found from the supports alone.

    Inner indices whose columns on the left and rows on the right have the same support span one block together.
    """
    left, right = (
        functools.reduce(torch.matmul, [p.support().double() for p in part]) != 0
        for part in (list(chain)[:s], list(chain)[s:])
    )
    classes: dict[tuple[tuple[bool, ...], tuple[bool, ...]], int] = {}
    for column, row in zip(left.T.tolist(), right.tolist()):
        classes[tuple(column), tuple(row)] = classes.get((tuple(column), tuple(row)), 0) + 1
    best = torch.zeros_like(matrix)
    for (rows, cols), rank in classes.items():
        at = torch.outer(torch.tensor(rows), torch.tensor(cols))
        u, sigma, vh = torch.linalg.svd(matrix[at].reshape(sum(rows), sum(cols)), full_matrices=False)
        best[at] = ((u[:, :rank] * sigma[:rank]) @ vh[:rank]).flatten()
    return best


@pytest.mark.parametrize("order", ["left", "right"])
@pytest.mark.parametrize("chain", [c for c in CHAINS if len(c) > 1], ids=str)
def test_squared_errors_of_the_splits_add_up(chain, order):
    """Pythagoras: one projection after the other of the whole matrix, at the interfaces that are not redundant."""
    matrix = noise(*chain.shape, seed=3)
    best = matrix * (functools.reduce(torch.matmul, [p.support().double() for p in chain]) != 0)
    dropped = float((best - matrix).square().sum())
    interfaces = [s for s in range(1, len(chain)) if s not in chain.reduce()[1]]
    for s in interfaces if order == "left" else reversed(interfaces):
        before, best = best, truncated(best, chain, s)
        dropped += float((best - before).square().sum())
    found = factorize(matrix, chain, order=order)
    torch.testing.assert_close(found.to_dense(), best, rtol=0, atol=1e-10)
    assert found.error**2 * float(matrix.square().sum()) == pytest.approx(dropped, rel=1e-10, abs=1e-20)


@pytest.mark.parametrize("chain", [c for c in CHAINS if len(c) == 2], ids=str)
def test_two_factors_are_the_best_two(chain):
    """No descent from the result, or from elsewhere, comes lower; the lower bound is the error."""
    matrix = noise(*chain.shape, seed=4)
    found = factorize(matrix, chain)
    assert found.error == pytest.approx(found.lower_bound, rel=1e-10, abs=1e-14)
    assert found.error == pytest.approx(found.upper_bound, rel=1e-10, abs=1e-14)
    for seed in (5, 6):
        blocks = [noise(*p, seed=seed + 10 * i).requires_grad_() for i, p in enumerate(chain)]
        steps = torch.optim.Adam(blocks, lr=0.05)
        for _ in range(150):
            steps.zero_grad()
            loss = (dense_product(blocks) - matrix).square().sum()
            loss.backward()
            steps.step()
        assert found.error <= float(loss.detach() / matrix.square().sum()) ** 0.5 + 1e-12


def test_a_low_rank_chain_is_the_truncated_singular_value_decomposition():
    matrix = noise(9, 14, seed=7, dtype=torch.complex128)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 4, 9):
        found = factorize(matrix, Chain.low_rank(9, 14, rank))
        torch.testing.assert_close(found.to_dense(), (u[:, :rank] * s[:rank]) @ vh[:rank], rtol=0, atol=1e-12)


def test_known_errors_of_the_hilbert_matrix():
    matrix, chain = hilbert(64), Chain.butterfly(64)
    known = {
        ("left", True): 0.156158752, ("right", True): 0.156216386, ("balanced", True): 0.156162032,
        ("left", False): 0.207521140, ("right", False): 0.217591518,
    }  # fmt: skip
    for (order, orthonormalize), error in known.items():
        found = factorize(matrix, chain, order=order, orthonormalize=orthonormalize)
        assert found.error == pytest.approx(error, abs=1e-7)
    found = factorize(matrix, chain)
    assert found.lower_bound == pytest.approx(0.100053305, abs=1e-7)
    assert found.upper_bound == pytest.approx(0.192898517, abs=1e-7)


def test_known_errors_of_a_cosine_kernel():
    i = torch.arange(64, dtype=torch.float64)
    matrix = torch.cos(torch.outer(i, i) / 7)
    for chain, error in (
        (Chain.monarch(64, 64, 8), 0.844090265),
        (Chain([(1, 16, 16, 4), (4, 16, 16, 1)]), 0.560304564),
        (Chain.low_rank(64, 64, 16), 0.488476260),
    ):
        assert factorize(matrix, chain).error == pytest.approx(error, abs=1e-7)


@pytest.mark.parametrize("levels", range(1, 12))
def test_hadamard_and_fourier_are_exact(levels):
    n = 2**levels
    chain = Chain.butterfly(n)
    for name, matrix in (("hadamard", hadamard(n)), ("fourier", fourier(n)[:, bit_reversal(n)])):
        for order in ORDERS:
            found = factorize(matrix, chain, order=order)
            assert found.error <= 2e-15 * levels, (name, order)
            assert sum(block.numel() for block in found.blocks) == 2 * n * levels
        single = torch.complex64 if matrix.is_complex() else torch.float32
        assert factorize(matrix.to(single), chain).error <= 2e-6


@every_chain
def test_a_stack_is_factorized_matrix_by_matrix(chain):
    stack = noise(2, 3, *chain.shape, seed=8)
    for order in ORDERS:
        found = factorize(stack, chain, order=order, refine=1)
        assert found.errors.shape == (2, 3)
        assert found.interface_errors.shape == (2, 3, len(chain) - 1)
        for i, j in ((0, 0), (1, 2)):
            alone = factorize(stack[i, j], chain, order=order, refine=1)
            assert float(found.errors[i, j]) == pytest.approx(alone.error, rel=1e-9, abs=1e-14)
            torch.testing.assert_close(found.to_dense()[i, j], alone.to_dense(), rtol=0, atol=1e-8)
        whole = stack.square().sum((-1, -2))
        together = float((found.errors.square() * whole).sum() / whole.sum()) ** 0.5
        assert found.error == pytest.approx(together, rel=1e-12)


@every_chain
def test_the_transposed_chain_gives_the_transposed_factors(chain):
    matrix = noise(*chain.shape, seed=9)
    for order, mirrored in (("left", "right"), ("right", "left")):
        one = factorize(matrix, chain, order=order)
        two = factorize(matrix.T, chain.transpose, order=mirrored)
        assert one.error == pytest.approx(two.error, rel=1e-9, abs=1e-14)
        torch.testing.assert_close(one.to_dense(), two.to_dense().T, rtol=0, atol=1e-8)


def orthogonal(pattern: KSPattern, seed: int) -> torch.Tensor:
    """Random rotations of the rows inside every block of a pattern."""
    blocks = torch.linalg.qr(noise(pattern.a, pattern.d, pattern.b, pattern.b, seed=seed))[0]
    return to_dense(blocks.permute(0, 2, 3, 1))


@every_chain
def test_the_error_does_not_see_rotations_inside_blocks(chain):
    """Of the rows inside the blocks of the first factor and the columns inside those of the last: the set stays."""
    matrix = noise(*chain.shape, seed=46)
    left, right = orthogonal(chain[0], 47), orthogonal(chain[len(chain) - 1].transpose, 48)
    for order in ORDERS:
        plain = factorize(matrix, chain, order=order)
        turned = factorize(left @ matrix @ right.T, chain, order=order)
        assert turned.error == pytest.approx(plain.error, rel=1e-9, abs=1e-13)
        torch.testing.assert_close(turned.interface_errors, plain.interface_errors, rtol=1e-8, atol=1e-12)


@every_chain
def test_factors_with_another_gauge_are_the_same_member(chain):
    """Invertible matrices between two neighbours, r x r for each block of the interface, cancel in the product."""
    blocks = [noise(*pattern, seed=49 + i) for i, pattern in enumerate(chain)]
    gauged = [to_dense(block) for block in blocks]
    for s in range(1, len(chain)):
        left, right = (p.support().double() for p in (chain[s - 1], chain[s]))
        # Inner indices with the same support on both sides may be mixed.
        same = (left.T @ left == left.sum(0)) & (right @ right.T == right.sum(1))
        gauge = torch.eye(len(same), dtype=torch.float64) + 0.3 * noise(*same.shape, seed=60 + s) * same
        gauged[s - 1], gauged[s] = gauged[s - 1] @ gauge, torch.linalg.inv(gauge) @ gauged[s]
    matrix = functools.reduce(torch.matmul, gauged)
    torch.testing.assert_close(matrix, dense_product(blocks), rtol=0, atol=1e-9 * float(matrix.abs().max()))
    assert factorize(matrix, chain).error <= 1e-12


@every_chain
def test_factors_apply_as_their_product(chain):
    matrix, x = noise(*chain.shape, seed=50), noise(5, chain.shape[1], seed=51)
    found = factorize(matrix, chain)
    torch.testing.assert_close(ks_chain_matmul(x, found.blocks), x @ found.to_dense().T, rtol=0, atol=1e-10)


def test_the_error_does_not_see_scale():
    chain = Chain([(1, 2, 3, 12), (3, 3, 8, 4), (12, 8, 3, 1)])
    matrix = noise(*chain.shape, seed=10)
    for order in ORDERS:
        plain = factorize(matrix, chain, order=order).error
        assert factorize(1e9 * matrix, chain, order=order).error == pytest.approx(plain, rel=1e-10)
        assert factorize(-1e-9 * matrix, chain, order=order).error == pytest.approx(plain, rel=1e-10)


def test_any_permutation_of_the_interfaces_is_an_order():
    chain, matrix = Chain.butterfly(16), noise(16, 16, seed=11)
    assert factorize(matrix, chain, order=[1, 2, 3]).error == factorize(matrix, chain).error
    assert factorize(matrix, chain, order=[1, 2, 3]).upper_bound is not None
    assert factorize(matrix, chain, order=[2, 1, 3]).error == factorize(matrix, chain, order="balanced").error
    for order in ([1, 3, 2], [3, 1, 2], [2, 3, 1]):
        found = factorize(matrix, chain, order=order)
        assert found.lower_bound <= found.error
        assert found.upper_bound is None
        assert found.error <= float(found.interface_errors.square().sum().sqrt()) * 1.05


@every_chain
@every_order
def test_sweeps_only_lower_the_error(chain, order):
    for matrix in (noise(*chain.shape, seed=12), noise(*chain.shape, seed=13, dtype=torch.complex128)):
        errors = [factorize(matrix, chain, order=order, refine=k).error for k in range(4)]
        assert all(after <= before * (1 + 1e-12) + 1e-15 for before, after in pairwise(errors))
        bound = factorize(matrix, chain, order=order, refine=3)
        assert bound.lower_bound <= bound.error * (1 + 1e-12) + 1e-15


def test_sweeps_find_a_better_butterfly_of_the_hilbert_matrix():
    found = factorize(hilbert(64), Chain.butterfly(64), refine=4)
    assert found.error == pytest.approx(0.1560900026, abs=1e-8)
    assert found.lower_bound < found.error < found.upper_bound


def test_close_singular_values_and_small_ones_keep_their_digits():
    """Singular values over seven orders: eigenvectors of the Gram matrix alone would lose half the digits."""
    q, _ = torch.linalg.qr(noise(20, 20, seed=14))
    values = torch.zeros(20, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 1e-4, 1e-7])
    matrix = (q * values) @ torch.linalg.qr(noise(20, 20, seed=15))[0]
    assert factorize(matrix, Chain.low_rank(20, 20, 3)).error <= 1e-14
    scaled = member(Chain.butterfly(16, rank=2), seed=16) * torch.logspace(0, -7, 16, dtype=torch.float64)
    assert factorize(scaled, Chain.butterfly(16, rank=2)).error <= 1e-13
    tied = torch.eye(8, dtype=torch.float64)
    assert factorize(tied, Chain.low_rank(8, 8, 3)).error == pytest.approx((5 / 8) ** 0.5, rel=1e-12)


def test_one_matrix_of_a_stack_does_not_cost_another_its_digits():
    """What noise drops is no licence to lose digits of the matrix beside it."""
    q, _ = torch.linalg.qr(noise(20, 20, seed=14))
    values = torch.zeros(20, dtype=torch.float64)
    values[:3] = torch.tensor([1.0, 1e-4, 1e-7])
    sharp = (q * values) @ torch.linalg.qr(noise(20, 20, seed=15))[0]
    found = factorize(torch.stack((sharp, noise(20, 20, seed=16))), Chain.low_rank(20, 20, 3))
    assert float(found.errors[0]) <= 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chain", [Chain.butterfly(8), Chain.low_rank(8, 8, 2), Chain([(1, 4, 4, 1)] * 2)], ids=str)
def test_sizes_at_the_ends_of_the_range_keep_errors_and_bounds(chain, dtype):
    """Squares of the entries would be infinite, or zero."""
    matrix = noise(*chain.shape, seed=37, dtype=dtype)
    one, double = factorize(matrix, chain), torch.finfo(dtype).bits == 64
    for scale in (1e160, 1e300, 1e-170, 1e-290) if double else (1e37, 1e-30):
        found = factorize(scale * matrix, chain)
        near = 1e-9 if double else 1e-4
        assert all(bool(torch.isfinite(block).all()) for block in found.blocks)
        assert found.error == pytest.approx(one.error, rel=near, abs=near)
        assert found.lower_bound == pytest.approx(one.lower_bound, rel=near, abs=1e-6)
        assert found.upper_bound == pytest.approx(one.upper_bound, rel=near, abs=1e-6)
        dense = found.to_dense() / scale
        torch.testing.assert_close(dense, one.to_dense(), rtol=1e-4, atol=1e-5)
        swept = factorize(scale * matrix, chain, refine=1)
        assert swept.error <= found.error * (1 + 1e-6) + 1e-7
    if double:
        stack = factorize(torch.stack((1e160 * matrix, matrix, 1e-170 * matrix)), chain)
        torch.testing.assert_close(stack.errors, stack.errors[1:2].expand(3), rtol=1e-9, atol=1e-14)
        assert stack.error == pytest.approx(one.error, rel=1e-9, abs=1e-14)


def test_a_metric_and_a_search_do_not_see_the_scale_of_the_matrix():
    chain, matrix = Chain.butterfly(8), noise(8, 8, seed=38)
    plain = factorize(matrix, chain, metric=Metric(moment(8, 39)), refine=1)
    large = factorize(1e160 * matrix, chain, metric=Metric(moment(8, 39)), refine=1)
    assert large.weighted_error == pytest.approx(plain.weighted_error, rel=1e-9)
    chosen = best_chain(1e-170 * matrix, max_params=40)
    assert chosen.chain == best_chain(matrix, max_params=40).chain
    assert chosen.least_error == pytest.approx(best_chain(matrix, max_params=40).least_error, rel=1e-9)


def test_an_empty_stack_has_empty_factors():
    found = factorize(torch.zeros(0, 8, 8), Chain.butterfly(8), refine=1)
    assert [tuple(block.shape) for block in found.blocks] == [(0, *pattern) for pattern in Chain.butterfly(8)]
    assert found.errors.shape == (0,)
    assert (found.error, found.lower_bound, found.upper_bound) == (0.0, 0.0, 0.0)


def test_zeros_are_exact_and_finite():
    for chain in (Chain.butterfly(8), Chain.low_rank(4, 4, 2), Chain.mixed_radix(12, 18)):
        for order in ORDERS:
            for orthonormalize in (True, False):
                found = factorize(torch.zeros(chain.shape), chain, order=order, orthonormalize=orthonormalize, refine=1)
                assert (found.error, found.lower_bound) == (0.0, 0.0)
                assert all(bool(torch.isfinite(block).all()) for block in found.blocks)
    half = member(Chain.butterfly(16), seed=17)
    half[:8] = 0
    for order in ORDERS:
        assert factorize(half, Chain.butterfly(16), order=order).error <= 1e-14


def test_large_pieces_are_split_like_small_ones(monkeypatch):
    matrices = {16: noise(32, 32, seed=18), 2: noise(32, 32, seed=19, dtype=torch.complex128)}
    whole = {k: factorize(m, Chain.radix((16, 2), (2, 16))).error for k, m in matrices.items()}
    dyadic = {k: factorize(m, Chain.butterfly(32)).error for k, m in matrices.items()}
    monkeypatch.setattr(fixed_support, "_PIECE", 8)
    for k, m in matrices.items():
        assert factorize(m, Chain.radix((16, 2), (2, 16))).error == pytest.approx(whole[k], rel=1e-12)
        assert factorize(m, Chain.butterfly(32)).error == pytest.approx(dyadic[k], rel=1e-12)


PAIRS = [Chain.butterfly(32), Chain.radix((2, 2, 2, 3), (3, 1, 2, 5)), Chain.radix((2, 2, 3, 2, 2), (2, 2, 3, 2, 2))]


@pytest.mark.parametrize("chain", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_the_kernel_for_row_pairs_changes_nothing(chain, dtype, monkeypatch):
    """With and without it, for stacks, views and every kind of order."""
    stack = noise(2, *chain.shape, seed=45, dtype=dtype)
    views = [stack, stack.mT.contiguous().mT, stack.conj(), torch._neg_view(stack)]
    last = list(range(1, len(chain)))
    orders = ["left", "right", "balanced", [*last[1:], 1], [2, *last[2:], 1], [1, *last[:0:-1]]]
    with_kernel = [factorize(view, chain, order=order) for view in views for order in orders]
    monkeypatch.setattr(pair_splits, "available", lambda values: False)
    without = [factorize(view, chain, order=order) for view in views for order in orders]
    for one, two in zip(with_kernel, without):
        torch.testing.assert_close(one.to_dense(), two.to_dense(), rtol=0, atol=1e-10)
        torch.testing.assert_close(one.errors, two.errors, rtol=1e-10, atol=0)
        assert one.upper_bound == two.upper_bound


@pytest.mark.parametrize("chain", [c for c in CHAINS if c.redundant()], ids=str)
def test_redundant_pairs_are_expanded_exactly(chain):
    """The factors hold copies of entries, zeros and ones: a matrix comes back bit for bit where nothing is dropped."""
    if len(chain.reduce()[0]) == 1:
        matrix = member(chain.reduce()[0], seed=20)
        assert torch.equal(dense_product(factorize(matrix, chain).blocks), matrix)
    reduced = chain.reduce()[0]
    matrix = noise(*chain.shape, seed=21)
    assert factorize(matrix, chain).error == pytest.approx(factorize(matrix, reduced).error, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("shape", [(2, 3), (3, 2)])
def test_expansion_pads_with_zeros(shape):
    b, c = shape
    between = Interface.between(Chain([(1, b, 3, 1), (1, 3, c, 1)])[0], Chain([(1, 3, c, 1)])[0])
    values = noise(1, b, c, 1, seed=22)
    left, right = expand(values, between)
    assert torch.equal(multiply(left, right, between), values)


def test_noise_is_removed_as_the_dimension_of_the_set_predicts():
    n, eps = 256, 0.1
    target = hadamard(n)
    found = factorize(target + eps * noise(n, n, seed=0), Chain.butterfly(n))
    assert distance(found.to_dense(), target) == pytest.approx(eps * math.sqrt(9 / n), rel=0.05)


def test_interface_errors_are_those_of_two_factors():
    chain, matrix = Chain.mixed_radix(12, 18), noise(12, 18, seed=23)
    errors = interface_errors(matrix, chain)
    for s in range(1, len(chain)):
        two = Chain([chain.product(0, s), chain.product(s)])
        assert float(errors[s - 1]) == pytest.approx(factorize(matrix, two).error, rel=1e-10)
    torch.testing.assert_close(interface_errors(matrix.T, chain.transpose), errors.flip(0))


def test_the_matrix_and_the_gradient_are_left_alone():
    matrix = noise(8, 8, seed=24).requires_grad_()
    before = matrix.detach().clone()
    found = factorize(matrix, Chain.butterfly(8), refine=2)
    assert not any(block.requires_grad for block in found.blocks)
    assert torch.equal(matrix, before)
    assert torch.isfinite(torch.tensor(found.error))


def moment(n: int, seed: int) -> torch.Tensor:
    rows = noise(3 * n, n, seed=seed) * torch.logspace(-1, 1, n, dtype=torch.float64)
    return rows.T @ rows / len(rows)


@pytest.mark.parametrize("both", [False, True])
def test_a_low_rank_chain_is_exact_in_a_metric(both):
    """Whitened singular value decomposition, by symmetric square roots instead of triangular ones."""
    matrix, a, g = noise(10, 14, seed=25), moment(14, 26), moment(10, 27) if both else None
    found = factorize(matrix, Chain.low_rank(10, 14, 3), metric=Metric(a, g))
    roots = []
    for factor in (g if both else torch.eye(10, dtype=torch.float64), a):
        values, vectors = torch.linalg.eigh(factor)
        roots.append((vectors * values.sqrt()) @ vectors.T)
    sigma = torch.linalg.svdvals(roots[0] @ matrix @ roots[1])
    assert found.weighted_error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-6)
    assert found.upper_bound is None
    assert found.lower_bound <= found.error


@pytest.mark.parametrize("chain", [c for c in CHAINS if len(c) > 1 and c.product().a == c.product().d == 1], ids=str)
def test_a_metric_lowers_its_own_loss_and_sweeps_lower_it_further(chain):
    matrix = noise(*chain.shape, seed=28)
    metric = Metric(moment(chain.shape[1], 29), moment(chain.shape[0], 30))
    plain = factorize(matrix, chain).to_dense() - matrix
    losses = [factorize(matrix, chain, metric=metric, refine=k).weighted_error for k in range(3)]
    scale = metric.loss(matrix)
    if chain.redundant() and len(chain.reduce()[0]) == 1:
        assert losses[-1] <= 1e-7
        return
    assert losses[-1] < (metric.loss(plain) / scale) ** 0.5
    assert losses[1] <= losses[0] * (1 + 1e-9)
    assert losses[2] <= losses[1] * (1 + 1e-9)
    assert factorize(matrix, chain).weighted_error is None


def test_a_diagonal_metric_is_a_scaling():
    chain, matrix = Chain.butterfly(16), noise(16, 16, seed=31)
    rows, cols = noise(16, seed=32).abs() + 0.1, noise(16, seed=33).abs() + 0.1
    found = factorize(matrix, chain, metric=Metric(torch.diag(cols**2), torch.diag(rows**2)))
    scaled = factorize(rows[:, None] * matrix * cols, chain)
    assert found.weighted_error == pytest.approx(scaled.error, rel=1e-8)
    torch.testing.assert_close(rows[:, None] * found.to_dense() * cols, scaled.to_dense(), rtol=0, atol=1e-7)


def every_chain_of(rows: int, cols: int) -> list[Chain]:
    """All ascending chains without redundancy by the closed form on the blocks of each support, and their mirrors."""
    found = []
    for m, n, mirror in ((rows, cols, False), (cols, rows, True)):
        for a, d in itertools.product(range(1, math.gcd(m, n) + 1), repeat=2):
            if math.gcd(m, n) % (a * d) == 0:
                for inner in enumerate_chains(m // (a * d), n // (a * d)):
                    chain = Chain([(a * p.a, p.b, p.c, d * p.d) for p in inner])
                    found.append(chain.transpose if mirror else chain)
    return found


def lopsided() -> torch.Tensor:
    """Noise with a corner of little weight, so that block-triangular and block-diagonal chains are worth a look."""
    matrix = noise(8, 12, seed=34)
    matrix[:4, 6:] *= 0.05
    return matrix


@functools.cache
def bounds_of_lopsided() -> dict[Chain, tuple[float, float]]:
    """Largest E_s and root of the sum of their squares for every chain; with one factor, what lies outside of it."""
    bounds = {}
    matrix = lopsided()
    for chain in every_chain_of(8, 12):
        errors = interface_errors(matrix, chain)
        if not len(errors):
            errors = torch.tensor([distance(matrix * chain[0].support(), matrix)], dtype=torch.float64)
        bounds[chain] = float(errors.max()), float(errors.square().sum().sqrt())
    return bounds


def test_sides_of_many_divisors_are_searched_on_a_coarser_grid():
    matrix = noise(120, 72)
    choice = best_chain(matrix, max_params=120 * 72 // 3)
    assert choice.chain.parameters <= 120 * 72 // 3
    assert choice.least_error <= choice.factorization.error
    # Chains of two factors are all on the grid at rank 1.
    for blocks in (2, 3, 4, 6, 8, 12, 24):
        monarch = Chain([(1, blocks, blocks, 120 // blocks), (blocks, 120 // blocks, 72 // blocks, 1)])
        if monarch.parameters <= 120 * 72 // 3:
            assert choice.factorization.upper_bound <= factorize(matrix, monarch).upper_bound + 1e-12
    member = factorize(matrix, Chain.radix([4, 5, 6], [3, 4, 6])).to_dense()
    assert best_chain(member, tolerance=1e-6).factorization.error <= 1e-6


@pytest.mark.parametrize("share", [0.6, 0.35])
def test_a_budget_is_used_up_where_rank_buys_accuracy(share):
    """Against every two-factor chain of the largest rank that fits: ranks off the grid among them."""
    matrix = noise(96, 120, seed=3)
    budget = int(share * matrix.numel())
    found = best_chain(matrix, max_params=budget).factorization
    for q in divisors(96):
        for p in divisors(120):
            rank = min(budget // (p * 96 + 120 * (96 // q)), q, 120 // p)
            if rank >= 1 and (q, p) not in ((1, 1), (96, 120)) and min(q, 120 // p) > 1:
                chain = Chain.radix([q, 96 // q], [p, 120 // p], ranks=[rank])
                assert found.upper_bound <= interface_errors(matrix, chain).square().sum().sqrt() * (1 + 1e-9), chain


@pytest.mark.parametrize("tolerance", [0.7, 0.4])
def test_ranks_beyond_what_a_tolerance_needs_are_given_up(tolerance):
    """Against every two-factor chain of the smallest rank that will do."""
    matrix = noise(96, 120, seed=4)
    found = best_chain(matrix, tolerance=tolerance).factorization
    assert found.error <= tolerance
    for q in divisors(96):
        for p in divisors(120):
            if (q, p) not in ((1, 1), (96, 120)):
                tails = spectrum(matrix, q, p).sqrt() / matrix.norm()
                rank = int((tails <= tolerance * (1 - 1e-9)).nonzero()[0])
                assert found.parameters <= max(rank, 1) * (p * 96 + 120 * (96 // q))


@pytest.mark.parametrize("budget", [8 * 12, 60, 48, 30, 20])
def test_the_best_chain_within_a_budget_has_the_least_proved_bound(budget):
    """Against all chains of 8 x 12 of both directions and every product pattern, one by one."""
    matrix = lopsided()
    found = best_chain(matrix, max_params=budget)
    within = {chain: bound for chain, bound in bounds_of_lopsided().items() if chain.parameters <= budget}
    assert found.chain.parameters <= budget
    assert found.factorization.error <= min(upper for _, upper in within.values()) * (1 + 1e-9) + 1e-12
    assert found.least_error == pytest.approx(min(lower for lower, _ in within.values()), rel=1e-9, abs=1e-12)
    assert found.least_parameters is None


@pytest.mark.parametrize("tolerance", [0.5, 0.3, 0.1, 0.02, 0.0])
def test_the_smallest_chain_within_a_tolerance(tolerance):
    matrix = lopsided()
    found = best_chain(matrix, tolerance=tolerance)
    assert found.factorization.error <= tolerance
    possible = [chain.parameters for chain, (lower, _) in bounds_of_lopsided().items() if lower <= tolerance]
    assert found.least_parameters == min(possible)
    assert found.least_parameters <= found.chain.parameters
    sure = min(chain.parameters for chain, (_, upper) in bounds_of_lopsided().items() if upper <= tolerance)
    assert found.chain.parameters <= sure
    assert found.least_error is None


def test_descending_chains_and_blocks_are_found():
    """No ascending chain of a full matrix comes near these with as few parameters."""
    mirrored = member(Chain.butterfly(16).transpose, seed=40)
    found = best_chain(mirrored, max_params=128)
    assert found.factorization.error <= 1e-13
    assert found.least_error <= 1e-13
    diagonal = torch.block_diag(*(noise(4, 4, seed=seed) for seed in range(4)))
    found = best_chain(diagonal, max_params=100)
    assert (found.factorization.error, found.least_error) == (0.0, 0.0)
    found = best_chain(diagonal, tolerance=0.0)
    assert (found.chain, found.least_parameters) == (Chain([(4, 4, 4, 1)]), 64)
    strided = to_dense(noise(1, 3, 2, 4, seed=41))
    assert best_chain(strided, tolerance=0.0).chain == Chain([(1, 3, 2, 4)])
    assert best_chain(torch.eye(12), tolerance=0.0).chain.parameters == 12


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 7)])
def test_sizes_without_divisors_have_chains(shape):
    matrix = noise(*shape, seed=42)
    assert best_chain(matrix, max_params=35).factorization.error == 0
    assert best_chain(matrix, tolerance=0).least_parameters == min(math.prod(shape), 21)
    assert best_chain(matrix, max_params=sum(shape)).chain.parameters <= sum(shape)


def test_a_tolerance_below_the_rounding_of_the_factors_is_kept():
    generator = torch.Generator().manual_seed(43)
    parts = [torch.randint(-9, 10, shape, generator=generator).float() for shape in ((12, 2), (2, 18))]
    matrix = parts[0] @ parts[1]
    assert factorize(matrix, Chain.low_rank(12, 18, 2)).error > 1e-9
    for tolerance in (1e-3, 1e-6, 1e-9, 0.0):
        assert best_chain(matrix, tolerance=tolerance).factorization.error <= tolerance


def test_a_hidden_butterfly_is_found():
    found = best_chain(member(Chain.butterfly(16), seed=36), tolerance=1e-6)
    # Two factors of 4 x 4 blocks have as many parameters as four of 2 x 2.
    assert found.chain in (Chain.butterfly(16), Chain([(1, 4, 4, 4), (4, 4, 4, 1)]))
    assert found.chain.parameters == found.least_parameters == 128


@pytest.mark.parametrize(
    ("matrix", "options", "error", "message"),
    [
        (torch.zeros(4, 8), {}, ValueError, r"describes 8 x 8 matrices, got \(4, 8\)"),
        (torch.zeros(8), {}, ValueError, r"describes 8 x 8 matrices, got \(8,\)"),
        (torch.zeros(8, 8).half(), {}, TypeError, r"complex64 or complex128, got torch.float16"),
        (torch.zeros(8, 8).long(), {}, TypeError, r"complex64 or complex128, got torch.int64"),
        ([[1.0]], {}, TypeError, r"complex64 or complex128, got list"),
        (torch.full((8, 8), float("nan")), {}, ValueError, r"64 of 64 entries that are not finite"),
        (torch.eye(8) / 0, {}, ValueError, r"64 of 64 entries that are not finite"),
        (torch.zeros(8, 8), {"order": "lef"}, ValueError, r"Unknown order 'lef'. Did you mean 'left'"),
        (torch.zeros(8, 8), {"order": [1, 1]}, ValueError, r"each interface 1 ... 2 of 3 factors once, got \[1, 1\]"),
        (torch.zeros(8, 8), {"order": [0, 1]}, ValueError, r"each interface 1 ... 2 of 3 factors once, got \[0, 1\]"),
        (torch.zeros(8, 8), {"order": ["a", 1]}, ValueError, r"1 ... 2 of 3 factors once, got \['a', 1\]"),
        (torch.zeros(8, 8), {"order": 3}, ValueError, r"'left', 'right', 'balanced' or a list of all .*, got 3"),
        (torch.zeros(8, 8), {"order": None}, ValueError, r"'left', 'right', 'balanced' or a list of all .*, got None"),
        (torch.zeros(8, 8), {"refine": True}, ValueError, r"refine >= 0 sweeps, got True"),
        (torch.zeros(8, 8), {"refine": -1}, ValueError, r"refine >= 0 sweeps, got -1"),
        (torch.zeros(2, 8, 8), {"metric": Metric(torch.eye(8))}, ValueError, r"one real matrix, got \(2, 8, 8\)"),
        (torch.zeros(8, 8) + 0j, {"metric": Metric(torch.eye(8))}, ValueError, r"one real matrix, .*complex64"),
        (torch.zeros(8, 8), {"metric": Metric(torch.eye(6))}, ValueError, r"6 columns, got \(8, 8\)"),
    ],
)
def test_what_cannot_be_factorized_is_refused(matrix, options, error, message):
    with pytest.raises(error, match=message):
        factorize(matrix, Chain.butterfly(8), **options)


def test_a_list_of_patterns_is_no_chain():
    with pytest.raises(TypeError, match=r"factorize needs a Chain, got \[\(1, 8, 8, 1\)\]; write Chain\(\["):
        factorize(torch.zeros(8, 8), [(1, 8, 8, 1)])


def test_a_chain_without_a_direction_is_refused():
    chain = Chain([*Chain.butterfly(4), *Chain.butterfly(4).transpose])
    with pytest.raises(ValueError, match=r"not chainable. Ascending, factors 3 and 4"):
        factorize(torch.zeros(4, 4), chain)


@pytest.mark.parametrize(
    ("matrix", "options", "message"),
    [
        (torch.zeros(4, 4), {}, r"either max_params or tolerance, got None and None"),
        (torch.zeros(4, 4), {"max_params": 8, "tolerance": 0.1}, r"either max_params or tolerance, got 8 and 0.1"),
        (torch.zeros(2, 4, 4), {"tolerance": 0.1}, r"one matrix \(m, n\) with entries, got \(2, 4, 4\)"),
        (torch.zeros(0, 4), {"max_params": 8}, r"one matrix \(m, n\) with entries, got \(0, 4\)"),
        (torch.zeros(4, 4), {"tolerance": -0.1}, r"tolerance >= 0, got -0.1"),
        (torch.zeros(4, 4), {"tolerance": float("nan")}, r"tolerance >= 0, got nan"),
        (torch.zeros(4, 4), {"tolerance": "0.1"}, r"tolerance >= 0, got '0.1'"),
        (torch.zeros(4, 4), {"max_params": "8"}, r"max_params to be a positive integer, got '8'"),
        (torch.zeros(4, 4), {"max_params": 8.5}, r"max_params to be a positive integer, got 8.5"),
        (torch.zeros(4, 4), {"max_params": 0}, r"max_params to be a positive integer, got 0"),
        (torch.zeros(4, 4), {"max_params": 3}, r"max_params=3 is below the smallest chain of 4 x 4, 4"),
        (torch.eye(4) / 0, {"max_params": 8}, r"16 of 16 entries that are not finite"),
    ],
)
def test_what_no_chain_can_be_chosen_for_is_refused(matrix, options, message):
    with pytest.raises(ValueError, match=message):
        best_chain(matrix, **options)
