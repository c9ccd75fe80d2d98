"""Neighbouring factors with b = c = 2 in half of the operations: the same product, or the plain way."""

from __future__ import annotations

import pytest
import torch

from eke import ops
from eke.ops.ks_matmul import native, reference

LEVELS = range(native.level() + 1)
pytestmark = pytest.mark.skipif(not native.available(), reason="the native kernel was not compiled")


def shapes(size, distances):
    """Factors that pair features at these distances, leftmost first."""
    return [(size // (2 * d), 2, 2, d) for d in distances]


CHAINS = [
    shapes(1024, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
    shapes(1024, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]),
    shapes(2048, [1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
    shapes(256, [1, 2, 4, 8, 16, 32, 64, 128, 64, 32, 16, 8, 4, 2, 1]),
    shapes(96, [16, 1, 16, 8, 8]),
    shapes(48, [8, 2]),
    shapes(16, [4, 4, 4, 4, 4, 4]),
    [(1, 48, 48, 1), *shapes(48, [8, 4, 2, 1]), (3, 16, 16, 1), *shapes(48, [1, 2])],
]


def made(chain, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in chain]


def product(x, factors):
    """In double precision, and the same of magnitudes: what rounding may be relative to."""
    y, size = x.double(), x.double().abs()
    for blocks in reversed(factors):
        y, size = reference.matmul(y, blocks.double()), reference.matmul(size, blocks.double().abs())
    return y, size


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_every_output_has_the_error_of_the_plain_product(level, chain):
    factors = made(chain)
    for batch in (1, 7, 40):
        x = torch.randn(batch, chain[-1][0] * chain[-1][2] * chain[-1][3], generator=torch.Generator().manual_seed(1))
        y = native.forward(x, factors[::-1], batch_last=False, instructions=level)
        expected, size = product(x, factors)
        # Each factor rounds once or twice, and so does each of the numbers it was divided by.
        terms = sum(shape[2] for shape in chain) + 2 * len(chain)
        assert ((y - expected).abs() <= 2 * terms * 2.0**-24 * size).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [5, 97, 1200])
def test_calls_with_kept_entries_threads_bias_and_types(threads, batch):
    chain = CHAINS[0]
    bias = torch.randn(1024)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            factors = [blocks / 2**0.5 for blocks in made(chain, dtype=dtype)]
            x = torch.randn(batch, 1024).to(dtype)
            expected, _ = product(x, factors)
            for _ in range(3):  # packed by the third
                y = ops.ks_chain_matmul(x, factors, bias=bias.to(dtype), activation=torch.relu)
                wanted = torch.relu(expected + bias.to(dtype).double())
                assert (y.double() - wanted).abs().max() < bound * wanted.abs().max()
                y = ops.ks_chain_matmul(x, factors)
                assert (y.double() - expected).abs().max() < bound * expected.abs().max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", LEVELS)
def test_divisors_that_are_zero_or_out_of_range_take_the_plain_way(level):
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    for change in (0.0, 1e-25, 1e25, float("nan")):
        factors = made(shapes(64, [32, 16, 8, 4, 2, 1]))
        factors[3][0, 0, 0, 0] = change
        y = native.forward(x, factors[::-1], batch_last=False, instructions=level)
        plain = x
        for blocks in reversed(factors):
            plain = native.forward(plain, [blocks], batch_last=False, instructions=level)
        torch.testing.assert_close(y, plain, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("level", LEVELS)
def test_results_that_are_finite_stay_finite(level):
    # Divided by 1e-4 four times, sums of inputs of 1e38 leave the range of float32; their product does not.
    factors = [torch.full(shape, 1e-4) for shape in shapes(64, [32, 16, 8, 4])]
    x = torch.full((5, 64), 1e38)
    expected, _ = product(x, factors)
    y = native.forward(x, factors[::-1], batch_last=False, instructions=level)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=0)
    x[2, 3] = float("inf")
    y = native.forward(x, factors[::-1], batch_last=False, instructions=level)
    assert y[[0, 1, 3, 4]].isfinite().all()
    assert not y[2].isfinite().all()


def test_kept_butterflies_see_that_their_entries_change():
    factors = made(CHAINS[0])
    x = torch.randn(30, 1024)
    for _ in range(3):
        ops.ks_chain_matmul(x, factors)
    factors[4].data[0, 0, 0, 0] += 1.0
    y = ops.ks_chain_matmul(x, factors)
    expected, size = product(x, factors)
    assert ((y - expected).abs() <= 1e-5 * size).all()
