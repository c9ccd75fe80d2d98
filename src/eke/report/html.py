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
from dataclasses import dataclass
from datetime import datetime
from importlib import resources
from pathlib import Path

from . import summary, tables, wording
from .document import Document
from .markup import Markup, escape, h, join, listing, word

LIMIT_BYTES = 400_000
PLAN_LEAD = (
    "Italic and hollow: predicted. Upright and solid: measured. Bars of size and time: outlined before, filled after."
)
CALIBRATION_LEAD = "How far the planner can be trusted here."
LIMITS = ((420, 120), (420, 70), (300, 60), (210, 60), (120, 60), (60, 40), (25, 25))
"""Rows a table and points a chart, from the first choice to the last resort."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its id, its title, what is in it, and a line under the title."""

    name: str
    title: str
    content: Markup
    lead: str = ""


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
    body = _body(_sections(document, rows, points), document, script)
    return f"<!doctype html>\n{h('html', {'lang': 'en'}, head, body)}\n"


def _policy(script: str) -> str:
    """Return a content security policy that lets this one script run and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _body(sections: Sequence[Section], document: Document, script: Markup) -> Markup:
    links = [h("li", {}, h("a", {"href": f"#{s.name}"}, s.title)) for s in sections]
    theme = h("button", {"type": "button", "id": "theme", "hidden": True}, "Dark page")
    foot = f"Written by eke {document.eke_version}. report.json holds the same numbers, schema {document.schema}."
    return h(
        "body",
        {},
        h("a", {"class": "skip", "href": "#main"}, "Skip to the report"),
        h("div", {"class": "masthead"}, h("span", {"class": "brand"}, "eke"), theme),
        summary.header(document, _date(document.created)),
        h("nav", {"aria-label": "Contents"}, h("ol", {}, links)),
        h("main", {"id": "main", "tabindex": -1}, [_section(s) for s in sections]),
        h("footer", {}, h("p", {}, foot)),
        h("script", {}, script),
    )


def _section(section: Section) -> Markup:
    heading = f"{section.name}-heading"
    lead = h("p", {}, section.lead) if section.lead else None
    rail = h("div", {"class": "rail"}, h("h2", {"id": heading}, section.title), lead)
    frame = {"id": section.name, "aria-labelledby": heading}
    return h("section", frame, rail, h("div", {"class": "content"}, section.content))


def _sections(document: Document, rows: int, points: int) -> list[Section]:
    """Return the sections that have something to show."""
    d = document

    def when(data: object, draw: Callable[[Document, int], Markup], most: int = rows) -> Markup:
        return draw(d, most) if data else Markup("")

    rounds = listing("ol", "prose", [r.text for r in d.rounds])
    first = listing("ul", "warnings", d.warnings)
    compared = {"inspect": "The model", "search": "The winner"}.get(d.kind, "Before and after")
    calibration = when(d.calibration, tables.calibration, 2 * points)
    drawn = [
        Section("read-first", "Read first", first, "What limits the claims below."),
        Section("asked", "Asked and got", summary.budget(d) if d.budget else Markup("")),
        Section("result", compared, summary.result(d), "All measured on this machine."),
        Section("trade-off", "Trade-off", when(d.front, tables.front, points), "Up and to the left is better."),
        Section("what-changed", "The plan", when(d.plan, tables.plan), PLAN_LEAD),
        Section(
            "rivals", "Controls", when(d.controls, tables.controls), "What else the same effort could have bought."
        ),
        Section("prediction", "Predicted against measured", calibration, CALIBRATION_LEAD),
        Section("model-sites", "Sites", when(d.sites, tables.sites), "Where the weight, the time and the risk are."),
        Section("data", "Data", when(d.splits, tables.splits)),
        Section("planning", "Rounds", rounds, "How the plan was corrected by measurement."),
        Section("remarks", "Notes", listing("ul", "prose", d.notes)),
        Section("machine", "Environment", _environment(d)),
        Section("repeat", "Reproduce", _reproduce(d)),
        Section("words", "The four words", _glossary(), "Every number stands under one of them."),
    ]
    return [section for section in drawn if section.content]


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
