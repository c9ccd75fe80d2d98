"""Progress on stderr: a bar on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import typer


@contextlib.contextmanager
def shown() -> Iterator[Callable[[str, float, str], None]]:
    """Show how far a run is.

    Yields:
        `progress(stage, share, text)`.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines()
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.fields[stage]:>10}"), BarColumn(24), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.description}", markup=False), console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0, stage="start")

        def progress(stage: str, share: float, text: str) -> None:
            bars.update(bar, completed=share, description=text, stage=stage)

        yield progress


def lines() -> Callable[[str, float, str], None]:
    """Return a `progress` that writes a line when a stage begins and at each tenth of it."""
    last: tuple[str, int] | None = None

    def progress(stage: str, share: float, text: str) -> None:
        nonlocal last
        if (stage, int(10 * share)) != last:
            last = stage, int(10 * share)
            typer.echo(f"{stage}: {text}", err=True)

    return progress
