"""How good do unrolled solvers get, with how much training, and how many steps of FISTA is that?

Question: the standard problem (250 x 500, density 0.1, numpy seed 0, the first 500 of 1000 vectors): error after each
layer of LISTA, LISTA-CP, LISTA-CPSS, TiLISTA, ALISTA and HyperLISTA, parameters, seconds of training (of the clock,
which other work on the machine lengthens, and of the processor); steps of FISTA to the same error; perturbed
dictionaries; time a problem.
Goals: HyperLISTA with the usual numbers <= -91 dB in 16 layers; tuned from scratch in 60 s to <= -85 dB; ALISTA trained
in 120 s to <= -75 dB; 100 times fewer steps than FISTA at -60 dB; 16 layers of HyperLISTA in 0.2 ms a problem, float32,
1000 at once, one thread.
Gate: both weights answer their own columns with one, and HyperLISTA reaches its -91 dB, before anything is timed.
Networks with matrices are trained by the papers' layer-wise schedule, with far fewer steps than in the papers ("scaled
down"), ALISTA by the faster one as well. Training vectors come from seed 1; HyperLISTA is tuned on 256 of them.

    python benchmarks/unrolled.py [--parts networks fista robust time] [--smoke]
        [--json benchmarks/results/unrolled.json]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eke
from eke import unrolled
from eke.cost import environment

PARTS = ("networks", "fista", "robust", "time")


class Data:
    """The dictionary, problems held out, and problems to train on.

    Args:
        smoke: Whether to take a small dictionary and few problems.
    """

    def __init__(self, smoke: bool) -> None:
        self.m, self.n, self.test, self.train = (40, 80, 50, 200) if smoke else (250, 500, 1000, 20_000)
        rng = np.random.default_rng(0)
        a = rng.standard_normal((self.m, self.n))
        a /= np.linalg.norm(a, axis=0)
        x = self.answers(rng, self.test)
        self.A, self.x = torch.from_numpy(a), torch.from_numpy(x)
        self.all_x = self.x
        self.many = (self.x @ self.A.T).float()
        self.x = self.x[: self.test // 2]
        self.b = self.x @ self.A.T
        more = torch.from_numpy(self.answers(np.random.default_rng(1), self.train))
        self.x_train, self.b_train = more.float(), (more @ self.A.T).float()

    def answers(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return sparse vectors (count, n)."""
        return (rng.random((count, self.n)) < 0.1) * rng.standard_normal((count, self.n))

    def errors(self, solver: unrolled.Unrolled | unrolled.HyperLISTA) -> list[float]:
        """Return the error after each layer on the problems held out, in decibels."""
        with torch.no_grad():
            found = solver.trajectory(self.b.to(solver.operator.dtype))
        return [round(unrolled.nmse_db(x, self.x), 2) for x in found]


def gate(data: Data, smoke: bool) -> dict[str, bool]:
    """Check the closed forms and HyperLISTA's error."""
    weights = {"analytic": unrolled.analytic_weight(data.A), "symmetric": unrolled.symmetric_weight(data.A)}
    checks = {
        f"{name} weight has a unit diagonal to 1e-12": bool(((w * data.A).sum(0) - 1).abs().max() < 1e-12)
        for name, w in weights.items()
    }
    if not smoke:
        error = unrolled.nmse_db(unrolled.HyperLISTA(data.A.float())(data.b.float()), data.x)
        checks["HyperLISTA with the usual numbers, float32, reaches -91 dB in 16 layers"] = error <= -91
    return checks


