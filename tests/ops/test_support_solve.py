"""Least squares on supports: the kernel against torch, on every instruction set, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from eke.ops import support_solve as op
from eke.ops.support_solve import native


def problem(batch, n, k, *, m=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, n, generator=generator, dtype=dtype)
    support = torch.stack([torch.randperm(n, generator=generator)[:k] for _ in range(batch)])
    return a.mH @ a, support, torch.randn(batch, m, generator=generator, dtype=dtype) @ a.conj()


LEVELS = range(native.level() + 1) if native.level() >= 0 else [None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8, 13, 30])
@pytest.mark.parametrize("level", LEVELS)
def test_solutions_solve_their_systems(level, k, dtype):
    gram, support, right = problem(7, 50, k, dtype=dtype)
    x = op.support_solve(gram, support, right, instructions=level)
    for i in range(7):
        expected = torch.linalg.solve(gram[support[i]][:, support[i]], right[i, support[i]])
        tolerance = 1e-3 if dtype == torch.float32 else 1e-9
        torch.testing.assert_close(x[i, support[i]], expected, rtol=tolerance, atol=tolerance)
    assert int((x != 0).sum()) == 7 * k
    torch.testing.assert_close(x, op.reference(gram, support, right), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_share_samples(threads):
    before = torch.get_num_threads()
    gram, support, right = problem(64, 80, 30)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(op.support_solve(gram, support, right), op.reference(gram, support, right))
    finally:
        torch.set_num_threads(before)


def test_singular_systems_are_regularised_one_by_one():
    gram, support, right = problem(3, 20, 5)
    gram[:, 1], right[:, 1] = gram[:, 0], right[:, 0]
    gram[1] = gram[0]
    support[1, :2] = torch.tensor([0, 1])
    support[1, 2:] = torch.tensor([5, 9, 12])
    for i in (0, 2):
        support[i] = torch.tensor([2, 3, 4, 6, 7])
    x = op.support_solve(gram, support, right)
    assert bool(torch.isfinite(x).all())
    at = support[1]
    torch.testing.assert_close(gram[at][:, at] @ x[1, at], right[1, at], rtol=1e-6, atol=1e-6)


def test_layouts_are_taken_as_they_come():
    gram, support, right = problem(6, 30, 4)
    wide = right.repeat_interleave(2, 1)[:, ::2]
    torch.testing.assert_close(
        op.support_solve(gram.T, support.T.contiguous().T, wide), op.reference(gram, support, right)
    )


def test_empty_batches_are_fine():
    gram, support, right = problem(3, 20, 5)
    assert op.support_solve(gram, support[:0], right[:0]).shape == (0, 20)
    assert bool((op.support_solve(gram, support[:, :0], right) == 0).all())


def test_gradients_take_the_reference():
    gram, support, right = problem(2, 6, 3, m=8)
    assert torch.autograd.gradcheck(lambda g, r: op.support_solve((g + g.T) / 2, support, r), (
        gram.requires_grad_(), right.requires_grad_()))  # fmt: skip


def test_without_the_library_torch_does_it(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)
    gram, support, right = problem(3, 20, 5)
    assert not op.available(gram)
    assert native.level() == -1
    assert op.describe() == "none (torch's own operations)"
    torch.testing.assert_close(op.support_solve(gram, support, right), op.reference(gram, support, right))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g, s, r: (g[:3], s, r), r"needs gram \(n, n\).*got \(3, 20\)"),
        (lambda g, s, r: (g, s[:2], r), r"got .*\(2, 5\)"),
        (lambda g, s, r: (g, s.int(), r), "torch.int32"),
        (lambda g, s, r: (g, s, r.float()), "torch.float32"),
        (lambda g, s, r: (g, s + 20, r), "must be from 0 to 19, got 2"),
        (lambda g, s, r: (g, s - 20, r), "must be from 0 to 19, got -"),
    ],
)
def test_wrong_calls_are_refused(change, says):
    if not op.available(torch.zeros(1)) and "from 0" in says:
        pytest.skip("torch's own operations check indices themselves")
    with pytest.raises(ValueError, match=says):
        op.support_solve(*change(*problem(3, 20, 5)))
