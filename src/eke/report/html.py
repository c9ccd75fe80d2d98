"""The report as one HTML file: no network, light and dark, for eyes, keyboards, screen readers and paper.

`render` draws a `Document`; sections whose data is missing do not appear. The page carries its own style and script and
a content security policy that allows nothing else, not even another script. It stays below `LIMIT_BYTES`: when a
document is too long for that, tables show what matters most and say so.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path

from . import summary, tables, wording
from .document import Document
from .markup import Markup, escape, h, join, word

LIMIT_BYTES = 400_000
PLAN_LEAD = (
    "Italic and hollow: predicted. Upright and solid: measured. Bars of size and time: outlined before, filled after."
)
CALIBRATION_LEAD = "How far the planner can be trusted here."
LIMITS = ((420, 120), (420, 70), (300, 60), (210, 60), (120, 60), (60, 40), (25, 25))
"""Rows a table and points a chart, from the first choice to the last resort."""


def render(document: Document) -> str:
    """Draw a document.

    Args:
        document: What to draw.

    Returns:
        The page, a complete HTML document of less than 400 kB.

    Raises:
        RuntimeError: if even the shortest tables do not fit.
    """
    for rows, points in LIMITS:
        page = _page(document, rows, points)
        if len(page.encode()) < LIMIT_BYTES:
            return page
    raise RuntimeError(
        f"The report of {document.title!r:.60} needs {len(page.encode())} bytes with {rows} rows a table, "
        f"more than {LIMIT_BYTES}; shorten its recipe, notes and warnings."
    )


def write(document: Document, path: str | os.PathLike[str]) -> None:
    """Render a document into a file; the file is replaced in one step or not at all.

    Args:
        document: What to draw.
        path: Where to.
    """
    target = Path(path)
    page = render(document)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _page(document: Document, rows: int, points: int) -> str:
    folder = resources.files(__package__)
    style = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))
    script = Markup(folder.joinpath("page.js").read_text(encoding="utf-8"))
    head = h(
        "head",
        {},
        h("meta", {"charset": "utf-8"}),
        h("meta", {"http-equiv": "Content-Security-Policy", "content": _policy(script)}),
        h("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        h("meta", {"name": "color-scheme", "content": "light dark"}),
        h("meta", {"name": "generator", "content": f"eke {document.eke_version}"}),
        h("title", {}, escape(document.title, 160), " \u2013 eke"),
        h("link", {"rel": "icon", "href": "data:,"}),
        h("style", {}, style),
    )
    return f"<!doctype html>\n{h('html', {'lang': 'en'}, head, _body(_sections(document, rows, points), document, script))}\n"


def _policy(script: str) -> str:
    """Return a content security policy that lets this one script run and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _body(drawn: list[tuple[str, str, Markup, str]], document: Document, script: Markup) -> Markup:
    sections = [s for s in drawn if s[2]]
    links = [h("li", {}, h("a", {"href": f"#{name}"}, title)) for name, title, _, _ in sections]
    theme = h("button", {"type": "button", "id": "theme", "hidden": True}, "Dark page")
    foot = f"Written by eke {document.eke_version}. report.json holds the same numbers, schema {document.schema}."
    return h(
        "body",
        {},
        h("a", {"class": "skip", "href": "#main"}, "Skip to the report"),
        h("div", {"class": "masthead"}, h("span", {"class": "brand"}, "eke"), theme),
        summary.header(document, _date(document.created)),
        h("nav", {"aria-label": "Contents"}, h("ol", {}, links)),
        h("main", {"id": "main", "tabindex": -1}, [_section(*section) for section in sections]),
        h("footer", {}, h("p", {}, foot)),
        h("script", {}, script),
    )


def _section(name: str, title: str, content: Markup, lead: str) -> Markup:
    heading = h("div", {"class": "rail"}, h("h2", {"id": f"{name}-heading"}, title), h("p", {}, lead) if lead else None)
    return h(
        "section", {"id": name, "aria-labelledby": f"{name}-heading"}, heading, h("div", {"class": "content"}, content)
    )


