"""The main job: a model, data and a budget go in; a cheaper model with the proof that it is cheaper comes out.

    statistics -> candidates -> costs -> (plan -> measure)* -> recover -> pack -> verify

Each stage is recorded when it is finished, so a run that was killed continues where it stood and, costs being recorded
before they are used, ends with the same result. Calibration batches serve statistics and recovery, `evaluate` (the
selection split) the check of the result, and `report` is opened once, at the end, for original and result together.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .. import cost
from .._types import Batch, Counts, Evaluate, Loss
from ..sites import unwrap
from ..solvers import reconstruct
from ..structures import Structure
from . import apply, measure
from .artifact import state_digest
from .budget import Budget
from .candidates import STRUCTURES, Solver, quick
from .checkpoint import Run, read_tensors, write_tensors
from .checks import check_batches, check_report, check_runs, check_task
from .deploy import set_memory_format_
from .job import Job, Progress
from .lessons import Lessons, collect
from .measure import Inputs
from .plan import InfeasibleError, Plan
from .recover import Recovery, recover_
from .result import Result
from .rounds import Planned, attempts, plan_within
from .space import Space, explore
from .task import Forward, Task, evaluating, split_batch
from .task import forward as default_forward
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
        check_task(task, budget.drop, bare)
    samples, first = check_batches(
        task.calibration,
        lambda index, batch: check_runs(bare, batch, loss=task.loss, forward=task.forward, index=index),
    )
    job = Job(
        model=bare,
        batches=task.calibration,
        loss=task.loss,
        budget=budget,
        evaluate=evaluate,
        report=report,
        inputs=_inputs(example, first),
        forward=task.forward,
        structures=tuple(structures),
        solver=solver or _default_solver(recovery or Recovery()),
        recovery=recovery or Recovery(),
        skip=tuple(skip),
        seed=seed,
        threads=threads or torch.get_num_threads(),
        seconds=seconds,
        samples=samples,
        progress=progress or (lambda stage, share, text: None),
    )
    run = Run(pathlib.Path(folder) if folder is not None else None, _recipe(job, recipe), resume=resume)
    job = replace(job, batches=_Counted(run, task.calibration), evaluate=_counted(run, evaluate))
    with cost.pinned_threads(_work_threads(job, run)):
        return _compressed(job, run, notes=remarks, recipe=dict(recipe or {}), title=title or type(bare).__name__)


class _Counted:
    """Calibration batches whose every pass is counted in the run."""

    def __init__(self, run: Run, batches: Iterable[Batch]) -> None:
        self.run, self.batches = run, batches

    def __iter__(self) -> Iterator[Batch]:
        self.run.opening("calibration")
        return iter(self.batches)


def _counted(run: Run, evaluate: Evaluate | None) -> Evaluate | None:
    """Return an evaluation on the selection split that is counted in the run."""
    if evaluate is None:
        return None

    def counted(model: nn.Module) -> float | Counts:
        run.opening("selection")
        return evaluate(model)

    return counted


def _compressed(job: Job, run: Run, *, notes: list[str], recipe: dict[str, Any], title: str) -> Result:
    selection = job.score(job.model, of="the original model")
    if job.report is None:
        notes.append("No report split was given: the published numbers are those of the selection split.")
        check_report(selection, job.budget.drop)
    space = explore(job, run)
    found, net, early = _settled(job, space, run, selection)
    blueprint = apply.blueprint(space.decisions, found.plan.picks, space.layout)
    scores = {"selection before": selection, "before recovery": early}
    evidence = verify(job, space, net, blueprint, found=found, run=run, scores=scores, notes=notes)
    return Result(net, found.plan, job.budget, blueprint, evidence, recipe, title)


def _work_threads(job: Job, run: Run) -> int:
    """Return the number of threads for everything but timings: on a busy machine one is faster than waiting for all.

    It is recorded, since another number would round sums otherwise and a continued run would end elsewhere.
    """
    known = run.get("threads")
    if known is None:
        known = 1
        if job.threads > 1:
            work = measure.runner(job.model, job.inputs)
            with evaluating(job.model):
                times = {n: cost.latency(work, threads=n, seconds=0.1 * job.seconds).median for n in (1, job.threads)}
            known = min(times, key=lambda n: times[n])
        run.put("threads", known)
    return int(known)


def _settled(job: Job, space: Space, run: Run, selection: float | Counts) -> tuple[Planned, nn.Module, float | Counts]:
    """Carry out the first plan that keeps what was asked.

    Returns:
        The plan, its recovered net, and the score that the net had before recovery.

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
        net, early = _recovered(job, space, found.plan, lessons, run, stage=f"recovery-{number}")
        settled = found, net, early
        if job.budget.limited or _kept(job, selection, job.score(net, of="the compressed model")):
            break
    if settled is None:
        raise ValueError(
            f"No plan for {type(job.model).__name__} saves anything worth the name: not even 0.6 of its bytes. Allow "
            f"more structures, or fewer modules in skip={list(job.skip)}."
        )
    return settled


def _kept(job: Job, before: float | Counts, after: float | Counts) -> bool:
    """Return whether the drop on the selection split keeps its limit."""
    drop = measure.drop_between(before, after, limit=job.budget.drop)
    return drop.limit is None or drop.points <= drop.limit


def _as_task(batches: Iterable[Batch] | Task, *, loss: Loss | None, forward: Forward | None) -> Task:
    if isinstance(batches, Task):
        return replace(batches, loss=loss or batches.loss, forward=forward or batches.forward)
    if loss is None:
        raise TypeError(
            "compress needs loss=, a function loss(model, batch) that returns the mean loss; for classifiers "
            "eke.compression.cross_entropy."
        )
    return Task(batches, (), (), loss=loss, forward=forward or default_forward)


def _default_solver(recovery: Recovery) -> Solver:
    """Return the solver that is used unless one is given: no effort is spared where nothing is learned afterwards."""
    if recovery.steps:
        return quick
    return lambda structure, weight, metric: reconstruct(structure, weight, metric).weight


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
        "structures": [repr(structure) for structure in job.structures],
        "weights": state_digest(job.model),
    }


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


def _recovered(
    job: Job, space: Space, plan: Plan, lessons: Lessons, run: Run, *, stage: str
) -> tuple[nn.Module, float | Counts]:
    """Return the cut, recovered net on its grids, and the score that it had before recovery."""
    planned = space.draft(plan.picks)
    net, form = planned.net, planned.blueprint
    apply.recalibrate_(net, lessons, forward=job.forward)
    early = job.score(planned.finished(), of="the cut model")
    # Convolutions train faster with channels last; `deploy_` sets the format that was measured to run fastest.
    set_memory_format_(net, "channels_last")
    done = run.path(f"{stage}-done.safetensors")
    if done is not None and done.exists():
        net.load_state_dict(read_tensors(done)[0])
    elif job.recovery.steps:
        steps = job.recovery.steps
        recover_(
            net, lessons, job.recovery, forms=apply.on_structures(net, form.structures), members=planned.members,
            forward=job.forward, seed=job.seed, checkpoint=run.path(f"{stage}.safetensors"),
            progress=lambda step, loss: job.progress("recover", step / steps, f"step {step}/{steps}, loss {loss:.4f}"),
        )  # fmt: skip
        if done is not None:
            write_tensors(done, net.state_dict(), {})
    else:
        planned.finish_(net)
    apply.deploy_(net, form)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    return net, early
