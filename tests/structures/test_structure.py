"""What every projection refuses, and the straight-through gradient."""

from __future__ import annotations

import pytest
import torch

from eke.structures import UniformGrid, straight_through


def test_straight_through_has_the_projected_value_and_an_identity_gradient():
    v = torch.randn(3, 7, requires_grad=True)
    out = straight_through(UniformGrid(3), v)
    assert torch.equal(out, UniformGrid(3).project(v.detach()))
    weights = torch.randn(3, 7)
    (out * weights).sum().backward()
    assert torch.equal(v.grad, weights)


@pytest.mark.parametrize(
    ("v", "score", "error", "match"),
    [
        (torch.zeros(3), None, ValueError, r"matrices \(m, n\) with at least one entry, got the shape \(3,\)"),
        (torch.zeros(0, 3), None, ValueError, r"got the shape \(0, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int32), None, TypeError, "floating point matrix, got torch.int32"),
        (torch.tensor([[1.0, float("nan")]]), None, ValueError, "1 of 2 entries that are not finite"),
        (torch.zeros(2, 3), torch.ones(2), ValueError, r"score must have shape \(3,\) or \(2, 3\).*got \(2,\)"),
        (torch.zeros(2, 3), -torch.ones(3), ValueError, "finite and >= 0, got a minimum of -1.0"),
    ],
)
def test_bad_matrices_and_scores_are_named(v, score, error, match):
    with pytest.raises(error, match=match):
        UniformGrid(4).project(v, score)
