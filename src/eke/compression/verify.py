"""Measure the result against the original, and open the report split once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import cost
from .._types import Counts
from ..report import PlanLine, Speedup, Split
from ..sites import Site, find
from ..structures import Structure, UniformGrid
from . import apply, measure
from .artifact import Blueprint
from .candidates import Grids, Widths
from .checkpoint import Run
from .checks import count_samples
from .intervals import samples_to_prove
from .job import Job
from .plan import Plan
from .result import Evidence
from .rounds import Planned
from .space import STATISTICS, Space
from .task import evaluating


def verify(
    job: Job,
    space: Space,
    net: nn.Module,
    blueprint: Blueprint,
    *,
    found: Planned,
    run: Run,
    scores: Mapping[str, float | Counts],
    notes: Sequence[str] = (),
) -> Evidence:
    """Measure the result against the original and open the report split.

    Args:
        job: What was asked.
        space: What could be changed.
        net: The result, deployed.
        blueprint: What was done to the architecture.
        found: What was chosen, and how.
        run: Counts how often the splits are opened, and keeps the report split's scores once they are known.
        scores: Scores so far, by label.
        notes: Remarks so far.

    Returns:
        Everything that was measured.
    """
    job.progress("verify", 0.0, "score on the selection split")
    scores = {**scores, "selection after": job.score(net, of="the compressed model")}
    job.progress("verify", 0.3, "latency against the original")
    after = measure.costs(net, job.inputs)
    after["size"] = float(measure.packed_bytes(net, blueprint.grids))
    base = apply.shaped(
        job.model, apply.surgery(space.widths, {}), folded=space.folded, memory_format=space.memory_format
    )
    batch = measure.batch_size(job.inputs)
    rivals = {"the original": job.model, "the original, folded, in the same memory format": base}
    compared = {}
    with evaluating(job.model):
        for against, rival in rivals.items():
            compared[against] = cost.compare_latency(
                measure.runner(rival, job.inputs),
                measure.runner(net, job.inputs),
                seconds=job.seconds,
                threads=job.threads,
                seed=job.seed,
            )
    speedups = [
        Speedup(c.ratio, c.interval, c.confidence, c.faster, c.threads, batch, against)
        for against, c in compared.items()
    ]
    first, second = compared.values()
    before = {**space.before, "latency": first.a.lower_quartile}
    after["latency"] = before["latency"] / first.ratio
    scores |= _reported(job, run, {"before": job.model, "after": net, "folded": base}, scores)
    warnings = []
    needed = samples_to_prove(job.budget.drop) if job.budget.drop is not None else 0
    total = scores["after"].total if isinstance(scores["after"], Counts) else None
    if total is not None and total < needed:
        warnings.append(
            f"{total} report samples cannot prove a drop of at most {job.budget.max_drop}: {needed} are needed."
        )
    lossless = {"seconds": second.a.lower_quartile, "size": float(cost.model_bytes(base))}
    job.progress("verify", 1.0, "done")
    return Evidence(
        before=before,
        after=after,
        scores=scores,
        speedups=tuple(speedups),
        plan=_plan_lines(job, space, net, found.plan),
        rounds=found.rounds,
        splits=_splits(job, scores, run.openings()),
        notes=tuple(notes),
        warnings=tuple(warnings),
        environment=_environment(job, space),
        lossless=lossless,
        threads=torch.get_num_threads(),
    )


def _reported(
    job: Job, run: Run, models: Mapping[str, nn.Module], scores: Mapping[str, float | Counts]
) -> dict[str, float | Counts]:
    """Return all scores on the report split, opened once for all; a continued run does not open it again."""
    if job.report is None:
        before = scores["selection before"]
        return {"before": before, "after": scores["selection after"], "folded": before}
    stored = run.get("report")
    if stored is None:
        job.progress("verify", 0.7, "opening the report split")
        run.opening("report")
        names = {
            "before": "the original model",
            "after": "the compressed model",
            "folded": "the original model, folded",
        }
        found = {
            label: measure.evaluate_on(model, job.report, of=f"{names[label]} on the report split")
            for label, model in models.items()
        }
        stored = run.put("report", {label: _plain(score) for label, score in found.items()})
    return {label: _score(value) for label, value in stored.items()}


def _plain(score: float | Counts) -> float | dict[str, Any]:
    if not isinstance(score, Counts):
        return score
    outcomes = None if score.outcomes is None else [int(right) for right in score.outcomes]
    return {"correct": score.correct, "total": score.total, "outcomes": outcomes, "order": score.order}


def _score(value: float | dict[str, Any]) -> float | Counts:
    if not isinstance(value, dict):
        return value
    outcomes = None if value["outcomes"] is None else torch.tensor(value["outcomes"], dtype=torch.bool)
    return Counts(value["correct"], value["total"], outcomes, value["order"])


class _Alone:
    """The measured loss increase of single decisions on some calibration samples, as long as its time lasts."""

    def __init__(self, job: Job, *, samples: int = 512) -> None:
        self.job, self.batches, seen = job, [], 0
        for batch in job.batches:
            self.batches.append(batch)
            seen += count_samples(batch)
            if seen >= samples:
                break
        self.end = time.monotonic() + 10 * job.seconds
        self.base = self._loss(job.model)

    def __call__(self, build: Callable[[], nn.Module]) -> float | None:
        if time.monotonic() > self.end:
            return None
        return self._loss(build()) - self.base

    def _loss(self, net: nn.Module) -> float:
        with evaluating(net):
            return sum(float(self.job.loss(net, batch)) for batch in self.batches) / len(self.batches)


def _plan_lines(job: Job, space: Space, net: nn.Module, plan: Plan) -> tuple[PlanLine, ...]:
    alone = _Alone(job)
    lines = [_width_line(job, space, width, plan.picks[width.choice], alone) for width in space.widths]
    after = {site.name: site.shape for site in find(net)}
    arguments = measure.positional(job.inputs)
    with evaluating(job.model):
        seconds = [
            cost.module_times(m, *arguments, seconds=0.2 * job.seconds, threads=job.threads) for m in (job.model, net)
        ]
    for grid in space.grids:
        times = [1e3 * found[grid.site.module_name] if grid.site.module_name in found else None for found in seconds]
        lines.append(_grid_line(job, grid, plan.picks[grid.choice], after[grid.site.name], (times[0], times[1]), alone))
    return tuple(lines)


def _width_line(job: Job, space: Space, width: Widths, option: int, alone: _Alone) -> PlanLine:
    size = width.group.size
    if not option:
        return PlanLine(width.choice, f"keeps all {size} channels", predicted_loss=0.0, maturity="exact")
    measured = alone(
        lambda: apply.cut(job.model, [width], {width.choice: option}, sites=space.sites, curvature=space.curvature)
    )
    change = f"keeps {width.kept[option]} of {size} channels"
    return PlanLine(width.choice, change, predicted_loss=width.losses[option], measured_loss=measured, maturity="exact")


def _grid_line(
    job: Job,
    grid: Grids,
    option: int,
    shape: tuple[int, int],
    milliseconds: tuple[float | None, float | None],
    alone: _Alone,
) -> PlanLine:
    site, structure = grid.site, grid.structures[option]
    shapes = f"{shape[0]} x {shape[1]}"
    if shape != site.shape:
        shapes = f"{site.shape[0]} x {site.shape[1]} to {shapes}"
    measured = None
    if structure is not None:
        measured = alone(lambda: _rounded(job.model, site, structure))
    return PlanLine(
        site.name,
        f"{shapes}, {f'{structure.code_bits} bits' if isinstance(structure, UniformGrid) else 'float32'}",
        predicted_loss=grid.losses[option],
        measured_loss=measured,
        bytes_before=4 * site.shape[0] * site.shape[1],
        bytes_after=structure.bits(shape) // 8 if structure is not None else 4 * shape[0] * shape[1],
        milliseconds_before=milliseconds[0],
        milliseconds_after=milliseconds[1],
        maturity="exact",
    )


def _rounded(model: nn.Module, site: Site, structure: Structure) -> nn.Module:
    net = copy.deepcopy(model)
    site.write_(net, structure.project(site.read(net)))
    return net


def _splits(job: Job, scores: Mapping[str, float | Counts], openings: Mapping[str, int]) -> tuple[Split, ...]:
    def total(label: str) -> int | None:
        score = scores[label]
        return score.total if isinstance(score, Counts) else None

    uses = {
        "calibration": (job.samples, f"statistics (at most {STATISTICS} samples), the original's answers, recovery"),
        "selection": (total("selection after"), "checks of the original, the cut and the recovered model"),
        "report": (total("after"), "the published scores, of original and result together"),
    }
    return tuple(Split(name, *uses[name][:1], openings[name], uses[name][1]) for name in uses if name in openings)


def _environment(job: Job, space: Space) -> dict[str, str]:
    found = {str(key): str(value) for key, value in cost.environment().to_json().items()}
    found["memory format"] = space.memory_format
    found["folded"] = str(len(space.folded))
    found["threads"] = str(job.threads)
    return found
