"""Greedy solvers are exact where supports are found, and equal slow definitions where they are not."""

from __future__ import annotations

import pytest
import torch

from eke.unrolled import HTP, OMP, Convolutional, Functions, as_operator, htp, least_squares, nmse_db, omp
from eke.unrolled.operators import Dense

from .cases import small, standard

SOLVERS = {"omp": lambda a, b, s: omp(a, b, sparsity=s), "htp": lambda a, b, s: htp(a, b, sparsity=s)}


def slow_omp(a, b, sparsity):
    """Matching pursuit on one sample, by least squares from scratch."""
    chosen, residual = [], b
    length = torch.linalg.vector_norm(a, dim=0)
    for _ in range(sparsity):
        score = (a.mH @ residual).abs() / length
        score[chosen] = -1
        chosen.append(int(score.argmax()))
        fit = torch.linalg.lstsq(a[:, chosen], b[:, None]).solution[:, 0]
        residual = b - a[:, chosen] @ fit
    x = torch.zeros(a.shape[1], dtype=a.dtype)
    x[chosen] = fit
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("name", SOLVERS)
def test_sparse_truth_is_found_exactly(name, matrices, dtype):
    a, x, b = small(m=30, n=50, nonzeros=3, dtype=dtype, matrices=matrices)
    assert nmse_db(SOLVERS[name](a, b, 3).x, x) < -250


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_omp_is_the_slow_one_also_with_noise_and_long_columns(dtype):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(12, 20, generator=generator, dtype=dtype) * torch.arange(1.0, 21, dtype=torch.float64)
    b = torch.randn(4, 12, generator=generator, dtype=dtype)
    for found, right in zip(omp(a, b, sparsity=7).x, b, strict=True):
        torch.testing.assert_close(found, slow_omp(a, right, 7), rtol=1e-9, atol=1e-9)


def test_omp_is_that_of_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    a, _, b = small(nonzeros=8)
    peer = linear_model.orthogonal_mp(a.numpy(), b.numpy().T, n_nonzero_coefs=6)
    torch.testing.assert_close(omp(a, b, sparsity=6).x, torch.from_numpy(peer.T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SOLVERS)
def test_residual_is_orthogonal_to_the_support(name):
    a, _, b = small(nonzeros=10)
    solution = SOLVERS[name](a, b, 6)
    correlation = (b - solution.x @ a.T) @ a
    assert float(correlation[solution.x != 0].abs().max()) < 1e-12
    assert int((solution.x != 0).sum(-1).max()) <= 6


def test_htp_is_its_definition():
    a, _, b = small(nonzeros=5)
    x = torch.zeros(6, 30, dtype=torch.float64)
    for _ in range(4):
        z = x + (b - x @ a.T) @ a
        x = torch.zeros_like(x)
        for i, row in enumerate(z):
            at = row.abs().argsort(descending=True)[:5]
            x[i, at] = torch.linalg.lstsq(a[:, at], b[i][:, None]).solution[:, 0]
    torch.testing.assert_close(HTP(a, sparsity=5, iterations=4)(b), x, rtol=0, atol=1e-11)


def test_htp_without_a_matrix_solves_by_conjugate_gradients():
    a, x, b = small(m=30, n=50, nonzeros=3)
    operator = Functions(lambda v: v @ a.T, lambda r: r @ a, shape=(30, 50), dtype=torch.float64)
    solver = HTP(operator, sparsity=3, step=1.0)
    assert nmse_db(solver.solve(b, tolerance=0.0).x, x) < -200
    filters = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    convolution = Convolutional(filters, (5, 5))
    b = torch.randn(2, 25, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    support = torch.tensor([[0, 7, 20], [3, 40, 55]])
    dense = least_squares(Dense(convolution.dense()), b, support)
    torch.testing.assert_close(least_squares(convolution, b, support), dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
def test_least_squares_is_that_of_lapack(matrices):
    a, _, b = small(matrices=matrices)
    support = torch.stack([torch.randperm(30, generator=torch.Generator().manual_seed(i))[:8] for i in range(6)])
    found = least_squares(as_operator(a), b, support)
    for i in range(6):
        columns = (a[i] if matrices else a)[:, support[i]]
        expected = torch.linalg.lstsq(columns, b[i][:, None]).solution[:, 0]
        torch.testing.assert_close(found[i, support[i]], expected)
    assert int((found != 0).sum()) == 48


def test_singular_supports_are_no_failure():
    a, _, b = small()
    doubled = torch.cat([a, a[:, :1]], 1)
    x = least_squares(as_operator(doubled), b, torch.tensor([[0, 5, 30]] * 6))
    single = least_squares(as_operator(a), b, torch.tensor([[0, 5]] * 6))
    torch.testing.assert_close(x @ doubled.T, single @ a.T, rtol=0, atol=1e-6)


def test_omp_stops_at_its_tolerance():
    a, x, b = small(m=30, n=50, nonzeros=3)
    solution = omp(a, b, sparsity=20, tolerance=1e-10)
    assert solution.iterations.tolist() == [3] * 6
    assert bool(solution.converged.all())
    assert nmse_db(solution.x, x) < -250


def test_more_nonzeros_than_the_truth_has_do_no_harm_without_noise():
    a, x, b = small(m=30, n=50, nonzeros=3)
    for name in SOLVERS:
        assert nmse_db(SOLVERS[name](a, b, 12).x, x) < -200


def test_zero_in_gives_zero_out():
    a, _, b = small()
    for name in SOLVERS:
        assert bool((SOLVERS[name](a, torch.zeros_like(b), 4).x == 0).all())


def test_standard_problem_is_exact():
    a, x, b = standard(20)
    assert nmse_db(omp(a, b, sparsity=90, tolerance=1e-12).x, x) < -280
    assert nmse_db(htp(a, b, sparsity=80).x, x) < -250


@pytest.mark.parametrize("sparsity", [0, 21, 2.0, True])
@pytest.mark.parametrize("make", [HTP, OMP])
def test_wrong_sparsities_are_refused(make, sparsity):
    with pytest.raises(ValueError, match=r"sparsity is a number of nonzeros from 1 to 20 for A of \(20, 30\), got"):
        make(small()[0], sparsity=sparsity)


def test_wrong_settings_are_refused():
    a, x, b = small()
    with pytest.raises(ValueError, match="step must be positive, or None, got -1"):
        HTP(a, sparsity=3, step=-1)
    with pytest.raises(ValueError, match=r"OMP cannot start from x0, got \(6, 30\)"):
        OMP(a, sparsity=3)(b, x)
