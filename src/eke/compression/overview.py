"""Look before compressing: what every option of every decision costs and saves, and how well that is predicted.

A survey does what `compress` does up to planning, and answers three questions: what does one option alone cost and
save (`options`), what would a whole plan be predicted to cost (`space.loss`), and how far are predictions from
measurements on changes that nothing was fitted to (`calibrate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from .. import cost
from .._types import Batch, Loss, Quality
from ..report import Calibrated
from ..structures import Structure
from .budget import Budget
from .calibrate import Meter, Random, families_of
from .candidates import STRUCTURES
from .checks import count_samples
from .job import Progress
from .plan import total
from .prepare import Prepared, prepare
from .recover import Recovery
from .solver import Solver
from .space import Space, explore
from .tables import choices
from .task import Task
from .trial import differentiable

_FIRST = 512
"""Calibration samples that predictions were corrected on; a calibration measures on the ones after them."""


@dataclass(frozen=True)
class Option:
    """What one option does when it is the only change.

    Args:
        choice: Name of the decision, such as "matrix:conv1".
        label: Of the option.
        predicted_loss: Loss increase before recovery, as corrected.
        measured_loss: The same as measured, None where it was not.
        score: Score on the selection split, None where it was not measured.
        bytes: Bytes of the file saved.
        seconds: Predicted seconds saved in the whole net.
    """

    choice: str
    label: str
    predicted_loss: float
    measured_loss: float | None
    score: Quality | None
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Survey:
    """A model's candidates with what they cost.

    Args:
        prepared: What was asked.
        space: The candidates, their losses and costs.
    """

    prepared: Prepared
    space: Space

    def options(self, *, only: str | None = None, measured: bool = False) -> Iterator[Option]:
        """Go through all options of all decisions.

        Args:
            only: Part of a decision's name; None takes all.
            measured: Whether to carry out each option and measure its loss increase and its score (a second or more
                each).

        Yields:
            One entry an option that changes something.

        Raises:
            ValueError: if no decision's name contains `only`.
        """
        decisions = choices(self.space.decisions)
        chosen = [choice for choice in decisions if only is None or only in choice.name]
        if not chosen:
            names = [choice.name for choice in decisions]
            raise ValueError(f"No decision's name contains {only!r}; there are {names[:12]}.")
        known = {(a.choice, a.option): a.measured for a in self.space.calibration.anchors}
        nothing = {choice.name: 0 for choice in decisions}
        base = total(self.space.terms, nothing)
        job = self.prepared.job
        meter = Meter(job) if measured else None
        for choice in chosen:
            for option, label in enumerate(choice.options):
                if not option:
                    continue
                picks = {**nothing, choice.name: option}
                costs = total(self.space.terms, picks)
                loss, score = known.get((choice.name, option)), None
                if meter is not None:
                    net = self.space.draft(picks).finished()
                    loss = meter(net)[0]
                    score = job.score(net, of=f"{choice.name}, {label}")
                yield Option(
                    choice.name,
                    label,
                    self.space.decisions.losses[choice.name][option],
                    loss,
                    score,
                    base["size"] - costs["size"],
                    base.get("latency", 0.0) - costs.get("latency", 0.0),
                )

    def calibrate(self, *, singles: int = 60, plans: int = 30, seed: int = 1) -> list[Calibrated]:
        """Compare predictions with measurements on samples and changes that nothing was fitted to.

        Args:
            singles: Most single options, drawn at random from those that were not carried out before.
            plans: Random whole plans.
            seed: Of the draws.

        Returns:
            One entry a change; the kind of a plan is "plan".
        """
        space, job = self.space, self.prepared.job
        meter = Meter(replace(job, batches=_after(job.batches, _FIRST)))
        anchors = {(a.choice, a.option) for a in space.calibration.anchors}
        losses = space.decisions.losses
        fresh = [(c, o) for c, found in losses.items() for o in range(1, len(found)) if (c, o) not in anchors]
        labels = {choice.name: choice.options for choice in choices(space.decisions)}
        drawn = Random(space.decisions, seed)
        order = drawn.order(len(fresh))[:singles]
        found = []
        for number, index in enumerate(order):
            choice, option = fresh[index]
            job.progress("calibrate", number / (singles + plans), f"{choice}: {labels[choice][option]}")
            measured, _ = meter(space.draft({choice: option}).finished())
            kind = families_of(space.decisions, choice)[option]
            found.append(Calibrated(f"{choice}: {labels[choice][option]}", kind, losses[choice][option], measured))
        for number in range(plans):
            job.progress("calibrate", (singles + number) / (singles + plans), f"whole plan {number + 1}")
            picks = drawn.draw()
            measured, _ = meter(space.draft(picks).finished())
            found.append(Calibrated(f"random plan {number + 1}", "plan", space.loss(picks), measured))
        return found


def survey(
    model: nn.Module,
    batches: Iterable[Batch] | Task,
    *,
    loss: Loss | None = None,
    structures: Sequence[Structure] = STRUCTURES,
    solver: Solver | None = None,
    skip: Iterable[str] = (),
    seed: int = 0,
    threads: int | None = None,
    seconds: float = 3.0,
    progress: Progress | None = None,
) -> Survey:
    """Find out what could be done to a model and what each change would cost, without a plan.

    Args:
        model: The model; never changed.
        batches: Calibration batches, or a `Task`.
        loss: `loss(model, batch)`, needed unless a `Task` brings it.
        structures: As for `compress`.
        solver: As for `compress`; None takes the quick one.
        skip: Modules or sites to leave as they are.
        seed: Of measurements.
        threads: Torch threads of latency measurements.
        seconds: Time of one latency comparison.
        progress: Called as the work advances.

    Returns:
        The survey.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if the data do not fit the model, or nothing can be compressed.
    """  # noqa: DOC502
    # Time is wanted, so it is limited, to what it is.
    with differentiable():
        prepared = prepare(
            model, batches, budget=Budget(latency="1x"), loss=loss, structures=structures, solver=solver,
            recovery=Recovery(), skip=skip, seed=seed, threads=threads, seconds=seconds, progress=progress,
        )  # fmt: skip
    with differentiable(), cost.pinned_threads(prepared.threads):
        return Survey(prepared, explore(prepared.job, prepared.run))


def _after(batches: Iterable[Batch], samples: int) -> list[Batch]:
    """Return the batches after so many samples; all if nothing would be left."""
    found, seen = list(batches), 0
    for index, batch in enumerate(found):
        seen += count_samples(batch)
        if seen >= samples and index + 1 < len(found):
            return found[index + 1 :]
    return found
