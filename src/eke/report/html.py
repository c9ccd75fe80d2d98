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
from collections.abc import Callable
from datetime import datetime
from importlib import resources
from pathlib import Path

from . import summary, tables, wording
from .document import Document
from .markup import Markup, escape, h, join, word

LIMIT_BYTES = 400_000
ROWS = (420, 240, 120, 60, 25)


def render(document: Document) -> str:
    """Draw a document.

    Args:
        document: What to draw.

    Returns:
        The page, a complete HTML document of less than 400 kB.

    Raises:
        RuntimeError: if even the shortest tables do not fit.
    """
    for rows in ROWS:
        page = _page(document, rows)
        if len(page.encode()) < LIMIT_BYTES:
            return page
    raise RuntimeError(
        f"The report of {document.title!r:.60} needs {len(page.encode())} bytes with {rows} rows a table, more than {LIMIT_BYTES}."
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


def _page(document: Document, rows: int) -> str:
    folder = resources.files(__package__)
    style = Markup(folder.joinpath("page.css").read_text(encoding="utf-8"))
    script = Markup(folder.joinpath("page.js").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    title = f"{escape(document.title, 160)} \u2013 eke"
    head = h(
        "head",
        {},
        h("meta", {"charset": "utf-8"}),
        h("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        h("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        h("meta", {"name": "color-scheme", "content": "light dark"}),
        h("meta", {"name": "generator", "content": f"eke {document.eke_version}"}),
        h("title", {}, Markup(title)),
        h("link", {"rel": "icon", "href": "data:,"}),
        h("style", {}, style),
    )
    return "<!doctype html>\n" + h("html", {"lang": "en"}, head, _body(document, rows), Markup("\n")).replace(
        "</body>", f"<script>{script}</script></body>"
    )


def _body(document: Document, rows: int) -> Markup:
    sections = [s for s in _sections(document, rows) if s[2]]
    links = [h("li", {}, h("a", {"href": f"#{name}"}, title)) for name, title, _, _ in sections]
    theme = h("button", {"type": "button", "id": "theme", "hidden": True}, "Dark page")
    top = h("div", {"class": "masthead"}, h("span", {"class": "brand"}, "eke"), theme)
    drawn = [_section(*section) for section in sections]
    return h(
        "body",
        {},
        h("a", {"class": "skip", "href": "#main"}, "Skip to the report"),
        top,
        summary.header(document, _date(document.created)),
        h("nav", {"aria-label": "Contents"}, h("ol", {}, links)),
        h("main", {"id": "main", "tabindex": -1}, drawn),
        h(
            "footer",
            {},
            h(
                "p",
                {},
                f"Written by eke {document.eke_version}. The same numbers are in report.json, schema {document.schema}.",
            ),
        ),
    )


def _section(name: str, title: str, content: Markup, lead: str) -> Markup:
    heading = h("div", {"class": "rail"}, h("h2", {"id": f"{name}-heading"}, title), h("p", {}, lead) if lead else None)
    return h(
        "section", {"id": name, "aria-labelledby": f"{name}-heading"}, heading, h("div", {"class": "content"}, content)
    )


def _sections(document: Document, rows: int) -> list[tuple[str, str, Markup, str]]:
    """Id, title, inside and the line under the title of every section; an empty inside drops it."""

    def when(data: object, draw: Callable[[Document, int], Markup]) -> Markup:
        return draw(document, rows) if data else Markup("")

    d = document
    result = join([summary.comparison(d) if d.before or d.after else None, summary.drop(d), summary.speeds(d)])
    return [
        ("read-first", "Read first", summary.warnings(d) if d.warnings else Markup(""), "What limits the claims below."),
        ("asked", "Asked and got", summary.budget(d) if d.budget else Markup(""), ""),
        ("result", "The model" if d.kind == "inspect" else "Before and after", result, "All measured on this machine."),
        ("trade-off", "Trade-off", when(d.front, tables.front), "Up and to the left is better."),
        ("what-changed", "The plan", when(d.plan, tables.plan), "Italic and hollow: predicted. Upright and solid: measured."),
        ("rivals", "Controls", when(d.controls, tables.controls), "What else could have been done with the same effort."),
        ("prediction", "Predicted against measured", when(d.calibration, tables.calibration), "How far the planner can be trusted here."),
        ("model-sites", "Sites", when(d.sites, tables.sites), "Where the weight, the time and the risk are."),
        ("data", "Data", when(d.splits, tables.splits), ""),
        ("planning", "Rounds", _rounds(d), "How the plan was corrected by measurement."),
        ("remarks", "Notes", _notes(d), ""),
        ("machine", "Environment", _environment(d), ""),
        ("repeat", "Reproduce", _reproduce(d), ""),
        ("words", "The four words", _glossary(), "Every number stands under one of them."),
    ]  # fmt: skip


def _rounds(document: Document) -> Markup:
    items = [h("li", {"value": r.number}, r.text) for r in document.rounds[:100]]
    return h("ol", {"class": "prose"}, items) if items else Markup("")


def _notes(document: Document) -> Markup:
    items = [h("li", {}, n) for n in document.notes[:40]]
    return h("ul", {"class": "prose"}, items) if items else Markup("")


def _environment(document: Document) -> Markup:
    entries = [
        h("div", {}, h("dt", {}, escape(k, 60)), h("dd", {}, escape(v, 300)))
        for k, v in list(document.environment.items())[:80]
    ]
    return h("dl", {"class": "facts"}, entries) if entries else Markup("")


def _reproduce(document: Document) -> Markup:
    if document.recipe is None:
        return Markup("")
    how = {
        "compress": "eke compress --recipe recipe.yaml",
        "gate": "eke gate --recipe recipe.yaml",
        "inspect": "eke inspect --recipe recipe.yaml",
    }
    steps = [
        h("li", {}, "Install the same version: ", h("code", {}, f"pip install eke=={document.eke_version}")),
        h("li", {}, "Save the recipe below as ", h("code", {}, "recipe.yaml"), " (a saved result has it already)."),
        h(
            "li",
            {},
            "Run ",
            h("code", {}, how[document.kind]),
            ". Times belong to the machine named under Environment; compare ratios.",
        ),
    ]
    copy = h("button", {"type": "button", "id": "copy", "hidden": True}, "Copy the recipe")
    said = h("span", {"role": "status", "aria-live": "polite", "id": "copied"})
    recipe = h(
        "pre", {"id": "recipe", "tabindex": 0, "aria-label": "Recipe"}, h("code", {}, escape(document.recipe, 40_000))
    )
    return join([h("ol", {"class": "prose"}, steps), recipe, h("p", {"class": "copy"}, copy, said)])


def _glossary() -> Markup:
    return h(
        "dl",
        {"class": "facts words"},
        [h("div", {}, h("dt", {}, word(name)), h("dd", {}, text)) for name, text in wording.GLOSSARY],
    )


def _date(created: str) -> str:
    try:
        when = datetime.fromisoformat(created)
    except ValueError:
        return created
    zone = f" {when.tzname()}" if when.tzinfo else ""
    return f"{when.day} {when:%B %Y, %H:%M}{zone}"
