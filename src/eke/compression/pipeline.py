"""The main job: a model, data and a budget go in; a cheaper model with the proof that it is cheaper comes out.

    statistics -> candidates -> costs -> (plan -> measure)* -> recover -> pack -> verify

Each stage is recorded when it is finished, so a run that was killed continues where it stood and, costs being recorded
before they are used, ends with the same result. Calibration batches serve statistics and recovery, `evaluate` (the
selection split) the check of the result, and `report` is opened once, at the end, for original and result together.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import nn

from .. import cost
from .._types import Batch, Counts, Evaluate, Loss
from ..curvature import Curvature
from ..report import PlanLine, Round, Speedup, Split
from ..sites import ChannelGroup, Site, channel_groups, find, unwrap
from ..structures import UniformGrid
from . import apply, candidates, measure, tables
from .artifact import Blueprint, pack
from .budget import RESOURCES, Budget
from .checkpoint import Run, read_tensors, write_tensors
from .checks import check_batches, check_report, check_runs, check_task
from .deploy import Pair
from .intervals import samples_to_prove
from .lessons import Lessons, collect
from .measure import Inputs
from .plan import InfeasibleError, Plan, Term, choose
from .recover import Recovery, recover_
from .result import Evidence, Result, describe
from .task import Forward, Task, evaluating, split_batch
from .task import forward as default_forward

GRIDS = tuple(UniformGrid(bits) for bits in (8, 6, 5, 4, 3))
"""Grids that matrices may be stored on by default: one scale a row."""

Progress = Callable[[str, float, str], None]
"""`progress(stage, share, text)`: called as a run advances."""

_ROUNDS = 3
_MARGIN = {"latency": 0.97, "size": 0.995, "peak_memory": 0.995}


@dataclass(frozen=True)
class Job:
    """What `compress` was asked for, checked."""

    model: nn.Module
    batches: Iterable[Batch]
    loss: Loss
    budget: Budget
    evaluate: Evaluate | None
    report: Evaluate | None
    inputs: Inputs
    forward: Forward
    grids: tuple[UniformGrid, ...]
    recovery: Recovery
    skip: tuple[str, ...]
    seed: int
    threads: int | None
    samples: int
    progress: Progress

    def score(self, model: nn.Module, *, of: str) -> float | Counts:
        """Score on the selection split; without one, minus the mean calibration loss."""
        if self.evaluate is not None:
            return measure.evaluate_on(model, self.evaluate, of=of)
        with evaluating(model):
            losses = [float(self.loss(model, batch)) for batch in self.batches]
        return measure.checked_score(-sum(losses) / len(losses), of=of)


@dataclass(frozen=True)
class Space:
    """All that may be changed and what it costs."""

    sites: tuple[Site, ...]
    curvature: Curvature
    widths: tuple[candidates.Widths, ...]
    grids: tuple[candidates.Grids, ...]
    folded: tuple[Pair, ...]
    memory_format: str
    lossless: Mapping[str, float]
    before: Mapping[str, float]
    terms: tuple[Term, ...]


def compress(
    model: nn.Module,
    batches: Iterable[Batch] | Task,
    *,
    loss: Loss | None = None,
    budget: Budget,
    evaluate: Evaluate | None = None,
    report: Evaluate | None = None,
    example: Any = None,
    forward: Forward | None = None,
    grids: Sequence[UniformGrid] = GRIDS,
    recovery: Recovery | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    threads: int | None = None,
    folder: str | pathlib.Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
    title: str | None = None,
) -> Result:
    """Make a model cheaper within a budget, and measure what became of it.

    Args:
        model: The model; never changed. `torch.compile` and DDP wrappers are taken off.
        batches: Calibration batches, iterated several times: a list or a DataLoader, not an iterator. Some hundred
            samples do for statistics; recovery learns from all of them. Or a `Task`, which brings loss, evaluation,
            report and forward with it.
        loss: `loss(model, batch)`: mean loss of a batch; needed unless a `Task` brings it.
        budget: What may be spent.
        evaluate: `evaluate(model)`: score on the selection split, larger is better, as a float or `Counts`. Without
            it the score is minus the mean calibration loss.
        report: The same on the report split, opened once at the end. Without it the selection split is reported.
        example: What the model is called with for measurements: a tensor, tuple or dictionary; None takes the first
            calibration batch.
        forward: Calls the model on a batch; None passes on the inputs of `(inputs, targets)` or of a dictionary.
        grids: Grids that matrices may be stored on.
        recovery: How to train after cutting; None for the default.
        skip: Modules or sites to leave as they are.
        seed: Of recovery and measurements.
        threads: Torch threads of latency measurements; None keeps their number.
        folder: Where an interrupted run can be continued from; None keeps everything in memory.
        resume: Continue the run in `folder`.
        progress: Called as the run advances.
        recipe: Kept with the artifact.
        title: Of the report.

    Returns:
        The result; `result.save(folder)` writes the artifact.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the data do not fit the model, nothing can be compressed, or no plan keeps the budget.
    """  # noqa: DOC502
    bare, remarks = _unwrapped(model)
    task = _as_task(batches, loss=loss, forward=forward)
    if isinstance(batches, Task):
        evaluate = evaluate or (lambda net: task.score(net, task.selection))
        report = report or (lambda net: task.score(net, task.report))
        check_task(task, budget.drop)
    samples, first = check_batches(task.calibration)
    job = Job(
        bare, task.calibration, task.loss, budget, evaluate, report, _inputs(example, first), task.forward, tuple(grids),
        recovery or Recovery(), tuple(skip), seed, threads, samples, progress or (lambda stage, share, text: None),
    )  # fmt: skip
    check_runs(bare, first, loss=job.loss, forward=job.forward)
    notes, warnings = list(remarks), []
    selection = job.score(bare, of="the original model")
    if report is None:
        notes.append("No report split was given: the published numbers are those of the selection split.")
        check_report(selection, budget.drop)
    run = Run(pathlib.Path(folder) if folder is not None else None, _recipe(job, recipe), resume=resume)
    space = _space(job, run)
    plan, rounds = _planned(job, space, run)
    lessons = _lessons(job)
    net, early = _recovered(job, space, plan, lessons, run)
    blueprint = Blueprint(
        apply.surgery(space.widths, plan.picks),
        space.folded,
        space.memory_format,
        apply.grids_of(space.grids, plan.picks),
    )
    evidence = _verify(
        job, space, net, blueprint, plan=plan, rounds=rounds, run=run,
        scores={"selection before": selection, "before recovery": early}, notes=notes, warnings=warnings,
    )  # fmt: skip
    return Result(net, plan, budget, blueprint, evidence, dict(recipe or {}), title or type(bare).__name__)


def _as_task(batches: Iterable[Batch] | Task, *, loss: Loss | None, forward: Forward | None) -> Task:
    if isinstance(batches, Task):
        return replace(batches, loss=loss or batches.loss, forward=forward or batches.forward)
    if loss is None:
        raise TypeError(
            "compress needs loss=, a function loss(model, batch) that returns the mean loss; for classifiers "
            "eke.compression.cross_entropy."
        )
    return Task(batches, (), (), loss=loss, forward=forward or default_forward)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress needs a torch.nn.Module, got {type(model).__name__}.")
    bare = unwrap(model)
    if bare is model:
        return bare, []
    return bare, [
        f"The model was wrapped in {type(model).__name__}: the wrapper was taken off and is not in the result."
    ]


def _inputs(example: Any, first: Batch) -> Inputs:
    if example is None:
        return split_batch(first)[0]
    if isinstance(example, dict):
        return example
    return tuple(example) if isinstance(example, (tuple, list)) else (example,)


def _recipe(job: Job, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    recovery = {k: v for k, v in vars(job.recovery).items() if not callable(v)}
    return {
        **dict(recipe or {}),
        "budget": job.budget.to_json(),
        "recovery": recovery,
        "seed": job.seed,
        "skip": list(job.skip),
        "grids": [repr(grid) for grid in job.grids],
        "parameters": sum(p.numel() for p in job.model.parameters()),
    }


def _space(job: Job, run: Run) -> Space:
    """Statistics, candidates and costs, each read back if it is already there."""
    sites = tuple(site for site in find(job.model, skip=job.skip) if site.hookable)
    path = run.path("statistics.safetensors")
    job.progress("statistics", 0.0, f"curvature at {len(sites)} matrices")
    if path is not None and path.exists():
        curvature = Curvature.load(path)
    else:
        curvature = Curvature.estimate(
            job.model, job.loss, job.batches, sites=sites, max_samples=2048, max_locations=64
        )
        if path is not None:
            curvature.save(path)
    job.progress("candidates", 0.0, "channel groups: proving every cut")
    groups: list[ChannelGroup] = channel_groups(
        job.model,
        measure.positional(job.inputs) if not isinstance(job.inputs, dict) else job.inputs,
        ignore=_modules(job),
    )
    found = run.get("candidates")
    if found is None:
        widths = candidates.channel_candidates(job.model, groups, sites, curvature)
        grids = candidates.grid_candidates(job.model, sites, curvature, job.grids)
        run.put("candidates", candidates.to_json(widths, grids))
    else:
        widths, grids = candidates.from_json(found, groups, sites, job.grids)
    if not widths and not grids:
        raise ValueError(
            f"There is nothing to compress: 0 channel groups and 0 matrices of {type(job.model).__name__} with "
            f"{len(sites)} sites can be changed (skip={list(job.skip)}). `eke inspect` says why for each module."
        )
    return _with_costs(job, run, sites, curvature, widths=widths, grids=grids)


def _modules(job: Job) -> list[str]:
    names = {name for name, _ in job.model.named_modules()}
    return [name for name in job.skip if name in names]


def _with_costs(
    job: Job,
    run: Run,
    sites: tuple[Site, ...],
    curvature: Curvature,
    *,
    widths: Sequence[candidates.Widths],
    grids: Sequence[candidates.Grids],
) -> Space:
    job.progress("costs", 0.0, "measuring cut nets in place")
    dimensions, counter = tables.shapes(job.model, widths), tables.Counter.of(widths)
    known = run.get("costs")
    if known is None:
        with evaluating(job.model):
            folded, memory_format, times = measure.lossless(job.model, job.inputs, threads=job.threads)
            before = {**measure.costs(job.model, job.inputs), "latency": times["original"]}
            timing = measure.timing(
                job.model, job.inputs, widths, dimensions=dimensions, folded=folded, memory_format=memory_format,
                seed=job.seed, threads=job.threads,
            )  # fmt: skip
        fit = {"modules": timing.modules, "rest": timing.rest, "scale": timing.scale}
        known = run.put(
            "costs", {"folded": folded, "memory_format": memory_format, "times": times, "before": before, "fit": fit}
        )
    folded = [(str(layer), str(norm)) for layer, norm in known["folded"]]
    fit = known["fit"]
    timing = tables.Timing({k: tuple(v) for k, v in fit["modules"].items()}, tuple(fit["rest"]), fit["scale"])
    macs = measure.own_macs(job.model, job.inputs)
    terms = [
        *tables.loss_terms(widths, grids),
        *tables.parameter_terms(job.model, dimensions, counter),
        *tables.mac_terms(macs, dimensions, counter),
        *tables.size_terms(job.model, dimensions, counter, grids=grids, folded=folded),
        *timing.terms(dimensions, counter),
    ]
    lossless = {"seconds": _folded_seconds(known["times"], folded, known["memory_format"])}
    return Space(
        sites,
        curvature,
        tuple(widths),
        tuple(grids),
        tuple(folded),
        known["memory_format"],
        lossless,
        known["before"],
        tuple(terms),
    )


def _folded_seconds(times: Mapping[str, float], folded: Sequence[Pair], memory_format: str) -> float:
    name = f"{'folded, ' if folded else ''}{memory_format}"
    return times.get(name, times["original"])


def _planned(job: Job, space: Space, run: Run) -> tuple[Plan, tuple[Round, ...]]:
    """Plan, measure what the plan costs, rescale and plan again; the best plan that keeps its limits."""
    stored = run.get("plan")
    if stored is not None:
        plan = Plan(stored["picks"], stored["predicted"], stored["gap"], stored["seconds"])
        return plan, tuple(Round(int(r["number"]), str(r["text"])) for r in stored["rounds"])
    limits = _limits(job.budget, space.before)
    decisions = tables.choices(space.widths, space.grids)
    correction = dict.fromkeys(RESOURCES, 1.0)
    best: tuple[tuple[bool, float], Plan] | None = None
    rounds: list[Round] = []
    for number in range(1, _ROUNDS + 1):
        job.progress("plan", (number - 1) / _ROUNDS, f"round {number}")
        terms = [Term(t.over, t.resource, t.table * correction.get(t.resource, 1.0)) for t in space.terms]
        wanted = {name: limit * _MARGIN.get(name, 1.0) for name, limit in limits.items()}
        try:
            plan = choose(decisions, terms, limits=wanted)
        except InfeasibleError:
            if best is None:
                raise
            break
        after = _plan_costs(job, space, plan)
        missed = [name for name, limit in limits.items() if after[name] > limit]
        excess = max([after[name] / limits[name] for name in limits], default=0.0)
        rounds.append(
            Round(
                number,
                f"measured {describe(after)}; "
                + (f"over the limit: {', '.join(missed)}" if missed else "within all limits"),
            )
        )
        key = (bool(missed), excess if missed else plan.predicted.get("loss", 0.0))
        if best is None or key < best[0]:
            best = (key, plan)
        close = all(after[name] > 0.93 * limits[name] for name in limits if name in ("latency", "size"))
        if not missed and (close or number == _ROUNDS):
            break
        for name in limits:
            correction[name] *= after[name] / max(plan.predicted[name], 1e-30)
    assert best is not None
    plan = best[1]
    run.put(
        "plan",
        {
            "picks": dict(plan.picks),
            "predicted": dict(plan.predicted),
            "gap": plan.gap,
            "seconds": plan.seconds,
            "rounds": [vars(r) for r in rounds],
        },
    )
    return plan, tuple(rounds)


def _limits(budget: Budget, before: Mapping[str, float]) -> dict[str, float]:
    found = {name: budget.limit(name, before=before[name]) for name in budget.limited}
    limits = {name: limit for name, limit in found.items() if limit is not None}
    # With a limit on the drop alone, half of the time and a quarter of the bytes are asked for.
    return limits or {"latency": 0.5 * before["latency"], "size": 0.25 * before["size"]}


def _plan_costs(job: Job, space: Space, plan: Plan) -> dict[str, float]:
    """Measure a plan's net before any training: its costs do not depend on its values."""
    net = apply.shaped(
        job.model, apply.surgery(space.widths, plan.picks), folded=space.folded, memory_format=space.memory_format
    )
    after = measure.costs(net, job.inputs)
    grids = apply.grids_of(space.grids, plan.picks)
    for site, grid in apply.on_grids(net, grids).values():
        site.write_(net, grid.project(site.read(net)))
    after["size"] = float(_packed_bytes(net, grids))
    original, net_run = measure.runner(job.model, job.inputs), measure.runner(net, job.inputs)
    with evaluating(job.model):
        compared = cost.compare_latency(original, net_run, threads=job.threads, seconds=2.0, seed=job.seed)
    after["latency"] = space.before["latency"] / compared.ratio
    return after


