"""Are Kronecker-sparse products faster than torch's own ways of computing them?

Question: forward and backward of one factor in float32, batch first and batch last, on 15 patterns and three batches,
against the dense product, batched products, einsum, block-sparse and CSR matrices; and a butterfly of ten factors.
Rivals: `kernels_rivals.py`; their entries are permuted and copied beforehand, untimed, and of several orders of
dimensions the fastest of each case counts. eke gets the same tensors in every call, as a network's layer does.
Goals: where torch's dense product reaches less than 55 % of the measured peak, median >= 2.5 times the best rival;
everywhere >= 75 % of the peak on the large cases; no case below 1.0; backward median >= 2; ten factors of N = 1024 at
batch 4096 >= 5 times ten einsums and within twice a copy of inputs to outputs.
Gate: every rival agrees with the product in float64 before it is timed.
Method: rivals interleaved, lower quartiles; time of the thread where there is one (other work cannot lengthen it), wall
time otherwise; memory is kept by the process (no page faults). Peak: independent fused multiply-adds, compiled here,
the best of several moments, times the threads.

    python benchmarks/kernels.py [--threads 1 2] [--seconds 0.3] [--smoke] [--json benchmarks/results/kernels.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernels_rivals import IN_PLACE, fastest, interleaved, ways
from torch import Tensor

import eke
from eke import ops
from eke.cost import environment
from eke.ops.ks_matmul import native, reference

Case = tuple[tuple[int, int, int, int], int, bool]
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # mallopt's names for them
GOALS = {
    "forward_median_where_dense_is_below_0.55_of_peak": 2.5,
    "forward_least": 1.0,
    "backward_median": 2.0,
    "large_least_share_of_peak": 0.75,
    "chain_gain_over_einsums": 5.0,
    "chain_copies_at_most": 2.0,
}
PATTERNS = [
    (1, 64, 64, 1),
    (6, 64, 64, 1),
    (12, 64, 64, 1),
    (64, 16, 16, 1),
    (1, 48, 48, 16),
    (1, 64, 64, 16),
    (1, 48, 192, 4),
    (1, 192, 48, 16),
    (4, 48, 48, 4),
    (16, 48, 48, 1),
    (2, 64, 64, 8),
    (1, 768, 192, 2),
    (6, 64, 256, 2),
    (256, 2, 2, 2),
    (1, 16, 16, 64),
]
BATCHES = (32, 192, 3136)
LARGE = 2e8
"""Operations from which a case counts as large."""
PEAK = """
#include <stdint.h>
typedef float v __attribute__((vector_size(WIDTH)));
float peak(int64_t n) {
  v a[CHAINS];
  v m = a[0] - a[0] + 0.5f;
  for (int e = 0; e < CHAINS; e++) a[e] = m + (float)e;
  for (int64_t i = 0; i < n; i++)
#pragma GCC unroll 32
    for (int e = 0; e < CHAINS; e++) a[e] = a[e] * m + m;
  for (int e = 1; e < CHAINS; e++) a[0] += a[e];
  return a[0][0];
}
"""


def clock() -> float:
    """Seconds of this thread, or of the wall where there are several."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peak_rate() -> float | None:
    """Operations per second of fused multiply-adds on one core, or None without a compiler."""
    wide = native.level() == 2
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(PEAK)
        options = ["-mavx512f", "-mprefer-vector-width=512"] if wide else ["-mavx2", "-mfma"]
        width, chains = (64, 24) if wide else (32, 12)
        command = ["cc", "-O3", *options, f"-DWIDTH={width}", f"-DCHAINS={chains}", "-shared", "-fPIC", "-o"]
        try:
            subprocess.run([*command, str(target), str(source)], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(str(target))
    library.peak.argtypes, library.peak.restype = [ctypes.c_int64], ctypes.c_float
    count = 200_000
    seconds = interleaved({"peak": lambda: library.peak(count)}, 0.2)["peak"]
    return 2 * chains * width / 4 * count / seconds


def gate(outputs: dict[str, Tensor], expected: Tensor, case: str) -> None:
    """Stop unless every rival is right."""
    scale = float(expected.abs().max())
    for name, found in outputs.items():
        error = float((found.double() - expected).abs().max()) / scale
        if not error < 1e-4:
            sys.exit(f"gate: {name} is off by {error:.1e} of the largest output at {case}")


def kept_memory() -> None:
    """Let the C library keep what is freed, so that no rival pays for fresh pages."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)


def forward_case(case: Case, *, seconds: float, total: float | None) -> dict[str, object]:
    """Time one product."""
    pattern, batch, last = case
    generator = torch.Generator().manual_seed(0)
    a, _, c, d = pattern
    x, blocks = torch.randn(batch, a * c * d, generator=generator), torch.randn(pattern, generator=generator)
    expected = reference.matmul(x.double(), blocks.double())
    x, expected = (x.T.contiguous(), expected.T) if last else (x, expected)
    with torch.no_grad():
        found = ways(blocks, last=last, batch=batch)
        runs = {name: (lambda w=w, run=run: run(x, w)) for name, (w, run) in found.items()}
        runs["eke"] = lambda: (ops.ks_matmul_batch_last if last else ops.ks_matmul)(x, blocks)
        for _ in range(3):  # packed by the third
            gate({name: run() for name, run in runs.items()}, expected, str(case))
        best = fastest(runs, clock)
        timed = interleaved({name: runs[variant] for name, variant in best.items()}, seconds, clock=clock)
    return row(case, timed, best, total)


def backward_case(case: Case, *, seconds: float, total: float | None) -> dict[str, object]:
    """Time the derivatives of inputs and entries together."""
    pattern, batch, last = case
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = pattern
    x = torch.randn((a * c * d, batch) if last else (batch, a * c * d), generator=generator, requires_grad=True)
    blocks = torch.randn(pattern, generator=generator, requires_grad=True)
    g = torch.randn((a * b * d, batch) if last else (batch, a * b * d), generator=generator)
    runs: dict[str, Callable[[], object]] = {}

    def add(name: str, y: Tensor, weights: Tensor) -> None:
        runs[name] = lambda: torch.autograd.grad(y, (x, weights), g, retain_graph=True)

    add("eke", (ops.ks_matmul_batch_last if last else ops.ks_matmul)(x, blocks), blocks)
    for name, (w, run) in ways(blocks.detach(), last=last, batch=batch, sparse=False).items():
        if IN_PLACE not in name and (not name.startswith("dense") or a * d <= 16):
            weights = w.clone().requires_grad_()
            add(name, run(x, weights), weights)
    right = (x.detach().T if last else x.detach()).double(), (g.T if last else g).double()
    expected = reference.matmul(right[1], blocks.detach().double().transpose(1, 2))
    gate({name: run()[0] for name, run in runs.items()}, expected.T if last else expected, f"{case}, inputs")  # type: ignore[index]
    gate({"eke": runs["eke"]()[1]}, reference.gradient(*right, pattern), f"{case}, entries")  # type: ignore[index]
    best = fastest(runs, clock)
    timed = interleaved({name: runs[variant] for name, variant in best.items()}, seconds, clock=clock)
    return row(case, timed, best, total, factor=2)


def row(
    case: Case, seconds: dict[str, float], variants: dict[str, str], total: float | None, factor: int = 1
) -> dict[str, object]:
    """Describe and print one case."""
    (a, b, c, d), batch, last = case
    work = 2 * factor * a * b * c * d * batch
    best = min((name for name in seconds if name != "eke"), key=lambda name: seconds[name])
    gain = seconds[best] / seconds["eke"]
    rates = {name: round(work / value / 1e9, 2) for name, value in seconds.items()}
    shares = {name: round(work / value / total, 3) for name, value in seconds.items()} if total else None
    layout = "last" if last else "first"
    print(f"{case[0]!s:>18} {batch:5} {layout:5} {gain:6.2f} x {variants[best]:22} {rates}", flush=True)
    return {
        "pattern": [a, b, c, d], "batch": batch, "layout": layout, "operations": work,
        "microseconds": {name: round(value * 1e6, 2) for name, value in seconds.items()}, "gflops": rates,
        "share_of_peak": shares, "best_rival": variants[best], "gain": round(gain, 3),
    }  # fmt: skip


def chain_case(levels: int, batch: int, seconds: float) -> dict[str, object]:
    """Time a butterfly against einsums, batched products of each factor, the dense matrix, and a copy."""
    generator = torch.Generator().manual_seed(0)
    size = 2**levels
    factors = [torch.randn(2**s, 2, 2, 2 ** (levels - 1 - s), generator=generator) / 2**0.5 for s in range(levels)]
    x = torch.randn(batch, size, generator=generator)
    y = torch.empty_like(x)

    def einsums() -> Tensor:
        z = x
        for blocks in reversed(factors):
            z = reference.matmul(z, blocks)
        return z

    with torch.no_grad():
        expected, matrix = x.double(), torch.eye(size, dtype=torch.float64)
        steps = []
        for blocks in reversed(factors):
            expected = reference.matmul(expected, blocks.double())
            matrix = reference.matmul(matrix, blocks.double())
            found = {n: w for n, w in ways(blocks, last=False, batch=batch, sparse=False).items() if "bmm" in n}
            best = fastest({n: (lambda w=w, run=run: run(x, w)) for n, (w, run) in found.items()}, clock)["bmm"]
            steps.append(found[best])
        whole = matrix.float()

        def products() -> Tensor:
            z = x
            for w, run in steps:
                z = run(z, w)
            return z

        runs: dict[str, Callable[[], Tensor]] = {
            "eke": lambda: ops.ks_chain_matmul(x, factors), "einsum": einsums, "bmm": products,
            "dense": lambda: x @ whole,
        }  # fmt: skip
        for _ in range(3):
            gate({name: run() for name, run in runs.items()}, expected, "the chain")
        timed = interleaved({**runs, "copy": lambda: y.copy_(x)}, seconds, clock=clock)
    gains = {name: round(timed[name] / timed["eke"], 3) for name in timed if name != "eke"}
    print(f"{levels} factors of {size}, batch {batch}: times faster than {gains}", flush=True)
    return {
        "factors": levels, "size": size, "batch": batch,
        "microseconds": {name: round(value * 1e6, 1) for name, value in timed.items()}, "gains": gains,
        "copies": round(timed["eke"] / timed["copy"], 3),
    }  # fmt: skip


def summarized(forward: list[Any], backward: list[Any], chain: dict[str, Any], share: float | None) -> dict[str, Any]:
    """What the goals ask for."""
    large = [entry["share_of_peak"]["eke"] for entry in forward if share and entry["operations"] >= LARGE]
    gains = [entry["gain"] for entry in forward]
    return {
        "dense_share_of_peak": share and round(share, 3),
        "forward_median": statistics.median(gains),
        "forward_least": min(gains),
        "forward_below_one": sum(gain < 1 for gain in gains),
        "forward_cases": len(gains),
        "backward_median": statistics.median(entry["gain"] for entry in backward),
        "backward_least": min(entry["gain"] for entry in backward),
        "large_median_share_of_peak": statistics.median(large) if large else None,
        "large_least_share_of_peak": min(large) if large else None,
        "chain_gain_over_einsums": chain["gains"]["einsum"],
        "chain_gain_over_bmm": chain["gains"]["bmm"],
        "chain_gain_over_dense": chain["gains"]["dense"],
        "chain_copies": chain["copies"],
    }


def call_overhead(seconds: float) -> dict[str, float]:
    """Microseconds of the smallest product: what a call costs."""
    x, blocks = torch.randn(1, 8), torch.randn(1, 8, 8, 1)
    matrix = blocks[0, :, :, 0]
    with torch.no_grad():
        runs = {
            "eke": lambda: [ops.ks_matmul(x, blocks) for _ in range(100)],
            "linear": lambda: [torch.nn.functional.linear(x, matrix) for _ in range(100)],
        }
        return {name: round(value * 1e4, 2) for name, value in interleaved(runs, seconds, clock=clock).items()}


def measured(threads: int, arguments: argparse.Namespace) -> dict[str, object]:
    """One run with so many threads."""
    torch.set_num_threads(threads)
    square = torch.randn(1024, 1024)
    rates = [peak_rate() for _ in range(1 if arguments.smoke else 5)]
    total = threads * max(rate for rate in rates if rate) if any(rates) else None
    dense = 2 * 1024**3 / interleaved({"dense": lambda: square @ square}, 3 * arguments.seconds, clock=clock)["dense"]
    share = dense / total if total else None
    print(f"{threads} thread(s), kernel {native.describe()}, torch {torch.__version__}")
    print(f"peak {(total or 0) / 1e9:.0f} GF/s, torch's dense product {dense / 1e9:.0f} ({(share or 0):.0%})")
    patterns, batches = (PATTERNS[9:10] + PATTERNS[13:14], (4,)) if arguments.smoke else (PATTERNS, BATCHES)
    cases = [(p, n, last) for p in patterns for n in batches for last in (False, True)]
    forward = [forward_case(case, seconds=arguments.seconds, total=total) for case in cases]
    print("backward")
    backward = [backward_case(case, seconds=arguments.seconds, total=total) for case in cases]
    chain = chain_case(*((4, 32) if arguments.smoke else (10, 4096)), 4 * arguments.seconds)
    summary = summarized(forward, backward, chain, share)
    print(json.dumps(summary, indent=1), flush=True)
    return {
        "threads": threads, "clock": "thread" if threads == 1 else "wall", "kernel": native.describe(),
        "load_average": round(os.getloadavg()[0], 2), "peak_gflops": total and round(total / 1e9, 1),
        "dense_gflops": round(dense / 1e9, 1), "call_microseconds": call_overhead(arguments.seconds),
        "summary": summary, "forward": forward, "backward": backward, "chain": chain,
    }  # fmt: skip


def main() -> None:
    """Gate, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case")
    parser.add_argument("--smoke", action="store_true", help="two small cases: seconds, no conclusions")
    parser.add_argument("--json", type=Path, help="runs with other numbers of threads in the file are kept")
    arguments = parser.parse_args()
    kept_memory()
    print(environment().to_json()["cpu"])
    runs = {threads: measured(threads, arguments) for threads in arguments.threads}
    if arguments.json:
        old = json.loads(arguments.json.read_text())["runs"] if arguments.json.exists() and not arguments.smoke else []
        kept = [run for run in old if run["threads"] not in runs]
        document = {
            "question": __doc__.splitlines()[0], "smoke": arguments.smoke, "goals": GOALS, "eke": eke.__version__,
            "environment": environment().to_json(), "settings": {"seconds": arguments.seconds},
            "runs": sorted([*kept, *runs.values()], key=lambda run: run["threads"]),
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
