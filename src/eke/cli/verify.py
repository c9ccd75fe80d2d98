"""`eke verify`: is the artifact what it says it is?

From the files alone: the weights have the digest that the plan names, the model rebuilt on the user's architecture has
the recorded state bit for bit, and its score on a split is the recorded one. What the artifact did not record is said
to be not comparable, never to be right.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .load import load_model, load_task
from .options import DataOption, DebugOption, JsonOption, TaskOption
from .recipe import Recipe, of_folder
from .session import emit, leave, session

if TYPE_CHECKING:
    from ..compression import Task

SPLITS = ("selection", "report")
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Check:
    """One thing that was compared.

    Args:
        name: What.
        same: Whether it is as recorded; None if nothing was recorded to compare with.
        text: In words.
    """

    name: str
    same: bool | None
    text: str


def verify(
    *,
    folder: Annotated[pathlib.Path, typer.Argument(metavar="FOLDER", help="A result of eke compress.")],
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="FILE.py:FUNCTION of the original (default: the recipe's)."),
    ] = None,
    data: DataOption = None,
    task: TaskOption = None,
    split: Annotated[
        str, typer.Option(metavar="selection|report", help="What to score on; opening the report split is counted.")
    ] = "selection",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare a saved result with its records.

    The weights' digest, the state of the rebuilt model bit for bit, and its score on a split.

    Exit codes: 0 the same; 1 different, or an error; 2 the command is wrong.
    """
    with session(as_json=as_json, debug=debug):
        from .names import check

        check(split, SPLITS, "--split must be selection or report, got")
        recipe = of_folder(folder).with_source(model, data=data, task=task)
        checks, score = verified(folder, recipe, split=split)
    same = all(item.same is not False for item in checks)
    if as_json:
        emit({
            "folder": str(folder),
            "same": same,
            "split": split,
            "score": score,
            "checks": [asdict(c) for c in checks],
        })
    else:
        for item in checks:
            mark = {True: "same", False: "DIFFERENT", None: "not recorded"}[item.same]
            typer.echo(f"{item.name}: {mark}; {item.text}")
        typer.echo(f"{folder} is {'as it was saved' if same else 'NOT as it was saved'}")
    leave(0 if same else 1)


def verified(folder: pathlib.Path, recipe: Recipe, *, split: str) -> tuple[list[Check], dict[str, Any]]:
    """Compare an artifact with its records.

    Args:
        folder: The artifact.
        recipe: Names the original model and the data.
        split: "selection" or "report".

    Returns:
        What was compared, and the score as plain values.
    """
    from ..compression import load
    from ..compression.artifact import read_plan, state_digest
    from ..compression.measure import evaluate_on
    from ..compression.result import plain
    from ..cost import pinned_threads

    plan = read_plan(folder)
    records = plan.get("checks") or {}
    original, task = load_model(recipe, folder=folder), load_task(recipe, folder=folder)
    with pinned_threads(records.get("threads") or recipe.threads):
        rebuilt = load(folder, original)
        digest = state_digest(rebuilt)
        batches = getattr(task, split)
        value = evaluate_on(rebuilt, lambda net: task.score(net, batches), of=f"the artifact on the {split} split")
    weights = Check("weights file", True, "its SHA-256 is the one in plan.json")
    score = plain(value)
    recorded = records.get("selection") if split == "selection" else count_opening(folder, task)
    return [weights, _compare_state(records.get("state_sha256"), digest), compare_scores(split, recorded, score)], score


def _compare_state(recorded: str | None, found: str) -> Check:
    if recorded is None:
        return Check("rebuilt model", None, "the plan records no digest of the model's state")
    if recorded == found:
        return Check("rebuilt model", True, "every tensor bit for bit")
    return Check("rebuilt model", False, f"its state has the digest {found[:12]}..., recorded is {recorded[:12]}...")


def compare_scores(split: str, recorded: Mapping[str, Any] | None, found: Mapping[str, Any]) -> Check:
    """Compare a score with the recorded one.

    Args:
        split: Where it was taken.
        recorded: Plain values, or None.
        found: Plain values.

    Returns:
        The comparison; scores of different kinds cannot be compared.
    """
    name, now = f"score on the {split} split", _words(found)
    counted = "correct" in found
    if recorded is None or _kind(recorded) != _kind(found):
        return Check(name, None, f"{now}; the artifact records no score of this kind to compare with")
    keys = ("correct", "total") if counted else ("value",)
    if all(math.isclose(recorded[key], found[key], rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for key in keys):
        return Check(name, True, now)
    advice = "; other processors or numbers of threads round differently, and a few samples may change sides"
    return Check(name, False, f"{now}, recorded is {_words(recorded)}{advice}")


def _kind(score: Mapping[str, Any]) -> str:
    """Return by what a score was made: "counts", the name of a metric, or nothing for a plain number."""
    return "counts" if score.get("correct") is not None else str(score.get("metric") or "")


def _words(score: Mapping[str, Any]) -> str:
    if score.get("correct") is not None:
        return f"{score['correct']}/{score['total']} = {100 * score['value']:.2f} %"
    return f"{_kind(score)} {score['value']:.6g}".strip()


def count_opening(folder: pathlib.Path, task: Task) -> dict[str, Any] | None:
    """Count in an artifact's report that its report split was opened once more.

    Args:
        folder: The artifact.
        task: Whose report split was opened.

    Returns:
        The score that the report published, or None.
    """
    from ..compression.checks import count_samples
    from ..compression.result import write_report
    from ..report import Document, Split

    path = folder / "report.json"
    if not path.is_file():
        return None
    document = Document.from_json(path.read_text(encoding="utf-8"))
    if not any(part.name == "report" for part in document.splits):
        samples = sum(count_samples(batch) for batch in task.report)
        document = replace(document, splits=(*document.splits, Split("report", samples, 0, "verification")))
    splits = tuple(replace(p, opened=p.opened + 1) if p.name == "report" else p for p in document.splits)
    write_report(folder, replace(document, splits=splits))
    score = document.after.score if document.after else None
    if score is None:
        return None
    # A plain number has no interval; what has one was made by a metric, which has a name.
    metric = score.name if score.interval is not None else None
    return {"value": score.value, "correct": score.correct, "total": score.total, "metric": metric}
