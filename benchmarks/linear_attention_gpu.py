"""What do the Triton kernels of linear attention need on GPUs that are not here: registers, shared memory, spills?

Question: outputs, dq, dk and dv of causal attention with heads of 64 and 128, compiled ahead of time for sm_80,
sm_90, sm_100 (by the ptxas that comes with Triton) and gfx942 (by its LLVM), in float32 (IEEE and TF32; other types
are converted before). No GPU is needed, and nothing is run: these are no timings.
Goal: no spill on NVIDIA's with TF32: met for heads of 64; for heads of 128, up to 40 bytes spill on sm_90. IEEE
products of tiles keep rows of them in registers, and up to 176 bytes spill; on gfx942 less than 100 do in every mode.

    python benchmarks/linear_attention_gpu.py [--smoke] [--json benchmarks/results/linear_attention_gpu.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import triton
from kernels_gpu import TARGETS, TYPES, needs
from triton.compiler import ASTSource

import eke
from eke.ops.linear_attention import gpu

CASES = [("float32", "ieee"), ("float32", "tf32")]
KINDS = ("out", "dq", "dk", "dv")
SIZES = (64, 128)
_HALVES = {"out": {"left", "right", "x", "raw", "out"}, "dq": {"right", "x", "raw", "out"},
           "dk": {"left", "x", "raw", "out"}, "dv": {"left", "right", "raw", "out"}}  # fmt: skip
"""Tensors of the type of the inputs; others are float32."""


def source_of(kind: str, dtype: str, precision: str, size: int) -> ASTSource:
    """The kernel with its types, constants and what is known of alignment."""
    names = gpu.scan_kernel.arg_names
    values = gpu.constants(kind, size, elu=True, normalize=True) | {"PRECISION": precision}
    numbers = {"length", "heads", "depth", "width", *(name for name in names if name.endswith(("_row", "_head")))}
    pointers = [name for name in names if name not in values and name not in numbers]
    kinds = {name: f"*{TYPES[dtype] if name in _HALVES[kind] else 'fp32'}" for name in pointers}
    return ASTSource(
        fn=gpu.scan_kernel,
        signature={name: "constexpr" if name in values else kinds.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )


def compiled(kernel: str, target: str, case: tuple[str, str], size: int) -> dict[str, Any]:
    """One row: what the compiled kernel needs, or why there is none."""
    dtype, precision = case
    row: dict[str, Any] = {
        "kernel": kernel, "target": target, "dtype": dtype, "precision": precision if dtype == "float32" else None,
        "size": size,
    }  # fmt: skip
    return row | needs(lambda: source_of(kernel, dtype, precision, size), target, gpu.WARPS)


def main() -> None:
    """Compile, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one target, one type")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    targets, cases = (["sm_80"], CASES[1:]) if options.smoke else (list(TARGETS), CASES)
    rows = []
    for target in targets:
        for kernel in KINDS:
            for case in cases:
                for size in SIZES:
                    rows.append(compiled(kernel, target, case, size))
                    print(rows[-1], flush=True)
    if options.json:
        document = {
            "question": __doc__.splitlines()[0], "smoke": options.smoke, "goals": {"spilled_bytes_tf32_nvidia": 0},
            "eke": eke.__version__, "triton": triton.__version__, "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
