"""`eke report`: show a saved report again."""

from __future__ import annotations

import json
import pathlib
import webbrowser
from typing import Annotated

import typer

from .options import DebugOption, JsonOption
from .session import UsageError, emit, session
from .show import draw


def report(
    *,
    folder: Annotated[pathlib.Path, typer.Argument(metavar="FOLDER", help="A result, or a report.json.")],
    browse: Annotated[bool, typer.Option("--open", help="Write the page again and open it in the browser.")] = False,
    out: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Write the page to a file.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the report of a result again.

    In the terminal, as a page (--open, --out) or as JSON.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        from ..cost import write_bytes
        from ..report import Document, html

        path = folder / "report.json" if folder.is_dir() else folder
        if not path.is_file():
            raise UsageError(f"There is no report at {path}: give the folder of a result, or its report.json.")
        document = Document.from_json(path.read_text(encoding="utf-8"))
        page = out or (path.with_suffix(".html") if browse else None)
        if page is not None:
            write_bytes(page, html.render(document).encode())
        if browse and page is not None:
            webbrowser.open(page.absolute().as_uri())
    if as_json:
        emit(json.loads(document.to_json()))
    elif page is None:
        draw(document, notes=True)
    else:
        typer.echo(str(page))
