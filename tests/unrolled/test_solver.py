"""The interface: early exit, warm starts, callbacks, divergence, moving, compiling."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch

from eke.unrolled import FISTA, HTP, ISTA, OMP, VAMP, CoordinateDescent, HyperLISTA, Operator, SparseSolver

from .cases import small

MEMBERS = {
    "ISTA": lambda a: ISTA(a, penalty=0.05, iterations=300),
    "FISTA": lambda a: FISTA(a, penalty=0.05, iterations=300),
    "CoordinateDescent": lambda a: CoordinateDescent(a, penalty=0.05, iterations=300),
    "HTP": lambda a: HTP(a, sparsity=4, iterations=20),
    "OMP": lambda a: OMP(a, sparsity=4),
    "VAMP": lambda a: VAMP(a, iterations=15),
}
DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("name", MEMBERS)
def test_module_and_solve_agree_in_every_dtype(name, matrices, dtype):
    a, _, b = small(dtype=dtype, matrices=matrices)
    solver = MEMBERS[name](a)
    x = solver(b)
    solution = solver.solve(b)
    assert x.dtype == dtype
    assert x.shape == (6, 30)
    torch.testing.assert_close(solution.x, x, rtol=0, atol=1e-6)
    residual = torch.linalg.vector_norm((a @ x.unsqueeze(-1)).squeeze(-1) - b, dim=-1)
    torch.testing.assert_close(solution.residual, residual, rtol=1e-3, atol=1e-5)
    assert solution.method == name
    assert not bool(solution.converged.any())
    assert solution.iterations.tolist() == [solver.iterations] * 6


@pytest.mark.parametrize("matrices", [False, True], ids=["shared", "by sample"])
@pytest.mark.parametrize("name", MEMBERS)
def test_leaving_early_changes_nothing_but_the_steps(name, matrices):
    a, _, b = small(matrices=matrices)
    b = b * torch.tensor([1.0, 10.0, 0.1, 1.0, 2.0, 5.0], dtype=torch.float64)[:, None]
    solver = MEMBERS[name](a)
    tolerance = {"HTP": 0.0, "OMP": 1e-9}.get(name, 1e-7)
    early, full = solver.solve(b, tolerance=tolerance), solver.solve(b)
    scale = torch.linalg.vector_norm(b, dim=-1, keepdim=True)
    torch.testing.assert_close(early.x / scale, full.x / scale, rtol=0, atol=1e-4)
    assert int(early.iterations.max()) <= solver.iterations
    assert bool((early.converged | (early.iterations == solver.iterations)).all())


@pytest.mark.parametrize("name", MEMBERS)
def test_each_sample_counts_its_own_steps(name):
    a, _, b = small()
    solver = MEMBERS[name](a)
    tolerance = {"HTP": 0.0, "OMP": 1e-9}.get(name, 1e-7)
    whole = solver.solve(b, tolerance=tolerance)
    for i in range(len(b)):
        single_solver = MEMBERS[name](a)
        single = single_solver.solve(b[i : i + 1], tolerance=tolerance)
        assert abs(int(single.iterations[0]) - int(whole.iterations[i])) <= 1
        torch.testing.assert_close(single.x[0], whole.x[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MEMBERS)
def test_trajectory_is_what_fewer_steps_give(name):
    a, _, b = small()
    solver = MEMBERS[name](a)
    steps = [step.clone() for step in solver.trajectory(b)]
    assert len(steps) == solver.iterations
    torch.testing.assert_close(steps[-1], solver(b), rtol=0, atol=1e-12)
    solver.iterations = 3
    torch.testing.assert_close(steps[2], solver(b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", MEMBERS)
def test_nothing_given_is_written(name):
    a, _, b = small()
    kept_a, kept_b = a.clone(), b.clone()
    MEMBERS[name](a).solve(b, tolerance=1e-6)
    assert torch.equal(a, kept_a)
    assert torch.equal(b, kept_b)


def test_callback_hears_every_step():
    a, _, b = small()
    heard = []
    solution = FISTA(a, penalty=0.05, iterations=500).solve(b, tolerance=1e-8, callback=heard.append)
    assert [p.iteration for p in heard] == list(range(1, int(solution.iterations.max()) + 1))
    assert heard[-1].running == 0
    assert all(earlier.running >= later.running for earlier, later in itertools.pairwise(heard))
    assert heard[0].batch == 6
    assert heard[0].total == 500
    assert heard[-1].change <= 1e-8


def test_divergence_is_marked_and_said():
    a, _, b = small()
    with pytest.warns(RuntimeWarning, match=r"ISTA diverged on 6 of 6 problems; their answer is x = 0"):
        solution = ISTA(a, penalty=0.0, iterations=400, step=5.0).solve(b, tolerance=1e-6)
    assert bool(solution.diverged.all())
    assert not bool(solution.converged.any())
    assert bool((solution.x == 0).all())
    torch.testing.assert_close(solution.residual, torch.linalg.vector_norm(b, dim=-1))
    assert "6 diverged" in str(solution)


def test_nothing_is_said_where_nothing_diverges():
    a, _, b = small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = str(FISTA(a, penalty=0.05).solve(b, tolerance=1e-6))
    assert said.startswith("FISTA: 6 problems, ")
    assert "6 converged" in said
    assert "diverged" not in said


@pytest.mark.parametrize("name", MEMBERS)
def test_solvers_follow_their_dtype(name):
    a, _, b = small()
    moved = copy.deepcopy(MEMBERS[name](a)).to(torch.float32)
    expected = MEMBERS[name](a.float())(b.float())
    torch.testing.assert_close(moved(b.float()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ISTA", "FISTA", "VAMP"])
def test_modules_export(name):
    a, _, b = small(dtype=torch.float32)
    solver = MEMBERS[name](a)
    solver.iterations = 3
    expected = solver(b)
    program = torch.export.export(solver, (b,), strict=False)
    torch.testing.assert_close(program.module()(b), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda a, b: ISTA(a, penalty=0.1)(b[0]), ValueError, r"b must be \(batch, m\) = \(batch, 20\)"),
        (lambda a, b: ISTA(a, penalty=0.1)(b.float()), TypeError, "b is torch.float32 and A torch.float64"),
        (lambda a, b: ISTA(a, penalty=0.1)(b, b), ValueError, r"x0 must be \(batch, n\) = \(batch, 30\)"),
        (lambda a, b: ISTA(a, penalty=0.1)(b, b.new_zeros(2, 30)), ValueError, "x0 has 2 samples and b 6"),
        (lambda a, b: ISTA(a.long(), penalty=0.1), TypeError, "A must be float32.*got torch.int64"),
        (lambda a, b: SparseSolver(a, iterations=1), TypeError, "abstract class SparseSolver.*start.*step"),
        (lambda a, b: Operator((2, 3), dtype=a.dtype, device=a.device), TypeError, "abstract class Operator.*adjoint"),
        (lambda a, b: HyperLISTA(a)([1.0]), TypeError, "b must be a tensor, got list"),
        (lambda a, b: VAMP(a)(b[0, 0]), ValueError, r"b must be \(batch, m\).*got \(\)"),
        (lambda a, b: VAMP(a)(b.repeat(30, 1), b.new_zeros(190, 30)), ValueError, "x0 has 190 samples and b 180"),
        (lambda a, b: VAMP(a).trajectory(b[:, 1:]), ValueError, r"b must be \(batch, m\) = \(batch, 20\)"),
    ],
)
def test_wrong_calls_are_refused(call, error, says):
    a, _, b = small()
    with pytest.raises(error, match=says):
        call(a, b)
