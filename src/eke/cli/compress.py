"""`eke compress`: run, save, verify in a fresh process, show.

What the run is asked for comes from a recipe file, then `--set`, then the flags. The result is loaded and measured
again by another process from the files alone before it may call itself verified.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import recipe as recipes
from .front import FRONT, compress_front
from .load import load_model, load_task, places, resolve
from .options import DataOption, DebugOption, JsonOption, ModelArgument, TaskOption, ThreadsOption
from .progress import shown
from .recipe import Recipe
from .session import Interrupted, UsageError, emit, leave, session
from .show import draw

if TYPE_CHECKING:
    from ..compression import Result
    from ..report import Document

BUDGETS = {
    "demo": {"max_drop": "1%", "latency": "0.27x", "size": "1/15.1x"},
    "minilm": {"max_drop": "5%", "size": "0.25x"},
    "g2p": {"max_drop": "1%", "size": "0.25x"},
    "crepe": {"max_drop": "1%", "latency": "0.67x", "size": "0.25x"},
    "mtcnn-pnet": {"max_drop": "5%", "size": "0.5x"},
    "mtcnn-rnet": {"max_drop": "5%", "latency": "0.67x", "size": "0.25x"},
    "mtcnn-onet": {"max_drop": "5%", "latency": "0.67x", "size": "0.25x"},
}
"""What a task is asked for when nothing else is."""

MET, FAILED, NOT_MET = 0, 1, 3
RUN = ".run"


def _limit(flag: str, text: str) -> Any:
    return typer.Option(flag, metavar="LIMIT", help=text, show_default=False)


def compress(
    *,
    model: ModelArgument = None,
    data: DataOption = None,
    task: TaskOption = None,
    max_drop: Annotated[str | None, _limit("--max-drop", "Largest loss of quality, such as 1%.")] = None,
    latency: Annotated[str | None, _limit("--latency", "Time of a batch, such as 0.5x or 3ms.")] = None,
    size: Annotated[str | None, _limit("--size", "Bytes of the weights file, such as 1/12x or 400kB.")] = None,
    macs: Annotated[str | None, _limit("--macs", "Multiply-adds of a batch, such as 0.3x or 1.5GMAC.")] = None,
    parameters: Annotated[str | None, _limit("--parameters", "Such as 0.5x or 2.5M.")] = None,
    peak_memory: Annotated[str | None, _limit("--peak-memory", "Such as 0.5x or 64MB.")] = None,
    steps: Annotated[int | None, typer.Option(min=0, help="Steps of the recovery.", show_default="900")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of recovery and measurements.", show_default="0")] = None,
    threads: ThreadsOption = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Time of one comparison of latencies.", show_default="3")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Module or site to leave alone; repeat for more.")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(metavar="FOLDER", help="Where the result goes.")] = pathlib.Path(
        "compressed"
    ),
    front: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="N results between the original and the limits.", show_default=False),
    ] = None,
    nested: Annotated[bool, typer.Option("--nested", help="With --front: tighter plans build on looser ones.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in FOLDER.")] = False,
    recipe: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Start from a recipe.yaml.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe: budget.latency=0.4x.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make a model cheaper within a budget.

    The saved result is loaded and measured again by a fresh process, and a report is written beside it.

    Exit codes: 0 the budget is met and that was verified; 3 verified, but the budget is not met; 1 an error, or the
    verification failed; 2 the command is wrong; 130 interrupted (continue with --resume).
    """
    limits = {
        "max_drop": max_drop, "latency": latency, "size": size, "macs": macs, "parameters": parameters,
        "peak_memory": peak_memory,
    }  # fmt: skip
    with session(as_json=as_json, debug=debug):
        where = str(recipe or "--set")
        wanted = recipes.build(
            recipes.assigned(recipes.read(recipe) if recipe else {}, settings or [], where=where), where=where
        )
        wanted = wanted.with_source(model, data=data, task=task)
        wanted = wanted.with_flags(
            limits, steps=steps, seed=seed, threads=threads, seconds=seconds, skip=tuple(skip) if skip else None
        )
        if wanted.task is not None and not wanted.budget:
            wanted = replace(wanted, budget=BUDGETS[wanted.task])
        base = None if recipe is None else recipe.absolute().parent
        if front is not None or nested:
            check_front(front, out, resume=resume)
        if front is not None:
            documents = _front(wanted, out, front, nested=nested, base=base)
        else:
            documents = [_continued(wanted, out, resume=resume, base=base)]
    if front is not None:
        _leave_front(documents, out, as_json=as_json)
    document = documents[0]
    if as_json:
        emit(json.loads(document.to_json()))
    else:
        draw(document, notes=True)
        typer.echo(str(out / "report.html"))
    leave(FAILED if not document.verdict.verified else NOT_MET if document.verdict.met is False else MET)


