"""The first page of the certificate: the verdict, what was asked and got, before and after, drop and speed.

Nothing here is estimated: a number that was only predicted has no place above the fold.
"""

from __future__ import annotations

from collections.abc import Callable

from . import wording
from .document import BudgetLine, Document, Drop, Measured, Speedup
from .markup import Cell, Child, Column, Markup, escape, h, join, table, word
from .strips import Strip, drop_plot, gauge, seal

Write = tuple[Callable[[float], str], str]
"""How a number is written, and the word for less of it."""

KINDS = {
    "compress": "Report on a compression",
    "gate": "Gate: old against new",
    "inspect": "Inspection of a model",
    "search": "Report on a search",
}


def verdict_words(document: Document) -> tuple[str, str]:
    """Return the verdict in two or three words, and whether it was verified."""
    if document.kind == "inspect":
        return "Inspected", "nothing was changed"
    if document.kind == "search":
        return "Budget kept" if document.verdict.met else "No budget asked", "not trained"
    asked = {True: "Budget met", False: "Budget not met", None: "No budget asked"}
    passed = {True: "Gate passed", False: "Gate failed", None: "No limits asked"}
    first = (passed if document.kind == "gate" else asked)[document.verdict.met]
    return first, "verified" if document.verdict.verified else "not verified"


def header(document: Document, created: str) -> Markup:
    """Return the masthead, the title, the verdict and the seal."""
    first, second = verdict_words(document)
    mark = "dash" if document.verdict.met is None else "check" if document.verdict.met else "cross"
    rim = f"{first} \u00b7 {second} \u00b7 ".upper()
    stamp = seal(mark, rim * 2 if len(rim) <= 24 else rim, f"Seal: {first}, {second}")
    state = h("p", {"class": f"state {mark}"}, h("strong", {}, first), h("span", {}, second))
    return h(
        "header",
        {},
        h("div", {"class": "verdict"}, _verdict(document, state), stamp),
        h(
            "p",
            {"class": "meta"},
            h("span", {}, f"eke {document.eke_version}"),
            h("time", {"datetime": document.created}, created),
        ),
    )


def _genre(document: Document) -> str:
    """Return what kind of paper this is; only a verified result that missed no budget is certified."""
    if document.kind == "compress" and document.verdict.verified and document.verdict.met is not False:
        return "Certificate of compression"
    return KINDS[document.kind]


def _verdict(document: Document, state: Markup) -> Markup:
    sentence = h("p", {"class": "sentence"}, document.verdict.text)
    return h(
        "div",
        {},
        h("p", {"class": "eyebrow"}, _genre(document)),
        h("h1", {}, escape(document.title, 160)),
        sentence,
        state,
    )


def budget(document: Document) -> Markup:
    """Return the table of asked limits, each with its gauge."""
    columns = [
        Column("Budget"),
        Column("Asked"),
        Column("Got", True, "measured"),
        Column("Measured against the limit"),
        Column("Met"),
    ]
    caption = "What was asked and what was measured. The upright stroke of each ruler is the limit."
    return table(caption, columns, [_budget_row(b) for b in document.budget[:60]], "budget")


def _budget_row(b: BudgetLine) -> list[Cell | str]:
    said = {True: "\u2713 met", False: "\u2717 not met", None: "\u2013 open"}[b.met]
    drawn = gauge(b.measured, b.limit, b.met) if b.measured is not None and b.limit is not None else None
    got = wording.quantity(b.measured, b.unit) if b.measured is not None else wording.NONE
    asked = b.asked
    if b.limit is not None and b.unit not in {"points", "%"}:
        limit = wording.quantity(b.limit, b.unit)
        asked = limit if limit.replace(wording.NBSP, " ") == b.asked else f"{b.asked} ({limit})"
    return [b.name, asked, Cell(got, b.measured), Cell(drawn), said]


def result(document: Document) -> Markup:
    """Return before and after, the drop and the speed-ups; nothing when none of them is known."""
    parts = [_comparison(document) if document.before or document.after else None, _drop(document), _speeds(document)]
    return join(parts)


def _comparison(document: Document) -> Markup:
    before, after = document.before, document.after
    entries = [
        _score_entry(before, after),
        _entry("Size of the file", before, after, "bytes", (wording.size, "smaller")),
        _latency_entry(document),
        _entry("FLOPs", before, after, "flops", (wording.count, "fewer")),
        _entry("Parameters", before, after, "parameters", (wording.count, "fewer")),
        _entry("Peak memory", before, after, "peak_bytes", (wording.size, "less")),
    ]
    ledger = h("dl", {"class": "ledger"}, entries)
    if before is None or after is None:
        return ledger
    bars = [h("li", {}, h("span", {"class": f"bar {css}"}), m.label) for css, m in (("was", before), ("is", after))]
    return join([ledger, h("ul", {"class": "legend"}, bars)])


def _item(title: str, word_name: str, *children: Child) -> Markup:
    return h("div", {}, h("dt", {}, title, word(word_name)), h("dd", {}, children))


