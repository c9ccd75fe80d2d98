"""How fast is the butterfly factorization of a fast transform, and how exact?

Question: Hadamard and (bit-reversed) Fourier matrices of size n as products of log2(n) factors, against lazylinop and
pyfaust, in one thread and double precision.
Goals: Hadamard 2048 at least 20 times as fast as the faster rival at an error of at most 3e-15, Fourier 10 times.
Gate: every row must reproduce its matrix to 1e-12 before it is timed.
Method: all rivals interleaved in one process; lower quartile and spread (10th to 90th percentile) of wall time and of
the processor time of this process, which other processes disturb less; ratios are those of the lower quartiles.
The rivals are not dependencies of eke: pip install --target FOLDER lazylinop[full] pyfaust, then --rivals FOLDER.

    python benchmarks/factorization.py --rivals FOLDER [--sizes 512 2048] [--rounds 9]
        [--json benchmarks/results/factorization.json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import eke

LIMIT = 1e-12
GOALS = {"hadamard": (20.0, 3e-15), "fourier": (10.0, 3e-15)}
Method = Callable[[], Any]


def rivals(matrix: torch.Tensor) -> dict[str, tuple[Method, Callable[[Any], torch.Tensor]]]:
    """Return the ways to factorize and how each result becomes dense."""
    n = matrix.shape[0]
    chain = eke.Chain.butterfly(n)
    found: dict[str, tuple[Method, Callable[[Any], torch.Tensor]]] = {
        f"eke {order}": (lambda order=order: eke.factorize(matrix, chain, order=order), lambda f: f.to_dense())
        for order in ("left", "right", "balanced")
    }
    with contextlib.suppress(ImportError):
        from lazylinop import butterfly

        dyadic = butterfly.Chain.square_dyadic((n, n))
        for order in ("l2r", "balanced"):
            found[f"lazylinop {order}"] = (
                lambda order=order: butterfly.ksd(matrix, dyadic, order=order),
                lambda f: torch.as_tensor(f @ torch.eye(n, dtype=matrix.dtype)),
            )
    with contextlib.suppress(ImportError):
        from pyfaust import fact

        array = matrix.numpy()
        found["pyfaust bbtree"] = (lambda: fact.butterfly(array, type="bbtree"), lambda f: torch.as_tensor(f.toarray()))
    return found


def row(name: str, n: int, rounds: int) -> dict[str, Any]:
    """Check, time and compare the methods on one matrix."""
    matrix = eke.linalg.hadamard(n) if name == "hadamard" else eke.linalg.fourier(n)[:, eke.linalg.bit_reversal(n)]
    methods = rivals(matrix)
    results: dict[str, dict[str, Any]] = {}
    for label, (run, dense) in methods.items():
        error = float(torch.linalg.matrix_norm(dense(run()) - matrix) / torch.linalg.matrix_norm(matrix))
        if not error <= LIMIT:
            sys.exit(f"gate: {label} reproduces {name} {n} to {error:.3g}, more than {LIMIT:g}.")
        results[label] = {"error": error, "wall": [], "processor": []}
    for _ in range(rounds):
        for label, (run, _) in methods.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            results[label]["wall"].append(time.perf_counter() - wall)
            results[label]["processor"].append(time.process_time() - processor)
    for found in results.values():
        for clock in ("wall", "processor"):
            seconds = sorted(found.pop(clock))
            deciles = statistics.quantiles(seconds, n=10, method="inclusive")
            found[f"{clock}_seconds"] = statistics.quantiles(seconds, n=4, method="inclusive")[0]
            found[f"{clock}_spread_seconds"] = [deciles[0], deciles[-1]]
    ours = {k: v for k, v in results.items() if k.startswith("eke")}
    theirs = {k: v for k, v in results.items() if not k.startswith("eke")}
    ratios = {
        clock: min(v[f"{clock}_seconds"] for v in theirs.values()) / min(v[f"{clock}_seconds"] for v in ours.values())
        for clock in ("wall", "processor")
        if theirs
    }
    fastest = min(ours, key=lambda k: ours[k]["processor_seconds"])
    return {
        "matrix": name,
        "n": n,
        "methods": results,
        "fastest": fastest,
        "times_as_fast": ratios,
        "goal": GOALS[name],
    }


def versions() -> dict[str, str]:
    """Return what was compared, and where."""
    found = {"python": platform.python_version(), "machine": platform.machine(), "processors": str(os.cpu_count())}
    for name in ("torch", "lazylinop", "pyfaust"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {**found, "eke": eke.__version__, "load_average": f"{os.getloadavg()[0]:.1f}"}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", type=Path, help="folder in which lazylinop and pyfaust are installed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rivals is not None:
        sys.path.append(str(arguments.rivals))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for n in arguments.sizes:
        for name in GOALS:
            with contextlib.redirect_stdout(sys.stderr):  # pyfaust reports its progress there
                found = row(name, n, arguments.rounds)
            rows.append(found)
            print(f"{name} {n}: {found['fastest']}, times as fast as the faster rival: {found['times_as_fast']}")
            for label, result in found["methods"].items():
                print(
                    f"  {label:<20}{1e3 * result['wall_seconds']:9.1f} ms wall"
                    f"{1e3 * result['processor_seconds']:9.1f} ms processor   error {result['error']:.1e}"
                )
    if arguments.json is not None:
        document = {
            "question": "how fast and how exact is the butterfly factorization of a fast transform",
            "threads": 1,
            "rounds": arguments.rounds,
            "environment": versions(),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