def _sections(document: Document, rows: int, points: int) -> list[tuple[str, str, Markup, str]]:
    """Return id, title, inside and the line under the title of every section; an empty inside drops it."""

    def when(data: object, draw: Callable[[Document, int], Markup], most: int = rows) -> Markup:
        return draw(document, most) if data else Markup("")

    d = document
    compared = "The model" if d.kind == "inspect" else "Before and after"
    return [
        (
            "read-first",
            "Read first",
            summary.warnings(d) if d.warnings else Markup(""),
            "What limits the claims below.",
        ),
        ("asked", "Asked and got", summary.budget(d) if d.budget else Markup(""), ""),
        ("result", compared, summary.result(d), "All measured on this machine."),
        ("trade-off", "Trade-off", when(d.front, tables.front, points), "Up and to the left is better."),
        ("what-changed", "The plan", when(d.plan, tables.plan), PLAN_LEAD),
        ("rivals", "Controls", when(d.controls, tables.controls), "What else the same effort could have bought."),
        (
            "prediction",
            "Predicted against measured",
            when(d.calibration, tables.calibration, 2 * points),
            CALIBRATION_LEAD,
        ),
        ("model-sites", "Sites", when(d.sites, tables.sites), "Where the weight, the time and the risk are."),
        ("data", "Data", when(d.splits, tables.splits), ""),
        ("planning", "Rounds", _rounds(d), "How the plan was corrected by measurement."),
        ("remarks", "Notes", _notes(d), ""),
        ("machine", "Environment", _environment(d), ""),
        ("repeat", "Reproduce", _reproduce(d), ""),
        ("words", "The four words", _glossary(), "Every number stands under one of them."),
    ]


def _rounds(document: Document) -> Markup:
    items = [h("li", {"value": r.number}, r.text) for r in document.rounds[:100]]
    return h("ol", {"class": "prose"}, items) if items else Markup("")


def _notes(document: Document) -> Markup:
    items = [h("li", {}, n) for n in document.notes[:40]]
    return h("ul", {"class": "prose"}, items) if items else Markup("")


def _environment(document: Document) -> Markup:
    known = list(document.environment.items())[:80]
    return _facts([(escape(key, 60), escape(value, 300)) for key, value in known], "facts") if known else Markup("")


def _glossary() -> Markup:
    return _facts([(word(name), text) for name, text in wording.GLOSSARY], "facts words")


def _facts(entries: Sequence[tuple[str, str]], css: str) -> Markup:
    return h("dl", {"class": css}, [h("div", {}, h("dt", {}, name), h("dd", {}, text)) for name, text in entries])


def _reproduce(document: Document) -> Markup:
    if document.recipe is None:
        return Markup("")
    install = h("code", {}, f"pip install eke=={document.eke_version}")
    run = h("code", {}, f"eke {document.kind} --recipe recipe.yaml")
    steps = [
        h("li", {}, "Install the same version: ", install),
        h("li", {}, "Save the recipe below as ", h("code", {}, "recipe.yaml"), " (a saved result has it already)."),
        h("li", {}, "Run ", run, ". Times belong to the machine named under Environment; compare ratios."),
    ]
    copy = h("button", {"type": "button", "id": "copy", "hidden": True}, "Copy the recipe")
    said = h("span", {"role": "status", "aria-live": "polite", "id": "copied"})
    frame = {"id": "recipe", "tabindex": 0, "role": "region", "aria-label": "Recipe"}
    recipe = h("pre", frame, h("code", {}, escape(document.recipe, 40_000)))
    return join([h("ol", {"class": "prose"}, steps), recipe, h("p", {"class": "copy"}, copy, said)])


def _date(created: str) -> str:
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    if "T" not in created:
        return f"{when.day} {when:%B %Y}"
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"
