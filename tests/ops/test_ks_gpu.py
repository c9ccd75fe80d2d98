"""The Triton kernels: right in the interpreter, and without spills on the GPUs they are compiled for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

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


def compiled(kernel, kind, architecture, tmp_path):
    """Registers, stack and shared bytes of a kernel compiled ahead of time."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eke.ops.ks_matmul import gpu

    values = {
        "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS, "DEPTH": 16 if kind == "fp32" else 32,
        "PRECISION": "ieee",
    }  # fmt: skip
    pointers = [name for name in kernel.arg_names if name in {"x", "w", "y", "g"}]
    signature = {
        name: "constexpr" if name in values else f"*{kind}" if name in pointers else "i32" for name in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in values.items()},
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": gpu.WARPS})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {**usage, "SHARED": built.metadata.shared}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["product_kernel", "gradient_kernel"])
def test_compiled_kernels_do_not_spill(name, kind, architecture, tmp_path):
    from eke.ops.ks_matmul import gpu

    usage = compiled(getattr(gpu, name), kind, architecture, tmp_path)
    assert usage["LOCAL"] == 0
    assert usage["STACK"] == 0
    # Two programs fit the registers of a multiprocessor.
    assert 2 * 32 * gpu.WARPS * usage["REG"] <= 65536
    assert usage["SHARED"] <= 100 * 1024
