"""What `compress` and its relatives are asked, checked: a job, and the run that records its stages."""

from __future__ import annotations

import inspect
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .._types import Batch, Evaluate, Loss, Quality
from ..sites import find
from ..structures import Structure
from . import measure, pace
from .arguments import check_budget, check_call, check_settings, check_structures, checked_solver
from .artifact import state_digest
from .attentions import Clusters, Conversion, several
from .budget import Budget
from .candidates import STRUCTURES
from .checkpoint import Run
from .checks import check_batched, check_batches, check_task, shared_splits
from .job import Job, Progress
from .measure import Inputs
from .original import check_module, check_sites, check_state, private_copy, without_history
from .recover import Recovery
from .solver import Solver, default_solver
from .task import Forward, Task, cross_entropy, evaluating, split_batch
from .task import forward as default_forward
from .trial import check_called, check_gradients, check_runs, guarded


@dataclass(frozen=True)
class Prepared:
    """A checked job with its run.

    Args:
        job: What was asked.
        run: Where stages are recorded.
        notes: Remarks for the report.
        threads: Threads for everything but timings.
    """

    job: Job
    run: Run
    notes: list[str]
    threads: int


def prepare(
    model: nn.Module,
    batches: Iterable[Batch] | Task,
    *,
    budget: Budget,
    loss: Loss | None = None,
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
    attentions: Conversion | Clusters | Sequence[Conversion | Clusters] | None = None,
) -> Prepared:
    """Check what was asked; arguments are those of `compress`.

    Returns:
        The job and its run.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the data do not fit the model.
    """  # noqa: DOC502
    bare, remarks = _unwrapped(model)
    if not isinstance(batches, Task):
        check_batched(batches)
    budget, structures = check_budget(budget), check_structures(structures)
    check_settings(
        recovery=recovery, skip=skip, seed=seed, threads=threads, seconds=seconds, recipe=recipe, folder=folder,
        resume=resume,
    )  # fmt: skip
    asked = None if attentions is None else several(attentions)
    check_state(bare)
    bare, probe, skip = without_history(bare), private_copy(bare), tuple(skip)
    remarks += _warned([f"Left as it is: {words}." for words in check_sites(bare, skip)])
    task = _as_task(batches, loss=loss, forward=forward)
    _check_functions(task, evaluate=evaluate, report=report, progress=progress)
    split = isinstance(batches, Task)
    if split:
        remarks += _warned(shared_splits(task))
        check_task(task, budget.drop, probe)
    samples, first = check_batches(
        task.calibration,
        lambda index, batch: _check_on(probe, batch, task, index),
        classes=getattr(task.loss, "func", task.loss) is cross_entropy,
    )
    recovery = recovery or task.recovery or Recovery()
    job = Job(
        model=bare,
        batches=task.calibration,
        loss=task.loss,
        budget=budget,
        evaluate=_evaluation("evaluate", evaluate, task, task.selection if split else None),
        report=_evaluation("report", report, task, task.report if split else None),
        inputs=_inputs(example, first, task.forward, probe),
        forward=task.forward,
        structures=structures,
        solver=checked_solver(solver) if solver else default_solver(find(bare, skip=skip), learns=recovery.steps > 0),
        recovery=recovery,
        skip=skip,
        seed=seed,
        threads=threads or torch.get_num_threads(),
        seconds=seconds,
        samples=samples,
        progress=progress or (lambda stage, share, text: None),
        attentions=asked,
    )
    run = Run(pathlib.Path(folder) if folder is not None else None, _recipe(job, recipe), resume=resume)
    job = replace(job, batches=_Counted(run, task.calibration), evaluate=_counted(run, job.evaluate))
    return Prepared(job, run, remarks, _work_threads(job, run))


def _evaluation(name: str, given: Evaluate | None, task: Task, split: Iterable[Batch] | None) -> Evaluate | None:
    """Return what was given, or the task's score on a split; its failures name it."""
    if given is not None:
        return guarded(f"{name}(model)", given)
    return None if split is None else guarded("score(model, batches)", lambda net: task.score(net, split))


def _warned(words: list[str]) -> list[str]:
    """Return remarks for the report that are also warnings now."""
    for text in words:
        warnings.warn(text, stacklevel=4)
    return words


