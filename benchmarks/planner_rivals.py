"""Is a plan on one scale better than layer-wise errors and a search, or than one setting for all?

Rivals at the same stored bytes, after training, before any recovery, on the demo network:
  eke      predicted loss (second order and slope, corrected by measured anchors), MILP; members solved in A and G
  SPDY     relative layer-wise squared errors of members solved in A alone (OBC), times a coefficient a layer; dynamic
           program over bytes; the coefficients are searched by measuring stitched networks (random, then local)
  uniform  the same structure at every matrix: the best of all that keep the bytes, members solved in A, G
All choose among the same structures. SPDY is written after Frantar and Alistarh, "SPDY: accurate pruning with speedup
guarantees", 2022, and OBC after "Optimal brain compression", 2022; the time of its search is not limited.
Gate: every rival's stored bytes are within the limit, and every matrix is a member of its structure.
Losses are measured on calibration images that nothing else has seen; differences are paired over images.

    python benchmarks/planner_rivals.py [--seeds 3] [--json FILE] [--smoke]
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from eke import cost
from eke.compression import Choice, Term, choose
from eke.compression.artifact import stored_bits
from eke.compression.budget import Budget
from eke.compression.calibrate import Calibration, Meter, calibrate
from eke.compression.candidates import Decisions, Forms, fitting, predicted
from eke.compression.prepare import prepare
from eke.compression.task import cross_entropy, evaluating
from eke.curvature import Curvature
from eke.linalg import Metric
from eke.sites import Site, find
from eke.solvers import reconstruct, sweep
from eke.structures import NM, Both, Structure, Sweepable, UniformGrid, Unstructured

demo = importlib.import_module("eke.demo.task")
STRUCTURES: tuple[Structure, ...] = (
    *(UniformGrid(bits) for bits in (8, 6, 5, 4, 3, 2)),
    Both(Unstructured(0.5), UniformGrid(4)),
    Both(NM(2, 4), UniformGrid(4)),
    Both(Unstructured(0.25), UniformGrid(4)),
    Both(NM(2, 4), UniformGrid(3)),
    Both(Unstructured(0.25), UniformGrid(3)),
)
Members = dict[str, dict[int, torch.Tensor]]


def subset(seed: int, *, statistics: int, held_out: int) -> tuple[Any, Any, Any]:
    """Images for statistics, for searches and corrections, and held-out ones: disjoint, of one seed."""
    pixels, classes = demo.images("calibration")
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed))
    parts = order.split([statistics, 512, held_out, len(order) - statistics - 512 - held_out])
    return tuple((pixels[i], classes[i]) for i in parts[:3])  # type: ignore[return-value]


def sample_losses(net: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of every sample."""
    with evaluating(net):
        parts = [
            nn.functional.cross_entropy(net(x), y, reduction="none")
            for x, y in zip(data[0].split(128), data[1].split(128))
        ]
    return torch.cat(parts).double()


def stitched(model: nn.Module, sites: list[Site], members: Members, picks: Mapping[str, int]) -> nn.Module:
    """The model with the chosen members."""
    net = copy.deepcopy(model)
    for site in sites:
        if picks[site.name]:
            site.write_(net, members[site.name][picks[site.name]])
    return net


def bytes_of(sites: list[Site], options: Mapping[str, list[Structure | None]]) -> dict[str, np.ndarray]:
    """Stored bytes of every option by site."""
    return {s.name: np.asarray([stored_bits(o, s.shape) / 8 for o in options[s.name]]) for s in sites}


def solve(model: nn.Module, sites: list[Site], curvature: Curvature, options: Any, *, layerwise: bool) -> Members:
    """Members of every structure at every site: reconstructed in (A, G), or swept in A alone as OBC does."""
    found: Members = {}
    for site in sites:
        factors, weight = curvature.factors(site.name), site.read(model)
        metric = Metric(factors.a[0], None if layerwise else factors.g[0])
        found[site.name] = {0: weight}
        for number, structure in enumerate(options[site.name]):
            if structure is None:
                continue
            if layerwise and isinstance(structure, Sweepable):
                member = sweep(structure, weight, metric).weight
            else:
                member = reconstruct(structure, weight, metric, steps=30).weight
            found[site.name][number] = member
    return found


