"""Which sparse solver is best, how exact, and how long does it take, among eke's and the ones people install?

Question: the standard problem (250 x 500, density 0.1, numpy seed 0, 1000 problems): error after each number of steps;
time a problem in one thread, batched and single, with the error reached; then noise of 20, 30 and 40 dB, densities 0.05
to 0.25, condition 50 and 1000 x 2000 in double precision.
Goals: -60 dB in 8 steps and -90 dB in 11, prior estimated; float32 0.04 ms a problem at -85 dB batched, 0.3 ms single;
exact (-250 dB) 0.2 ms and no slower than SPAMS OMP; within 0.5 dB of message passing that knows prior and noise.
Gate: lasso solvers are compared by their optimality conditions, exact ones by their error, before anything is timed.
Method: rivals interleaved round by round, time of the thread (other work does not stop its clock, but slows it down),
lower quartiles. Rivals that are not installed are left out and named. Slow rivals solve the first 20 problems.

    python benchmarks/sparse_solvers.py [--rounds 9] [--rivals FOLDER] [--parts steps times conditions]
        [--json benchmarks/results/sparse_solvers.json]
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import eke
from eke import unrolled

PENALTY = 0.001
SLOW = 20
"""Problems that slow rivals solve."""


@dataclass
class Row:
    """One solver in the table of times: how it is run, on how many problems, and what it returns."""

    name: str
    run: Callable[[], Tensor]
    problems: int
    kind: str


def standard(batch: int = 1000) -> unrolled.Problem:
    """The problem of the tables, drawn by numpy so that everybody can have the same one."""
    rng = np.random.default_rng(0)
    a = rng.standard_normal((250, 500))
    a /= np.linalg.norm(a, axis=0)
    x = (rng.random((batch, 500)) < 0.1) * rng.standard_normal((batch, 500))
    a, x = torch.from_numpy(a), torch.from_numpy(x)
    return unrolled.Problem(a, x, x @ a.T, torch.zeros(batch, dtype=torch.float64))


def load(names: list[str]) -> dict[str, object]:
    """Those of the named packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed and is left out")
    return found


def peers(problem: unrolled.Problem, found: dict[str, object]) -> list[Row]:
    """Rivals from other packages, in double precision as their users call them."""
    a, b = problem.A.numpy(), problem.b.numpy()
    columns, many = np.asfortranarray(a), np.asfortranarray(b.T)
    rows = []
    if "spams" in found:
        spams = found["spams"]

        def omp(right: np.ndarray) -> Callable[[], Tensor]:
            return lambda: torch.from_numpy(spams.omp(right, columns, eps=1e-20, L=125, numThreads=1).toarray().T)

        def lasso(right: np.ndarray) -> Callable[[], Tensor]:
            settings = {"D": columns, "lambda1": PENALTY, "mode": 2, "numThreads": 1}
            return lambda: torch.from_numpy(spams.lasso(right, **settings).toarray().T)

        one = np.asfortranarray(many[:, :1])
        rows += [Row("SPAMS OMP", omp(many), len(b), "exact"), Row("SPAMS OMP, one problem", omp(one), 1, "exact")]
        rows += [Row("SPAMS lasso (LARS)", lasso(many[:, :200].copy(order="F")), 200, "lasso")]
    if "sklearn" in found:
        linear = importlib.import_module("sklearn.linear_model")
        rows.append(Row("scikit-learn OMP", lambda: torch.from_numpy(
            linear.orthogonal_mp(a, b[:SLOW].T, tol=1e-20).T), SLOW, "exact"))  # fmt: skip
        rows.append(Row("scikit-learn Lasso", lambda: fitted(
            lambda: linear.Lasso(alpha=PENALTY / 250, fit_intercept=False, tol=1e-8, max_iter=20_000), a, b), SLOW,
            "lasso"))  # fmt: skip
    if "celer" in found:
        rows.append(Row("celer Lasso", lambda: fitted(
            lambda: found["celer"].Lasso(alpha=PENALTY / 250, fit_intercept=False, tol=1e-8), a, b), SLOW,
            "lasso"))  # fmt: skip
    if "skglm" in found:
        rows.append(Row("skglm Lasso", lambda: fitted(
            lambda: found["skglm"].Lasso(alpha=PENALTY / 250, fit_intercept=False, tol=1e-8), a, b), SLOW,
            "lasso"))  # fmt: skip
    return rows


def fitted(make: Callable[[], object], a: np.ndarray, b: np.ndarray) -> Tensor:
    """Coefficients of an estimator fitted to each of the first problems."""
    return torch.stack([torch.from_numpy(np.asarray(make().fit(a, right).coef_)) for right in b[:SLOW]])


