"""`eke why`: for every matrix, channel group and block, what each option would cost in loss and save in bytes and time.

Losses are predicted to second order and corrected by the options that were carried out (their own measured loss stands
beside the prediction); with --measure each option is carried out, and its score is measured too. Times are what the
fitted model of the whole net says one option alone saves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .load import load_model, load_task
from .options import DataOption, DebugOption, JsonOption, ModelArgument, TaskOption, ThreadsOption
from .progress import shown
from .recipe import Recipe
from .session import UsageError, emit, session
from .show import console

if TYPE_CHECKING:
    from .._types import Quality
    from ..compression import Option


def why(
    *,
    model: ModelArgument = None,
    data: DataOption = None,
    task: TaskOption = None,
    site: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only decisions with this in their name.", show_default=False)
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Carry out and measure every option shown.")] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of each measurement of latency.")] = 3.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what every option would cost and save.

    One line for each width, structure and block that a plan could choose: the loss it is predicted to cost before
    recovery, what was measured, and the bytes and time it saves.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        from ..compression import survey

        recipe = Recipe(model, data, task)
        if recipe.task is None and recipe.data is None:
            raise UsageError(f"why needs the data of {model}: --data FILE.py:FUNCTION.")
        net, known = load_model(recipe), load_task(recipe)
        with shown() as progress:
            found = survey(net, known, threads=threads, seconds=seconds, progress=progress)
            options = list(found.options(only=site, measured=measure))
        before = found.space.before
    if as_json:
        emit({"before": dict(before), "options": [_plain(option) for option in options]})
        return
    _draw(options, before)


def _plain(option: Option) -> dict[str, Any]:
    score = option.score
    return {**vars(option), "score": None if score is None else _number(score)}


def _number(score: Quality) -> float:
    from ..compression.measure import as_score

    return as_score(score).value


def _draw(options: Iterable[Option], before: Mapping[str, float]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from ..report.markup import printable

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    titles = ("decision", "option", "predicted loss", "measured", "score", "file saved", "time saved")
    for number, title in enumerate(titles):
        grid.add_column(title, justify="left" if number < 2 else "right")
    last = None
    for option in options:
        cells = (
            option.choice if option.choice != last else "",
            option.label,
            f"{option.predicted_loss:+.2g}",
            "" if option.measured_loss is None else f"{option.measured_loss:+.2g}",
            "" if option.score is None else f"{_number(option.score):.4g}",
            f"{100 * option.bytes / before['size']:.1f} %",
            f"{100 * option.seconds / before['latency']:.1f} %",
        )
        grid.add_row(*(Text(printable(cell)) for cell in cells))
        last = option.choice
    console().print(grid)
