"""What `compress` and its relatives are asked, checked: a job, and the run that records its stages."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import cost
from .._types import Batch, Counts, Evaluate, Loss
from ..sites import unwrap
from ..solvers import reconstruct
from ..structures import Structure
from . import measure
from .artifact import state_digest
from .budget import Budget
from .candidates import STRUCTURES, Solver, quick
from .checkpoint import Run
from .checks import check_batches, check_runs, check_task
from .job import Job, Progress
from .measure import Inputs
from .recover import Recovery
from .task import Forward, Task, evaluating, split_batch
from .task import forward as default_forward


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
) -> Prepared:
    """Check what was asked; arguments are those of `compress`.

    Returns:
        The job and its run.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the data do not fit the model.
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
    recovery = recovery or Recovery()
    job = Job(
        model=bare,
        batches=task.calibration,
        loss=task.loss,
        budget=budget,
        evaluate=evaluate,
        report=report,
        inputs=_inputs(example, first),
        forward=task.forward,
        structures=_checked_structures(structures),
        solver=solver or _default_solver(recovery),
        recovery=recovery,
        skip=tuple(skip),
        seed=seed,
        threads=threads or torch.get_num_threads(),
        seconds=seconds,
        samples=samples,
        progress=progress or (lambda stage, share, text: None),
    )
    run = Run(pathlib.Path(folder) if folder is not None else None, _recipe(job, recipe), resume=resume)
    job = replace(job, batches=_Counted(run, task.calibration), evaluate=_counted(run, evaluate))
    return Prepared(job, run, remarks, _work_threads(job, run))


def _checked_structures(structures: Sequence[Structure]) -> tuple[Structure, ...]:
    wrong = [s for s in structures if isinstance(s, type) or not isinstance(s, Structure)]
    if wrong:
        raise TypeError(
            f"structures must have project, bits, check and exactness, got {wrong[0]!r} of {type(wrong[0]).__name__}."
        )
    nameless = [s for s in structures if f"0x{id(s):x}" in repr(s).lower()]
    if nameless:
        raise TypeError(
            f"structures are recognised by their repr, and that of {nameless[0]!r} is another one in every process: "
            "give its class a __repr__, or make it a dataclass."
        )
    return tuple(structures)


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
