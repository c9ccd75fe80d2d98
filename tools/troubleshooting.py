#!/usr/bin/env python3
"""Write docs/troubleshooting.md from the table of wrong inputs that the tests go through (tests/wrong)."""

from __future__ import annotations

import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"

HEAD = """\
# Troubleshooting

What eke says when something does not fit, why, and what to do. Search this page for a piece of your message; "..."
stands for what differs from case to case. Every line is a test: `tools/troubleshooting.py` writes the page from the
same table.

Where the error came from a function of yours (loss, score, loader, solver), its own traceback stands above eke's
message. `eke ... --debug` shows the whole traceback of a command. What is missing here is a bug, and worth an issue.
"""


def cell(text: str) -> str:
    """One cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def says(text: str) -> str:
    """A message as code."""
    return f"`{cell(text).replace('`', chr(39))}`"


def table(title: str, rows: list[tuple[str, str, str, str]]) -> str:
    """A section with one line a row: what was given, what is seen, why, what to do."""
    lines = [f"## {title}", "", "| Given | You see | Why | What to do |", "|---|---|---|---|"]
    lines += [f"| {given} | {seen} | {cell(why)} | {cell(do)} |" for given, seen, why, do in rows]
    return "\n".join(lines) + "\n"


def text() -> str:
    """The page."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        from wrong import COMMANDS, SECTIONS
    finally:
        sys.path.remove(str(ROOT / "tests"))
    parts = [HEAD]
    for title, rows in SECTIONS.items():
        parts.append(table(title, [(cell(row.given), says(row.says), row.why, row.do) for row in rows]))
    commands = [(f"`eke {cell(row.words)}`", says(row.says), row.why, row.do) for row in COMMANDS]
    parts.append(table("On the command line", commands))
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
