"""The Triton kernels: right in the interpreter, and without spills on the GPUs they are compiled for."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

INTERPRETED = """
import torch
from eke.ops.ks_matmul import gpu, reference

worst = 0.0
for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
    for pattern, batch in (((2, 3, 5, 4), 7), ((1, 70, 20, 3), 66)):
        a, b, c, d = pattern
        x, g = torch.randn(batch, a * c * d).to(dtype), torch.randn(batch, a * b * d).to(dtype)
        w = torch.randn(pattern).to(dtype)
        for last in (False, True):
            u, v = (x.T.contiguous(), g.T.contiguous()) if last else (x, g)
            pairs = (
                (gpu.matmul(u, w, batch_last=last), reference.matmul(x.double(), w.double())),
                (
                    gpu.matmul(v, w.transpose(1, 2), batch_last=last),
                    reference.matmul(g.double(), w.double().transpose(1, 2)),
                ),
                (gpu.gradient(u, v, pattern, batch_last=last), reference.gradient(x.double(), g.double(), pattern)),
            )
            for number, (found, expected) in enumerate(pairs):
                found = found.T if last and number < 2 else found
                error = float((found.double() - expected).abs().max() / expected.abs().max())
                assert error < bound, (dtype, pattern, last, number, error)
                worst = max(worst, error / bound)
print("worst", worst)
"""


def test_interpreted_kernels_agree_with_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("worst")


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("kernels_gpu")


def check(row):
    assert row["ok"], row["why"]
    assert row["spilled_bytes"] == 0
    assert row["shared_bytes"] <= 64 * 1024
    if row["target"].startswith("sm_"):
        # Two programs fit the registers of a multiprocessor.
        assert 2 * 32 * 4 * row["registers"] <= 65536
    else:
        # Two waves a SIMD of 512 registers each.
        assert row["registers"] <= 256
    assert bool(row["instructions"]) == (row["precision"] != "ieee" or row["target"] == "gfx942")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["first", "last"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("case", [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")])
@pytest.mark.parametrize("name", ["product", "gradient"])
def test_compiled_kernels_do_not_spill(benchmark, name, case, target, layout):
    check(benchmark.compiled(name, target, case, layout))


def test_the_committed_table_is_whole():
    document = json.loads((ROOT / "benchmarks" / "results" / "kernels_gpu.json").read_text())
    assert document["smoke"] is False
    assert document["goals"]["spilled_bytes"] == 0
    for row in document["rows"]:
        check(row)
    found = {(r["kernel"], r["target"], r["dtype"], r["precision"], r["layout"]) for r in document["rows"]}
    assert len(found) == len(document["rows"]) == 2 * 4 * 4 * 2


def test_one_kernel_compiles_and_does_not_spill(benchmark):
    check(benchmark.compiled("product", "sm_80", ("float16", "ieee"), "first"))
