"""Convolutional weights against brute force on tiny filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eke.unrolled import Convolutional, analytic_weight, convolutional_weight


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def interference(weight, filters):
    """Sum over pairs and shifts of |<w_m, shifted d_k>|^2, by loops over shifts."""
    _, _, h, w = filters.shape
    total = 0.0
    for dy in range(-h + 1, h):
        for dx in range(-w + 1, w):
            shifted = np.zeros_like(filters)
            for y in range(h):
                for x in range(w):
                    if 0 <= y - dy < h and 0 <= x - dx < w:
                        shifted[:, :, y, x] = filters[:, :, y - dy, x - dx]
            total += np.square(np.abs(np.einsum("mchw,kchw->mk", weight.conj(), shifted))).sum()
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_each_filter_answers_its_own_with_one(dtype):
    filters = random(4, 2, 3, 2, dtype=dtype)
    weight = convolutional_weight(filters)
    torch.testing.assert_close((weight.conj() * filters).sum((1, 2, 3)), torch.ones(4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_no_feasible_neighbour_interferes_less(dtype):
    filters = random(3, 1, 2, 3, dtype=dtype)
    weight = convolutional_weight(filters)
    least = interference(weight.numpy(), filters.numpy())
    for seed in range(1, 30):
        step = 0.05 * random(3, 1, 2, 3, dtype=dtype, seed=seed)
        inner = (filters.conj() * step).sum((1, 2, 3), keepdim=True)
        step = step - filters * inner / filters.abs().square().sum((1, 2, 3), keepdim=True)
        assert interference((weight + step).numpy(), filters.numpy()) > least


def test_weight_solves_the_quadratic_program():
    filters = random(2, 1, 2, 2, seed=3)
    flat = filters.reshape(2, 4).numpy()
    hessian = np.zeros((4, 4))
    for i in range(4):
        for j in range(4):
            unit = np.zeros((2, 4))
            if i == j:
                unit[0, i] = 1
                hessian[i, i] = interference(unit.reshape(2, 1, 2, 2), filters.numpy())
    for i in range(4):
        for j in range(i):
            both = np.zeros((2, 4))
            both[0, [i, j]] = 1
            value = interference(both.reshape(2, 1, 2, 2), filters.numpy())
            hessian[i, j] = hessian[j, i] = (value - hessian[i, i] - hessian[j, j]) / 2
    for m, found in enumerate(convolutional_weight(filters).reshape(2, 4).numpy()):
        kkt = np.block([[2 * hessian, flat[m][:, None]], [flat[m][None], np.zeros((1, 1))]])
        np.testing.assert_allclose(found, np.linalg.solve(kkt, [0, 0, 0, 0, 1])[:4], atol=1e-9)


def test_interference_is_below_that_of_the_filters_and_coherence_falls():
    filters = random(6, 1, 3, 3)
    filters = filters / torch.linalg.vector_norm(filters.flatten(1), dim=1)[:, None, None, None]
    weight = convolutional_weight(filters)
    assert interference(weight.numpy(), filters.numpy()) < interference(filters.numpy(), filters.numpy())


def test_filters_of_one_pixel_are_the_dense_case():
    a = random(5, 9)
    filters = a.T.reshape(9, 5, 1, 1)
    torch.testing.assert_close(convolutional_weight(filters).reshape(9, 5).T, analytic_weight(a))


def test_weight_as_an_operator_answers_with_ones_on_the_diagonal():
    filters = random(3, 1, 2, 2)
    dictionary = Convolutional(filters, (5, 5), circular=True)
    weight = Convolutional(convolutional_weight(filters), (5, 5), circular=True)
    product = weight.adjoint(dictionary.dense().T).T
    torch.testing.assert_close(product.diagonal(), torch.ones(75, dtype=torch.float64))


def test_weight_keeps_dtype_and_is_differentiable():
    assert convolutional_weight(random(3, 1, 2, 2).float()).dtype == torch.float32
    assert torch.autograd.gradcheck(convolutional_weight, (random(2, 1, 2, 2).requires_grad_(),))


@pytest.mark.parametrize(
    ("filters", "error", "says"),
    [
        (torch.ones(2, 3), ValueError, r"\(filters, channels, h, w\), got \(2, 3\)"),
        (torch.ones(2, 1, 2, 2, dtype=torch.int64), TypeError, "filters must be float32.*got torch.int64"),
        (torch.stack([torch.ones(1, 2, 2), torch.zeros(1, 2, 2)]), ValueError, "Filter 1 of 2 is zero everywhere"),
        (torch.ones(1, 2, 1, 1), ValueError, r"1 filters of shape \(2, 1, 1\) do not span their window"),
        (torch.full((1, 1, 2, 2), torch.nan), ValueError, "filters has 4 entries that are NaN"),
    ],
)
def test_wrong_filters_are_refused(filters, error, says):
    with pytest.raises(error, match=says):
        convolutional_weight(filters)
