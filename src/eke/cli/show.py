"""Reports on stdout: drawn for a terminal's width, on lines of any length into a pipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..report import Document

_ENDLESS = 100_000


def console() -> Console:
    """Return a console on stdout; into a pipe, no line is broken."""
    from rich.console import Console

    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=_ENDLESS)


def draw(document: Document, *, notes: bool = False) -> None:
    """Print a report; its last line is the verdict.

    Args:
        document: What to print.
        notes: Whether to print its notes too, before everything else.
    """
    from rich.text import Text

    from ..report import terminal
    from ..report.markup import printable

    screen = console()
    for note in document.notes if notes else ():
        screen.print(Text(f"note: {printable(note)}"))
    terminal.render(document, screen)
