"""To lazylinop and FAuST and back; what they compute agrees with eke."""

from __future__ import annotations

import sys

import pytest
import torch

from eke._errors import MissingExtraError
from eke.linalg import factorize, from_faust, from_lazylinop, hadamard, to_faust, to_lazylinop
from eke.patterns import Chain


def noise(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_factors_survive_lazylinop_and_its_errors_are_ours():
    butterfly = pytest.importorskip("lazylinop.butterfly")
    matrix = noise(32)
    ours = factorize(matrix, Chain.butterfly(32))
    operator = to_lazylinop(ours.blocks)
    torch.testing.assert_close(torch.as_tensor(operator.toarray()), ours.to_dense(), rtol=0, atol=1e-10)
    chain, blocks = from_lazylinop(operator)
    assert chain == Chain.butterfly(32)
    assert all(torch.equal(one, two) for one, two in zip(blocks, ours.blocks))
    theirs = butterfly.ksd(matrix, butterfly.Chain.square_dyadic((32, 32)), order="l2r")
    dense = torch.as_tensor(theirs.toarray())
    assert float((dense - matrix).norm() / matrix.norm()) == pytest.approx(ours.error, abs=1e-10)


def test_factors_survive_faust():
    pytest.importorskip("pyfaust")
    from pyfaust.fact import butterfly

    for matrix in (noise(16), noise(16) + 1j * noise(16, 1)):
        ours = factorize(matrix, Chain.butterfly(16))
        faust = to_faust(ours.blocks)
        torch.testing.assert_close(torch.as_tensor(faust.toarray()), ours.to_dense(), rtol=0, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(from_faust(faust, Chain.butterfly(16)), ours.blocks))
    with pytest.raises(ValueError, match=r"The Faust has 4 factors, the chain .* has 3"):
        from_faust(faust, Chain.butterfly(8))
    with pytest.raises(ValueError, match=r"entries outside the support of \(8, 2, 2, 1\)"):
        from_faust(faust, Chain.butterfly(16).transpose)
    theirs = butterfly(hadamard(16).numpy(), type="bbtree")
    torch.testing.assert_close(torch.as_tensor(theirs.toarray()), hadamard(16), rtol=0, atol=1e-12)


def test_an_operator_without_factors_is_refused():
    with pytest.raises(TypeError, match=r"operator with ks_values, as ksm and ksd return, got 3"):
        from_lazylinop(3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lazylinop", None)
    monkeypatch.setitem(sys.modules, "lazylinop.butterfly", None)
    monkeypatch.setitem(sys.modules, "pyfaust", None)
    with pytest.raises(
        MissingExtraError, match=r"needs 'lazylinop.butterfly', which cannot be imported.*lazylinop\[full\]"
    ):
        to_lazylinop([torch.ones(1, 2, 2, 1)])
    with pytest.raises(MissingExtraError, match=r"needs 'pyfaust', which cannot be imported"):
        to_faust([torch.ones(1, 2, 2, 1)])