def _packed_bytes(net: nn.Module, grids: Mapping[str, UniformGrid]) -> int:
    return len(
        serialise(
            {name: tensor.detach().contiguous().clone() for name, tensor in pack(net, grids).items()},
            {"format": "eke artifact 1"},
        )
    )


def _lessons(job: Job) -> Lessons:
    job.progress("recover", 0.0, "the original's answers")
    return collect(job.model, job.batches, forward=job.forward)


def _recovered(job: Job, space: Space, plan: Plan, lessons: Lessons, run: Run) -> tuple[nn.Module, float | Counts]:
    """Cut, recover and put on grids; the score between the first two is returned too."""
    net = apply.cut(job.model, space.widths, plan.picks, sites=space.sites, curvature=space.curvature)
    apply.recalibrate_(net, lessons, forward=job.forward)
    early = job.score(net, of="the cut model")
    grids = apply.grids_of(space.grids, plan.picks)
    done = run.path("recovered.safetensors")
    if done is not None and done.exists():
        net.load_state_dict(read_tensors(done)[0])
    elif job.recovery.steps:
        steps = job.recovery.steps
        recover_(
            net, lessons, job.recovery, grids=apply.on_grids(net, grids), forward=job.forward, seed=job.seed,
            checkpoint=run.path("recovery.safetensors"),
            progress=lambda step, loss: job.progress("recover", step / steps, f"step {step} of {steps}, loss {loss:.4f}"),
        )  # fmt: skip
        if done is not None:
            write_tensors(done, net.state_dict(), {})
    apply.deploy_(net, folded=space.folded, memory_format=space.memory_format, grids=grids)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net, early


