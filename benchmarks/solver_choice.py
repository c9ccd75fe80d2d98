"""Does `choose` (`eke solve --solver auto`) pick the fastest solver that is good enough?

Question: forty problems that differ in size, density, noise, condition, coherence (cosines beside Haar wavelets,
pulses, convolutions), batch, precision and in what is asked: exact answers, answers as good as the noise lets, the
lasso of a penalty, a number of nonzeros. Every solver that can be asked so is run with usual settings.
Good enough: exact: -100 dB in float32, -200 dB in float64; noise, and number of nonzeros (no answer may have more):
within 1 dB of the best of all (or exact); penalty: duality gap at most 1e-4 of the objective, 1e-3 in float32.
Goal: the time of the solver chosen is at most 1.2 times the best one's among those good enough, on 90 % of the forty.
Method: rounds interleaved, time of the thread, lower quartile; time to choose is shown and not part of the ratio.

    python benchmarks/solver_choice.py [--rounds 5] [--seed 0] [--only 3 17]
        [--json benchmarks/results/solver_choice.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import eke
from eke import unrolled
from eke.cost import environment

ENOUGH = 1.2
SLOW_SECONDS = 2.0
"""Solvers slower than this are run once."""


@dataclass(frozen=True)
class Case:
    """One problem: a dictionary, its size, and what is asked ("exact", "noise", "penalty" or "sparsity")."""

    ask: str
    dictionary: str
    m: int
    n: int
    density: float
    batch: int
    dtype: torch.dtype = torch.float64
    snr_db: float = math.inf
    condition: float = 1.0

    def __str__(self) -> str:
        words = [self.ask, self.dictionary, f"{self.m} x {self.n}", f"density {self.density:g}", f"batch {self.batch}"]
        words += [str(self.dtype).removeprefix("torch.")]
        words += [f"{self.snr_db:g} dB"] if math.isfinite(self.snr_db) else []
        return ", ".join(words + ([f"condition {self.condition:g}"] if self.condition > 1 else []))


F32, F64, C128 = torch.float32, torch.float64, torch.complex128
CASES = (
    Case("exact", "random", 250, 500, 0.1, 500),
    Case("exact", "random", 250, 500, 0.1, 500, F32),
    Case("exact", "random", 250, 500, 0.1, 1),
    Case("exact", "random", 250, 500, 0.2, 100),
    Case("exact", "random", 250, 500, 0.1, 100, condition=50.0),
    Case("exact", "random", 60, 120, 0.05, 1000, F32),
    Case("exact", "random", 100, 1000, 0.01, 100),
    Case("exact", "random", 500, 1000, 0.1, 50),
    Case("exact", "random", 120, 240, 0.1, 100, C128),
    Case("exact", "cosines and wavelets", 128, 255, 0.02, 200),
    Case("exact", "cosines and wavelets", 128, 255, 0.02, 1),
    Case("exact", "convolutions", 256, 1024, 0.01, 50),
    Case("exact", "pulses", 120, 240, 0.02, 100),
    Case("noise", "random", 250, 500, 0.1, 500, snr_db=20.0),
    Case("noise", "random", 250, 500, 0.1, 500, F32, snr_db=30.0),
    Case("noise", "random", 250, 500, 0.1, 1, snr_db=30.0),
    Case("noise", "random", 250, 500, 0.05, 50, snr_db=40.0),
    Case("noise", "random", 250, 500, 0.2, 100, snr_db=40.0),
    Case("noise", "random", 250, 500, 0.1, 100, snr_db=30.0, condition=50.0),
    Case("noise", "random", 60, 120, 0.05, 1000, F32, snr_db=20.0),
    Case("noise", "random", 500, 1000, 0.1, 50, snr_db=30.0),
    Case("noise", "random", 120, 240, 0.1, 100, C128, snr_db=20.0),
    Case("noise", "cosines and wavelets", 128, 255, 0.02, 200, snr_db=30.0),
    Case("noise", "convolutions", 256, 1024, 0.01, 20, snr_db=30.0),
    Case("noise", "pulses", 120, 240, 0.02, 100, snr_db=30.0),
    Case("penalty", "random", 250, 500, 0.1, 200, snr_db=20.0),
    Case("penalty", "random", 250, 500, 0.1, 200, F32, snr_db=20.0),
    Case("penalty", "random", 250, 500, 0.05, 1, snr_db=30.0),
    Case("penalty", "random", 60, 120, 0.05, 500, snr_db=20.0),
    Case("penalty", "random", 120, 240, 0.1, 100, C128, snr_db=20.0),
    Case("penalty", "cosines and wavelets", 128, 255, 0.05, 100, snr_db=20.0),
    Case("penalty", "convolutions", 256, 1024, 0.01, 20, snr_db=20.0),
    Case("sparsity", "random", 250, 500, 0.1, 200),
    Case("sparsity", "random", 250, 500, 0.1, 200, F32),
    Case("sparsity", "random", 250, 500, 0.05, 1),
    Case("sparsity", "random", 250, 500, 0.05, 200, snr_db=30.0),
    Case("sparsity", "random", 60, 120, 0.05, 500, snr_db=30.0),
    Case("sparsity", "cosines and wavelets", 128, 255, 0.03, 200),
    Case("sparsity", "convolutions", 256, 1024, 0.01, 20),
    Case("sparsity", "pulses", 120, 240, 0.02, 50, snr_db=40.0),
)


def wavelets(n: int) -> Tensor:
    """Haar wavelets as columns, the constant first, n a power of two."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    up, across = torch.tensor([[1.0], [1.0]]).double(), torch.tensor([[1.0], [-1.0]]).double()
    return torch.cat([torch.kron(wavelets(n // 2), up), torch.kron(torch.eye(n // 2).double(), across)], 1)


def dictionary(name: str, m: int, n: int, generator: torch.Generator) -> Tensor:
    """A coherent dictionary, columns of length one."""
    at, column = torch.arange(m).double(), torch.arange(n).double()
    if name == "cosines and wavelets":
        cosines = torch.cos(torch.pi * (at[:, None] + 0.5) * at / m)
        a = torch.cat([cosines, wavelets(m)[:, 1:]], 1)  # the constant is there once
    elif name == "pulses":
        a = torch.exp(-((at[:, None] - column * m / n) ** 2) / 2)
    else:
        side, filters = math.isqrt(m), n // m
        drawn = torch.randn(filters, 1, 5, 5, generator=generator, dtype=torch.float64)
        a = unrolled.Convolutional(drawn, (side, side), circular=True).dense()
    return a / torch.linalg.vector_norm(a, dim=0)


def drawn(case: Case, seed: int) -> unrolled.Problem:
    """The problem of a case; no sample is zero."""
    generator = torch.Generator().manual_seed(seed)
    settings = {"batch": case.batch, "snr_db": case.snr_db, "dtype": case.dtype, "generator": generator}
    problem = unrolled.gaussian(case.m, case.n, case.density, condition=case.condition, **settings)
    if case.dictionary == "random":
        return problem
    a, x = dictionary(case.dictionary, case.m, case.n, generator).to(case.dtype), problem.x.clone()
    x[(x == 0).all(1), case.n // 3] = 1.0
    clean = x @ a.T
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    std = clean.std(1) * 10 ** (-case.snr_db / 20)
    return unrolled.Problem(a, x, clean + noise * std[:, None], std)


def penalty_of(problem: unrolled.Problem) -> float:
    """A usual penalty: a twentieth of the largest useful one."""
    return 0.05 * float((problem.b @ problem.A.conj()).abs().amax(1).mean())


Run = tuple[unrolled.SparseSolver, float | None]
"""A solver and the tolerance of its `solve`."""


def rivals(case: Case, problem: unrolled.Problem) -> dict[str, Run]:
    """All solvers that can be asked so, ready to run."""
    a, b, m = problem.A, problem.b, case.m
    rounding = 2e-5 if case.dtype == F32 else 1e-12
    if case.ask == "exact":
        return {
            "Exact": (unrolled.Exact(a), 0.0),
            "VAMP polished": (unrolled.VAMP(a, iterations=20, polish=3), None),
            "VAMP polished early": (unrolled.VAMP(a, iterations=6, polish=3), None),
            "OMP": (unrolled.OMP(a, sparsity=m // 2), rounding),
        }
    if case.ask == "sparsity":
        s = int((problem.x != 0).sum(1).max())
        found: dict[str, Run] = {"HTP": (unrolled.HTP(a, sparsity=s), 0.0)}
        return found | {"OMP": (unrolled.OMP(a, sparsity=s), rounding), "Exact": (unrolled.Exact(a), 0.0)}
    if case.ask == "noise":
        found = {"VAMP": (unrolled.VAMP(a, iterations=20), None)}
        found["VAMP damped"] = (unrolled.VAMP(a, iterations=60, damping=0.5), None)
        for share in (1e-3, 1e-2):
            small = share * (b @ a.conj()).abs().amax(1)
            falling = unrolled.FISTA(a, penalty=small, iterations=1000, continuation=1 / share)
            found[f"FISTA falling to {share:g}"] = (falling, 1e-6)
        if not a.is_complex() and case.dictionary == "random":
            found["HyperLISTA"] = (unrolled.HyperLISTA(a), None)
        return found
    level = penalty_of(problem)
    found = {"ISTA, tolerance 1e-06": (unrolled.ISTA(a, penalty=level, iterations=20_000), 1e-6)}
    for name, solver in (
        ("FISTA", unrolled.FISTA(a, penalty=level, iterations=20_000)),
        ("FISTA falling", unrolled.FISTA(a, penalty=level, iterations=300, continuation=20.0)),
        ("CoordinateDescent", unrolled.CoordinateDescent(a, penalty=level)),
    ):
        for tolerance in (1e-5, 1e-6):
            found[f"{name}, tolerance {tolerance:g}"] = (solver, tolerance)
    return found


def chosen(case: Case, problem: unrolled.Problem) -> unrolled.Choice:
    """What `choose` picks for the case."""
    asked: dict[str, Any] = {}
    if case.ask == "exact":
        asked["exact"] = True
    elif case.ask == "penalty":
        # What the gap that is asked for needs.
        asked |= {"penalty": penalty_of(problem), "tolerance": 1e-5 if case.dtype == F32 else 1e-6}
    elif case.ask == "sparsity":
        asked["sparsity"] = int((problem.x != 0).sum(1).max())
    return unrolled.choose(problem.A, problem.b, **asked)


def quality(case: Case, problem: unrolled.Problem, x: Tensor) -> float:
    """Error in decibels, or the worst duality gap over the objective: less is better."""
    if not bool(torch.isfinite(x).all()):
        return math.inf
    if case.ask == "sparsity" and int((x != 0).sum(1).max()) > int((problem.x != 0).sum(1).max()):
        return math.inf
    if case.ask != "penalty":
        return problem.nmse_db(x)
    near = unrolled.optimality(problem.A, problem.b, x, penalty=penalty_of(problem))
    return float((near.gap / near.objective).max())


def limit(case: Case, best: float) -> float:
    """What is good enough."""
    if case.ask == "penalty":
        return 1e-3 if case.dtype == F32 else 1e-4
    exact = -100.0 if case.dtype == F32 else -200.0
    return exact if case.ask == "exact" else max(best + 1, exact)


def raced(runs: dict[str, Run], b: Tensor, rounds: int) -> tuple[dict[str, float], dict]:
    """Milliseconds a problem and answers."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    answers = {}
    for k in range(rounds + 1):
        for name, (solver, tolerance) in runs.items():
            if k > 1 and min(times[name]) > SLOW_SECONDS:
                continue
            repeats = 1 if k == 0 or min(times[name], default=1.0) > 0.02 else 5
            start = time.thread_time()
            for _ in range(repeats):
                answers[name] = solver.solve(b, tolerance=tolerance).x
            if k:  # the first round warms up
                times[name].append((time.thread_time() - start) / repeats)
    return {name: sorted(of)[len(of) // 4] / len(b) * 1e3 for name, of in times.items()}, answers


def compared(case: Case, seed: int, rounds: int) -> dict[str, Any]:
    """Run all solvers of a case and the one that is chosen."""
    problem = drawn(case, seed)
    with torch.no_grad():
        start = time.thread_time()
        choice = chosen(case, problem)
        seconds = time.thread_time() - start
        runs = rivals(case, problem)
        runs["chosen"] = (choice.solver, choice.tolerance)
        times, answers = raced(runs, problem.b, rounds)
    scores = {name: quality(case, problem, x) for name, x in answers.items()}
    enough = limit(case, min(scores.values()))
    good = {name: times[name] for name in runs if scores[name] <= enough}
    best = min(good, key=good.__getitem__, default=None)
    ratio = times["chosen"] / good[best] if best is not None and "chosen" in good else math.inf
    return {
        "case": str(case), "chosen": type(choice.solver).__name__, "reason": choice.reason, "best": best,
        "ratio": ratio if math.isfinite(ratio) else None, "none_good": best is None, "limit": enough,
        "choosing_ms": seconds * 1e3, "ms": times,
        "score": {name: score if math.isfinite(score) else None for name, score in scores.items()},
    }  # fmt: skip


def main() -> None:
    """Race all cases, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="draws other problems of the same kinds")
    parser.add_argument("--only", type=int, nargs="+", help="cases by number, from 0")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = []
    for index, case in enumerate(CASES):
        if given.only and index not in given.only:
            continue
        row = compared(case, index + 1000 * given.seed, given.rounds)
        rows.append(row)
        listed = "  ".join(
            f"{name} {row['ms'][name]:.4g} ms {row['score'][name] if row['score'][name] is not None else math.inf:.3g}"
            for name in row["ms"]
        )
        verdict = "none good" if row["none_good"] else f"{row['ratio'] or math.inf:.2f} of {row['best']}"
        print(f"{index:2} {row['case']}: {row['chosen']}, {verdict}\n     {listed}", flush=True)
    judged = [row for row in rows if not row["none_good"]]
    held = sum(row["ratio"] is not None and row["ratio"] <= ENOUGH for row in judged)
    print(f"{held} of {len(judged)} within {ENOUGH}; {len(rows) - len(judged)} that no solver does well enough")
    if given.json:
        document = {
            "benchmark": "solver_choice", "eke": eke.__version__, "environment": environment().to_json(),
            "seed": given.seed, "within": ENOUGH, "held": held, "judged": len(judged), "rows": rows,
        }  # fmt: skip
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
