"""The main job: a model, data and a budget go in; a cheaper model with the proof that it is cheaper comes out.

    statistics -> candidates -> costs -> (plan -> measure)* -> recover -> pack -> verify

Each stage is recorded when it is finished, so a run that was killed continues where it stood and, costs being recorded
before they are used, ends with the same result. Calibration batches serve statistics and recovery, `evaluate` (the
selection split) the check of the result, and `report` is opened once, at the end, for original and result together.
"""

from __future__ import annotations

import copy
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .. import cost
from .._types import Batch, Evaluate, Loss, Quality
from ..report import wording
from ..structures import Structure
from . import apply, measure
from .arguments import check_budgets
from .artifact import Blueprint
from .attentions import Clusters, Conversion
from .budget import Budget
from .candidates import STRUCTURES
from .checkpoint import Run
from .checks import check_report
from .deploy import set_memory_format_
from .hidden import hints
from .job import Job, Progress
from .lessons import Lessons, collect
from .plan import InfeasibleError, Plan
from .prepare import Prepared, prepare
from .recover import Recovery, Teacher, recover_
from .result import Result
from .rounds import Planned, attempts, plan_nested, plan_within
from .solver import Solver
from .space import Space, explore
from .task import Forward, Task
from .trial import differentiable
from .verify import verify


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
    structures: Sequence[Structure] = STRUCTURES,
    solver: Solver | None = None,
    recovery: Recovery | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    threads: int | None = None,
    seconds: float = 3.0,
    folder: str | pathlib.Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
    title: str | None = None,
    attentions: Conversion | Clusters | Sequence[Conversion | Clusters] | None = None,
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
        structures: Structures that matrices may take, eke's or your own; where one has no member of a matrix's shape,
            it is not offered there.
        solver: `solver(structure, weight, metric)` finds a member (m, n); None takes a quick one where recovery
            follows, and `eke.solvers.reconstruct` otherwise.
        recovery: How to train after cutting; None for the default.
        skip: Modules or sites to leave as they are.
        seed: Of recovery and measurements.
        threads: Torch threads of latency measurements; None keeps their number.
        seconds: Time of one latency comparison; a run makes about eight of them.
        folder: Where an interrupted run can be continued from; None keeps everything in memory.
        resume: Continue the run in `folder`.
        progress: Called as the run advances.
        recipe: Kept with the artifact.
        title: Of the report.
        attentions: How softmax attentions may become linear or clustered, or both; None leaves them as they are.

    Returns:
        The result; `result.save(folder)` writes the artifact.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the data do not fit the model, nothing can be compressed, or no plan keeps the budget.
    """  # noqa: DOC502
    with differentiable():
        prepared = prepare(
            model, batches, loss=loss, budget=budget, evaluate=evaluate, report=report, example=example,
            forward=forward, structures=structures, solver=solver, recovery=recovery, skip=skip, seed=seed,
            threads=threads, seconds=seconds, folder=folder, resume=resume, progress=progress, recipe=recipe,
            attentions=attentions,
        )  # fmt: skip
    job, run = prepared.job, prepared.run
    with differentiable(), cost.pinned_threads(prepared.threads):
        selection = _selection(job, prepared.notes)
        space = explore(job, run)
        found, learned = _settled(job, space, run, selection)
        return _verified(prepared, space, (found, learned), selection, recipe=recipe, title=title)


def front(
    model: nn.Module,
    batches: Iterable[Batch] | Task,
    *,
    budgets: Sequence[Budget],
    loss: Loss | None = None,
    nested: bool = False,
    structures: Sequence[Structure] = STRUCTURES,
    solver: Solver | None = None,
    recovery: Recovery | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    threads: int | None = None,
    seconds: float = 3.0,
    progress: Progress | None = None,
    title: str | None = None,
) -> list[Result]:
    """Compress one model for several budgets; statistics, candidates and measured costs are shared.

    Args:
        model: The model; never changed.
        batches: Calibration batches, or a `Task`.
        budgets: One a result, from loosest to tightest; each limits at least one cost.
        loss: As for `compress`.
        nested: Whether a tighter plan must build on the looser one: what is cut stays cut, what is rounded does not
            get more bits. One set of decisions then serves all budgets.
        structures: As for `compress`.
        solver: As for `compress`.
        recovery: As for `compress`.
        skip: As for `compress`.
        seed: As for `compress`.
        threads: As for `compress`.
        seconds: As for `compress`.
        progress: As for `compress`.
        title: Of the reports.

    Returns:
        One result a budget, in their order. Each one's report shows the whole front.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if there is no budget, one limits no cost, or no plan keeps one.
    """  # noqa: DOC502
    budgets = check_budgets(budgets)
    with differentiable():
        prepared = prepare(
            model, batches, loss=loss, budget=budgets[-1], structures=structures, solver=solver, recovery=recovery,
            skip=skip, seed=seed, threads=threads, seconds=seconds, progress=progress,
        )  # fmt: skip
    # Time is measured for all if one budget limits it.
    timed = next((b for b in budgets if b.latency is not None), budgets[-1])
    memory = next((b for b in budgets if b.peak_memory is not None), budgets[-1])
    asked = replace(budgets[-1], latency=timed.latency, peak_memory=memory.peak_memory)
    # The run has no folder and keeps nothing, but it counts: a report says how often splits were opened by then.
    with differentiable(), cost.pinned_threads(prepared.threads):
        job = replace(prepared.job, budget=asked)
        selection = _selection(job, prepared.notes)
        space = explore(job, prepared.run)
        jobs = [replace(job, budget=budget) for budget in budgets]
        limits = [attempts(budget, space.before)[0] for budget in budgets]
        if nested:
            plans = plan_nested(jobs, space, limits=limits)
        else:
            plans = [plan_within(j, space, prepared.run, limits=at, stage="plan") for j, at in zip(jobs, limits)]
        lessons = _lessons(job, prepared.run)
        results = []
        for one, found in zip(jobs, plans):
            learned = _recovered(one, space, found.plan, lessons, prepared.run, stage="recovery")
            own = replace(prepared, job=one, notes=list(prepared.notes))
            results.append(_verified(own, space, (found, learned), selection, recipe=None, title=title))
    points = tuple(result.front_point for result in results)
    return [replace(result, front=points) for result in results]


def _selection(job: Job, notes: list[str]) -> Quality:
    """Return the original's score on the selection split."""
    selection = job.score(job.model, of="the original model")
    if job.report is None:
        notes.append("No report split was given: the published numbers are those of the selection split.")
        check_report(selection, job.budget.drop)
    return selection


