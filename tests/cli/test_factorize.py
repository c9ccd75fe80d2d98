"""`eke factorize`: a matrix in a file, its factors, error and bounds."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

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
