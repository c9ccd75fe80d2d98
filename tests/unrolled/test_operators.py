"""Operators: adjoints, shapes, and what comes through the door."""

from __future__ import annotations

import math

import pytest
import torch

from eke.unrolled import Convolutional, Dense, Functions, as_operator
from eke.unrolled.operators import check_vector

DTYPES = [torch.float64, torch.complex128]


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def members(dtype):
    """Operators with the matrix that each one should equal."""
    a = random(4, 7, dtype=dtype)
    batched = random(3, 4, 7, dtype=dtype, seed=1)
    filters = random(2, 3, 2, 3, dtype=dtype, seed=2)
    return {
        "dense": Dense(a),
        "batched": Dense(batched),
        "functions": Functions(lambda x: x @ a.T, lambda r: r @ a.conj(), shape=(4, 7), dtype=dtype),
        "convolutional": Convolutional(filters, (4, 5)),
        "circular": Convolutional(filters, (4, 5), circular=True),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", members(torch.float64))
def test_adjoint_is_the_adjoint_and_dense_is_the_matrix(name, dtype):
    operator = members(dtype)[name]
    m, n = operator.shape
    x, r = random(3, n, dtype=dtype, seed=3), random(3, m, dtype=dtype, seed=4)
    torch.testing.assert_close((operator.forward(x) * r.conj()).sum(), (x * operator.adjoint(r).conj()).sum())
    matrix = operator.dense()
    assert matrix.shape[-2:] == (m, n)
    torch.testing.assert_close((matrix @ x.unsqueeze(-1)).squeeze(-1), operator.forward(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", members(torch.float64))
def test_norm_is_the_largest_singular_value(name, dtype):
    operator = members(dtype)[name]
    exact = torch.linalg.svdvals(operator.dense()).amax(-1).square().reshape(-1)
    assert operator.norm_squared().shape == exact.shape
    bound = operator.norm_squared()
    assert bool((bound >= exact * (1 - 1e-9)).all())
    assert bool((bound <= exact * 1.002).all())


def test_convolution_is_the_sum_of_shifted_filters():
    filters = random(2, 1, 2, 2)
    operator = Convolutional(filters, (3, 4))
    x = torch.zeros(1, *operator.maps_shape, dtype=torch.float64)
    x[0, 1, 2, 3] = 5.0
    image = operator.images(operator.forward(x.flatten(1)))[0, 0]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[1:3, 2:4] = 5 * filters[1, 0]
    torch.testing.assert_close(image, expected)


def test_circular_convolution_is_a_product_of_spectra():
    filters = random(1, 1, 3, 2)
    operator = Convolutional(filters, (6, 5), circular=True)
    x = random(1, 30, seed=5)
    padded = torch.zeros(6, 5, dtype=torch.float64)
    padded[:3, :2] = filters[0, 0]
    spectrum = torch.fft.fft2(operator.maps(x)[0, 0]) * torch.fft.fft2(padded)
    torch.testing.assert_close(operator.images(operator.forward(x))[0, 0], torch.fft.ifft2(spectrum).real)


def test_selecting_rows_selects_matrices():
    operator = Dense(random(3, 4, 7))
    rows = torch.tensor([2, 0])
    x = random(2, 7, seed=6)
    torch.testing.assert_close(operator.select(rows).forward(x)[0], operator.dense()[2] @ x[0])
    shared = Dense(random(4, 7))
    assert shared.select(rows) is shared


def test_operators_follow_their_tensors():
    for operator in (Dense(random(4, 7)), Convolutional(random(2, 1, 2, 2), (3, 3), circular=True)):
        moved = operator.mapped(lambda tensor: tensor.to(torch.float32))
        assert moved.dtype == torch.float32
        assert moved.shape == operator.shape


def test_given_operator_is_kept():
    operator = Dense(random(4, 7))
    assert as_operator(operator) is operator


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ([[1.0]], TypeError, "A must be a tensor or an Operator, got list"),
        (torch.ones(2, 3, dtype=torch.int64), TypeError, "A must be float32.*got torch.int64"),
        (torch.ones(2, 3, dtype=torch.float16), TypeError, "got torch.float16"),
        (torch.ones(3), ValueError, r"\(m, n\) or \(batch, m, n\).*got \(3,\)"),
        (torch.ones(0, 3), ValueError, r"at least one entry, got \(0, 3\)"),
        (torch.tensor([[1.0, math.nan]]), ValueError, "A has 1 entries that are NaN or infinite, of 2"),
        (torch.tensor([[1.0, 0.0]]), ValueError, "1 columns of zeros, the first at index 1"),
    ],
)
def test_wrong_dictionaries_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        as_operator(given)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        (torch.ones(4, dtype=torch.float64), ValueError, r"\(batch, m\) = \(batch, 4\).*One vector is b\[None\]"),
        (torch.ones(2, 5, dtype=torch.float64), ValueError, r"got \(2, 5\)"),
        (torch.ones(2, 4), TypeError, "b is torch.float32 and A torch.float64"),
        (torch.ones(2, 4, dtype=torch.int32), TypeError, "b must be float32.*got torch.int32"),
        (torch.full((2, 4), math.inf, dtype=torch.float64), ValueError, "b has 8 entries that are NaN"),
        (torch.ones(2, 4, dtype=torch.float64, device="meta"), ValueError, "b is on meta and A on cpu"),
        ("b", TypeError, "b must be a tensor, got str"),
    ],
)
def test_wrong_right_hand_sides_are_refused(given, error, says):
    with pytest.raises(error, match=says):
        check_vector(Dense(random(4, 7)), given, "b")


def test_one_matrix_a_sample_needs_as_many_samples():
    with pytest.raises(ValueError, match="each of 3 samples, b has 2 samples"):
        check_vector(Dense(random(3, 4, 7)), random(2, 4), "b")


def test_functions_that_are_no_adjoints_are_refused():
    a = random(4, 7)
    with pytest.raises(ValueError, match="adjoint is not the adjoint of forward"):
        Functions(lambda x: x @ a.T, lambda r: 2 * r @ a, shape=(4, 7), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"forward must map \(batch, 7\) to \(batch, 4\)"):
        Functions(lambda x: x, lambda r: r @ a, shape=(4, 7), dtype=torch.float64)


def test_wrong_filters_are_refused():
    with pytest.raises(ValueError, match=r"filters must be \(filters, channels, h, w\), got \(2, 2\)"):
        Convolutional(random(2, 2), (4, 4))
    with pytest.raises(ValueError, match=r"Filters of 3 x 3 need images at least as large, got size=\(2, 4\)"):
        Convolutional(random(1, 1, 3, 3), (2, 4))


def test_huge_operators_are_not_written_out():
    operator = Functions(lambda x: x, lambda r: r, shape=(2**14, 2**14), dtype=torch.float32)
    with pytest.raises(ValueError, match="would be written out as a matrix of 268435456 entries"):
        operator.dense()