def planned(
    model: nn.Module,
    sites: list[Site],
    curvature: Curvature,
    options: Any,
    members: Members,
    sizes: Any,
    data: Any,
    limits: list[float],
) -> tuple[list[dict[str, int]], float]:
    """Eke's plans: predicted losses corrected by anchors, then the exact program."""
    start = time.perf_counter()
    forms = []
    for site in sites:
        weight = members[site.name][0].double()
        parts = [(0.0, 0.0)] + [
            predicted(curvature, {site.name: members[site.name][o].double() - weight})
            for o in range(1, len(options[site.name]))
        ]
        losses, rises = tuple(q + r for q, r in parts), tuple(r for _, r in parts)
        forms.append(Forms(site, tuple(options[site.name]), losses, rises))
    decisions = Decisions(forms=tuple(forms))
    batches = list(zip(data[0].split(64), data[1].split(64)))
    job = prepare(model, batches, loss=cross_entropy, budget=Budget(size="0.5x")).job

    class Draft:
        """What calibration asks of a draft."""

        def __init__(self, picks: Mapping[str, int]) -> None:
            self.picks = {f.site.name: picks.get(f.choice, 0) for f in forms}

        def finished(self) -> nn.Module:
            """Return the stitched model."""
            return stitched(model, sites, members, self.picks)

    calibration: Calibration = calibrate(decisions, Meter(job), Draft, plans=0)  # type: ignore[arg-type]
    corrected = calibration.corrected(decisions)
    plans = []
    for limit in limits:
        terms = [Term((f.choice,), "loss", np.asarray(f.losses)) for f in corrected.forms]
        terms += [Term((f.choice,), "size", sizes[f.site.name]) for f in corrected.forms]
        decided = [Choice(f.choice, tuple(map(repr, f.structures))) for f in corrected.forms]
        picks = choose(decided, terms, limits={"size": limit}).picks
        plans.append({f.site.name: picks[f.choice] for f in corrected.forms})
    return plans, time.perf_counter() - start


def dynamic_program(costs: np.ndarray, steps: list[np.ndarray], most: int) -> list[int]:
    """Option of each layer with the least sum of costs whose sizes, in steps, do not exceed `most`."""
    best, choice = np.zeros(most + 1), []
    for prices, step in zip(costs, steps):
        tried = np.full((len(prices), most + 1), np.inf)
        for option, (value, size) in enumerate(zip(prices, step)):
            if size <= most:
                tried[option, size:] = best[: most + 1 - size] + value
        choice.append(tried.argmin(0))
        best = tried.min(0)
    picks, left = [], most
    for step, chosen in zip(reversed(steps), reversed(choice)):
        picks.append(int(chosen[left]))
        left -= int(step[picks[-1]])
    return picks[::-1]


def spdy(
    model: nn.Module,
    sites: list[Site],
    curvature: Curvature,
    members: Members,
    sizes: Any,
    data: Any,
    limit: float,
    *,
    tries: int,
) -> tuple[dict[str, int], float]:
    """SPDY's search: coefficients of the layers' errors, each judged by the loss of the stitched network."""
    start = time.perf_counter()
    generator = np.random.default_rng(0)
    errors = []
    for site in sites:
        metric = Metric(curvature.factors(site.name).a[0])
        weight = members[site.name][0].double()
        whole = metric.loss(weight)
        errors.append(np.asarray([metric.loss(members[site.name][o].double() - weight) / whole
                                  for o in range(len(sizes[site.name]))]))  # fmt: skip
    unit = limit / 4000
    steps = [np.ceil(sizes[site.name] / unit).astype(int) for site in sites]

    def judged(c: np.ndarray) -> tuple[float, dict[str, int]]:
        costs = [ci * e for ci, e in zip(c, errors)]
        picks = dict(zip((s.name for s in sites), dynamic_program(costs, steps, 4000)))  # type: ignore[arg-type]
        return float(sample_losses(stitched(model, sites, members, picks), data).mean()), picks

    c = np.ones(len(sites))
    value, picks = judged(c)
    for _ in range(tries):
        trial = generator.random(len(sites))
        new, found = judged(trial)
        if new < value:
            value, picks, c = new, found, trial
    for share in np.linspace(0.5, 0.1, tries):
        trial = c.copy()
        index = generator.choice(len(sites), max(1, round(share * len(sites))), replace=False)
        trial[index] = generator.random(len(index))
        new, found = judged(trial)
        if new < value:
            value, picks, c = new, found, trial
    return picks, time.perf_counter() - start


