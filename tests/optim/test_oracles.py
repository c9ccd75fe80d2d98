"""EKFAC's curvature against other implementations, where they are installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "curvature_oracles.py"


@pytest.fixture
def oracles():
    if not SCRIPT.exists():
        pytest.skip("benchmarks are not here")
    spec = importlib.util.spec_from_file_location("curvature_oracles", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield module
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["perceptron", "convolutional"])
@pytest.mark.parametrize("fisher", ["empirical", "exact"])
def test_matrices_and_directions_are_those_of_curvlinops(oracles, kind, fisher):
    pytest.importorskip("curvlinops")
    found = oracles.curvlinops_rows(getattr(oracles, kind)(), *oracles.data(kind), fisher)
    assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("kind", ["perceptron", "convolutional"])
def test_factors_matrices_and_directions_are_those_of_nngeometry(oracles, kind):
    pytest.importorskip("nngeometry")
    found = oracles.nngeometry_rows(getattr(oracles, kind)(), *oracles.data(kind))
    assert max(found.values()) <= 1e-6, found
