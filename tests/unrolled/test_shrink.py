"""Thresholds and selections against their definitions."""

from __future__ import annotations

import pytest
import torch

from eke.unrolled import hard_threshold, keep_largest, select_support, soft_threshold
from eke.unrolled.shrink import kth_largest


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_sorting(z, threshold, share):
    """Selection row by row, by a plain sort."""
    rows = []
    for row in z:
        k = int(share * len(row) + 1e-6 * len(row))
        top = set(row.abs().argsort(descending=True)[:k].tolist())
        rows.append([
            v.item() if i in top and v.abs() >= threshold else (v / v.abs()).item() * max(v.abs().item() - threshold, 0)
            for i, v in enumerate(row)
        ])
    return torch.tensor(rows, dtype=z.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_soft_threshold_is_the_proximal_map_of_the_norm(dtype):
    z, t = random(50, dtype=dtype), 0.7
    x = soft_threshold(z, t)
    for other in (x + 1e-3 * random(50, dtype=dtype, seed=s) for s in range(1, 20)):
        best = (x - z).abs().square() / 2 + t * x.abs()
        assert bool((best <= (other - z).abs().square() / 2 + t * other.abs() + 1e-12).all())
    assert bool(((z.abs() <= t) == (x == 0)).all())


def test_thresholds_may_differ_by_sample():
    z = random(3, 5)
    t = torch.tensor([[0.1], [0.5], [1.0]], dtype=torch.float64)
    for row, threshold, whole in zip(z, t, soft_threshold(z, t), strict=True):
        torch.testing.assert_close(soft_threshold(row, float(threshold)), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.05, 0.13, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.5, 10.0])
def test_selection_is_the_sorted_one(dtype, share, threshold):
    z = random(7, 40, dtype=dtype)
    expected = by_sorting(z, threshold, share)
    torch.testing.assert_close(select_support(z, threshold, share), expected)
    each = torch.full((7, 1), share, dtype=torch.float64)
    torch.testing.assert_close(select_support(z, threshold, each), expected)


def test_shares_may_differ_by_sample():
    z = random(4, 40)
    shares = torch.tensor([[0.0], [0.1], [0.6], [1.0]], dtype=torch.float64)
    whole = select_support(z, 0.2, shares)
    for i in range(4):
        torch.testing.assert_close(whole[i : i + 1], by_sorting(z[i : i + 1], 0.2, float(shares[i])))


def test_no_share_is_soft_and_all_is_hard():
    z = random(3, 30)
    torch.testing.assert_close(select_support(z, 0.5, 0.0), soft_threshold(z, 0.5))
    torch.testing.assert_close(select_support(z, 0.5, 1.0), hard_threshold(z, 0.5))


def test_selection_is_the_same_when_compiled_shapes_are_needed(monkeypatch):
    z = random(4, 40)
    shares = torch.tensor([[0.0], [0.1], [0.6], [1.0]], dtype=torch.float64)
    expected = select_support(z, 0.2, shares)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(select_support(z, 0.2, shares), expected)


def test_rounding_does_not_cost_an_entry():
    z = random(1, 100)
    assert int((select_support(z, 1e-9, 0.13 * (1 - 1e-9)) == z).sum()) == 13


def test_gradients_flow_through_values_and_thresholds():
    z = random(2, 6).requires_grad_()
    t = torch.tensor([[0.3], [0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: select_support(a, b, 0.34), (z, t))


def test_largest_are_kept_exactly_also_among_equals():
    z = torch.ones(2, 5)
    assert keep_largest(z, 2).sum(-1).tolist() == [2, 2]
    mask = keep_largest(random(3, 9), 4)
    assert mask.sum(-1).tolist() == [4, 4, 4]
    assert float(random(3, 9).abs()[mask].min()) >= float(random(3, 9).abs()[~mask].min())
    assert not bool(keep_largest(z, 0).any())


@pytest.mark.parametrize("k", [1, 4, 9])
def test_kth_largest_is_in_its_place(k):
    z = random(3, 9).abs()
    torch.testing.assert_close(kth_largest(z, k), z.sort(descending=True).values[:, k - 1 : k])


def test_wrong_shares_are_refused():
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1\.5"):
        select_support(random(2, 4), 0.1, 1.5)
    with pytest.raises(ValueError, match=r"from 0 to 1, got values from -0\.5 to 0\.5"):
        select_support(random(2, 4), 0.1, torch.tensor([[-0.5], [0.5]]))
    with pytest.raises(ValueError, match="k must be from 0 to 4, the number of entries, got 5"):
        keep_largest(random(2, 4), 5)