def _continued(wanted: Recipe, out: pathlib.Path, *, resume: bool, base: pathlib.Path | None) -> Document:
    """Return the report of a new, continued or finished run."""  # noqa: DOC501
    check_folder(out, resume=resume)
    try:
        document = _finished(out, wanted) if resume else None
        if resume and document is None and not _unfinished(out):
            typer.echo(f"nothing to continue in {out}: starting", err=True)
        return document or _run(wanted, out, resume=resume, base=base)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; continue with: {recipes.command(wanted, out, resume=True)}") from None


def check_front(count: int | None, folder: pathlib.Path, *, resume: bool) -> None:
    """Refuse what does not go with --front.

    Args:
        count: Results asked for.
        folder: Where they go.
        resume: Whether a run was to be continued.

    Raises:
        UsageError: if --nested comes without --front, --resume with it, or the folder is in use.
    """
    if count is None:
        raise UsageError(f"--nested orders the plans of --front N, got --front {count}.")
    if resume:
        raise UsageError(f"--front starts anew each time, got --resume with --out {folder}.")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else ["a file"] if folder.exists() else []
    if any(name != FRONT and not name.isdigit() for name in names):
        raise UsageError(f"--out {folder} is in use ({names[0]}): give an empty or a new folder.")


def _front(
    wanted: Recipe, folder: pathlib.Path, count: int, *, nested: bool, base: pathlib.Path | None
) -> list[Document]:
    return compress_front(
        wanted, folder, count, nested=nested, base=base,
        verify=lambda place, recipe: verify_elsewhere(place, recipe, base=base),
    )  # fmt: skip


def _leave_front(documents: list[Document], folder: pathlib.Path, *, as_json: bool) -> None:
    if as_json:
        emit({"front": [json.loads(document.to_json()) for document in documents]})
    else:
        for number, document in enumerate(documents, start=1):
            typer.echo(f"{folder / str(number)}: {document.verdict.text}")
        typer.echo(str(folder / str(len(documents)) / "report.html"))
    verified = all(document.verdict.verified for document in documents)
    leave(FAILED if not verified else MET if all(d.verdict.met for d in documents) else NOT_MET)


