"""Do the planner's predictions hold, and are its plans good?

Questions, on the demo network with its calibration images:
  singles   Does the predicted loss of one change rank measured losses, and better than cruder metrics do?
  plans     Do predictions of random whole plans hold, in loss and in latency?
  chosen    Where does the chosen plan stand among 200 random feasible plans of the same budget, before recovery?
  budgets   Is a grid of 20 budgets kept by the first plan that is measured, within three rounds, or refused?
Gate: a draft of the empty plan must answer exactly as the original does.
Losses are measured on calibration images that neither the statistics nor the corrections have seen.

    python benchmarks/planner.py [--parts singles plans chosen budgets] [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from eke import cost
from eke.compression import Budget, InfeasibleError, choose
from eke.compression.calibrate import Random, families_of
from eke.compression.candidates import readers, removal_change, replaced
from eke.compression.checkpoint import Run
from eke.compression.measure import runner
from eke.compression.overview import Survey, survey
from eke.compression.plan import Term, total
from eke.compression.rounds import attempts, plan_within
from eke.compression.tables import choices
from eke.compression.task import evaluating

demo = importlib.import_module("eke.demo.task")
STATISTICS = 1024
LEADING = "EKFAC with leading directions"
KRONECKER = ("K-FAC", "EKFAC", LEADING)


def held_out(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration images after the ones that statistics and corrections use."""
    pixels, classes = demo.images("calibration")
    return pixels[STATISTICS : STATISTICS + count], classes[STATISTICS : STATISTICS + count]


