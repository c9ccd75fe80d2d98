"""HTML that nothing can be injected into: plain strings are escaped, `Markup` passes.

`h("td", {"class": name}, text, h("b", {}, more))` builds an element; children that are plain strings are escaped, so
raw HTML is only what was built here. Names may come from anywhere: control characters, lone
surrogates and direction overrides, which no font shows and which break XML, become the replacement character.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_HOSTILE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_VOID = frozenset({"meta", "link", "input", "br", "hr", "col"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | None | Iterable["Child"]


def printable(text: str) -> str:
    """Return text without characters that no font shows: control codes, lone surrogates, direction overrides."""
    return _HOSTILE.sub("\ufffd", text)


def escape(text: object, limit: int = 2000) -> Markup:
    """Escape a value for text and attributes.

    Args:
        text: Anything with a `str`.
        limit: Longest text in characters; longer ones lose their middle.

    Returns:
        Text that is safe inside an element or a quoted attribute.
    """
    plain = printable(str(text))
    if len(plain) > limit:
        plain = f"{plain[: limit // 2]} \u2026 {plain[-limit // 2 :]}"
    return Markup(html.escape(plain, quote=True))


def h(name: str, attributes: Mapping[str, object] | None = None, *children: Child) -> Markup:
    """Build one element.

    Args:
        name: Tag.
        attributes: Values are escaped; None and False leave the attribute out, True writes it empty.
        children: Strings are escaped unless they are `Markup`; None is left out; iterables are flattened.

    Returns:
        The element, well-formed as HTML and as XML.
    """
    written = "".join(
        f' {key}="{"" if value is True else escape(value)}"'
        for key, value in (attributes or {}).items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Return children joined as `h` joins them."""
    return Markup("".join(_flat(children)))


def _flat(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            yield child
        elif isinstance(child, str):
            yield escape(child)
        else:
            yield from _flat(child)


@dataclass(frozen=True)
class Column:
    """A column: its title, whether it holds numbers, and the word its numbers stand under."""

    title: str
    numeric: bool = False
    word: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, what it is sorted by, and attributes for its drawing."""

    content: Child
    value: float | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)


def word(name: str) -> Markup:
    """Return one of the four words with its mark, so that it looks the same everywhere."""
    return h("span", {"class": f"word {name}"}, name)


def listing(name: str, css: str, texts: Sequence[str], most: int = 40) -> Markup:
    """Build a list of texts, saying how many did not fit.

    Args:
        name: "ul" or "ol".
        css: Its class.
        texts: One an item.
        most: Most items to show.

    Returns:
        The list; nothing for no texts.
    """
    shown = list(texts[:most])
    if len(texts) > most:
        shown.append(f"{len(texts) - most} more are in report.json.")
    return h(name, {"class": css}, [h("li", {}, text) for text in shown]) if shown else Markup("")


def table(caption: Child, columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]], name: str) -> Markup:
    """Build a table that scrolls inside its own region when the page is narrow; the page's script makes it sortable.

    Args:
        caption: What the table shows.
        columns: One a cell of each row; the first cell of a row heads it.
        rows: Cells or plain text.
        name: Unique id on the page; row i gets the id `{name}-{i}`.

    Returns:
        The region with its table.
    """
    heads = [
        h("th", {"scope": "col", "class": "n" if c.numeric else None}, c.title, word(c.word) if c.word else None)
        for c in columns
    ]
    body = [h("tr", {"id": f"{name}-{i}"}, _cells(row, columns)) for i, row in enumerate(rows)]
    built = h(
        "table",
        {"id": name},
        h("caption", {"id": f"{name}-caption"}, h("span", {}, caption)),
        h("thead", {}, h("tr", {}, heads)),
        h("tbody", {}, body),
    )
    tall = len(rows) > 24
    region = {"class": "scroll tall" if tall else "scroll", "role": "region", "tabindex": 0}
    return join([
        _filter(name, len(rows)) if tall else None,
        h("div", {**region, "aria-labelledby": f"{name}-caption"}, built),
    ])


def _filter(name: str, rows: int) -> Markup:
    field_id = f"{name}-filter"
    return h(
        "p",
        {"class": "filter", "hidden": True},
        h("label", {"for": field_id}, "Filter rows "),
        h(
            "input",
            {"type": "search", "id": field_id, "data-filter": name, "autocomplete": "off", "spellcheck": "false"},
        ),
        h("output", {"for": field_id, "aria-live": "polite"}, f"{rows} rows"),
    )


def _cells(row: Sequence[Cell | str], columns: Sequence[Column]) -> Iterable[Markup]:
    for i, (cell, column) in enumerate(zip(row, columns)):
        item = cell if isinstance(cell, Cell) else Cell(cell)
        attributes: dict[str, object] = {"scope": "row"} if i == 0 else {}
        if column.numeric:
            attributes["class"] = "n"
        if item.value is not None:
            attributes["data-v"] = f"{item.value:.6g}"
        extra = dict(item.attributes)
        if "class" in extra and "class" in attributes:
            extra["class"] = f"{attributes['class']} {extra['class']}"
        yield h("th" if i == 0 else "td", {**attributes, **extra}, item.content)