def _check_on(probe: nn.Module, batch: Batch, task: Task, index: int) -> None:
    """Run model and loss on the first batch of a form; on the very first one also what needs gradients."""
    check_runs(probe, batch, loss=task.loss, forward=task.forward, index=index)
    if index == 0:
        check_gradients(probe, batch, loss=task.loss, forward=task.forward, index=index)


def _check_functions(
    task: Task, *, evaluate: Evaluate | None, report: Evaluate | None, progress: Progress | None
) -> None:
    """Refuse functions that cannot be called as they will be, before an hour was spent."""
    check_call("loss", task.loss, "model", "batch")
    check_call("forward", task.forward, "model", "batch")
    check_call("score", task.score, "model", "batches")
    if evaluate is not None:
        check_call("evaluate", evaluate, "model")
    if report is not None:
        check_call("report", report, "model")
    if progress is not None:
        check_call("progress", progress, "stage", "share", "text")


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

    def counted(model: nn.Module) -> Quality:
        run.opening("selection")
        return evaluate(model)

    return counted


def _work_threads(job: Job, run: Run) -> int:
    """Return the number of threads for everything but timings: on a busy machine one is faster than waiting for all.

    It is recorded, since another number would round sums otherwise and a continued run would end elsewhere.
    """
    known = run.get("threads")
    if known is None:
        known = 1
        if job.threads > 1:
            with evaluating(job.model):
                work, budget = measure.runner(job.model, job.inputs), 0.1 * job.seconds
                times = {n: pace.once(work, budget=budget, threads=n) for n in (1, job.threads)}
            known = min(times, key=lambda n: times[n])
        run.put("threads", known)
    return int(known)


def _as_task(batches: Iterable[Batch] | Task, *, loss: Loss | None, forward: Forward | None) -> Task:
    if isinstance(batches, Task):
        return replace(batches, loss=loss or batches.loss, forward=forward or batches.forward)
    if loss is None:
        raise TypeError(
            "eke needs loss=, a function loss(model, batch) that returns the mean loss; for classifiers "
            "eke.compression.cross_entropy."
        )
    return Task(batches, (), (), loss=loss, forward=forward or default_forward)


def _unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    bare = check_module(model)
    if bare is model:
        return bare, []
    return bare, [
        f"The model was wrapped in {type(model).__name__}: the wrapper was taken off and is not in the result."
    ]


def _inputs(example: Any, first: Batch, forward: Forward, probe: nn.Module) -> Inputs:
    """Return what the model is called with for measurements, once it was seen to run on it."""
    if example is None:
        called = None if forward is default_forward else _called_with(probe, first, forward)
        inputs: Inputs = split_batch(first)[0] if called is None else called
    elif isinstance(example, dict):
        inputs = example
    else:
        inputs = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    check_called(
        probe,
        inputs,
        which="example" if example is not None else "the first batch without forward=",
        do="Give example=, what the model is called with: a tensor, a tuple of positional or a dictionary of keyword "
        "arguments.",
    )
    return inputs


def _called_with(probe: nn.Module, batch: Batch, forward: Forward) -> Inputs | None:
    """Return what a `forward` of the user's own calls the model with, or None where it calls something else."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments, keywords))

    handle = probe.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with evaluating(probe):
            forward(probe, batch)
    finally:
        handle.remove()
    if not seen:
        return None
    arguments, keywords = seen[0]
    if not arguments or not keywords:
        return arguments or keywords
    bound = inspect.signature(probe.forward).bind(*arguments, **keywords)
    kinds = {parameter.kind for parameter in bound.signature.parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        return None
    variable = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    named = dict(bound.arguments)
    return {**{k: v for k, v in named.items() if k != variable}, **named.get(variable or "", {})}


def _recipe(job: Job, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    recovery = {k: v for k, v in vars(job.recovery).items() if not callable(v)}
    return {
        **dict(recipe or {}),
        "budget": job.budget.to_json(),
        "recovery": recovery,
        "seed": job.seed,
        "skip": list(job.skip),
        "structures": [repr(structure) for structure in job.structures],
        **({"attentions": repr(job.attentions)} if job.attentions is not None else {}),
        "weights": state_digest(job.model),
    }
