"""`eke gate`: may the new model replace the old one? For CI: one command, one JSON document, one exit code.

Both are scored on the same samples of the report split, and the drop passes when the upper end of its paired interval
is within the limit: a point estimate inside it is not enough. Speed passes when the lower end of the measured ratio's
interval is above the asked one.
"""

from __future__ import annotations

import datetime
import pathlib
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from .load import load_model, load_task
from .options import DataOption, DebugOption, JsonOption, TaskOption, ThreadsOption
from .recipe import Recipe, of_folder
from .session import UsageError, emit, leave, session
from .show import draw
from .verify import count_opening

if TYPE_CHECKING:
    from torch import nn

    from .._types import Quality
    from ..compression import Task
    from ..report import Document

_SIDE = "A result's folder, FILE.py:FUNCTION or torchvision:NAME."


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Args:
        name: As typed.
        model: The model.
        bytes: Of its weights file.
        folder: The artifact, if it is one.
    """

    name: str
    model: nn.Module
    bytes: int
    folder: pathlib.Path | None = None


def gate(
    *,
    old: Annotated[str, typer.Argument(metavar="OLD", help=_SIDE)],
    new: Annotated[str, typer.Argument(metavar="NEW", help=_SIDE)],
    data: DataOption = None,
    task: TaskOption = None,
    max_drop: Annotated[str, typer.Option("--max-drop", metavar="LIMIT", help="Largest loss of quality.")] = "0.5%",
    min_speedup: Annotated[
        float | None, typer.Option("--min-speedup", min=0.0, help="Smallest time(OLD)/time(NEW).", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of the comparison of latencies.")] = 3.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Decide whether NEW may replace OLD.

    The drop passes when the upper end of its paired 95 % interval on the report split is within --max-drop; the speed
    when the lower end of its 99 % interval is above --min-speedup.

    Exit codes: 0 pass; 1 fail, or an error; 2 the command is wrong.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        from ..compression import Budget
        from ..cost import pinned_threads

        try:
            limit = Budget(max_drop=max_drop).drop
        except (ValueError, TypeError) as error:
            raise UsageError(f"{error}".replace("Budget.max_drop", "--max-drop")) from error
        assert limit is not None
        source, folder = _source(old, new, data=data, task=task)
        known = load_task(source, folder=folder)
        sides = _side(old, task=task), _side(new, task=task)
        with pinned_threads(threads):
            document, numbers = compared(
                sides, known, limit=limit, asked=max_drop, min_speedup=min_speedup, seconds=seconds
            )
    if as_json:
        emit(numbers)
    else:
        draw(document)
    leave(0 if numbers["passed"] else 1)


def _source(old: str, new: str, *, data: str | None, task: str | None) -> tuple[Recipe, pathlib.Path | None]:
    """Return where the data come from: the flags, or the recipe of a folder."""  # noqa: DOC501
    if data is not None or task is not None:
        return Recipe(data=data, task=task), None
    for folder in (pathlib.Path(new), pathlib.Path(old)):
        if folder.is_dir():
            found = of_folder(folder)
            if found.data or found.task:
                return found, folder
    raise UsageError(f"gate needs data, and {old} and {new} name none: add --data FILE.py:FUNCTION.")


def _side(text: str, *, task: str | None) -> Side:
    """Return what OLD or NEW names."""  # noqa: DOC501
    from .. import cost
    from ..compression import load

    folder = pathlib.Path(text)
    if folder.is_dir():
        recipe = of_folder(folder)
        if recipe.model is None and recipe.task is None and task is not None:
            recipe = Recipe(task=task)
        return Side(text, load(folder, load_model(recipe, folder=folder)), cost.stored_bytes(folder), folder)
    if ":" not in text:
        raise FileNotFoundError(f"There is no folder {text!r}: give a result's folder or FILE.py:FUNCTION.")
    model = load_model(Recipe(model=text))
    return Side(text, model.eval(), cost.model_bytes(model))


def _count_openings(sides: tuple[Side, Side], task: Task) -> None:
    """Count in the reports of the artifacts among the sides, once in each, that the report split was opened."""
    for folder in {side.folder.resolve(): side.folder for side in sides if side.folder is not None}.values():
        try:
            count_opening(folder, task)
        except OSError as error:
            warnings.warn(f"That the report split was opened could not be counted: {error}.", stacklevel=2)


def compared(
    sides: tuple[Side, Side], task: Task, *, limit: float, asked: str, min_speedup: float | None, seconds: float
) -> tuple[Document, dict[str, Any]]:
    """Score and time two models.

    Args:
        sides: The old and the new one.
        task: Its report split is opened.
        limit: Largest drop as a share.
        asked: The limit as typed.
        min_speedup: Smallest ratio of times, or None.
        seconds: Of the timing.

    Returns:
        A report, and its numbers as plain values.
    """
    import torch

    from .. import cost
    from ..compression.checks import check_batches, check_task
    from ..compression.measure import as_score, drop_between, evaluate_on
    from ..compression.result import plain
    from ..compression.task import evaluating
    from ..compression.trial import guarded, run_forward
    from ..compression.verify import few_samples
    from ..report import BudgetLine, Document, Measured, Speedup, Verdict

    old, new = sides
    check_task(task, limit, old.model)
    _, batch = check_batches(task.calibration)
    for side in sides:
        with evaluating(side.model):
            run_forward(side.model, batch, task.forward, where=f"calibration batch 0 ({side.name})")

    def score(side: Side) -> Quality:
        scored = guarded("score(model, batches)", lambda net: task.score(net, task.report))
        return evaluate_on(side.model, scored, of=side.name)

    def run(side: Side) -> Any:
        with torch.inference_mode():
            return task.forward(side.model, batch)

    scores = score(old), score(new)
    _count_openings(sides, task)
    drop = drop_between(*scores, limit=limit)
    timed = cost.compare_latency(lambda: run(old), lambda: run(new), seconds=seconds)
    worst = drop.points if drop.interval is None else drop.interval[1]
    assert drop.limit is not None
    name = "drop (upper end)" if drop.interval else "drop"
    lines = [BudgetLine(name, asked, drop.limit, worst, drop.unit, worst <= drop.limit)]
    if min_speedup is not None:
        low = timed.interval[0]
        lines.append(BudgetLine("speed-up (lower end)", f"{min_speedup:g}x", min_speedup, low, "x", low > min_speedup))
    passed = all(line.met for line in lines)
    speedup = Speedup(
        timed.ratio, timed.interval, timed.confidence, timed.faster, timed.a.threads, against=old.name
    )  # fmt: skip
    reasons = ", ".join(line.name for line in lines if not line.met)
    text = f"{new.name} {'may' if passed else 'may not'} replace {old.name}{f': {reasons}' if reasons else ''}."
    measured = [
        Measured(
            s.name, as_score(value), bytes=s.bytes, parameters=cost.parameters(s.model), milliseconds=1e3 * t.median
        )
        for s, value, t in zip(sides, scores, (timed.a, timed.b))
    ]
    document = Document(
        kind="gate", title=f"{old.name} against {new.name}", eke_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verdict=Verdict(passed, True, text), budget=tuple(lines), before=measured[0], after=measured[1], drop=drop,
        speedups=(speedup,), warnings=few_samples(scores[1]),
        environment={str(k): str(v) for k, v in cost.environment().to_json().items()},
    )  # fmt: skip
    numbers = {
        "passed": passed,
        "text": text,
        "split": "report",
        "limits": [asdict(line) for line in lines],
        "drop": asdict(drop),
        "speedup": asdict(speedup),
        "old": {**asdict(measured[0]), "score": plain(scores[0])},
        "new": {**asdict(measured[1]), "score": plain(scores[1])},
        "environment": cost.environment().to_json(),
    }
    return document, numbers