def own(problem: unrolled.Problem) -> list[Row]:
    """Solvers of eke, in both precisions."""
    a, b = problem.A, problem.b
    rows = []
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        at, bt = a.to(dtype), b.to(dtype)

        def add(label: str, solver: Callable[[Tensor], Tensor], kind: str, count: int = 1000, bt: Tensor = bt) -> None:
            rows.append(Row(label, lambda: solver(bt[:count]), count, kind))

        proved = unrolled.Exact(at)
        add(f"eke Exact, {name}", proved, "exact")
        add(f"eke Exact, one problem, {name}", proved, "exact", 1)
        twelve, exact = unrolled.VAMP(at, iterations=12), unrolled.VAMP(at, iterations=6, polish=3)
        add(f"eke VAMP, 12 steps, {name}", twelve, "message passing")
        add(f"eke VAMP, 12 steps, one problem, {name}", twelve, "message passing", 1)
        add(f"eke VAMP, 6 steps, polished, {name}", exact, "exact")
        add(f"eke VAMP, 6 steps, polished, one problem, {name}", exact, "exact", 1)
        hyper = unrolled.HyperLISTA(at)
        add(f"eke HyperLISTA, 16 layers, {name}", hyper, "learned")
        add(f"eke HyperLISTA, 16 layers, one problem, {name}", hyper, "learned", 1)
        htp = unrolled.HTP(at, sparsity=80)
        add(f"eke HTP, {name}", lambda v, s=htp: s.solve(v, tolerance=0.0).x, "exact", 200)
        omp = unrolled.OMP(at, sparsity=90)
        rounding = 2e-5 if dtype == torch.float32 else 1e-12
        add(f"eke OMP, {name}", lambda v, s=omp, t=rounding: s.solve(v, tolerance=t).x, "exact", 200)
    fista = unrolled.FISTA(a, penalty=PENALTY, iterations=4000)
    add("eke FISTA with restart, float64", lambda v: fista.solve(v, tolerance=1e-7).x, "lasso", 200)
    return rows


def violation(problem: unrolled.Problem, x: Tensor) -> float:
    """Median violation of the lasso's optimality conditions, relative to the penalty."""
    x = x.double()
    gradient = (problem.b[: len(x)] - x @ problem.A.T) @ problem.A
    off = torch.where(x != 0, (gradient - PENALTY * x.sign()).abs(), (gradient.abs() - PENALTY).clamp_min(0))
    return float(off.amax(1).median()) / PENALTY


