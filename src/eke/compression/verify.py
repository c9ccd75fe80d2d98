"""Measure the result against the original, and open the report split once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from .. import cost
from .._types import Counts
from ..report import PlanLine, Speedup, Split
from ..sites import find
from ..structures import UniformGrid
from . import apply, measure
from .artifact import Blueprint
from .intervals import samples_to_prove
from .job import Job
from .plan import Plan
from .result import Evidence
from .rounds import Planned
from .space import Space
from .task import evaluating


def verify(
    job: Job,
    space: Space,
    net: nn.Module,
    blueprint: Blueprint,
    *,
    found: Planned,
    scores: Mapping[str, float | Counts],
    notes: Sequence[str],
) -> Evidence:
    """Measure the result against the original and open the report split.

    Args:
        job: What was asked.
        space: What could be changed.
        net: The result, deployed.
        blueprint: What was done to the architecture.
        found: What was chosen, and how.
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
    with evaluating(job.model):
        speedups = []
        for against, rival in (("the original", job.model), ("the original, folded, in the same memory format", base)):
            compared = cost.compare_latency(
                measure.runner(rival, job.inputs),
                measure.runner(net, job.inputs),
                seconds=job.seconds,
                threads=job.threads,
                seed=job.seed,
            )
            speedups.append(
                Speedup(
                    compared.ratio,
                    compared.interval,
                    compared.confidence,
                    compared.faster,
                    compared.threads,
                    batch,
                    against,
                )
            )
    after["latency"] = space.before["latency"] / speedups[0].ratio
    job.progress("verify", 0.7, "opening the report split")
    if job.report is not None:
        scores["before"] = measure.evaluate_on(job.model, job.report, of="the original model on the report split")
        scores["after"] = measure.evaluate_on(net, job.report, of="the compressed model on the report split")
    else:
        scores["before"], scores["after"] = scores["selection before"], scores["selection after"]
    warnings = []
    needed = samples_to_prove(job.budget.drop) if job.budget.drop is not None else 0
    total = scores["after"].total if isinstance(scores["after"], Counts) else None
    if total is not None and total < needed:
        warnings.append(
            f"{total} report samples cannot prove a drop of at most {job.budget.max_drop}: {needed} are needed."
        )
    lossless = {**space.lossless, "size": float(cost.model_bytes(base))}
    job.progress("verify", 1.0, "done")
    return Evidence(
        before=space.before,
        after=after,
        scores=scores,
        speedups=tuple(speedups),
        plan=_plan_lines(job, space, net, found.plan),
        rounds=found.rounds,
        splits=_splits(job, scores),
        notes=tuple(notes),
        warnings=tuple(warnings),
        environment=_environment(job, space),
        lossless=lossless,
    )


def _plan_lines(job: Job, space: Space, net: nn.Module, plan: Plan) -> tuple[PlanLine, ...]:
    lines = []
    for width in space.widths:
        option, size = plan.picks[width.choice], width.group.size
        change = f"keeps {width.kept[option]} of {size} channels" if option else f"keeps all {size} channels"
        lines.append(PlanLine(width.choice, change, predicted_loss=width.losses[option], maturity="exact"))
    after = {site.name: site.shape for site in find(net)}
    arguments = measure.positional(job.inputs)
    with evaluating(job.model):
        seconds = [
            cost.module_times(m, *arguments, seconds=0.2 * job.seconds, threads=job.threads) for m in (job.model, net)
        ]
    for grid in space.grids:
        option, site = plan.picks[grid.choice], grid.site
        structure, shape = grid.structures[option], after[site.name]
        shapes = f"{shape[0]} x {shape[1]}"
        if shape != site.shape:
            shapes = f"{site.shape[0]} x {site.shape[1]} to {shapes}"
        stored = structure.bits(shape) // 8 if structure is not None else 4 * shape[0] * shape[1]
        milliseconds = [1e3 * times[site.module_name] if site.module_name in times else None for times in seconds]
        lines.append(
            PlanLine(
                site.name,
                f"{shapes}, {f'{structure.code_bits} bits' if isinstance(structure, UniformGrid) else 'float32'}",
                predicted_loss=grid.losses[option],
                bytes_before=4 * site.shape[0] * site.shape[1],
                bytes_after=stored,
                milliseconds_before=milliseconds[0],
                milliseconds_after=milliseconds[1],
                maturity="exact",
            )
        )
    return tuple(lines)


def _splits(job: Job, scores: Mapping[str, float | Counts]) -> tuple[Split, ...]:
    def total(label: str) -> int | None:
        score = scores[label]
        return score.total if isinstance(score, Counts) else None

    found = [Split("calibration", job.samples, 3, "statistics, the original's answers, recovery")]
    if job.evaluate is not None:
        found.append(Split("selection", total("selection after"), 3, "check of the plan and of the result"))
    if job.report is not None:
        found.append(Split("report", total("after"), 1, "the published scores, of original and result together"))
    return tuple(found)


def _environment(job: Job, space: Space) -> dict[str, str]:
    found = {str(key): str(value) for key, value in cost.environment().to_json().items()}
    found["memory format"] = space.memory_format
    found["folded"] = str(len(space.folded))
    found["threads"] = str(job.threads)
    return found
