"""Does choosing 2:4 support and int3 values together, in the curvature's metric, do at least 10 times less damage?

Every matrix of the demo's network whose columns 4 divides is replaced by a member of Both(NM(2, 4), UniformGrid(3)):
by plain projection, support first and grid after; by rivals that use a part of the metric or one solver alone; and by
the composed solver `reconstruct`. Statistics come from disjoint subsets of the calibration images, one a seed; damage
is the mean loss increase on calibration images that none of them saw, of each matrix alone and of all together.

Gate: every result is a member (projection leaves it unchanged, 2 of 4 entries, at most 7 levels a row, packing loses
nothing), and no solver's loss in its own metric is above that of plain projection.
Intervals: 95 %, percentile bootstrap over seeds and images at once. One thread.

    python benchmarks/joint.py [--smoke] [--seeds 4] [--samples 768] [--write benchmarks/results/joint.json]

Needs about 20 minutes on one core, the smoke run less than one.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eke import __version__
from eke.cost import environment
from eke.curvature import Curvature
from eke.linalg import Metric
from eke.sites import Site, find
from eke.solvers import admm, reconstruct, sweep
from eke.structures import NM, Both, UniformGrid

SPARSE, GRID = NM(2, 4), UniformGrid(3)
STRUCTURE = Both(SPARSE, GRID)
LEVELS = 7
GOAL = 10.0
PLAIN, JOINT = "plain projection", "reconstruct"
SMOKE_SITES = ("blocks.1.shortcut.0", "blocks.2.shortcut.0", "classifier")
REPLICATES = 2000

Solver = Callable[[Tensor, Metric], tuple[Tensor, str]]
"""`solver(weight, metric)`: a member, and what found it."""


def plain(weight: Tensor, _metric: Metric) -> tuple[Tensor, str]:
    """Project on 2:4, then on the grid: no data are used."""
    return GRID.project(SPARSE.project(weight)), "projection"


def weighted(weight: Tensor, metric: Metric) -> tuple[Tensor, str]:
    """Project with squared errors weighted by the metric's diagonal."""
    return STRUCTURE.project(weight, metric.score(tuple(weight.shape)).to(weight.dtype)), "weighted projection"


def sweep_alone(weight: Tensor, metric: Metric) -> tuple[Tensor, str]:
    """Sweep columns knowing the inputs only (G = I), as OBC and GPTQ do; support by magnitude times input."""
    solution = sweep(STRUCTURE, weight, Metric(metric.a))
    return solution.weight, solution.method


def admm_alone(weight: Tensor, metric: Metric) -> tuple[Tensor, str]:
    """Alternating directions in the whole metric, and nothing else."""
    return admm(STRUCTURE, weight, metric), "admm"


def one_after_the_other(weight: Tensor, metric: Metric) -> tuple[Tensor, str]:
    """Solve for 2:4 in the whole metric, then round what is left, weighted by the diagonal."""
    sparse = reconstruct(SPARSE, weight, metric)
    score = metric.score(tuple(weight.shape)).to(weight.dtype)
    return STRUCTURE.project(sparse.weight, score), f"{sparse.method}, then weighted projection"


def joint(weight: Tensor, metric: Metric) -> tuple[Tensor, str]:
    """Choose support and values together: the best of what the composed solver tries."""
    solution = reconstruct(STRUCTURE, weight, metric)
    return solution.weight, solution.method


SOLVERS: dict[str, Solver] = {
    PLAIN: plain,
    "weighted projection": weighted,
    "sweep alone, inputs only": sweep_alone,
    "ADMM alone": admm_alone,
    "2:4 solved, then rounded": one_after_the_other,
    JOINT: joint,
}


