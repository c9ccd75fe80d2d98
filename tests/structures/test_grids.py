"""Uniform grids: fixed points, bit-exact storage, symmetry, and never worse than max-abs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eke.structures import UniformGrid

GRIDS = [UniformGrid(bits, group) for bits in range(1, 9) for group in (None, 1, 5, 100)]


def matrix(seed: int, dtype: torch.dtype, rows: int = 7, columns: int = 23) -> torch.Tensor:
    """Rows of very different size, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(rows, columns, dtype=dtype, generator=generator)
    v = v * torch.logspace(-12, 12, rows, dtype=dtype)[:, None]
    v[2] = 0
    return v


def scores(seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [None, torch.rand(23, generator=generator), torch.rand(7, 23, generator=generator)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_projection_is_a_fixed_point_bit_for_bit(grid, dtype):
    v = matrix(0, dtype)
    for score in scores(1):
        once = grid.project(v, score)
        assert once.dtype == dtype
        assert torch.equal(grid.project(once, score), once)
        assert torch.equal(grid.project(once), once)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_decode_inverts_encode_bit_for_bit(grid):
    for score in scores(2):
        p = grid.project(matrix(3, torch.float32), score)
        packed = grid.encode(p)
        assert torch.equal(grid.decode(packed, (7, 23)), p)
        assert 8 * sum(tensor.nbytes for tensor in packed.values()) == grid.bits((7, 23))
        assert packed["scales"].dtype == torch.float32
        assert packed["codes"].dtype == torch.uint8


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_any_grid_point_is_recovered_even_where_no_code_is_extreme(bits, seed):
    """A column sweep or a cut leaves rows whose largest code is below the top: they are members too."""
    generator = torch.Generator().manual_seed(seed)
    grid = UniformGrid(bits)
    codes = torch.randint(-grid.top, grid.top + 1, (5, 11), generator=generator, dtype=torch.int8)
    _, scales = grid.quantize(torch.randn(5, 11, generator=generator))
    v = grid.dequantize(codes, scales)
    assert torch.equal(grid.project(v), v)
    assert torch.equal(grid.decode(grid.encode(v), (5, 11)), v)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_error_is_never_above_max_abs(grid):
    v = matrix(4, torch.float64)
    width = grid.group or 23
    for score in scores(5):
        weights = torch.ones_like(v) if score is None else score.double().expand_as(v)
        p = grid.project(v, score)
        for start in range(0, 23, width):
            part = slice(start, start + width)
            scale = v[:, part].abs().amax(1, keepdim=True) / grid.top
            safe = torch.where(scale > 0, scale, 1.0)
            plain = (
                (v[:, part] / safe).round() * scale
                if grid.code_bits > 1
                else torch.where(v[:, part] < 0, -1, 1) * scale
            )
            ours = (weights[:, part] * (p[:, part] - v[:, part]) ** 2).sum(1)
            theirs = (weights[:, part] * (plain - v[:, part]) ** 2).sum(1)
            # The stored scale has 17 bits: an entry's error grows by at most |v| 2**-17.
            slack = (theirs.sqrt() + (weights[:, part] * v[:, part] ** 2).sum(1).sqrt() * 2**-16) ** 2
            assert (ours <= slack).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_is_near_the_best_of_a_dense_search(bits):
    grid = UniformGrid(bits)
    v = torch.randn(6, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    ours = (grid.project(v) - v).square().sum(1)
    ratios = torch.linspace(0.02, 1, 3000, dtype=torch.float64)[:, None, None]
    scales = ratios * v.abs().amax(1, keepdim=True) / grid.top
    best = (((v / scales).round().clamp(-grid.top, grid.top) * scales - v) ** 2).sum(2).amin(0)
    assert (ours <= 1.02 * best).all()


def test_one_bit_is_the_exact_optimum():
    v = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    p = UniformGrid(1).project(v)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=9)), dtype=torch.float64)
    fit = (signs @ v.T) / 9  # best scale of each sign pattern: (patterns, rows)
    best = (v.square().sum(1) - 9 * fit.square()).amin(0)
    torch.testing.assert_close((p - v).square().sum(1), best, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("grid", GRIDS, ids=repr)
def test_rows_times_powers_of_two_keep_their_codes(grid):
    v = matrix(8, torch.float32)
    powers = torch.tensor([2.0**k for k in range(-3, 4)])[:, None]
    codes, scales = grid.quantize(v)
    scaled_codes, scaled_scales = grid.quantize(v * powers)
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(scales * powers, scaled_scales)


@pytest.mark.parametrize("bits", range(2, 9))
def test_projection_is_odd(bits):
    v = matrix(9, torch.float32)
    assert torch.equal(UniformGrid(bits).project(-v), -UniformGrid(bits).project(v))


def test_weights_move_the_error_to_columns_that_matter_less():
    v = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(10))
    score = torch.where(torch.arange(64) < 60, 1.0, 0.0).double()
    v[:, 60:] *= 4
    grid = UniformGrid(3)
    weighted = ((grid.project(v, score) - v)[:, :60] ** 2).sum()
    assert weighted < 0.5 * ((grid.project(v) - v)[:, :60] ** 2).sum()


def test_rounding_to_given_scales_is_the_nearest_level():
    grid = UniformGrid(4, group=6)
    v = matrix(11, torch.float64)
    codes, scales = grid.quantize(v)
    assert torch.equal(grid.round(v, scales), codes)
    rule = grid.by_columns(v)
    columns = torch.stack([rule(v[:, j], j) for j in range(23)], dim=1)
    assert torch.equal(columns, grid.project(v))


def test_half_precision_comes_back_as_float32():
    assert UniformGrid(4).project(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_tiny_rows_become_zero():
    assert torch.equal(UniformGrid(4).project(torch.full((1, 3), 1e-38)), torch.zeros(1, 3))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="bits from 1 to 8, got 0"):
        UniformGrid(0)
    with pytest.raises(ValueError, match="positive number of columns or None, got -1"):
        UniformGrid(4, -1)
    with pytest.raises(ValueError, match=r"below 2\*\*120 in magnitude, got 1e\+38"):
        UniformGrid(4).project(torch.full((1, 2), 1e38))
    grid = UniformGrid(4)
    packed = grid.encode(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"needs scales \(4, 1\), got \(3, 1\)"):
        grid.decode(packed, (4, 5))
    with pytest.raises(ValueError, match="take 8 bytes, got 7"):
        grid.decode({**packed, "codes": packed["codes"][:-1]}, (3, 5))
