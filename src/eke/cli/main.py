"""The command `eke`: its verbs and its version.

`eke --help` answers at once: torch and the rooms are imported inside the verbs.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .._version import __version__
from .compress import compress
from .doctor import doctor
from .factorize import factorize
from .gate import gate
from .inspect import inspect
from .report import report
from .search import search
from .solve import solve
from .verify import verify
from .why import why

app = typer.Typer(
    name="eke",
    help="Make PyTorch models cheaper, and prove it.",
    epilog="Start with: eke compress --task demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for verb in (compress, inspect, why, verify, gate, report, factorize, solve, search, doctor):
    app.command()(verb)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"eke {__version__}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make PyTorch models cheaper, and prove it."""


def main() -> None:
    """Run the command with the arguments of this process and exit with its code."""
    try:
        app(prog_name="eke")
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