def times(problem: unrolled.Problem, rows: list[Row], rounds: int) -> list[dict[str, object]]:
    """Milliseconds a problem, interleaved, with the error that goes with them."""
    table, samples = [], {row.name: [] for row in rows}
    for row in rows:
        x = row.run().double()
        record = {"name": row.name, "kind": row.kind, "problems": row.problems}
        record["nmse_db"] = unrolled.nmse_db(x, problem.x[: row.problems])
        if row.kind == "lasso":
            record["violation"] = violation(problem, x)
        table.append(record)
    for _ in range(rounds):
        for row in rows:
            row.run()  # untimed: no rival pays for the caches that another one filled
            # one problem is run often enough for the clock
            repeats = 20 if row.problems == 1 else 1
            start = time.thread_time()
            for _ in range(repeats):
                row.run()
            samples[row.name].append((time.thread_time() - start) / repeats / row.problems * 1e3)
    for record in table:
        ordered = sorted(samples[record["name"]])
        record["ms"] = ordered[len(ordered) // 4]
        record["ms_spread"] = [ordered[0], ordered[-1]]
    return table


def steps(problem: unrolled.Problem) -> list[dict[str, object]]:
    """Error after a number of steps, float64; a round of polish counts as its two least squares."""
    a, b = problem.A, problem.b
    table = [
        {"solver": "VAMP", "steps": k, "nmse_db": problem.nmse_db(unrolled.VAMP(a, iterations=k)(b))}
        for k in range(2, 17)
    ]
    given = {"density": 0.1, "variance": 1.0, "noise_variance": 0.0}
    table += [
        {"solver": "VAMP that knows prior and noise", "steps": k,
         "nmse_db": problem.nmse_db(unrolled.VAMP(a, iterations=k, **given)(b))}
        for k in (4, 8, 11, 12)
    ]  # fmt: skip
    table += [
        {"solver": "VAMP, polished once", "steps": k + 2,
         "nmse_db": problem.nmse_db(unrolled.VAMP(a, iterations=k, polish=1)(b))}
        for k in (4, 5, 6, 7, 8, 9)
    ]  # fmt: skip
    some = b[:200]
    for k in (4, 8, 12):
        x = unrolled.HTP(a, sparsity=80, iterations=k)(some)
        table.append({"solver": "HTP, 80 nonzeros", "steps": k, "nmse_db": unrolled.nmse_db(x, problem.x[:200])})
    for k in (16, 100, 200, 400):
        x = unrolled.FISTA(a, penalty=0.005, iterations=k, restart=False)(some)
        table.append({"solver": "FISTA, penalty 0.005", "steps": k, "nmse_db": unrolled.nmse_db(x, problem.x[:200])})
    return table


CASES = {
    "as it is": {},
    "noise, 40 dB": {"snr_db": 40.0},
    "noise, 30 dB": {"snr_db": 30.0},
    "noise, 20 dB": {"snr_db": 20.0},
    "density 0.05": {"density": 0.05},
    "density 0.15": {"density": 0.15},
    "density 0.2": {"density": 0.2},
    "density 0.25": {"density": 0.25},
    "condition 50": {"condition": 50.0},
    "condition 50, noise 30 dB": {"condition": 50.0, "snr_db": 30.0},
    "1000 x 2000": {"m": 1000, "n": 2000, "batch": 50},
    "1000 x 2000, noise 30 dB": {"m": 1000, "n": 2000, "batch": 50, "snr_db": 30.0},
    "complex": {"dtype": torch.complex128},
}


class Informed(unrolled.VAMP):
    """Message passing that is told each sample's noise, and the prior."""

    # in parts, each would get the first samples' noise
    chunk = None

    def __init__(self, problem: unrolled.Problem, density: float, iterations: int) -> None:
        super().__init__(problem.A, iterations=iterations, density=density, variance=1.0, noise_variance=1.0)
        self.each = problem.noise_std.square()

    def start(self, operator: unrolled.Operator, b: Tensor, x0: Tensor | None) -> tuple[Tensor, ...]:
        """Replace the noise that all samples share by their own."""
        state = super().start(operator, b, x0)
        return (*state[:5], self.each.unsqueeze(-1) / state[8].square(), *state[6:])


def conditions(batch: int) -> list[dict[str, object]]:
    """Errors of all solvers on problems of other kinds, float64."""
    table = []
    for index, (name, settings) in enumerate(CASES.items()):
        given = {"m": 250, "n": 500, "density": 0.1, "batch": batch, "dtype": torch.float64} | settings
        density = given["density"]
        size = (given.pop("m"), given.pop("n"), given.pop("density"))
        problem = unrolled.gaussian(*size, generator=torch.Generator().manual_seed(index), **given)
        nonzeros = min(int((problem.x != 0).sum(1).max()), size[0])
        some = min(50, len(problem.b))
        part = lambda x: unrolled.nmse_db(x, problem.x[:some])  # noqa: B023, E731
        informed = Informed(problem, density, 30)
        record = {
            "case": name,
            "VAMP": problem.nmse_db(unrolled.VAMP(problem.A, iterations=30)(problem.b)),
            "VAMP that knows prior and noise": problem.nmse_db(informed(problem.b)),
            "Exact": problem.nmse_db(unrolled.Exact(problem.A)(problem.b)),
            "VAMP, polished": problem.nmse_db(unrolled.VAMP(problem.A, iterations=20, polish=3)(problem.b)),
            "HTP": part(unrolled.htp(problem.A, problem.b[:some], sparsity=nonzeros).x),
            "OMP": part(unrolled.omp(problem.A, problem.b[:some], sparsity=nonzeros).x),
        }
        lasso = {"iterations": 1000, "continuation": 50.0, "tolerance": 1e-6}
        scale = float((problem.b @ problem.A.conj()).abs().amax(1).mean())
        record["FISTA, best of 8 penalties"] = min(
            part(unrolled.fista(problem.A, problem.b[:some], penalty=scale * 2.0**-k, **lasso).x) for k in range(2, 10)
        )
        table.append(record)
        print(
            f"{name}: " + "  ".join(f"{key}: {value:.1f}" for key, value in record.items() if key != "case"), flush=True
        )
    return table


def versions(found: dict[str, object]) -> dict[str, str]:
    """Versions of all packages in the tables."""
    names = {"spams": "spams-bin", "sklearn": "scikit-learn"}
    listed = {name: metadata.version(names.get(name, name)) for name in found}
    return {"eke": eke.__version__, "torch": torch.__version__, "numpy": np.__version__, **listed}


def main() -> None:
    """Run all tables, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=200, help="problems of each other kind")
    parser.add_argument("--rivals", type=Path, help="folder with rivals installed by pip install --target")
    parser.add_argument("--parts", nargs="+", default=["steps", "times", "conditions"], help="tables to make")
    parser.add_argument("--json", type=Path, help="tables not made now are kept as they are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if given.rivals:
        sys.path.append(str(given.rivals))
    found = load(["sklearn", "celer", "skglm", "spams"])
    problem = standard()
    document = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    document |= {"benchmark": "sparse_solvers", "versions": versions(found), "penalty": PENALTY}
    if "steps" in given.parts:
        document["steps"] = steps(problem)
        for row in document["steps"]:
            print(f"{row['solver']:34} {row['steps']:4} steps {row['nmse_db']:9.1f} dB", flush=True)
    if "times" in given.parts:
        document["machine"] = {"processor": processor(), "threads": 1, "clock": "thread time"}
        document["left_out"] = sorted({"sklearn", "celer", "skglm", "spams"} - set(found))
        document["times"] = times(problem, own(problem) + peers(problem, found), given.rounds)
        for row in document["times"]:
            note = f"  optimality off by {row['violation']:.1e}" if "violation" in row else ""
            print(f"{row['name']:56} {row['ms']:9.4f} ms {row['nmse_db']:9.1f} dB{note}", flush=True)
    if "conditions" in given.parts:
        document["conditions"] = conditions(given.batch)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=1) + "\n")


def processor() -> str:
    """Name of the processor."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
