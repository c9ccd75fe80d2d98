"""`eke solve`: batches of sparse problems in files."""

from __future__ import annotations

import json

import numpy as np
import pytest


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.standard_normal((60, 120))
    a /= np.linalg.norm(a, axis=0)
    x = (rng.random((30, 120)) < 0.08) * rng.standard_normal((30, 120))
    for name, array in (("A", a), ("b", x @ a.T), ("x", x), ("one", a @ x[0])):
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_exact_answers_are_found_and_written(eke, files):
    out = files / "found.npy"
    said = eke("solve", files / "A.npy", files / "b.npy", "--exact", "--out", out, "--json")
    found = json.loads(said.stdout)
    assert found["solver"] == "VAMP"
    assert "holds on 16 samples" in found["reason"]
    assert (found["problems"], found["shape"], found["diverged"]) == (30, [60, 120], 0)
    assert found["residual_over_b_worst"] < 1e-9
    np.testing.assert_allclose(np.load(out), np.load(files / "x.npy"), atol=1e-8)


def test_lasso_comes_with_its_optimality(eke, files):
    said = eke("solve", files / "A.npy", files / "one.npy", "--penalty", "0.05", "--out", files / "found.npy", "--json")
    found = json.loads(said.stdout)
    assert found["solver"] == "FISTA"
    assert found["violation_over_penalty_worst"] < 1e-4
    assert 0 <= found["duality_gap_over_objective_worst"] < 1e-6
    assert np.load(files / "found.npy").shape == (120,)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (("--solver", "htp", "--sparsity", "20"), "HTP"),
        (("--solver", "omp", "--sparsity", "30"), "OMP"),
        (("--solver", "ista", "--penalty", "0.3"), "ISTA"),
        (("--solver", "hyperlista"), "HyperLISTA"),
        (("--solver", "vamp"), "VAMP"),
        (("--sparsity", "20"), "HTP"),
    ],
)
def test_solvers_are_run_by_name(eke, files, options, name):
    shown = eke("solve", files / "A.npy", files / "b.npy", *options).stdout
    assert f"solver                  {name}" in shown
    assert "residual over b worst" in shown


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--penalty", "0.1", "--sparsity", "3"), "--penalty or --sparsity, got both: 0.1 and 3"),
        (("--solver", "fista"), "--solver fista takes --penalty, got neither"),
        (("--solver", "htp", "--penalty", "0.1"), "--solver htp takes --sparsity, got --penalty"),
        (("--solver", "vamp", "--sparsity", "3"), "takes neither --penalty nor --sparsity, got --sparsity"),
    ],
)
def test_contradictions_are_refused(eke, files, options, says):
    said = eke("solve", files / "A.npy", files / "b.npy", *options, code=2)
    assert says in " ".join(said.stderr.split())


def test_files_of_other_things_are_refused(eke, files):
    (files / "text.npy").write_text("hello")
    np.save(files / "words.npy", np.array(["a"]))
    np.save(files / "deep.npy", np.zeros((2, 2, 2, 2)))
    for name, says in (
        ("text", "no file of numbers"),
        ("words", "an array of numbers"),
        ("deep", "A (m, n) or (batch, m, n)"),
    ):
        said = eke("solve", files / f"{name}.npy", files / "b.npy", code=2)
        assert says in " ".join(said.stderr.split())