@dataclass
class Found:
    """What one solver did with the statistics of one seed: losses by image, predictions and seconds.

    Args:
        increases: Loss increase by image (images,), by matrix name and for "all".
        selection: Mean loss increase and right answers on the selection images, all matrices replaced.
        predicted: By matrix name: loss in the metric, corrected quadratic, first-order part.
        methods: By matrix name, what found the member.
        seconds: CPU seconds of the solver, all matrices.
    """

    increases: dict[str, Tensor] = field(default_factory=dict)
    selection: dict[str, float] = field(default_factory=dict)
    predicted: dict[str, dict[str, float]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def scored(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the loss of every image, and how many are right."""
    losses, right = [], 0
    with torch.inference_mode():
        for images, classes in zip(data[0].split(128), data[1].split(128)):
            logits = model(images)
            losses.append(F.cross_entropy(logits, classes, reduction="none"))
            right += int((logits.argmax(1) == classes).sum())
    return torch.cat(losses).double(), right


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def gate(name: str, weight: Tensor, member: Tensor) -> None:
    """Stop unless the matrix is a member of the structure."""
    shape = (weight.shape[0], weight.shape[1])
    problems = []
    if not torch.equal(STRUCTURE.project(member), member):
        problems.append("projection changes it")
    if int((member.reshape(-1, 4) != 0).sum(1).max()) > 2:
        problems.append("more than 2 of 4 entries")
    if max(len(row.unique()) for row in member) > LEVELS:
        problems.append(f"more than {LEVELS} levels in a row")
    if not torch.equal(STRUCTURE.decode(STRUCTURE.encode(member), shape), member):
        problems.append("packing changes it")
    if problems:
        sys.exit(f"gate: {name}: {', '.join(problems)}")


def gate_losses(name: str, weight: Tensor, members: Mapping[str, Tensor], *, metric: Metric) -> None:
    """Stop if a solver that promises not to be worse than plain projection in its own metric is."""
    for solver, own in {JOINT: metric, "ADMM alone": metric, "sweep alone, inputs only": Metric(metric.a)}.items():
        loss, least = (own.loss(members[key].double() - weight.double()) for key in (solver, PLAIN))
        if loss > least:
            sys.exit(f"gate: {solver} at {name} has loss {loss:.6g} in its metric, plain projection {least:.6g}")


def one_seed(
    model: nn.Module,
    sites: Sequence[Site],
    statistics: tuple[Tensor, Tensor],
    *,
    held_out: tuple[Tensor, Tensor],
    selection: tuple[Tensor, Tensor],
    before: tuple[Tensor, Tensor, int],
    known: Found | None,
) -> tuple[dict[str, Found], dict[str, float]]:
    """Solve for every matrix with the statistics of one subset and measure the damage.

    Args:
        model: The network; written to and restored.
        sites: Its matrices.
        statistics: Images and classes of the subset.
        held_out: Images and classes for the damage.
        selection: Images and classes that the network was not trained on.
        before: Losses of the untouched network on both, and its right answers on the latter.
        known: What plain projection did for another seed: it uses no data.

    Returns:
        What was found by solver, and the coherence by matrix.
    """
    batches = list(zip(statistics[0].split(64), statistics[1].split(64)))
    curvature = Curvature.estimate(model, mean_loss, batches, sites, max_locations=49, corrected_samples=128)
    originals = {site.name: site.read(model) for site in sites}
    found = {name: Found() for name in SOLVERS}
    members: dict[str, dict[str, Tensor]] = {name: {} for name in SOLVERS}
    for site in sites:
        factors, weight = curvature.factors(site.name), originals[site.name]
        metric = Metric(factors.a[0], factors.g[0])
        for name, solver in SOLVERS.items():
            start = time.process_time()
            member, found[name].methods[site.name] = solver(weight, metric)
            found[name].seconds += time.process_time() - start
            member = member.to(weight.dtype)
            gate(f"{name} at {site.name}", weight, member)
            members[name][site.name] = member
            change = member - weight
            found[name].predicted[site.name] = {
                "metric": metric.loss(change),
                "corrected": curvature.quadratic(site.name, change),
                "linear": curvature.linear(site.name, change),
            }
        gate_losses(site.name, weight, {name: members[name][site.name] for name in SOLVERS}, metric=metric)
    for name, outcome in found.items():
        if name == PLAIN and known is not None:
            outcome.increases, outcome.selection = known.increases, known.selection
            continue
        for site in sites:
            site.write_(model, members[name][site.name])
            outcome.increases[site.name] = scored(model, held_out)[0] - before[0]
            site.write_(model, originals[site.name])
        for site in sites:
            site.write_(model, members[name][site.name])
        outcome.increases["all"] = scored(model, held_out)[0] - before[0]
        losses, right = scored(model, selection)
        outcome.selection = {"increase": float((losses - before[1]).mean()), "right": right}
        for site in sites:
            site.write_(model, originals[site.name])
        print(f"  {name:28} mean of single {_single(outcome):+.5f}  all {float(outcome.increases['all'].mean()):+.5f}")
    return found, {site.name: curvature.factors(site.name).coherence for site in sites}


def _single(outcome: Found) -> float:
    alone = [float(values.mean()) for name, values in outcome.increases.items() if name != "all"]
    return sum(alone) / len(alone)


def bootstrap(runs: Sequence[Mapping[str, Found]], names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Draw seeds and images with replacement.

    Args:
        runs: By seed, what each solver found.
        names: Matrices.

    Returns:
        By solver, for "single" (mean over matrices) and "all": (1 + replicates,) mean loss increases; the first is that
        of the data themselves.
    """
    generator = torch.Generator().manual_seed(0)
    images = runs[0][PLAIN].increases["all"].numel()

    def shares(count: int) -> Tensor:
        drawn = torch.randint(count, (REPLICATES, count), generator=generator)
        counts = torch.zeros(REPLICATES, count, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(REPLICATES, count, dtype=torch.float64)
        )
        return torch.cat([torch.ones(1, count, dtype=torch.float64), counts]) / count

    over_images, over_seeds = shares(images), shares(len(runs))
    found: dict[str, dict[str, Tensor]] = {}
    for solver in SOLVERS:
        single = torch.stack([torch.stack([run[solver].increases[n] for n in names]).mean(0) for run in runs])
        together = torch.stack([run[solver].increases["all"] for run in runs])
        found[solver] = {
            key: ((over_images @ values.T) * over_seeds).sum(1)
            for key, values in (("single", single), ("all", together))
        }
    return found


def interval(values: Tensor) -> dict[str, Any]:
    """Return the value and its 95 % interval; an end that is not finite (a rival without damage) becomes null."""
    low, high = (float(values[1:].quantile(q, interpolation="nearest")) for q in (0.025, 0.975))
    ends = [end if math.isfinite(end) else None for end in (low, high)]
    return {"value": float(values[0]), "interval": ends}


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return how many times more damage the first does: infinite where the second does none, 1 where they are equal."""
    found = torch.where(denominator > 0, numerator / denominator.clamp_min(1e-30), torch.full_like(numerator, math.inf))
    return torch.where(numerator == denominator, torch.ones_like(found), found)


def summarise(runs: Sequence[Mapping[str, Found]], names: Sequence[str]) -> dict[str, Any]:
    """Return the table by solver, the ratios and the verdict."""
    drawn = bootstrap(runs, names)
    rows = {}
    for solver in SOLVERS:
        kinds = ("metric", "corrected", "linear")
        totals = {kind: [sum(run[solver].predicted[name][kind] for name in names) for run in runs] for kind in kinds}
        rows[solver] = {
            "single": interval(drawn[solver]["single"]),
            "all": interval(drawn[solver]["all"]),
            "by_seed": {
                "single": [_single(run[solver]) for run in runs],
                "all": [float(run[solver].increases["all"].mean()) for run in runs],
            },
            "by_matrix": {
                name: {
                    "measured": sum(float(run[solver].increases[name].mean()) for run in runs) / len(runs),
                    "predicted": {
                        kind: sum(run[solver].predicted[name][kind] for run in runs) / len(runs) for kind in kinds
                    },
                }
                for name in names
            },
            "predicted_single": {kind: sum(totals[kind]) / len(runs) / len(names) for kind in kinds},
            "predicted_all": {kind: sum(totals[kind]) / len(runs) for kind in kinds},
            "methods": [run[solver].methods for run in runs],
            "selection_all": [run[solver].selection for run in runs],
            "cpu_seconds": [round(run[solver].seconds, 2) for run in runs],
        }
    ratios = {
        f"{solver} / {JOINT}": {
            kind: interval(ratio(drawn[solver][kind], drawn[JOINT][kind])) for kind in ("single", "all")
        }
        for solver in SOLVERS
        if solver != JOINT
    }
    reached = {}
    for kind in ("single", "all"):
        least = ratios[f"{PLAIN} / {JOINT}"][kind]
        low = least["interval"][0]
        reached[kind] = {"point": least["value"] >= GOAL, "whole_interval": low is None or low >= GOAL}
    return {"rows": rows, "ratios": ratios, "at_least_10_times_less": reached}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--samples", type=int, default=768)
    parser.add_argument("--smoke", action="store_true", help="three small matrices and few images")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    demo = importlib.import_module("eke.demo.task")
    model, pixels = demo.build(), demo.images("calibration")
    order = torch.randperm(len(pixels[0]), generator=torch.Generator().manual_seed(0))
    images, classes = pixels[0][order], pixels[1][order]
    sites = [site for site in find(model) if site.hookable and site.groups == 1 and site.shape[1] % 4 == 0]
    seeds, samples, selection = options.seeds, options.samples, demo.images("selection")
    held_out = (images[seeds * samples :], classes[seeds * samples :])
    if options.smoke:
        sites = [site for site in sites if site.name in SMOKE_SITES]
        seeds, samples = 3, 128
        held_out, selection = (images[-256:], classes[-256:]), (selection[0][:256], selection[1][:256])
    if len(images) - seeds * samples < 256:
        parser.error(f"{seeds} subsets of {samples} leave fewer than 256 of {len(images)} images to measure on")
    names = [site.name for site in sites]
    losses = scored(model, held_out)[0]
    on_selection, right = scored(model, selection)
    runs: list[dict[str, Found]] = []
    coherence = []
    for seed in range(seeds):
        print(f"seed {seed}: images {seed * samples} to {(seed + 1) * samples - 1} of the shuffled order", flush=True)
        part = slice(seed * samples, (seed + 1) * samples)
        found, agreement = one_seed(
            model,
            sites,
            (images[part], classes[part]),
            held_out=held_out,
            selection=selection,
            before=(losses, on_selection, right),
            known=runs[0][PLAIN] if runs else None,
        )
        runs.append(found)
        coherence.append(agreement)
    document = {
        "question": __doc__.split("\n", 1)[0] if __doc__ else "",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "eke": __version__,
        "environment": environment().to_json(),
        "settings": {
            "smoke": options.smoke,
            "structure": str(STRUCTURE),
            "matrices": {site.name: list(site.shape) for site in sites},
            "seeds": seeds,
            "images_of_statistics": samples,
            "held_out_images": len(held_out[0]),
            "selection_images": len(selection[0]),
            "max_locations": 49,
            "corrected_samples": 128,
            "bootstrap_replicates": REPLICATES,
            "goal": GOAL,
        },
        "gate": "every result a member; no solver above plain projection in its own metric",
        "before": {"held_out_loss": float(losses.mean()), "selection_loss": float(on_selection.mean()), "right": right},
        "coherence": coherence,
        **summarise(runs, names),
    }
    show(document)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        options.write.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def show(document: Mapping[str, Any]) -> None:
    """Print the table."""
    for solver, row in document["rows"].items():
        single, together = row["single"], row["all"]
        predicted, seconds = row["predicted_all"]["corrected"], sum(row["cpu_seconds"])
        print(
            f"{solver:28} single {single['value']:+.6f} {_ends(single)}  all {together['value']:+.5f} {_ends(together)}"
        )
        print(f"{'':28} predicted for all {predicted:.5f}  CPU {seconds:.0f} s")
    for name, kinds in document["ratios"].items():
        print(f"{name:42} " + "  ".join(f"{k} {v['value']:.1f}x {_ends(v)}" for k, v in kinds.items()))
    print(json.dumps(document["at_least_10_times_less"]))


def _ends(value: Mapping[str, Any]) -> str:
    return "[" + ", ".join("inf" if end is None else f"{end:.4g}" for end in value["interval"]) + "]"


if __name__ == "__main__":
    main()
