"""The report in a terminal: a compact table of before and after, then the verdict.

On a terminal it uses weight and colour besides words; into a pipe rich writes the same words plain.
"""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import wording
from .document import Document, Measured
from .markup import printable
from .summary import verdict_words

SITES = 30
"""Most sites a terminal is asked to show."""


def render(document: Document, console: Console) -> None:
    """Print the summary and the verdict.

    Args:
        document: What to print.
        console: Where to.
    """
    console.print(Text(printable(document.title), style="bold"))
    if document.before or document.after:
        console.print(_comparison(document))
    for speedup in document.speedups:
        claim = "faster" if speedup.claimed else "(no speed-up claimed)"
        _say(
            console,
            f"  {wording.ratio(speedup.ratio)} {claim}: {wording.speed_detail(speedup)}, against {speedup.against}",
        )
    if document.drop is not None:
        lost = wording.difference(document.drop.points, document.drop.unit)
        _say(console, f"  drop {lost}: {wording.drop_detail(document.drop)}")
    if document.budget:
        console.print(_budget(document))
    if document.sites:
        console.print(_sites(document))
    for warning in document.warnings:
        console.print(Text("warning: ", style="bold yellow") + Text(printable(warning)))
    first, second = verdict_words(document)
    style = {True: "bold green", False: "bold red", None: "bold"}[document.verdict.met]
    console.print(Text(f"{first}, {second}. ", style=style) + Text(printable(document.verdict.text)))


def _say(console: Console, text: str) -> None:
    console.print(Text(printable(text)))


def _table(*titles: str) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for i, title in enumerate(titles):
        grid.add_column(Text(printable(title)), justify="left" if i == 0 else "right", overflow="fold")
    return grid


def _comparison(document: Document) -> Table:
    models = [m for m in (document.before, document.after) if m is not None]
    grid = _table("", *(m.label for m in models))
    rows: tuple[tuple[str, Callable[[Measured], str | None]], ...] = (
        (_score_name(models), lambda m: None if m.score is None else wording.score(m.score)),
        ("", lambda m: None if m.score is None else "\n".join(wording.score_detail(m.score).split(", ", 1))),
        ("size", lambda m: None if m.bytes is None else wording.size(m.bytes)),
        ("latency", lambda m: None if m.milliseconds is None else wording.duration(m.milliseconds)),
        ("FLOPs", lambda m: None if m.flops is None else wording.count(m.flops)),
        ("parameters", lambda m: None if m.parameters is None else wording.count(m.parameters)),
        ("peak memory", lambda m: None if m.peak_bytes is None else wording.size(m.peak_bytes)),
    )
    for name, read in rows:
        cells = [read(m) for m in models]
        if any(cells):
            grid.add_row(*(Text(printable(c or wording.NONE)) for c in (name or " ", *cells)))
    return grid


def _score_name(models: list[Measured]) -> str:
    return next((wording.score_name(m.score) for m in models if m.score is not None), "score")


def _budget(document: Document) -> Table:
    grid = _table("budget", "asked", "measured", "")
    said = {True: ("met", "green"), False: ("not met", "red"), None: ("open", "")}
    for b in document.budget:
        got = wording.NONE if b.measured is None else wording.quantity(b.measured, b.unit)
        grid.add_row(Text(printable(b.name)), Text(printable(b.asked)), Text(printable(got)), Text(*said[b.met]))
    return grid


def _sites(document: Document) -> Table:
    grid = _table("site", "kind", "shape", "parameters", "FLOPs", "time", "sensitivity (estimated)")
    shown = sorted(document.sites, key=lambda s: (-(s.share_of_time or 0.0), -(s.parameters or 0)))[:SITES]
    for s in shown:
        numbers: tuple[tuple[float | None, Callable[[float], str]], ...] = (
            (s.parameters, wording.count),
            (s.flops, wording.count),
            (s.share_of_time, wording.percent),
            (s.sensitivity, wording.number),
        )
        cells = [wording.NONE if v is None else write(v) for v, write in numbers]
        grid.add_row(*(Text(printable(c)) for c in (s.name, s.kind, _shape(s.shape), *cells)))
    if len(shown) < len(document.sites):
        grid.caption = f"the {len(shown)} that take most time of {len(document.sites)}"
    return grid


def _shape(sizes: tuple[int, ...]) -> str:
    return " \u00d7 ".join(map(str, sizes))
