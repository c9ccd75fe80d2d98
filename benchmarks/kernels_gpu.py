"""What do the Triton kernels need on GPUs that are not here: registers, shared memory, spills?

Question: product and gradient of one Kronecker-sparse factor, compiled ahead of time for sm_80, sm_90, sm_100 (by the
ptxas that comes with Triton) and gfx942 (by its LLVM), in float32 (IEEE and TF32), float16 and bfloat16, in both
layouts (strides of 1 are compiled in). No GPU is needed, and nothing is run: these are no timings.
Goal: no spill, and two programs at a time on a multiprocessor (NVIDIA: 2 * 32 * warps * registers <= 65536).

    python benchmarks/kernels_gpu.py [--smoke] [--json benchmarks/results/kernels_gpu.json]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import eke
from eke.ops.ks_matmul import gpu

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
CASES = [("float32", "ieee"), ("float32", "tf32"), ("float16", "ieee"), ("bfloat16", "ieee")]
KERNELS = {"product": gpu.product_kernel, "gradient": gpu.gradient_kernel}
_CONTIGUOUS = {"first": ("x_feature", "y_feature", "g_feature"), "last": ("x_row", "y_row", "g_row")}
"""Strides that are 1: Triton compiles them into the kernel."""


def source_of(kernel: Any, dtype: str, precision: str, layout: str) -> ASTSource:
    """The kernel with its types, constants and what is known of alignment."""
    names = kernel.arg_names
    depth = gpu.gradient_depth if "g" in names else gpu.depth
    values = {
        "ROWS": gpu.ROWS, "COLUMNS": gpu.COLUMNS, "DEPTH": depth(getattr(torch, dtype)), "PRECISION": precision,
    } | {name: 1 for name in _CONTIGUOUS[layout] if name in names}  # fmt: skip
    pointers = [name for name in names if name in {"x", "w", "y", "g"}]
    return ASTSource(
        fn=kernel,
        signature={
            name: "constexpr" if name in values else f"*{TYPES[dtype]}" if name in pointers else "i32" for name in names
        },
        constexprs={(names.index(name),): value for name, value in values.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )


def nvidia(built: Any) -> dict[str, int]:
    """Registers and memory that cuobjdump finds in the compiled program."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", report)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def amd(built: Any) -> dict[str, int]:
    """Registers and memory from the metadata that LLVM writes beside the program."""
    text = built.asm["amdgcn"]
    found = {
        name: int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]
        for name in ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    }
    return {
        "registers": found["vgpr_count"] + found["agpr_count"],
        "spilled_bytes": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
        + found["private_segment_fixed_size"],
    }


def matrix_instructions(built: Any) -> list[str]:
    """Which instructions for products of tiles the assembly holds."""
    text = built.asm.get("ptx") or built.asm["amdgcn"]
    found = re.findall(r"\b(mma\.sync\.[\w.]+|wgmma\.mma_async\.[\w.]+|tcgen05\.mma[\w.]*|v_mfma_[\w]+)", text)
    return sorted(set(found))


def needs(source: Any, target: str, warps: int) -> dict[str, Any]:
    """What a kernel needs once it is compiled, or why it is not."""
    try:
        built = triton.compile(source(), target=TARGETS[target], options={"num_warps": warps})
        found = (nvidia if target.startswith("sm_") else amd)(built)
    except Exception as error:  # what a compiler cannot do is a result too
        return {"ok": False, "why": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    return {"ok": True, **found, "shared_bytes": built.metadata.shared, "instructions": matrix_instructions(built)}


def compiled(kernel: str, target: str, case: tuple[str, str], layout: str) -> dict[str, Any]:
    """One row: what the compiled kernel needs, or why there is none."""
    dtype, precision = case
    row: dict[str, Any] = {
        "kernel": kernel, "target": target, "dtype": dtype, "precision": precision if dtype == "float32" else None,
        "layout": layout,
    }  # fmt: skip
    return row | needs(lambda: source_of(KERNELS[kernel], dtype, precision, layout), target, gpu.WARPS)


def main() -> None:
    """Compile, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one target, one type")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    targets, cases = (["sm_80"], CASES[2:3]) if arguments.smoke else (list(TARGETS), CASES)
    rows = []
    for target in targets:
        for kernel in KERNELS:
            for case in cases:
                for layout in _CONTIGUOUS:
                    rows.append(compiled(kernel, target, case, layout))
                    print(rows[-1], flush=True)
    if arguments.json:
        document = {
            "question": __doc__.splitlines()[0], "smoke": arguments.smoke,
            "goals": {"spilled_bytes": 0, "programs_a_multiprocessor": 2},
            "eke": eke.__version__, "triton": triton.__version__,
            "tile": {"rows": gpu.ROWS, "columns": gpu.COLUMNS, "warps": gpu.WARPS}, "rows": rows,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
