"""`eke factorize`: a matrix in a file, its factors, error and bounds."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from eke.linalg import best_chain, factorize
from eke.patterns import to_dense


@pytest.fixture
def hilbert(tmp_path):
    i = np.arange(64.0)
    path = tmp_path / "hilbert.npy"
    np.save(path, 1 / (i[:, None] + i + 1))
    return path


def test_error_bounds_and_costs_are_told(eke, hilbert):
    found = json.loads(eke("factorize", hilbert, "--chain", "butterfly", "--json").stdout)
    assert found["error"] == pytest.approx(0.156158752, abs=1e-7)
    assert found["lower_bound"] == pytest.approx(0.100053305, abs=1e-7)
    assert found["upper_bound"] == pytest.approx(0.192898517, abs=1e-7)
    assert (found["parameters"], found["dense_parameters"]) == (768, 4096)
    assert (found["flops"], found["dense_flops"]) == (1536, 8192)
    shown = eke("factorize", hilbert, "--chain", "butterfly", "--order", "balanced").stdout
    assert "0.156162 (measured)" in shown
    assert "not proved for this order" in shown


def test_factors_are_written_and_multiply_to_the_matrix(eke, tmp_path):
    matrix = np.fft.fft(np.eye(16))
    np.save(tmp_path / "fourier.npy", matrix)
    out = tmp_path / "factors.safetensors"
    eke("factorize", tmp_path / "fourier.npy", "--chain", "butterfly", "--bit-reversal", "--out", out)
    parts = load_file(out)
    blocks = [torch.complex(parts[f"{i}.real"], parts[f"{i}.imag"]) for i in range(4)]
    dense = functools.reduce(torch.matmul, [to_dense(block) for block in blocks]).numpy()
    reversed_digits = [int(f"{i:04b}"[::-1], 2) for i in range(16)]
    np.testing.assert_allclose(dense, matrix[:, reversed_digits], atol=1e-13)


def test_a_chain_is_chosen_within_a_limit(eke, hilbert):
    found = json.loads(eke("factorize", hilbert, "--max-params", 768, "--json").stdout)
    assert found["chain"] == [[1, 64, 6, 1], [1, 6, 64, 1]]
    found = json.loads(eke("factorize", hilbert, "--tolerance", 0.01, "--json").stdout)
    assert found["error"] <= 0.01
    found = json.loads(eke("factorize", hilbert, "--chain", "1,8,8,8/8,8,8,1", "--refine", 1, "--json").stdout)
    assert found["chain"] == [[1, 8, 8, 8], [8, 8, 8, 1]]
    shown = [
        json.loads(eke("factorize", hilbert, "--chain", chain, "--json").stdout)["parameters"]
        for chain in ("mixed_radix", "monarch:8", "low_rank:3")
    ]
    assert shown == [768, 1024, 384]


def test_what_no_chain_could_beat_is_told(eke, hilbert):
    found = json.loads(eke("factorize", hilbert, "--max-params", 768, "--json").stdout)
    assert 0 < found["least_error"] <= found["error"]
    assert found["least_parameters"] is None
    found = json.loads(eke("factorize", hilbert, "--tolerance", 0.01, "--json").stdout)
    assert 0 < found["least_parameters"] <= found["parameters"]
    assert found["least_error"] is None
    shown = eke("factorize", hilbert, "--tolerance", 0.01).stdout
    assert f"{found['least_parameters']} (proved, for every chain of that tolerance)" in shown
    assert "(proved, for every chain within the limit)" in eke("factorize", hilbert, "--max-params", 768).stdout
    assert "least_error" not in json.loads(eke("factorize", hilbert, "--chain", "butterfly", "--json").stdout)


def test_a_tolerance_is_kept_in_every_order_or_refused(eke, tmp_path):
    i = torch.arange(24, dtype=torch.float64)
    noise = torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = 1 / (i[:, None] + i + 1) + 0.003 * noise
    np.save(tmp_path / "noise.npy", matrix.numpy())
    chosen = best_chain(matrix, tolerance=0.2).chain
    errors = {order: factorize(matrix, chosen, order=order).error for order in ("left", "right", "balanced")}
    worst = max(errors, key=errors.get)
    limit = (errors[worst] + errors["left"]) / 2
    assert errors["left"] < limit < errors[worst]
    assert best_chain(matrix, tolerance=limit).chain == chosen
    words = ["factorize", tmp_path / "noise.npy", "--tolerance", repr(limit), "--json"]
    assert json.loads(eke(*words).stdout)["error"] <= limit
    told = " ".join(eke(*words, "--order", worst, code=1).stderr.split())
    assert f"with --order {worst}, more than --tolerance" in told
    assert "leave --order out" in told


def test_a_proof_for_single_precision_names_its_rounding(eke, tmp_path):
    np.save(tmp_path / "single.npy", np.outer(np.arange(1, 9), np.arange(1, 9)).astype(np.float32) / 3)
    shown = eke("factorize", tmp_path / "single.npy", "--chain", "low_rank:1").stdout
    assert "(proved, up to rounding to 32 bits)" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "factorize needs one of --chain, --max-params and --tolerance, got None, None and None"),
        (["--chain", "monarc:3"], "names no chain with 'monarc:3'. Did you mean 'monarch'?"),
        (["--chain", "monarch"], "--chain monarch is written monarch:4, got 'monarch'"),
        (["--chain", "butterfly:2"], "--chain butterfly is written butterfly, got 'butterfly:2'"),
        (["--chain", "monarch:7"], "needs blocks that divide rows and cols, got 7"),
        (["--chain", "1,2,2"], "four integers (a, b, c, d), got (1, 2, 2)"),
        (["--chain", "1,2,2,x"], "--chain 1,2,2,x: invalid literal"),
    ],
)
def test_what_cannot_be_meant_is_refused(eke, hilbert, words, told):
    assert told in " ".join(eke("factorize", hilbert, *words, code=2).stderr.split())


def test_files_that_hold_no_such_matrix_are_refused(eke, tmp_path):
    np.save(tmp_path / "cube.npy", np.zeros((2, 2, 2)))
    assert "needs a matrix (m, n)" in eke("factorize", tmp_path / "cube.npy", "--chain", "butterfly", code=2).stderr
    np.save(tmp_path / "wide.npy", np.zeros((4, 8)))
    told = eke("factorize", tmp_path / "wide.npy", "--chain", "butterfly", code=2).stderr
    assert "a butterfly is square, the matrix is 4 x 8; use mixed_radix" in " ".join(told.split())
    np.save(tmp_path / "whole.npy", np.eye(4, dtype=np.int64))
    assert json.loads(eke("factorize", tmp_path / "whole.npy", "--chain", "butterfly", "--json").stdout)["error"] == 0
    np.save(tmp_path / "empty.npy", np.zeros((0, 4)))
    told = eke("factorize", tmp_path / "empty.npy", "--max-params", 8, code=1).stderr
    assert "one matrix (m, n) with entries, got (0, 4)" in " ".join(told.split())


def test_files_without_numbers_are_refused_without_bad_advice(eke, tmp_path):
    (tmp_path / "text.npy").write_text("1 2\n3 4\n")
    (tmp_path / "nothing.npy").write_bytes(b"")
    for name in ("text.npy", "nothing.npy"):
        told = " ".join(eke("factorize", tmp_path / name, "--max-params", 8, code=2).stderr.split())
        assert "is no file of numbers as numpy.save writes it" in told
        assert "pickle" not in told
    for name, array in {
        "words": np.array([["a", "b"], ["c", "d"]]),
        "long": np.eye(4, dtype=np.longdouble),
        "dates": np.zeros((2, 2), dtype="datetime64[s]"),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        told = " ".join(eke("factorize", tmp_path / f"{name}.npy", "--max-params", 8, code=2).stderr.split())
        assert f"got {array.dtype}; save matrix.astype('float64')" in told


@pytest.mark.parametrize(
    ("stored", "used"),
    [(">f8", "float64"), (">f4", "float32"), (">c16", "complex128"), ("<f2", "float64"), (">i4", "float64")],
)
def test_other_byte_orders_and_small_numbers_are_read(eke, tmp_path, stored, used):
    np.save(tmp_path / "other.npy", np.arange(16).reshape(4, 4).astype(stored))
    found = json.loads(eke("factorize", tmp_path / "other.npy", "--chain", "low_rank:2", "--json").stdout)
    assert found["dtype"] == used
    assert found["error"] < 1e-6
