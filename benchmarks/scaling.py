"""How do planning and curvature grow with the problem?

Question: time and peak memory of `choose` and `choose_nested` against sites, candidates per site and budgets (up to
400 x 60 x 3), of `choose` on a chain of tables over two widths and a number of bits, and of `Curvature.estimate`
against the number of batches (memory shall be flat, time linear) and against the width of an MLP.
Gate: on small problems the plans are the best of all by enumeration, and A of a first layer is E[x x^T].
Method: every measurement is a fresh process with one thread. Time is the median of up to `repeats` calls (as many as
begin within 10 s) after a tiny one that loads the libraries; memory is the growth of the peak resident set (ru_maxrss)
over that after the tiny call. Slopes are least squares on logarithms. Tables: loss convex in the share kept and in
bits, with a random sensitivity of each site over four decades; bytes and latency of random sites; limits as shares of
the untouched model. Curvature takes 256 samples a second time to correct its eigenvalues: a fixed part of the time.

    python benchmarks/scaling.py [--smoke] [--json results.json] [--svg scaling.svg]
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# The parent stays small: Linux passes its peak memory on to the processes it starts. Workers import the rest.
Row = dict[str, Any]
Point = tuple[float, float]
SHARES = {1: (0.25,), 3: (0.5, 0.35, 0.25)}
BATCH = 32
FULL: dict[str, list[Any]] = {
    "sites": [25, 100, 400], "candidates": [15, 30, 60], "budgets": [1, 3], "chain": [15, 30, 60],
    "batches": [32, 64, 128, 256, 512], "widths": [64, 128, 256, 512, 1024],
}  # fmt: skip
SMOKE: dict[str, list[Any]] = {
    "sites": [12], "candidates": [8], "budgets": [1, 3], "chain": [], "batches": [8, 16], "widths": [64, 128],
}  # fmt: skip


# Problems


def additive(sites: int, candidates: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Tables of one site each: shares kept times bits, ordered from untouched to smallest."""
    import numpy as np

    from eke.compression.plan import Choice, Term

    rng = np.random.default_rng(seed)
    choices, terms = [], []
    bits = np.asarray([32, 8, 6, 5, 4, 3][: max(1, min(6, candidates // 5 + 1))], dtype=float)
    share = np.linspace(1, 0.1, -(-candidates // len(bits)))
    kept, width = (axis.ravel()[:candidates] for axis in np.meshgrid(share, bits, indexing="ij"))
    for site in range(sites):
        weights = 10 ** rng.uniform(4, 6.5)
        rounding = np.where(width < 32, 4.0 ** (2 - width), 0.0)
        loss = 10 ** rng.uniform(-4, 0) * (10 * (1 - kept) ** 2 + rounding) * np.exp(rng.normal(0, 0.1, len(kept)))
        speed = np.exp(rng.normal(0, 0.05, len(kept)))
        latency = weights * 1e-9 * (0.1 + kept * (0.4 + 0.6 * width / 32)) * speed
        order = np.argsort(-kept * width, kind="stable")
        choices.append(Choice(f"site {site}", tuple(f"{k:.2f} x {b:.0f} bits" for k, b in zip(kept, width))))
        tables = {"loss": loss, "size": weights * kept * width / 8, "latency": latency}
        terms += [Term((choices[-1].name,), name, table[order]) for name, table in tables.items()]
    return choices, terms


def chain(length: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    """Tables over the widths before and after a layer (8 each) and its bits (12)."""
    import numpy as np

    from eke.compression.plan import Choice, Term

    rng = np.random.default_rng(seed)
    kept, bits = np.linspace(1, 0.2, 8), np.linspace(16, 2, 12)
    widths = [Choice(f"width {i}", tuple(f"{k:.2f}" for k in kept)) for i in range(length + 1)]
    grids = [Choice(f"bits {i}", tuple(f"{b:.1f}" for b in bits)) for i in range(length)]
    terms = [Term((w.name,), "loss", 10 ** rng.uniform(-3, 0) * (1 - kept) ** 2) for w in widths]
    both = np.multiply.outer(kept, kept)
    for (before, after), grid in zip(itertools.pairwise(widths), grids):
        weights = 10 ** rng.uniform(4, 6)
        terms.append(Term((grid.name,), "loss", 10 ** rng.uniform(-3, 0) * 4.0 ** (2 - bits) * (bits < 16)))
        size = weights * np.multiply.outer(both, bits / 8)
        terms.append(Term((before.name, after.name, grid.name), "size", size))
        latency = 1e-9 * weights * (0.1 + 0.2 * kept[:, None] + 0.7 * both)
        terms.append(Term((before.name, after.name), "latency", latency))
    return [*widths, *grids], terms


def untouched(terms: Sequence[Any], share: float) -> dict[str, float]:
    """Limits as a share of what the untouched model costs."""
    names = ("size", "latency")
    return {name: share * sum(float(t.table.flat[0]) for t in terms if t.resource == name) for name in names}


# Workers: one measurement, one fresh process


def measured(call: Callable[[], Any], *, repeats: int) -> tuple[Row, Any]:
    """Seconds of a call and what it adds to the peak of the resident set."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = call()
    seconds = [time.perf_counter() - start]
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    while len(seconds) < repeats and sum(seconds) < 10:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "range_seconds": [min(seconds), max(seconds)],
        "peak_bytes": peak,
    }, result


def plan(*, sites: int, candidates: int, budgets: int, repeats: int, seconds: float) -> Row:
    """Plan an additive problem, or a chain if there are no candidates."""
    from eke.compression.plan import choose, choose_nested, undominated

    small = additive(12, 6)
    choose_nested(*small, limits=[untouched(small[1], 0.5), untouched(small[1], 0.4)], gap=0.0)
    choices, terms = additive(sites, candidates) if candidates else chain(sites)
    limits = [untouched(terms, share) for share in SHARES[budgets]]
    if budgets == 1:
        row, one = measured(lambda: choose(choices, terms, limits=limits[0], seconds=seconds), repeats=repeats)
        plans = [one]
    else:
        row, plans = measured(lambda: choose_nested(choices, terms, limits=limits, seconds=seconds), repeats=repeats)
    left = undominated(choices, terms, list(limits[0]), nested=budgets > 1)
    return {
        **row,
        "options": sum(len(c.options) for c in choices),
        "undominated": sum(map(len, left.values())),
        "gap": plans[0].gap,
        "losses": [p.predicted["loss"] for p in plans],
    }


def curvature(*, width: int, batches: int, repeats: int) -> Row:
    """Estimate the curvature of an MLP with three hidden layers."""
    import torch
    from torch import nn

    from eke.curvature import Curvature
    from eke.sites import find

    def network(size: int) -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Linear(64, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(size, 10)).eval()

    def loss(model: nn.Module, batch: Any) -> Any:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    def data(count: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1)
        for _ in range(count):
            labels = torch.randint(10, (BATCH,), generator=generator)
            yield torch.randn(BATCH, 64, generator=generator), labels

    tiny, model = network(8), network(width)
    Curvature.estimate(tiny, loss, data(2), find(tiny))
    row, _ = measured(lambda: Curvature.estimate(model, loss, data(batches), find(model)), repeats=repeats)
    return row


def gate() -> Row:
    """Compare small problems with enumeration, and A with its definition."""
    import numpy as np
    import torch
    from torch import nn

    from eke import __version__
    from eke.compression.plan import choose, choose_nested, total
    from eke.cost import environment
    from eke.curvature import Curvature
    from eke.sites import find

    worst = 0.0
    for seed in range(10):
        choices, terms = additive(4, 5, seed)
        names = [c.name for c in choices]
        every = {
            p: total(terms, dict(zip(names, p))) for p in itertools.product(*(range(len(c.options)) for c in choices))
        }
        limits = [untouched(terms, share) for share in (0.7, 0.45)]
        fits = [[p for p, t in every.items() if all(t[r] <= most[r] for r in most)] for most in limits]
        best = min(every[p]["loss"] for p in fits[1])
        found = choose(choices, terms, limits=limits[1]).predicted["loss"]
        worst = max(worst, found / best - 1)
        loss = {p: every[p]["loss"] for p in every}
        array = np.asarray(fits[1])
        second = np.asarray([loss[p] for p in fits[1]])
        both = min(loss[p] + min(second[(array >= np.asarray(p)).all(1)], default=np.inf) for p in fits[0])
        nested = sum(p.predicted["loss"] for p in choose_nested(choices, terms, limits=limits))
        worst = max(worst, nested / both - 1)
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)),
        torch.randn(40, 5),
        torch.randint(3, (40,)),
    )
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    found_a = Curvature.estimate(model, lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]), batches, find(model))
    error = float((found_a.factors(find(model)[0].name).a - x.T @ x / 40).abs().max())
    return {
        "gate": {"plans against enumeration, worst excess": worst, "A against E[x x^T], largest error": error},
        "passed": worst <= 2e-4 and error <= 1e-5,
        "eke": __version__,
        "environment": environment().to_json(),
    }


def fresh(kind: str, **settings: Any) -> Row:
    """Run a worker in a fresh process with one thread."""
    task = json.dumps({"kind": kind, **settings})
    command = ["env", "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", sys.executable, __file__, "--worker", task]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{kind} {settings} failed: {done.stderr[-2000:]}")
    row: Row = {**settings, **json.loads(done.stdout.splitlines()[-1])}
    shown = {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items() if k in (*settings, "seconds", "gap")}
    print(kind, shown, f"{row.get('peak_bytes', 0) / 1e6:.1f} MB", flush=True)
    return row


# Slopes


def slope(points: Sequence[Point]) -> float | None:
    """Least-squares slope of logarithms; None where fewer than two points are positive."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len(logs) < 2:
        return None
    middle = [statistics.mean(values) for values in zip(*logs)]
    return sum((x - middle[0]) * (y - middle[1]) for x, y in logs) / sum((x - middle[0]) ** 2 for x, _ in logs)


def straight(points: Sequence[Point]) -> Row:
    """Least-squares line through points: what is fixed, what a step adds, and the share of variance explained."""
    xs, ys = zip(*points)
    fit = statistics.linear_regression(xs, ys)
    explained = statistics.correlation(xs, ys) ** 2
    return {"fixed_seconds": fit.intercept, "seconds_per_batch": fit.slope, "r_squared": explained}


def slopes(rows: dict[str, list[Row]]) -> Row:
    """Exponents of growth of time and memory."""
    found: Row = {}
    for value in ("seconds", "peak_bytes"):
        for budgets in (1, 3):
            plans = [r for r in rows["plans"] if r["budgets"] == budgets]
            for axis, other in (("sites", "candidates"), ("candidates", "sites")):
                most = max(r[other] for r in plans)
                line = [(r[axis], r[value]) for r in plans if r[other] == most]
                found[f"planning, {budgets} budgets: {value} against {axis} at {most} {other}"] = slope(line)
        found[f"chain: {value} against layers"] = slope([(r["sites"], r[value]) for r in rows["chains"]])
        for name in ("batches", "width"):
            line = [(r[name], r[value]) for r in rows[f"curvature against {name}"]]
            found[f"curvature: {value} against {name}"] = slope(line)
            found[f"curvature: {value} against {name}, last three"] = slope(line[-3:])
    return {name: None if value is None else round(value, 3) for name, value in found.items()}


# Drawing

STYLE = """text{font:12px system-ui,sans-serif;fill:#24292f}.t{font-weight:600}.s{fill:#57606a;font-size:11px}
.g{stroke:#d0d7de;stroke-width:1}.a{stroke:#57606a;stroke-width:1}path{fill:none;stroke-width:2}.d{stroke-dasharray:5 4}
.c0{stroke:#0969da}.c1{stroke:#bc4c00}.c2{stroke:#1a7f37}circle{stroke-width:2;fill:#fff}.b{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.s{fill:#9198a1}.g{stroke:#30363d}.a{stroke:#9198a1}.b{fill:#0d1117}
.c0{stroke:#58a6ff}.c1{stroke:#f0883e}.c2{stroke:#3fb950}circle{fill:#0d1117}}"""
WIDE, HIGH, LEFT, TOP = 300, 236, 54, 44
Series = tuple[str, str, list[Point]]


def ticks(low: float, high: float) -> list[float]:
    """Powers of ten in a range, or of two where those are too few."""
    tens = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    inside = [t for t in tens if low <= t <= high * 1.0001]
    return inside if len(inside) >= 2 else [low, high]


def panel(title: str, axis: str, unit: str, series: Sequence[Series], *, floor: float, places: Sequence[float]) -> str:
    """One chart with logarithmic axes; values below `floor` are drawn on it."""
    values = [max(y, floor) for _, _, line in series for _, y in line]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values) * 1.0001))
    wide, tall = WIDE - LEFT - 14, HIGH - TOP - 40
    first, last = math.log(min(places)), math.log(max(places))

    def at(x: float, y: float) -> Point:
        right = (math.log(x) - first) / ((last - first) or 1.0)
        up = (math.log(max(y, floor)) - math.log(low)) / (math.log(high) - math.log(low))
        return round(LEFT + 8 + right * (wide - 16), 1), round(TOP + tall * (1 - up), 1)

    parts = [f'<text class="t" x="{LEFT}" y="16">{html.escape(title)}</text>']
    parts.append(f'<text class="s" x="{LEFT}" y="32">{html.escape(unit)}</text>')
    for tick in ticks(low, high):
        y = at(min(places), tick)[1]
        parts.append(f'<path class="g" d="M{LEFT} {y}H{LEFT + wide}"/>')
        parts.append(f'<text class="s" x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<path class="a" d="M{LEFT} {TOP + tall}H{LEFT + wide}"/>')
    for place in places:
        x = at(place, high)[0]
        parts.append(f'<text class="s" x="{x}" y="{TOP + tall + 16}" text-anchor="middle">{place:g}</text>')
    parts.append(f'<text class="s" x="{LEFT + wide / 2}" y="{TOP + tall + 32}" text-anchor="middle">{axis}</text>')
    for _, style, line in series:
        drawn = [at(*point) for point in line]
        parts.append(f'<path class="{style}" d="M{"L".join(f"{x} {y}" for x, y in drawn)}"/>')
        parts += [f'<circle class="{style.split()[0]}" cx="{x}" cy="{y}" r="3"/>' for x, y in drawn]
    return "".join(parts)


def drawing(rows: dict[str, list[Row]]) -> str:
    """Small multiples: planning, curvature against batches and against width; time above, memory below."""

    def lines(value: str, scale: float) -> list[list[Series]]:
        plans: list[Series] = []
        counts = sorted({r["candidates"] for r in rows["plans"]})
        for (i, count), budgets in itertools.product(enumerate(counts), (1, 3)):
            chosen = [r for r in rows["plans"] if r["candidates"] == count and r["budgets"] == budgets]
            style = f"c{i % 3}" + (" d" if budgets == 3 else "")
            plans.append((f"{count} candidates", style, [(r["sites"], r[value] * scale) for r in chosen]))
        others: list[list[Series]] = [
            [("", "c0", [(r[name], r[value] * scale) for r in rows[f"curvature against {name}"]])]
            for name in ("batches", "width")
        ]
        return [plans, *others]

    titles = [
        ("Planning", "sites"),
        ("Curvature, growing data", f"batches of {BATCH}"),
        ("Curvature, growing net", "width of the MLP"),
    ]
    parts = []
    for i, (value, scale, unit, floor) in enumerate([
        ("seconds", 1.0, "seconds", 1e-3),
        ("peak_bytes", 1e-6, "peak memory added, MB", 0.1),
    ]):
        for j, ((title, axis), series) in enumerate(zip(titles, lines(value, scale))):
            places = sorted({x for _, _, line in series for x, _ in line})
            inside = panel(title, axis, unit, series, floor=floor, places=places)
            parts.append(f'<g transform="translate({j * WIDE} {i * HIGH})">{inside}</g>')
    x, key = LEFT, []
    for i, count in enumerate(sorted({r["candidates"] for r in rows["plans"]})):
        y = 2 * HIGH + 14
        key.append(f'<path class="c{i % 3}" d="M{x} {y - 4}h22"/><text x="{x + 28}" y="{y}">{count} candidates</text>')
        x += 130
    key.append(f'<path class="a" d="M{x} {y - 4}h22"/><text x="{x + 28}" y="{y}">1 budget</text>')
    key.append(f'<path class="a d" d="M{x + 110} {y - 4}h22"/><text x="{x + 138}" y="{y}">3 nested budgets</text>')
    wide, high = 3 * WIDE, 2 * HIGH + 28
    title = "Time and memory of planning and of curvature against the size of the problem"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" role="img" aria-label="{title}">'
        f'<title>{title}</title><style>{STYLE}</style><rect class="b" width="{wide}" height="{high}"/>'
        f"{''.join(parts)}{''.join(key)}</svg>\n"
    )


def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, once each, within a minute")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        settings = dict(options.worker)
        worker: Callable[..., Row] = {"plan": plan, "curvature": curvature, "gate": gate}[settings.pop("kind")]
        print(json.dumps(worker(**settings)))
        return
    checked = fresh("gate")
    if not checked["passed"]:
        sys.exit(f"gate: {checked['gate']}")
    grid, repeats = (SMOKE, 1) if options.smoke else (FULL, options.repeats)
    rows: dict[str, list[Row]] = {"plans": [], "chains": []}
    for budgets, sites, candidates in itertools.product(grid["budgets"], grid["sites"], grid["candidates"]):
        # Nested plans are no quick question: they may take a minute, those of one budget the usual 20 s.
        most = {"repeats": repeats, "seconds": 20.0 if budgets == 1 else 60.0}
        rows["plans"].append(fresh("plan", sites=sites, candidates=candidates, budgets=budgets, **most))
    for length in grid["chain"]:
        rows["chains"].append(fresh("plan", sites=length, candidates=0, budgets=1, repeats=repeats, seconds=20.0))
    rows["curvature against batches"] = [
        fresh("curvature", width=256, batches=n, repeats=repeats) for n in grid["batches"]
    ]
    rows["curvature against width"] = [fresh("curvature", width=n, batches=16, repeats=repeats) for n in grid["widths"]]
    single = [r for r in rows["plans"] if r["budgets"] == 1] + rows["chains"]
    goals = {
        "one budget: gap 1e-4 within 20 s": all(r["gap"] <= 1e-4 and r["seconds"] <= 20 for r in single),
        "three nested budgets: largest gap within 60 s": max(r["gap"] for r in rows["plans"] if r["budgets"] == 3),
    }
    document = {
        "question": "how planning and curvature grow with sites, candidates, budgets, batches and width",
        "smoke": options.smoke,
        "settings": {
            "repeats": repeats,
            "threads": 1,
            "shares": {str(k): v for k, v in SHARES.items()},
            "batch": BATCH,
        },
        **checked,
        "goals": goals,
        "slopes": slopes(rows),
        "curvature_line": straight([(r["batches"], r["seconds"]) for r in rows["curvature against batches"]]),
        "rows": rows,
    }
    print(json.dumps({"goals": goals, "slopes": document["slopes"], "line": document["curvature_line"]}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        options.svg.write_text(drawing(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