def _verified(
    prepared: Prepared,
    space: Space,
    found: tuple[Planned, _Learned],
    selection: Quality,
    *,
    recipe: Mapping[str, Any] | None,
    title: str | None,
) -> Result:
    planned, learned = found
    job = prepared.job
    blueprint = apply.blueprint(space.decisions, planned.plan.picks, space.layout)
    scores = {"selection before": selection, "before recovery": learned.early, "selection after": learned.late}
    evidence = verify(
        job, space, learned.net, blueprint, found=planned, run=prepared.run, scores=scores,
        notes=[*prepared.notes, *learned.notes],
    )  # fmt: skip
    name = title or type(job.model).__name__
    return Result(learned.net, planned.plan, job.budget, blueprint, evidence, dict(recipe or {}), name)


@dataclass(frozen=True)
class _Learned:
    """A cut, recovered net on its grids, and its scores on the selection split before and after recovery."""

    net: nn.Module
    early: Quality
    late: Quality
    notes: tuple[str, ...] = ()


def _settled(job: Job, space: Space, run: Run, selection: Quality) -> tuple[Planned, _Learned]:
    """Carry out the first plan that keeps what was asked.

    Returns:
        The plan and its recovered net.

    Raises:
        InfeasibleError: if no plan keeps the limits that were asked for.
        ValueError: if nothing can be saved at all.
    """
    lessons = _lessons(job, run)
    settled = None
    for number, limits in enumerate(attempts(job.budget, space.before)):
        try:
            found = plan_within(job, space, run, limits=limits, stage=f"plan-{number}")
        except InfeasibleError:
            if job.budget.limited:
                raise
            continue
        learned = _recovered(job, space, found.plan, lessons, run, stage=f"recovery-{number}")
        settled = found, learned
        if job.budget.limited or _kept(job, selection, learned.late):
            break
    if settled is None:
        raise ValueError(
            f"No plan for {type(job.model).__name__} saves anything worth the name: not even 0.6 of its bytes. Allow "
            f"more structures, or fewer modules in skip={list(job.skip)}."
        )
    return settled


