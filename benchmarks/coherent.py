"""Which sparse solver is the fastest to -40 dB where columns of the dictionary are much alike?

Question: cosines beside Haar wavelets (128 x 255, density 0.02) and a bank of circular convolutions (256 x 1024,
density 0.01), no noise, double precision, 100 problems: for each solver the fewest steps with a mean error of -40 dB or
less, the time a problem of a run of that many steps, and the error it reaches. "never": not in the most steps tried.
Goal: the safeguarded learned network converges and is the fastest. If not, the table says what is.
Solvers: ALISTA of 12 layers trained on other problems of the kind, HyperLISTA tuned on them, both alone and
safeguarded by FISTA (with the penalty that is best for FISTA); FISTA at its best of six penalties, and with a falling
penalty; message passing; OMP and HTP, which are told the number of nonzeros; `Exact`.
Method: time of one thread, median of three, in turns. Training is not part of the time.

    python benchmarks/coherent.py [--problems 100] [--json benchmarks/results/coherent.json] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from solver_choice import dictionary
from sparse_solvers import processor
from torch import Tensor

from eke import unrolled

GOAL = -40.0
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048)
CASES = {"cosines and wavelets": (128, 256, 0.02), "convolutions": (256, 1024, 0.01)}
Make = Callable[[int], unrolled.SparseSolver]


def drawn(a: Tensor, density: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sparse x, none of them zero, and b = A x."""
    generator = torch.Generator().manual_seed(seed)
    size = (count, a.shape[1])
    x = torch.randn(size, generator=generator, dtype=a.dtype) * (torch.rand(size, generator=generator) < density)
    x[(x == 0).all(1), a.shape[1] // 3] = 1.0
    return x, x @ a.T


def solvers(
    a: Tensor, density: float, x: Tensor, b: Tensor, *, smoke: bool
) -> tuple[dict[str, Make], dict[str, float]]:
    """Ways to make each solver with a number of steps, and the seconds of training."""
    train = drawn(a, density, 64 if smoke else 4000, 1)
    scale = float((b @ a).abs().amax(1).mean())
    nonzeros = int((x != 0).sum(1).max())
    penalties = {k: scale * 2.0**-k for k in range(5, 17, 2)}

    def error(solver: unrolled.SparseSolver) -> float:
        return unrolled.nmse_db(solver(b), x)

    best = min(penalties.values(), key=lambda p: error(unrolled.FISTA(a, penalty=p, iterations=50 if smoke else 512)))
    falling = min(
        penalties.values(),
        key=lambda p: error(unrolled.FISTA(a, penalty=p, iterations=64, continuation=scale / p)),
    )
    started = time.perf_counter()
    schedule = unrolled.Deepening(steps=2, last=((2, 0.01),)) if smoke else unrolled.Deepening()
    alista = unrolled.fit(unrolled.ALISTA(a, layers=12), *train, schedule=schedule).solver
    trained = time.perf_counter() - started
    hyper = unrolled.tune_hyperlista(a, *(t[:500] for t in train), layers=16, candidates=8 if smoke else 256, pinv=True)
    tuned = time.perf_counter() - started - trained

    def alone(network: Any) -> Make:
        return lambda n: network.prefix(n) if hasattr(network, "prefix") else _shorter(network, n)

    def safe(network: Any) -> Make:
        return lambda n: unrolled.Safeguarded(network, unrolled.FISTA(a, penalty=best), iterations=n)

    return {
        "ALISTA": alone(alista), "ALISTA, safeguarded": safe(alista), "HyperLISTA": alone(hyper),
        "HyperLISTA, safeguarded": safe(hyper),
        "FISTA, best penalty": lambda n: unrolled.FISTA(a, penalty=best, iterations=n),
        "FISTA, falling penalty": lambda n: unrolled.FISTA(
            a, penalty=falling, iterations=n, continuation=scale / falling
        ),
        "VAMP": lambda n: unrolled.VAMP(a, iterations=n),
        "HTP": lambda n: unrolled.HTP(a, sparsity=nonzeros, iterations=n),
        "OMP": lambda n: unrolled.OMP(a, sparsity=nonzeros), "Exact": lambda n: unrolled.Exact(a),
    }, {"ALISTA": trained, "HyperLISTA": tuned}  # fmt: skip


def _shorter(network: unrolled.HyperLISTA, layers: int) -> unrolled.HyperLISTA:
    found = copy.copy(network)
    found.iterations = layers
    return found


def first(make: Make, x: Tensor, b: Tensor, most: int) -> tuple[int, float]:
    """The fewest steps that reach the goal, or those of least error, and the error."""
    tried = []
    for count in (n for n in COUNTS if n <= most):
        tried.append((count, unrolled.nmse_db(make(count)(b), x)))
        if tried[-1][1] <= GOAL:
            return tried[-1]
    return min(tried, key=lambda pair: pair[1])


def case(name: str, problems: int, *, smoke: bool) -> dict[str, Any]:
    """One dictionary."""
    m, n, density = CASES[name]
    a = dictionary(name, m, n, torch.Generator().manual_seed(0))
    x, b = drawn(a, density, problems, 2)
    made, training = solvers(a, density, x, b, smoke=smoke)
    most = {"ALISTA": 12, "HyperLISTA": 16, "OMP": 1, "Exact": 1, "HTP": 64, "VAMP": 128}
    rows, ready = [], {}
    for solver, make in made.items():
        count, error = first(make, x, b, min(64 if smoke else COUNTS[-1], most.get(solver, COUNTS[-1])))
        ready[solver] = make(count)
        rows.append({"solver": solver, "steps": count, "nmse_db": error, "reached": error <= GOAL})
    times: dict[str, list[float]] = {solver: [] for solver in made}
    for _ in range(3):
        for solver, run in ready.items():
            started = time.thread_time()
            run(b)
            times[solver].append(time.thread_time() - started)
    for row in rows:
        row["milliseconds_a_problem"] = 1e3 * statistics.median(times[row["solver"]]) / problems
        print(
            f"{name:22} {row['solver']:26} {row['steps']:5} steps {row['nmse_db']:8.1f} dB "
            f"{row['milliseconds_a_problem']:8.4f} ms {'' if row['reached'] else 'never'}", flush=True,
        )  # fmt: skip
    reached = [row for row in rows if row["reached"]]
    fastest = min(reached, key=lambda row: row["milliseconds_a_problem"])["solver"] if reached else None
    return {
        "dictionary": name, "shape": list(a.shape), "density": density, "problems": problems, "rows": rows,
        "training_seconds": training, "fastest": fastest,
    }  # fmt: skip


def main() -> None:
    """Make the table, print and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=100)
    parser.add_argument("--smoke", action="store_true", help="few steps and problems: seconds, no conclusions")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    cases = [case(name, 4 if given.smoke else given.problems, smoke=given.smoke) for name in CASES]
    if given.json:
        document = {
            "benchmark": "coherent",
            "smoke": given.smoke,
            "processor": processor(),
            "goal_db": GOAL,
            "cases": cases,
        }
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
