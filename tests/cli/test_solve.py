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
    assert found["solver"] == "Exact"
    assert "proved exact on 16 samples" in found["reason"]
    assert found["converged"] == 30
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
        (("--solver", "exact"), "Exact"),
        (("--sparsity", "20"), "Exact"),
    ],
)
def test_solvers_are_run_by_name(eke, files, options, name):
    shown = eke("solve", files / "A.npy", files / "b.npy", *options).stdout
    lines = dict(line.split("  ", 1) for line in shown.splitlines())
    assert lines["solver"].strip() == name
    assert float(lines["residual over b worst"]) >= 0
    assert ("noise over b worst" in lines) == ("settled" in lines) == (name == "VAMP")


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


def test_long_names_stand_apart_from_their_numbers(eke, files):
    shown = eke("solve", files / "A.npy", files / "one.npy", "--penalty", "0.05").stdout
    for name in ("violation over penalty worst", "duality gap over objective worst"):
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert line[len(name)] == " "
        assert 0 <= float(line[len(name) :]) < 1e-6


def test_message_passing_that_takes_most_of_b_for_noise_shows_it(eke, tmp_path):
    k = np.arange(64)
    a = np.cos(np.pi * (k[:, None] + 0.5) * np.arange(256) / 256)
    a /= np.linalg.norm(a, axis=0)
    rng = np.random.default_rng(0)
    x = (rng.random((60, 256)) < 0.2) * rng.standard_normal((60, 256))
    np.save(tmp_path / "A.npy", a)
    np.save(tmp_path / "b.npy", x @ a.T)
    found = json.loads(eke("solve", tmp_path / "A.npy", tmp_path / "b.npy", "--solver", "vamp", "--json").stdout)
    assert found["diverged"] < 60
    assert found["noise_over_b_worst"] > 0.3


def test_numbers_of_other_sizes_keep_their_values(eke, files):
    a, b = np.load(files / "A.npy"), np.load(files / "b.npy")
    for dtype, factor in ((np.float16, 1), (np.int64, 100), (np.clongdouble, 1 + 2j)):
        small_b = (b * factor).astype(dtype)
        np.save(files / "other.npy", small_b)
        eke(
            "solve",
            files / "A.npy",
            files / "other.npy",
            "--solver",
            "omp",
            "--sparsity",
            "60",
            "--out",
            files / "x2.npy",
        )
        np.testing.assert_allclose(np.load(files / "x2.npy") @ a.T, small_b.astype(np.complex128), atol=1e-8)


def test_answers_without_a_folder_are_refused_before_the_work(eke, files):
    said = eke("solve", files / "A.npy", files / "b.npy", "--out", files / "nowhere" / "x.npy", code=2)
    assert "there is no folder" in " ".join(said.stderr.split())
    assert "FISTA" not in said.stderr
    assert "choose" not in said.stderr


def test_files_of_other_things_are_refused(eke, files):
    (files / "text.npy").write_text("hello")
    (files / "zip.npy").write_bytes(b"PK\x03\x04 and no more")
    np.save(files / "words.npy", np.array(["a"]))
    np.save(files / "deep.npy", np.zeros((2, 2, 2, 2)))
    for name, says in (
        ("text", "no file of numbers"),
        ("zip", "no file of numbers"),
        ("words", "an array of numbers"),
        ("deep", "A (m, n) or (batch, m, n)"),
    ):
        said = eke("solve", files / f"{name}.npy", files / "b.npy", code=2)
        assert says in " ".join(said.stderr.split())