def _kept(job: Job, before: Quality, after: Quality) -> bool:
    """Return whether the drop on the selection split keeps its limit."""
    drop = measure.drop_between(before, after, limit=job.budget.drop)
    return drop.limit is None or drop.points <= drop.limit


def _lessons(job: Job, run: Run) -> Lessons:
    """Gather the samples and the original's answers; a continued run must get the very same samples.

    Returns:
        The lessons.

    Raises:
        ValueError: if the samples are not those of the run that is continued.
    """
    job.progress("recover", 0.0, "the original's answers")
    lessons = collect(job.model, job.batches, forward=job.forward)
    digest = lessons.digest()
    known = run.get("lessons")
    if known not in (None, digest):
        raise ValueError(
            f"The calibration batches differ from those of the run that is continued ({digest[:12]} instead of "
            f"{str(known)[:12]}): use shuffle=False and no random augmentation, or start again without resume."
        )
    run.put("lessons", digest)
    return lessons


def _recovered(job: Job, space: Space, plan: Plan, lessons: Lessons, run: Run, *, stage: str) -> _Learned:
    """Return the cut net, recovered unless recovery made it worse."""
    planned = space.last(plan.picks)
    net, form = planned.net, planned.blueprint
    apply.recalibrate_(net, lessons, forward=job.forward)
    early = job.score(planned.finished(), of="the cut model")
    if not job.recovery.steps:
        return _finished(job, planned, early)
    teacher = None
    if job.recovery.hidden:
        original = copy.deepcopy(job.model).eval().requires_grad_(False)
        found = hints(original, net, space.sites, form.surgery, call=lambda m: measure.runner(m, job.inputs)())
        teacher = Teacher(original, tuple(found))
    # Convolutions train faster with channels last; `deploy_` sets the format that was measured to run fastest.
    set_memory_format_(net, "channels_last")
    done = run.path(f"{stage}-done.safetensors")
    if done is not None and done.exists():
        net.load_state_dict(cost.read_tensors(done)[0])
    else:
        steps = job.recovery.steps
        recover_(
            net, lessons, job.recovery, forms=apply.on_structures(net, form.structures), members=planned.members,
            forward=job.forward, seed=job.seed, teacher=teacher, checkpoint=run.path(f"{stage}.safetensors"),
            progress=lambda step, loss: job.progress("recover", step / steps, f"step {step}/{steps}, loss {loss:.4f}"),
        )  # fmt: skip
        if done is not None:
            cost.write_tensors(done, net.state_dict(), {})
    late = _deployed(job, net, form)
    lost = measure.drop_between(early, late, limit=None)
    if lost.points <= 0:
        return _Learned(net, early, late)
    # What is learned from few samples can cost more of what was known than it mends.
    planned = space.last(plan.picks)
    apply.recalibrate_(planned.net, lessons, forward=job.forward)
    much = wording.difference(lost.points, lost.unit)
    note = (
        f"Recovery made the score of the selection split worse, by {much}, and was set aside: give it more calibration "
        f"samples, or a learning rate below {job.recovery.learning_rate:g}."
    )
    return replace(_finished(job, planned, early), notes=(note,))


def _finished(job: Job, planned: apply.Draft, early: Quality) -> _Learned:
    """Return the net without recovery."""
    planned.finish_(planned.net)
    return _Learned(planned.net, early, _deployed(job, planned.net, planned.blueprint))


def _deployed(job: Job, net: nn.Module, form: Blueprint) -> Quality:
    """Return the score on the selection split; the net is packed for use, in place."""
    apply.deploy_(net, form)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return job.score(net, of="the compressed model")
