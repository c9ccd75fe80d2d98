"""How fast is the butterfly factorization of a fast transform, and how exact?

Question: Hadamard and (bit-reversed) Fourier matrices of size n as products of log2(n) factors, against lazylinop (both
orders, each of its decompositions, torch and NumPy input) and pyfaust, in double precision.
Goals: Hadamard 2048 at least 20 times as fast as the fastest of them at an error of at most 3e-15, Fourier 10 times.
Gate: every method must reproduce its matrix to 1e-12 before it is timed.
Method: all in one thread of one process, OpenMP and BLAS included, and interleaved; lower quartile and spread (10th to
90th percentile) of wall time and of the processor time of this process, which other processes disturb less. Ratios are
those of the lower quartiles. A method whose first two runs both took more than four times as long as the fastest of its
library keeps the shorter one as its time.
The rivals are not dependencies of eke: pip install --target FOLDER lazylinop[full] pyfaust, then --rivals FOLDER.

    python benchmarks/factorization.py --rivals FOLDER [--sizes 512 2048] [--rounds 15] [--smoke]
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
from eke.cost import environment
from eke.ops import pair_splits

LIMIT = 1e-12
SLOW = 4.0
GOALS = {("hadamard", 2048): (20.0, 3e-15), ("fourier", 2048): (10.0, 3e-15)}
"""Times as fast as the fastest rival, and the error, that are asked for."""
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
Method = tuple[Callable[[], Any], Callable[[Any], torch.Tensor]]


def methods(matrix: torch.Tensor) -> dict[str, Method]:
    """Return the ways to factorize and how each result becomes dense, named library first."""
    n = matrix.shape[0]
    chain = eke.Chain.butterfly(n)
    found: dict[str, Method] = {
        f"eke {order}": (lambda order=order: eke.factorize(matrix, chain, order=order), lambda f: f.to_dense())
        for order in ("left", "right", "balanced")
    }
    array, eye = matrix.numpy(), torch.eye(n, dtype=matrix.dtype)
    with contextlib.suppress(ImportError):
        from lazylinop import butterfly

        dyadic = butterfly.Chain.square_dyadic((n, n))
        for order in ("l2r", "balanced"):
            for given, backend in ((matrix, "pytorch_svd_cpu"), (array, "numpy_svd"), (array, "scipy_svd")):
                identity = eye if given is matrix else eye.numpy()
                found[f"lazylinop {order} {backend}"] = (
                    lambda order=order, given=given, backend=backend: butterfly.ksd(
                        given, dyadic, order=order, svd_backend=backend
                    ),
                    lambda f, identity=identity: torch.as_tensor(f @ identity),
                )
    with contextlib.suppress(ImportError):
        from pyfaust import fact

        found["pyfaust bbtree"] = (lambda: fact.butterfly(array, type="bbtree"), lambda f: torch.as_tensor(f.toarray()))
    return found


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds of one run by each clock."""
    start = {clock: read() for clock, read in CLOCKS.items()}
    run()
    return {clock: read() - start[clock] for clock, read in CLOCKS.items()}


def row(name: str, n: int, rounds: int) -> dict[str, Any]:
    """Check, time and compare the methods on one matrix."""
    matrix = eke.linalg.hadamard(n) if name == "hadamard" else eke.linalg.fourier(n)[:, eke.linalg.bit_reversal(n)]
    ways = methods(matrix)
    errors: dict[str, float] = {}
    for label, (run, dense) in ways.items():
        errors[label] = float(torch.linalg.matrix_norm(dense(run()) - matrix) / torch.linalg.matrix_norm(matrix))
        if not errors[label] <= LIMIT:
            sys.exit(f"gate: {label} reproduces {name} {n} to {errors[label]:.3g}, more than {LIMIT:g}.")
    seconds = {label: [timed(run) for _ in range(2)] for label, (run, _) in ways.items()}
    first = {label: min(one["processor"] for one in runs) for label, runs in seconds.items()}
    again = [
        label
        for label in ways
        if first[label] <= SLOW * min(t for other, t in first.items() if other.split()[0] == label.split()[0])
    ]
    for label in again:
        seconds[label].clear()
    for _ in range(rounds):
        for label in again:
            seconds[label].append(timed(ways[label][0]))
    results = {label: summary(seconds[label], errors[label], label in again) for label in ways}
    return {"matrix": name, "n": n, "methods": results, **verdict(name, n, results)}


def summary(runs: list[dict[str, float]], error: float, whole: bool) -> dict[str, Any]:
    """Return quartile and spread of the runs of one method."""
    found: dict[str, Any] = {"error": error, "runs": len(runs)}
    for clock in CLOCKS:
        seconds = sorted(run[clock] for run in runs)
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        found[f"{clock}_seconds"] = statistics.quantiles(seconds, n=4, method="inclusive")[0] if whole else seconds[0]
        found[f"{clock}_spread_seconds"] = [deciles[0], deciles[-1]]
    return found


def verdict(name: str, n: int, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest of both sides, the ratios, and whether the goal was reached by both clocks."""
    ours = {k: v for k, v in results.items() if k.startswith("eke")}
    theirs = {k: v for k, v in results.items() if not k.startswith("eke")}
    best = min(ours, key=lambda k: ours[k]["processor_seconds"])
    found: dict[str, Any] = {"fastest": best}
    if not theirs:
        return found
    ratios = {
        clock: min(v[f"{clock}_seconds"] for v in theirs.values()) / ours[best][f"{clock}_seconds"] for clock in CLOCKS
    }
    found["fastest_rival"] = min(theirs, key=lambda k: theirs[k]["processor_seconds"])
    found["times_as_fast"] = ratios
    if (name, n) in GOALS:
        times, error = GOALS[name, n]
        reached = min(ratios.values()) >= times and ours[best]["error"] <= error
        found["goal"] = {"times_as_fast": times, "error": error, "reached": reached}
    return found


def versions() -> dict[str, str | None]:
    """Return what was compared."""
    found: dict[str, str | None] = {"python": platform.python_version(), "eke": eke.__version__}
    for name in ("torch", "numpy", "scipy", "lazylinop", "pyfaust"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def in_one_thread() -> None:
    """Start this script again where a library would use more: the variables are read when the libraries are loaded.

    torch.set_num_threads alone leaves pyfaust's OpenMP and NumPy's BLAS as they are.
    """
    wanted = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", type=Path, help="folder in which lazylinop and pyfaust are installed")
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="matrices of 64, two rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rivals is not None:
        sys.path.append(str(arguments.rivals))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    sizes, rounds = ([64], 2) if arguments.smoke else (arguments.sizes, arguments.rounds)
    rows = []
    for n in sizes:
        for name in ("hadamard", "fourier"):
            with contextlib.redirect_stdout(sys.stderr):  # pyfaust reports its progress there
                found = row(name, n, rounds)
            rows.append(found)
            print(f"{name} {n}: {found['fastest']}, {found.get('times_as_fast')}, goal {found.get('goal')}")
            for label, result in found["methods"].items():
                print(
                    f"  {label:<34}{1e3 * result['wall_seconds']:9.1f} ms wall"
                    f"{1e3 * result['processor_seconds']:9.1f} ms processor   error {result['error']:.1e}"
                )
    if arguments.json is not None:
        document = {
            "question": __doc__.splitlines()[0],
            "smoke": arguments.smoke,
            "threads": 1,
            "rounds": rounds,
            "machine": {**environment().to_json(), "load_average": os.getloadavg()[0]},
            "kernel": pair_splits.describe(),
            "versions": versions(),
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    in_one_thread()
    main()