def clocked(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """Return a result, seconds of the clock and seconds of the processor."""
    wall, own = time.perf_counter(), time.process_time()
    result = work()
    return result, round(time.perf_counter() - wall, 1), round(time.process_time() - own, 1)


def networks(data: Data, smoke: bool, only: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Train every network, or those of some names; errors after each layer."""
    a, layers = data.A.float(), 3 if smoke else 16
    stage, pace = (1, 2) if smoke else (25, 60)
    unrolled.fit(
        unrolled.TiLISTA(a, layers=1), data.x_train[:9], data.b_train[:9], schedule=unrolled.LayerWise(steps=1)
    )
    wise = unrolled.LayerWise(steps=stage, rate=1e-3)
    scalars = unrolled.LayerWise(steps=stage, rate=0.1)
    last = ((2, 0.01),) if smoke else ((150, 0.01), (100, 0.002))
    fast = unrolled.Deepening(steps=pace, last=last)
    plan: Sequence[tuple[str, unrolled.Unrolled, Any, str]] = (
        ("ALISTA", unrolled.ALISTA(a, layers=layers), fast, "faster"),
        ("ALISTA", unrolled.ALISTA(a, layers=layers), scalars, "layer-wise, scaled down"),
        ("LISTA-CPSS", unrolled.LISTACPSS(a, layers=layers), wise, "layer-wise, scaled down"),
        ("LISTA-CP", unrolled.LISTACP(a, layers=layers), wise, "layer-wise, scaled down"),
        ("LISTA", unrolled.LISTA(a, layers=layers), wise, "layer-wise, scaled down"),
        ("TiLISTA", unrolled.TiLISTA(a, layers=layers), wise, "layer-wise, scaled down"),
    )
    if not only or "HyperLISTA" in only:
        yield hyper(data, layers)
        errors = data.errors(unrolled.HyperLISTA(a, layers=layers))
        yield {"name": "HyperLISTA", "schedule": "usual numbers", "parameters": 3, "seconds": 0.0, "nmse_db": errors}
    for name, network, schedule, label in plan:
        if only and name not in only:
            continue
        fitted, wall, own = clocked(
            lambda n=network, s=schedule: unrolled.fit(n, data.x_train, data.b_train, schedule=s)
        )
        yield ({
            "name": name, "schedule": label, "parameters": sum(p.numel() for p in network.parameters()),
            "steps": len(fitted.losses), "seconds": wall, "processor": own, "before_db": data.errors(network),
            "nmse_db": data.errors(fitted.solver),
        })  # fmt: skip


def hyper(data: Data, layers: int) -> dict[str, Any]:
    """Tune HyperLISTA from scratch."""
    x, b = data.x_train[:256], data.b_train[:256]
    tuned, wall, own = clocked(lambda: unrolled.tune_hyperlista(data.A.float(), x, b, layers=layers))
    return {
        "name": "HyperLISTA", "schedule": "tuned from scratch", "parameters": 3, "solved": tuned.tuning.solved,
        "seconds": wall, "processor": own, "numbers": [tuned.tuning.c1, tuned.tuning.c2, tuned.tuning.c3],
        "nmse_db": data.errors(tuned),
    }  # fmt: skip


def fista(data: Data, smoke: bool) -> Iterator[dict[str, Any]]:
    """Count the steps of FISTA to the errors of HyperLISTA's layers, on the first problems held out."""
    count, most = (10, 50) if smoke else (100, 6000)
    x, b = data.x[:count], data.b[:count]
    network = unrolled.HyperLISTA(data.A, layers=4 if smoke else 16)
    layers = [unrolled.nmse_db(found, x) for found in network.trajectory(b)]
    plain = [(f"penalty {p:g}", {"penalty": p, "restart": False}) for p in (1e-3, 5e-4, 2e-4, 1e-4, 5e-5)]
    better = [(f"penalty {p:g}, restart", {"penalty": p, "restart": True}) for p in (5e-4, 2e-4, 1e-4)]
    for label, options in plain + better:
        solver = unrolled.FISTA(data.A, iterations=most, **options)
        state, reached, error = solver.start(solver.operator, b, None), {}, 0.0
        for k in range(most):
            state = solver.step(k, solver.operator, state)
            if k % 10 == 9:
                error = unrolled.nmse_db(state[0], x)
                for goal in (-20, -40, -60):
                    if error <= goal:
                        reached.setdefault(str(goal), k + 1)
                if str(-60) in reached:
                    break
        yield ({"solver": f"FISTA, {label}", "steps_to_db": reached, "last_db": round(error, 1)})
    for steps in (5, 10) if smoke else (60, 100, 200, 400):
        found = unrolled.fista(data.A, b, penalty=1e-5, iterations=steps, continuation=1e5).x
        label = f"FISTA, restart, penalty falling to 1e-05 within {steps // 2} of {steps} steps"
        yield {"solver": label, "steps": steps, "last_db": round(unrolled.nmse_db(found, x), 1)}
    reached = {str(goal): next((k + 1 for k, e in enumerate(layers) if e <= goal), None) for goal in (-20, -40, -60)}
    yield ({"solver": "HyperLISTA, usual numbers", "steps_to_db": reached, "last_db": round(layers[-1], 1)})


def robust(data: Data, smoke: bool) -> Iterator[dict[str, Any]]:
    """Solve problems of perturbed dictionaries with the weight of the clean one and with their own."""
    count = 20 if smoke else 100
    clean = unrolled.HyperLISTA(data.A, layers=16)
    schedule = unrolled.Deepening(steps=1 if smoke else 40, last=((1 if smoke else 100, 0.005),))
    net = unrolled.fit(unrolled.ALISTA(data.A.float()), data.x_train, data.b_train, schedule=schedule).solver.double()
    net = net.on(data.A)
    for std in (0.005, 0.01, 0.02):
        noise = torch.randn(count, data.m, data.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        a = data.A + std * noise
        a = a / torch.linalg.vector_norm(a, dim=1, keepdim=True)
        x = data.x[:count]
        b = (a @ x.unsqueeze(-1)).squeeze(-1)
        (own, seconds, _) = clocked(lambda a=a: net.on(a))
        weight = unrolled.analytic_weight(data.A).expand_as(a)
        yield ({
            "std": std,
            "clean_dictionary_and_weight_db": round(unrolled.nmse_db(net(b), x), 1),
            "own_dictionary_clean_weight_db": round(unrolled.nmse_db(net.on(a, weight=weight)(b), x), 1),
            "own_dictionary_own_weight_db": round(unrolled.nmse_db(own(b), x), 1),
            "hyperlista_clean_db": round(unrolled.nmse_db(clean(b), x), 1),
            "hyperlista_own_db": round(unrolled.nmse_db(unrolled.HyperLISTA(a, layers=16)(b), x), 1),
            "seconds_of_all_weights": seconds,
        })  # fmt: skip


def timed(data: Data, smoke: bool) -> Iterator[dict[str, Any]]:
    """Time HyperLISTA and its two products alone, interleaved, by the time of the thread."""
    rounds = 2 if smoke else 25
    network = unrolled.HyperLISTA(data.A.float())
    b = data.many
    left, right = data.A.float(), network.weights.matrix

    def products(part: Tensor) -> None:
        x = part.new_zeros(len(part), data.n)
        for _ in range(16):
            torch.addmm(part, x, left.T, beta=-1) @ right

    for batch in (len(b), 64, 1):
        seen = {"network": [], "products": []}
        with torch.no_grad():
            for _ in range(rounds):
                for name, work in (("network", network), ("products", products)):
                    start = time.thread_time()
                    for _ in range(1 if batch > 1 else 20):
                        work(b[:batch])
                    seen[name].append((time.thread_time() - start) / (1 if batch > 1 else 20) / batch * 1e3)
        quartile = {name: float(np.quantile(values, 0.25)) for name, values in seen.items()}
        yield ({
            "batch": batch, "ms_a_problem": round(quartile["network"], 4),
            "median": round(float(np.median(seen["network"])), 4),
            "of_it_matrix_products": round(quartile["products"], 4),
            "nmse_db": round(unrolled.nmse_db(network(b[: len(data.x)]), data.x), 1),
            "nmse_db_of_all_1000": round(unrolled.nmse_db(network(b), data.all_x), 1),
        })  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts asked for; those of an earlier run stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--smoke", action="store_true", help="a small dictionary and few steps: seconds, no conclusions"
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="networks to train; others stay as they are"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = Data(options.smoke)
    checks = gate(data, options.smoke)
    print(checks)
    if not all(checks.values()):
        raise SystemExit(f"The gate is closed: {checks}")
    document: dict[str, Any] = {}
    if options.json and options.json.exists():
        document = json.loads(options.json.read_text(encoding="utf-8"))
    document |= {
        "question": (__doc__ or "").splitlines()[0],
        "gate": checks,
        "eke": eke.__version__,
        "smoke": options.smoke,
    }
    only = options.only
    run = {"networks": lambda *given: networks(*given, only=only), "fista": fista, "robust": robust, "time": timed}
    for part in options.parts:
        earlier = document.get(part, {"rows": []})["rows"] if part == "networks" and only else []
        rows: list[dict[str, Any]] = [row for row in earlier if row["name"] not in only]
        document[part] = {"environment": environment().to_json(), "rows": rows}
        for row in run[part](data, options.smoke):
            print(row, flush=True)
            rows.append(row)
            if options.json:
                options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