def sample_losses(net: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of every sample."""
    with evaluating(net):
        parts = [
            torch.nn.functional.cross_entropy(net(x), y, reduction="none")
            for x, y in zip(data[0].split(128), data[1].split(128))
        ]
    return torch.cat(parts).double()


def rank(predicted: Any, measured: Any) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(predicted, measured).statistic)


def rank_interval(predicted: Any, measured: Any, *, draws: int = 1000) -> list[float]:
    """95 % bootstrap interval of the rank correlation over changes."""
    generator = np.random.default_rng(0)
    p, m = np.asarray(predicted), np.asarray(measured)
    found = [rank(p[i], m[i]) for i in (generator.integers(0, len(p), len(p)) for _ in range(draws))]
    return [float(q) for q in np.quantile(found, [0.025, 0.975])]


def changes(found: Survey, choice: str, option: int) -> dict[str, torch.Tensor]:
    """Change of every matrix that an option makes, by site name; empty for a block."""
    space = found.space
    for form in space.decisions.forms:
        if form.choice == choice:
            matrix = form.site.read(space.model)
            new = replaced(form.structures[option], matrix, space.curvature, form.site, solver=space.solver)
            return {form.site.name: new - matrix.double()}
    for width in space.decisions.widths:
        if width.choice == choice:
            by_parameter = {site.parameter_name: site for site in space.sites}
            consumers = readers(width.group, by_parameter, space.model, space.curvature)
            units = torch.tensor(width.order[: width.group.size - width.kept[option]])
            names = [by_parameter[m.parameter].name for m in width.group.consumers]
            return {name: removal_change(consumer, units) for name, consumer in zip(names, consumers)}
    return {}


def predictors(found: Survey, delta: dict[str, torch.Tensor]) -> dict[str, float]:
    """Predicted loss of a change by every metric."""
    curvature = found.space.curvature
    sums = dict.fromkeys(("distance", "activations", "diagonal", "K-FAC", "EKFAC", LEADING, "slope"), 0.0)
    for name, d in delta.items():
        factors = curvature.factors(name)
        plain = dataclasses.replace(factors, basis=None, leading=None)
        sums["distance"] += float(d.square().sum())
        sums["activations"] += 0.5 * float((d @ factors.a[0].double() * d).sum())
        sums["diagonal"] += 0.5 * float((plain.diagonal.double() * d.square()).sum())
        sums["K-FAC"] += plain.quadratic(d)
        sums["EKFAC"] += dataclasses.replace(factors, leading=None).quadratic(d)
        sums[LEADING] += factors.quadratic(d)
        sums["slope"] += factors.linear(d)
    slope = max(0.0, sums.pop("slope"))
    return sums | {f"{name} and slope": sums[name] + slope for name in KRONECKER}


def singles(found: Survey, data: tuple[torch.Tensor, torch.Tensor], *, most: int) -> dict[str, Any]:
    """Predicted and measured losses of single changes, by every metric."""
    space = found.space
    labels = {choice.name: choice.options for choice in choices(space.decisions)}
    anchors = {(a.choice, a.option) for a in space.calibration.anchors}
    fresh = [(c, o) for c, options in labels.items() for o in range(1, len(options))]
    order = np.random.default_rng(0).permutation(len(fresh))[:most]
    base = sample_losses(space.model, data)
    rows = []
    for index in order:
        choice, option = fresh[index]
        delta = changes(found, choice, option)
        measured = float((sample_losses(space.draft({choice: option}).finished(), data) - base).mean())
        rows.append({
            "change": f"{choice}: {labels[choice][option]}",
            "kind": families_of(space.decisions, choice)[option],
            "measured": measured,
            "corrected": space.decisions.losses[choice][option],
            "anchor": (choice, option) in anchors,
            **(predictors(found, delta) if delta else {}),
        })
        print(f"  {rows[-1]['change']}: measured {measured:+.4f}, corrected {rows[-1]['corrected']:+.4f}", flush=True)
    return {"samples": len(data[1]), **ranks_of(rows), "rows": rows}


METRICS = ("distance", "activations", "diagonal", *KRONECKER, *(f"{name} and slope" for name in KRONECKER))


def ranks_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How well every metric orders the changes: all, those of one kind, and differences with paired intervals."""
    full = [row for row in rows if "K-FAC" in row]
    ranks = {}
    for name in (*METRICS, "corrected"):
        chosen = full if name != "corrected" else [row for row in rows if not row["anchor"]]
        p, m = [row[name] for row in chosen], [row["measured"] for row in chosen]
        seen = [(a, b) for a, b in zip(p, m) if a > 0 and b > 1e-3]
        ranks[name] = {
            "changes": len(p),
            "spearman": rank(p, m),
            "interval": rank_interval(p, m),
            "median factor": float(np.exp(np.median([abs(math.log(a / b)) for a, b in seen]))),
        }
    by_kind = {}
    for kind in sorted({row["kind"] for row in full}):
        some = [row for row in full if row["kind"] == kind]
        m = [row["measured"] for row in some]
        by_kind[kind] = {"changes": len(some)} | {name: rank([row[name] for row in some], m) for name in METRICS}
    random = np.random.default_rng(0)
    pairs = [(one + end, two + end) for end in ("", " and slope") for one, two in itertools.combinations(KRONECKER, 2)]
    gains: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for _ in range(1000):
        drawn = [full[i] for i in random.integers(0, len(full), len(full))]
        m = [row["measured"] for row in drawn]
        found = {name: rank([row[name] for row in drawn], m) for pair in pairs for name in pair}
        for less, more in pairs:
            gains[less, more].append(found[more] - found[less])
    paired = {
        f"{more} less {less}": [float(x) for x in np.percentile(values, (2.5, 97.5))]
        for (less, more), values in gains.items()
    }
    return {"ranks": ranks, "ranks of one kind": by_kind, "paired intervals": paired}


def plans(found: Survey, data: tuple[torch.Tensor, torch.Tensor], *, count: int, seconds: float) -> dict[str, Any]:
    """Predicted and measured losses and latencies of random whole plans."""
    space, job = found.space, found.prepared.job
    base = sample_losses(space.model, data)
    drawn, rows = Random(space.decisions, seed=1), []
    for number in range(count):
        picks = drawn.draw()
        net = space.draft(picks).finished()
        measured = float((sample_losses(net, data) - base).mean())
        compared = cost.compare_latency(
            runner(space.model, job.inputs), runner(space.shaped(picks), job.inputs), seconds=seconds, threads=1
        )
        rows.append({
            "predicted": space.loss(picks),
            "measured": measured,
            "predicted seconds": total(space.terms, picks)["latency"],
            "measured seconds": space.before["latency"] / compared.ratio,
        })
        print(f"  plan {number}: {rows[-1]}", flush=True)
    seen = [(r["predicted"], r["measured"]) for r in rows if r["measured"] > 0]
    errors = [abs(r["predicted seconds"] / r["measured seconds"] - 1) for r in rows]
    p, m = [r["predicted"] for r in rows], [r["measured"] for r in rows]
    return {
        "samples": len(data[1]),
        "spearman": rank(p, m),
        "interval": rank_interval(p, m),
        "median factor": float(np.exp(np.median([abs(math.log(a / b)) for a, b in seen]))),
        "latency error": {"median": float(np.median(errors)), "95 %": float(np.quantile(errors, 0.95))},
        "rows": rows,
    }


def chosen(found: Survey, data: tuple[torch.Tensor, torch.Tensor], *, count: int) -> dict[str, Any]:
    """The chosen plan among random feasible plans of one budget, before recovery."""
    space = found.space
    base = sample_losses(space.model, data)
    limits = attempts(Budget(latency="0.3x", size="1/14x"), space.before)[0]
    decisions = choices(space.decisions)
    plan = choose(decisions, space.terms, limits=limits)
    ours = float((sample_losses(space.draft(plan.picks).finished(), data) - base).mean())
    generator = np.random.default_rng(0)
    rivals: dict[str, list[float]] = {"random objective": [], "loss times lognormal(1)": []}
    for number in range(count + count // 2):
        perturbed = number >= count
        name = list(rivals)[perturbed]
        terms = []
        for term in space.terms:
            table = term.table
            if term.resource == "loss":
                noise = generator.lognormal(0.0, 1.0, table.shape)
                table = table * noise if perturbed else generator.random(table.shape)
            terms.append(Term(term.over, term.resource, table))
        picks = choose(decisions, terms, limits=limits, gap=0.05, seconds=5).picks
        rivals[name].append(float((sample_losses(space.draft(picks).finished(), data) - base).mean()))
        print(f"  rival {number}: {rivals[name][-1]:.4f} (ours {ours:.4f})", flush=True)
    return {
        "samples": len(data[1]),
        "limits": limits,
        "chosen": ours,
        "better than the chosen": {name: sum(v < ours for v in values) for name, values in rivals.items()},
        "rivals": rivals,
    }


def budgets(found: Survey, *, latencies: list[str], sizes: list[str]) -> dict[str, Any]:
    """A grid of budgets: rounds until a measured plan keeps it."""
    space, rows = found.space, []
    for latency in latencies:
        for size in sizes:
            budget = Budget(latency=latency, size=size)
            limits = attempts(budget, space.before)[0]
            job = dataclasses.replace(found.prepared.job, budget=budget)
            row: dict[str, Any] = {"latency": latency, "size": size}
            try:
                planned = plan_within(job, space, Run(None, {}, resume=False), limits=limits, stage="plan")
                texts = [r.text for r in planned.rounds]
                row |= {"met": True, "first": "within" in texts[0], "rounds": len(texts)}
            except InfeasibleError as error:
                row |= {"met": False, "refused": str(error), "nearest": dict(error.nearest)}
            rows.append(row)
            print(f"  {row}", flush=True)
    met = [row for row in rows if row["met"]]
    return {"first plan": sum(row["first"] for row in met), "met": len(met), "budgets": len(rows), "rows": rows}


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["singles", "plans", "chosen", "budgets"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true", help="Few changes and samples: seconds, no conclusions.")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, small = time.time(), arguments.smoke
    found = survey(demo.build(), demo.task(), threads=1, seconds=0.5 if small else 4.0)
    x = held_out(64)[0]
    with evaluating(found.space.model):
        if not torch.equal(found.space.draft({}).finished()(x), found.space.model(x)):
            raise SystemExit("gate: the empty plan changes the network")
    data = held_out(128 if small else 2048)
    parts = {
        "singles": lambda: singles(found, data, most=6 if small else 100),
        "plans": lambda: plans(found, data, count=3 if small else 30, seconds=0.3 if small else 2.0),
        "chosen": lambda: chosen(found, (data[0][:1024], data[1][:1024]), count=4 if small else 200),
        "budgets": lambda: budgets(
            found,
            latencies=["0.5x"] if small else ["0.7x", "0.5x", "0.35x", "0.28x"],
            sizes=["1/4x", "1/9x"] if small else ["1/3x", "1/6x", "1/9x", "1/12x", "1/15x"],
        ),
    }
    results: dict[str, Any] = {}
    for name in arguments.parts:
        print(name, flush=True)
        results[name] = parts[name]()
        print({k: v for k, v in results[name].items() if k not in ("rows", "rivals")}, flush=True)
    if arguments.json:
        known = json.loads(arguments.json.read_text())["results"] if arguments.json.exists() else {}
        document = {
            "benchmark": "planner",
            "calibration": {
                "gamma": found.space.calibration.gamma,
                "scale": found.space.calibration.scale,
                "anchors": len(found.space.calibration.anchors),
                "plans": len(found.space.calibration.plans),
            },
            "results": {**known, **results},
            "seconds": time.time() - start,
            "environment": cost.environment().to_json(),
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