def _verify(
    job: Job,
    space: Space,
    net: nn.Module,
    blueprint: Blueprint,
    *,
    plan: Plan,
    rounds: Sequence[Round],
    run: Run,
    scores: Mapping[str, float | Counts],
    notes: list[str],
    warnings: list[str],
) -> Evidence:
    """Measure the result against the original and open the report split."""
    job.progress("verify", 0.0, "score on the selection split")
    scores = {**scores, "selection after": job.score(net, of="the compressed model")}
    job.progress("verify", 0.3, "latency against the original")
    after = measure.costs(net, job.inputs)
    after["size"] = float(_packed_bytes(net, blueprint.grids))
    base = apply.shaped(
        job.model, apply.surgery(space.widths, {}), folded=space.folded, memory_format=space.memory_format
    )
    batch = measure.batch_size(job.inputs)
    with evaluating(job.model):
        speedups = []
        for against, rival in (("the original", job.model), ("the original, folded, in the same memory format", base)):
            compared = cost.compare_latency(
                measure.runner(rival, job.inputs), measure.runner(net, job.inputs), threads=job.threads, seed=job.seed
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
    needed = samples_to_prove(job.budget.drop) if job.budget.drop is not None else 0
    total = scores["after"].total if isinstance(scores["after"], Counts) else None
    if total is not None and total < needed:
        warnings.append(
            f"{total} report samples cannot prove a drop of at most {job.budget.max_drop}: at least {needed} are needed."
        )
    lossless = {**space.lossless, "size": float(cost.model_bytes(base))}
    job.progress("verify", 1.0, "done")
    return Evidence(
        before=space.before, after=after, scores=scores, speedups=tuple(speedups),
        plan=_plan_lines(job, space, net, plan), rounds=tuple(rounds), splits=_splits(job, scores), notes=tuple(notes),
        warnings=tuple(warnings), environment=_environment(job, space), lossless=lossless,
    )  # fmt: skip


def _plan_lines(job: Job, space: Space, net: nn.Module, plan: Plan) -> tuple[PlanLine, ...]:
    lines = []
    for width in space.widths:
        option = plan.picks[width.choice]
        change = (
            f"keeps {width.kept[option]} of {width.group.size} channels"
            if option
            else f"keeps all {width.group.size} channels"
        )
        lines.append(PlanLine(width.choice, change, predicted_loss=width.losses[option], maturity="exact"))
    after = {site.name: site.shape for site in find(net)}
    with evaluating(job.model):
        milliseconds = [
            {
                name: 1e3 * s
                for name, s in cost.module_times(
                    m, *measure.positional(job.inputs), seconds=0.5, threads=job.threads
                ).items()
            }
            for m in (job.model, net)
        ]
    for grid in space.grids:
        option, site = plan.picks[grid.choice], grid.site
        structure = grid.structures[option]
        rows, columns = after[site.name]
        shape = (
            f"{site.shape[0]} x {site.shape[1]} to {rows} x {columns}"
            if (rows, columns) != site.shape
            else f"{rows} x {columns}"
        )
        stored = structure.bits((rows, columns)) // 8 if structure is not None else 4 * rows * columns
        lines.append(
            PlanLine(
                site.name, f"{shape}, {f'{structure.code_bits} bits' if isinstance(structure, UniformGrid) else 'float32'}",
                predicted_loss=grid.losses[option], bytes_before=4 * site.shape[0] * site.shape[1], bytes_after=stored,
                milliseconds_before=milliseconds[0].get(site.module_name), milliseconds_after=milliseconds[1].get(site.module_name),
                maturity="exact",
            )
        )  # fmt: skip
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
    found["threads"] = str(job.threads or torch.get_num_threads())
    return found
