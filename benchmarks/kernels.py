"""Are Kronecker-sparse products faster than torch's own ways of computing them?

Question: forward and backward of one factor in float32, batch first and batch last, on 15 patterns and three batches,
against the dense product, batched products, einsum, block-sparse and CSR matrices; and a butterfly of ten factors.
Goals: where torch's dense product reaches less than 55 % of the measured peak, median >= 2.5 times the best rival;
elsewhere >= 75 % of the peak on the large cases; no case below 1.0; backward median >= 2; ten factors of N = 1024 at
batch 4096 >= 5 times ten einsums and within twice a copy of inputs to outputs.
Gate: every rival agrees with the dense matrix in float64 before it is timed.
Method: rivals interleaved, lower quartiles; time of the thread where there is one (other work cannot lengthen it), wall
time otherwise. Peak: independent fused multiply-adds, compiled here.

    python benchmarks/kernels.py [--threads 1] [--seconds 0.3] [--quick] [--json benchmarks/results/kernels.json]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from eke import ops
from eke.ops.ks_matmul import choose, native, reference

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


def interleaved(rivals: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Lower quartile of each rival's seconds."""
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for run in rivals.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, run in rivals.items():
            run()  # untimed: no rival pays for the caches that another one filled
            start = clock()
            run()
            samples[name].append(clock() - start)
    return {name: sorted(values)[len(values) // 4] for name, values in samples.items()}


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
    seconds = interleaved({"peak": lambda: library.peak(count)}, 0.3)["peak"]
    return 2 * chains * width / 4 * count / seconds


def rivals_of(x: Tensor, blocks: Tensor, *, last: bool) -> dict[str, Callable[[], Tensor]]:
    """Every way to compute the product; weights are prepared beforehand where a rival can."""
    a, b, c, d = blocks.shape
    found: dict[str, Callable[[], Tensor]] = {
        "eke": lambda: (ops.ks_matmul_batch_last if last else ops.ks_matmul)(x, blocks),
        "bmm": lambda: choose.ALGORITHMS["bmm"](x, blocks, last),
        "einsum": lambda: choose.ALGORITHMS["einsum"](x, blocks, last),
    }
    matrix = reference.dense(blocks)
    if a * d <= 64 and matrix.numel() * x.numel() / x.shape[1 if not last else 0] < 2e10:
        found["dense"] = lambda: matrix @ x if last else torch.nn.functional.linear(x, matrix)
    if blocks.numel() * x.shape[1 if last else 0] < 1e7:
        csr = matrix.to_sparse_csr()
        found["csr"] = lambda: csr @ x if last else (csr @ x.T).T
        side = max(k for k in range(1, min(b, c) + 1) if b % k == 0 and c % k == 0)
        apart = reference.dense(blocks.permute(0, 3, 1, 2).reshape(a * d, b, c, 1)).to_sparse_bsr((side, side))

        def bsr() -> Tensor:
            if last:
                groups = x.reshape(a, c, d, -1).transpose(1, 2).reshape(a * c * d, -1)
                return (apart @ groups).reshape(a, d, b, -1).transpose(1, 2).reshape(a * b * d, -1)
            groups = x.reshape(-1, a, c, d).transpose(2, 3).reshape(-1, a * c * d)
            return (apart @ groups.T).T.reshape(-1, a, d, b).transpose(2, 3).reshape(-1, a * b * d)

        found["bsr"] = bsr
    return found


def gate(rivals: dict[str, Callable[[], Tensor]], expected: Tensor, case: str) -> None:
    """Stop unless every rival is right."""
    scale = float(expected.abs().max())
    for name, run in rivals.items():
        error = float((run().double() - expected).abs().max()) / scale
        if not error < 1e-4:
            sys.exit(f"gate: {name} is off by {error:.1e} of the largest output at {case}")


def forward_case(pattern: tuple[int, int, int, int], batch: int, *, last: bool, seconds: float) -> dict[str, object]:
    """Time one product."""
    generator = torch.Generator().manual_seed(0)
    a, _, c, d = pattern
    x, blocks = torch.randn(batch, a * c * d, generator=generator), torch.randn(pattern, generator=generator)
    expected = reference.matmul(x.double(), blocks.double())
    x, expected = (x.T.contiguous(), expected.T) if last else (x, expected)
    with torch.no_grad():
        rivals = rivals_of(x, blocks, last=last)
        gate(rivals, expected, f"{pattern}, batch {batch}")
        return row(pattern, batch, last, interleaved(rivals, seconds))


def backward_case(pattern: tuple[int, int, int, int], batch: int, *, last: bool, seconds: float) -> dict[str, object]:
    """Time the derivatives of inputs and entries together."""
    generator = torch.Generator().manual_seed(0)
    a, b, c, d = pattern
    sizes = (a * c * d, batch) if last else (batch, a * c * d)
    x = torch.randn(sizes, generator=generator, requires_grad=True)
    blocks = torch.randn(pattern, generator=generator, requires_grad=True)
    g = torch.randn((a * b * d, batch) if last else (batch, a * b * d), generator=generator)
    rivals: dict[str, Callable[[], object]] = {}
    first: list[Tensor] | None = None
    for name in ("eke", "bmm", "einsum"):
        run = (ops.ks_matmul_batch_last if last else ops.ks_matmul) if name == "eke" else choose.ALGORITHMS[name]
        y = run(x, blocks) if name == "eke" else run(x, blocks, last)
        rivals[name] = lambda y=y: torch.autograd.grad(y, (x, blocks), g, retain_graph=True)
        grads = list(torch.autograd.grad(y, (x, blocks), g, retain_graph=True))
        first = first or grads
        for one, other in zip(first, grads):
            if not float((one - other).abs().max() / one.abs().max()) < 1e-4:
                sys.exit(f"gate: derivatives of {name} differ at {pattern}, batch {batch}")
    return row(pattern, batch, last, interleaved(rivals, seconds), factor=2)


def row(
    pattern: tuple[int, ...], batch: int, last: bool, seconds: dict[str, float], factor: int = 1
) -> dict[str, object]:
    """Describe and print one case."""
    a, b, c, d = pattern
    work = 2 * factor * a * b * c * d * batch
    best = min((name for name in seconds if name != "eke"), key=lambda name: seconds[name])
    gain = seconds[best] / seconds["eke"]
    rates = {name: round(work / value / 1e9, 2) for name, value in seconds.items()}
    print(f"{pattern!s:>18} {batch:5} {'last' if last else 'first':5} {gain:6.2f} x {best:6} {rates}", flush=True)
    return {
        "pattern": list(pattern), "batch": batch, "layout": "last" if last else "first", "operations": work,
        "seconds": seconds, "gflops": rates, "best_rival": best, "gain": gain,
    }  # fmt: skip


def chain_case(seconds: float) -> dict[str, object]:
    """Time a butterfly of ten factors."""
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(2**s, 2, 2, 2 ** (9 - s), generator=generator) / 2**0.5 for s in range(10)]
    x = torch.randn(4096, 1024, generator=generator)
    y = torch.empty_like(x)

    def einsums() -> Tensor:
        z = x
        for blocks in reversed(factors):
            z = reference.matmul(z, blocks)
        return z

    with torch.no_grad():
        expected = x.double()
        for blocks in reversed(factors):
            expected = reference.matmul(expected, blocks.double())
        runs = {"eke": lambda: ops.ks_chain_matmul(x, factors), "einsums": einsums}
        gate(runs, expected, "ten factors")
        found = interleaved({**runs, "copy": lambda: y.copy_(x)}, seconds)
    print(
        f"ten factors of 1024, batch 4096: {found['einsums'] / found['eke']:.1f} times ten einsums, "
        f"{found['eke'] / found['copy']:.2f} copies",
        flush=True,
    )
    return {
        "seconds": found, "gain": found["einsums"] / found["eke"], "copies": found["eke"] / found["copy"],
    }  # fmt: skip


def cpu_name() -> str:
    """The processor, as the kernel names it."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def main() -> None:
    """Gate, measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each case")
    parser.add_argument("--quick", action="store_true", help="batches of 32 and 192 alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    batches = BATCHES[:2] if arguments.quick else BATCHES
    peak = peak_rate()
    square = torch.randn(1024, 1024)
    dense = 2 * 1024**3 / interleaved({"dense": lambda: square @ square}, 1.0)["dense"]
    total = peak and peak * arguments.threads
    share = dense / total if total else None
    print(f"{cpu_name()}, {arguments.threads} thread(s), kernel {native.describe()}, torch {torch.__version__}")
    print(f"peak {(total or 0) / 1e9:.0f} GF/s, torch's dense product {dense / 1e9:.0f} ({(share or 0):.0%})")
    cases = [(p, n, last) for p in PATTERNS for n in batches for last in (False, True)]
    forward = [forward_case(p, n, last=last, seconds=arguments.seconds) for p, n, last in cases]
    print("backward")
    backward = [backward_case(p, n, last=last, seconds=arguments.seconds) for p, n, last in cases]
    chain = chain_case(max(1.0, arguments.seconds))
    gains = [float(str(entry["gain"])) for entry in forward]
    large = [
        entry["operations"] / entry["seconds"]["eke"] / total  # type: ignore[index, operator]
        for entry in forward
        if total and entry["operations"] >= LARGE  # type: ignore[operator]
    ]
    summary = {
        "forward_median": statistics.median(gains),
        "forward_least": min(gains),
        "backward_median": statistics.median(float(str(entry["gain"])) for entry in backward),
        "large_median_share_of_peak": statistics.median(large) if large else None,
        "large_least_share_of_peak": min(large) if large else None,
        "chain_gain": chain["gain"],
        "chain_copies": chain["copies"],
    }
    print(json.dumps(summary, indent=1))
    if arguments.json:
        machine = {"cpu": cpu_name(), "threads": arguments.threads, "torch": torch.__version__, "python": sys.version}
        document = {
            "question": __doc__.splitlines()[0], "machine": machine, "kernel": native.describe(), "peak": total,
            "dense_rate": dense, "dense_share_of_peak": share, "summary": summary, "forward": forward,
            "backward": backward, "chain": chain,
        }  # fmt: skip
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