def _score_entry(before: Measured | None, after: Measured | None) -> Markup | None:
    last = (after and after.score) or (before and before.score)
    if not last:
        return None
    details = [h("p", {}, wording.score_detail(last) or None)]
    if after and after.score and before and before.score:
        shown = wording.score_detail(before.score)
        details.append(
            h("p", {"class": "from"}, f"from {wording.score(before.score)}" + (f", {shown}" if shown else ""))
        )
    return _item(
        _sentence_case(wording.score_name(last)), "measured", h("p", {"class": "big"}, wording.score(last)), details
    )


def _sentence_case(text: str) -> str:
    """Return the text with its first letter large and the others, such as those of names, as they are."""
    return text[:1].upper() + text[1:]


def _entry(title: str, before: Measured | None, after: Measured | None, name: str, write: Write) -> Markup | None:
    was, now = getattr(before, name, None), getattr(after, name, None)
    shown = now if now is not None else was
    if shown is None:
        return None
    more = _change(was, now, write) if was is not None and now is not None else None
    return _item(title, "measured", h("p", {"class": "big"}, write[0](shown)), more)


def _change(was: float, now: float, write: Write) -> Markup:
    text = "unchanged"
    if was > 0 and now > 0 and was != now:
        opposite = {"smaller": "larger", "fewer": "more", "less": "more"}[write[1]]
        text = f"{wording.ratio(was / now)} {write[1]}" if was > now else f"{wording.ratio(now / was)} {opposite}"
    return join([h("p", {}, text), h("p", {"class": "from"}, f"from {write[0](was)}"), _bars(was, now)])


def _bars(was: float, now: float) -> Markup:
    top = max(was, now) or 1.0
    bars = [
        h("span", {"class": f"bar {css}", "style": f"width:{100 * v / top:.1f}%"})
        for css, v in (("was", was), ("is", now))
    ]
    return h("div", {"class": "bars", "aria-hidden": "true"}, bars)


def _latency_entry(document: Document) -> Markup | None:
    before, after = document.before, document.after
    was, now = before and before.milliseconds, after and after.milliseconds
    shown, timed = (now, after) if now else (was, before)
    if not shown or timed is None:
        return None
    details: list[Markup] = []
    if timed.milliseconds_interval is not None:
        details.append(h("p", {"class": "from"}, wording.span(timed.milliseconds_interval, wording.duration)))
    if document.speedups:
        s = document.speedups[0]
        claim = "faster" if s.claimed else "measured, but no speed-up is claimed"
        details.append(h("p", {}, f"{wording.ratio(s.ratio)} {claim}"))
        details.append(h("p", {"class": "from"}, f"{wording.speed_detail(s)}, against {s.against}"))
    if was and now:
        details += [h("p", {"class": "from"}, f"from {wording.duration(was)}"), _bars(was, now)]
    return _item("Latency", "measured", h("p", {"class": "big"}, wording.duration(shown)), details)


def _drop(document: Document) -> Markup | None:
    d = document.drop
    if d is None:
        return None
    title = h("h3", {}, f"Drop: {wording.difference(d.points, d.unit)}, {wording.drop_detail(d)}")
    return join([title, h("figure", {}, drop_plot(d), h("figcaption", {}, _drop_said(d)))])


def _drop_said(d: Drop) -> Markup:
    """Return what may be said about a drop, and no more."""
    if d.limit is None:
        return join(["The ", word("measured"), " drop; no limit was asked."])
    limit, sure = f"the limit of {wording.difference(d.limit, d.unit)}", wording.level(d.confidence)
    if d.proved:
        said = f"The whole interval lies within {limit}: that the drop is no larger is "
        return join([said, word("statistical"), f" and holds with {sure}."])
    if d.points > d.limit:
        return join(["The ", word("measured"), f" drop is beyond {limit}."])
    unsure = f"but not the whole interval: with {sure} confidence a larger drop is not ruled out."
    return join(["The ", word("measured"), f" drop is within {limit}, {unsure}"])


def _speeds(document: Document) -> Markup | None:
    shown = document.speedups[:60]
    if not shown:
        return None
    strip = Strip.over([(s.ratio, s.interval) for s in shown], 1.0, wording.ratio)
    columns = [
        Column("Against"),
        Column("Ratio", True, "measured"),
        Column("Interval"),
        Column("1\u00d7 is the upright line"),
        Column("Claim"),
    ]
    caption = "Time of the other divided by time of the result, interleaved on this machine; above one it is faster."
    return table(caption, columns, [_speed_row(s, strip) for s in shown], "speedups")


def _speed_row(s: Speedup, strip: Strip) -> list[Cell | str]:
    detail = wording.speed_detail(s)
    drawn = strip.row(s.ratio, s.interval, f"{wording.ratio(s.ratio)}, {detail}")
    claim = "claimed" if s.claimed else "not claimed"
    return [s.against, Cell(wording.ratio(s.ratio), s.ratio), detail, Cell(drawn), claim]