def uniform(
    model: nn.Module, sites: list[Site], options: Any, members: Members, sizes: Any, data: Any, limit: float
) -> tuple[dict[str, int], str]:
    """The best single structure for all matrices that keeps the bytes (8 bits where it has no member)."""
    best: tuple[float, dict[str, int], str] | None = None
    for structure in STRUCTURES:
        picks = {}
        for site in sites:
            known = options[site.name]
            picks[site.name] = known.index(structure) if structure in known else known.index(UniformGrid(8))
        if sum(sizes[s.name][picks[s.name]] for s in sites) > limit:
            continue
        value = float(sample_losses(stitched(model, sites, members, picks), data).mean())
        if best is None or value < best[0]:
            best = value, picks, repr(structure)
    if best is None:
        raise SystemExit(f"no uniform setting keeps {limit:.0f} bytes")
    return best[1], best[2]


def interval(values: torch.Tensor) -> list[float]:
    """Mean and 95 % bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(values), (1000, len(values)), generator=generator)
    means = values[index].mean(1)
    return [float(values.mean()), float(means.quantile(0.025)), float(means.quantile(0.975))]


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, small = time.time(), arguments.smoke
    model = demo.build()
    sites = [site for site in find(model) if site.hookable and (not small or site.shape[1] < 100)]
    rows = []
    for seed in range(1 if small else arguments.seeds):
        first, second, held = subset(seed, statistics=128 if small else 1024, held_out=128 if small else 2048)
        curvature = Curvature.estimate(
            model, cross_entropy, list(zip(first[0].split(64), first[1].split(64))), sites, max_locations=49,
            corrected_samples=128,
        )  # fmt: skip
        options = {
            s.name: [None, *sorted((o for o in STRUCTURES if fitting(o, s.shape)), key=lambda o, s=s: -o.bits(s.shape))]
            for s in sites
        }
        sizes = bytes_of(sites, options)
        whole = sum(float(sizes[s.name][0]) for s in sites)
        limits = [share * whole for share in ((1 / 8,) if small else (1 / 9, 1 / 12, 1 / 14))]
        clock = time.perf_counter()
        ours = solve(model, sites, curvature, options, layerwise=False)
        solved = time.perf_counter() - clock
        theirs = solve(model, sites, curvature, options, layerwise=True)
        plans, seconds = planned(model, sites, curvature, options, ours, sizes, second, limits)
        base = sample_losses(model, held)
        for limit, plan in zip(limits, plans):
            other, searched = spdy(model, sites, curvature, theirs, sizes, second, limit, tries=3 if small else 40)
            one, name = uniform(model, sites, options, ours, sizes, second, limit)
            swapped = stitched(model, sites, ours, other)
            nets = {
                "eke": stitched(model, sites, ours, plan),
                "SPDY over OBC": stitched(model, sites, theirs, other),
                "SPDY's plan, eke's members": swapped,
                f"uniform ({name})": stitched(model, sites, ours, one),
            }
            for picks in (plan, other, one):
                if sum(float(sizes[s.name][picks[s.name]]) for s in sites) > limit * 1.0001:
                    raise SystemExit("gate: a plan exceeds the bytes")
            losses = {label: sample_losses(net, held) for label, net in nets.items()}
            row = {
                "seed": seed,
                "smaller": whole / limit,
                "seconds": {"solve": solved, "plan all": seconds, "SPDY search": searched},
                "increase": {label: interval(found - base) for label, found in losses.items()},
                "rival minus eke": {
                    label: interval(found - losses["eke"]) for label, found in losses.items() if label != "eke"
                },
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        document = {
            "benchmark": "planner_rivals",
            "rows": rows,
            "seconds": time.time() - start,
            "environment": cost.environment().to_json(),
        }
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