def check_folder(folder: pathlib.Path, *, resume: bool) -> None:
    """Refuse to write among files that are not eke's.

    Args:
        folder: Where the result will go.
        resume: Whether an unfinished run there is meant.

    Raises:
        UsageError: if the folder is a file, or holds other things and no artifact.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file: give a folder.")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and not names & {"plan.json", RUN}:
        raise UsageError(
            f"--out {folder} holds files that are not eke's ({', '.join(sorted(names)[:3])}): "
            "give an empty or a new folder."
        )
    if _unfinished(folder) and not resume:
        typer.echo(f"{folder} holds an unfinished run: starting anew (--resume continues it)", err=True)


def _unfinished(folder: pathlib.Path) -> bool:
    return (folder / RUN / "recipe.json").exists()


def _finished(folder: pathlib.Path, wanted: Recipe) -> Document | None:
    """Return the report of a run that needs no continuing, or None."""  # noqa: DOC501
    from ..report import Document

    if _unfinished(folder) or not (folder / "report.json").is_file():
        return None
    document = Document.from_json((folder / "report.json").read_text(encoding="utf-8"))
    if not document.verdict.verified:
        return None
    before = recipes.assigned(recipes.read(folder), [], where=str(folder / recipes.FILE))
    # What is not said now is as it was: the task that would say it is not loaded for a run that is finished.
    unsaid = {**(before.get("recovery") or {}), **wanted.recovery}
    if before != (now := replace(wanted, recovery=unsaid).to_json()):
        changed = next(key for key in {*before, *now} if before.get(key) != now.get(key))
        raise UsageError(
            f"The finished run in {folder} had another recipe: {changed} was {before.get(changed)!r} and is now "
            f"{now.get(changed)!r}. Start it without --resume, or give another folder."
        )
    typer.echo(f"{folder} is finished: nothing to continue", err=True)
    return document


def _run(wanted: Recipe, folder: pathlib.Path, *, resume: bool, base: pathlib.Path | None) -> Document:
    """Return the report after compressing, saving and verifying."""  # noqa: DOC501
    from ..compression import Budget, Recovery
    from ..compression import compress as compressed
    from ..compression.arguments import check_budget
    from ..cost import pinned_threads

    wanted.check_source("compress")
    if not wanted.budget:
        raise UsageError(
            f"Nothing was limited, got the budget {wanted.budget}: give a limit, such as --max-drop 1% --latency 0.5x."
        )
    try:
        budget = check_budget(Budget(**wanted.budget))
        Recovery(**wanted.recovery)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise UsageError(f"{error}".replace("Budget.", "budget.")) from error
    model, task = load_model(wanted, folder=base), load_task(wanted, folder=base)
    wanted = wanted.with_recovery_of(task)
    recovery = replace(task.recovery or Recovery(), **wanted.recovery)  # type: ignore[arg-type]
    with pinned_threads(wanted.threads), shown() as progress:
        result = compressed(
            model, task, budget=budget, recovery=recovery, skip=wanted.skip, seed=wanted.seed, threads=wanted.threads,
            seconds=wanted.seconds, folder=folder / RUN, resume=resume, progress=progress, recipe=wanted.to_json(),
            title=task.name if wanted.task else f"{type(model).__name__} of {wanted.model}",
        )  # fmt: skip
        return _saved(result, wanted, folder, base=base)


def _saved(result: Result, wanted: Recipe, folder: pathlib.Path, *, base: pathlib.Path | None) -> Document:
    """Return the report once the artifact is written, verified by another process, and the run removed."""
    from ..compression.checkpoint import Run
    from ..compression.result import mark_verified

    result.save(folder)
    problem = verify_elsewhere(folder, wanted, base=base)
    if problem is not None:
        typer.echo(f"error: the saved result could not be verified: {problem}", err=True)
        return result.document()
    document = mark_verified(folder)
    run = Run(None, {}, resume=False)
    run.folder = folder / RUN
    run.finish()
    return document


def verify_elsewhere(folder: pathlib.Path, wanted: Recipe, *, base: pathlib.Path | None) -> str | None:
    """Load and measure an artifact in a fresh process.

    Args:
        folder: The artifact.
        wanted: Names model and data.
        base: Where the recipe was read from.

    Returns:
        None if it is the same there, otherwise what is wrong.

    Raises:
        KeyboardInterrupt: if that process was interrupted.
    """
    words = [sys.executable, "-P", "-m", "eke", "verify", str(folder), "--json"]
    if wanted.task:
        words += ["--task", wanted.task]
    else:
        words += [resolve(str(wanted.model), places(base)), "--data", resolve(str(wanted.data), places(base))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode == 0:
        return None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return f"the process ended with code {done.returncode}: {done.stderr.strip()[-2000:]}"
    if "error" in answer:
        return str(answer["error"])
    return "; ".join(f"{c['name']}: {c['text']}" for c in answer["checks"] if c["same"] is False)
