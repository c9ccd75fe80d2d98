"""The first page of the certificate: the verdict, what was asked and got, before and after, drop and speed.

Nothing here is estimated: a number that was only predicted has no place above the fold.
"""

from __future__ import annotations

from collections.abc import Callable

from . import wording
from .document import Document, Measured, Speedup
from .markup import Cell, Child, Column, Markup, escape, h, join, table, word
from .strips import Strip, drop_plot, gauge, seal

KINDS = {
    "compress": "Certificate of compression",
    "gate": "Gate: old against new",
    "inspect": "Inspection of a model",
}


def verdict_words(document: Document) -> tuple[str, str]:
    """Return the verdict in two or three words, and whether it was verified."""
    if document.kind == "inspect":
        return "Inspected", "nothing was changed"
    asked = {True: "Budget met", False: "Budget not met", None: "No budget asked"}
    passed = {True: "Gate passed", False: "Gate failed", None: "No limits asked"}
    first = (passed if document.kind == "gate" else asked)[document.verdict.met]
    return first, "verified" if document.verdict.verified else "not verified"


def header(document: Document, created: str) -> Markup:
    """Return the masthead, the title, the verdict and the seal."""
    first, second = verdict_words(document)
    mark = "dash" if document.verdict.met is None else "check" if document.verdict.met else "cross"
    stamp = seal(mark, f"{first} \u00b7 {second} \u00b7 ".upper() * 2, f"Seal: {first}, {second}")
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


def _verdict(document: Document, state: Markup) -> Markup:
    sentence = h("p", {"class": "sentence"}, document.verdict.text)
    return h(
        "div",
        {},
        h("p", {"class": "eyebrow"}, KINDS[document.kind]),
        h("h1", {}, escape(document.title, 160)),
        sentence,
        state,
    )


def warnings(document: Document) -> Markup:
    """Return what must be read first."""
    return h("ul", {"class": "warnings"}, [h("li", {}, w) for w in document.warnings[:40]])


def budget(document: Document) -> Markup:
    """Return the table of asked limits, each with its gauge."""
    columns = [
        Column("Budget"),
        Column("Asked"),
        Column("Got", True, "measured"),
        Column("Measured against the limit"),
        Column("Met"),
    ]
    said = {True: "\u2713 met", False: "\u2717 not met", None: "\u2013 open"}
    rows = []
    for b in document.budget:
        drawn = gauge(b.measured, b.limit, b.met) if b.measured is not None and b.limit is not None else None
        got = wording.quantity(b.measured, b.unit) if b.measured is not None else wording.NONE
        limit = f" ({wording.quantity(b.limit, b.unit)})" if b.limit is not None else ""
        rows.append([b.name, f"{b.asked}{limit}", Cell(got, b.measured), Cell(drawn), Cell(said[b.met])])
    return table(
        "What was asked and what was measured. The upright stroke of each ruler is the limit.", columns, rows, "budget"
    )


def comparison(document: Document) -> Markup:
    """Return the ledger of before and after."""
    before, after = document.before, document.after
    entries = [_score_entry(document, before, after)]
    entries.append(_entry("Size of the file", before, after, "bytes", (wording.size, "smaller")))
    entries.append(_latency_entry(document, before, after))
    entries.append(_entry("FLOPs", before, after, "flops", (wording.flops, "fewer")))
    entries.append(_entry("Parameters", before, after, "parameters", (wording.count, "fewer")))
    entries.append(_entry("Peak memory", before, after, "peak_bytes", (wording.size, "less")))
    names = " and ".join(m.label for m in (before, after) if m is not None)
    ledger = h("dl", {"class": "ledger", "aria-label": f"Measured: {names}"}, entries)
    key = (
        h(
            "p",
            {"class": "legend"},
            h("span", {"class": "bar was"}),
            before.label,
            h("span", {"class": "bar is"}),
            after.label,
        )
        if before and after
        else None
    )
    return join([ledger, key])


def _item(title: str, word_name: str, *children: Child) -> Markup:
    return h("div", {}, h("dt", {}, title, word(word_name)), h("dd", {}, children))


def _score_entry(document: Document, before: Measured | None, after: Measured | None) -> Markup | None:
    last = (after and after.score) or (before and before.score)
    if not last:
        return None
    details = [h("p", {}, wording.score_detail(last) or None)]
    if after and after.score and before and before.score:
        shown = wording.score_detail(before.score)
        details.append(
            h("p", {"class": "from"}, f"from {wording.score(before.score)}" + (f", {shown}" if shown else ""))
        )
    return _item(last.name.capitalize(), "measured", h("p", {"class": "big"}, wording.score(last)), details)


def _entry(
    title: str, before: Measured | None, after: Measured | None, name: str, write: tuple[Callable[[float], str], str]
) -> Markup | None:
    was, now = getattr(before, name, None), getattr(after, name, None)
    shown = now if now is not None else was
    if shown is None:
        return None
    more = _change(was, now, write) if was is not None and now is not None else None
    return _item(title, "measured", h("p", {"class": "big"}, write[0](shown)), more)


def _change(was: float, now: float, write: tuple[Callable[[float], str], str]) -> Markup:
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


def _latency_entry(document: Document, before: Measured | None, after: Measured | None) -> Markup | None:
    was, now = before and before.milliseconds, after and after.milliseconds
    shown = now or was
    if not shown:
        return None
    details: list[Markup] = []
    if document.speedups:
        s = document.speedups[0]
        claim = "faster" if s.claimed else "\u2014 no speed-up claimed"
        details.append(h("p", {}, f"{wording.ratio(s.ratio)} {claim}"))
        details.append(h("p", {"class": "from"}, f"{wording.speed_detail(s)}, against {s.against}"))
    if was and now:
        details += [h("p", {"class": "from"}, f"from {wording.duration(was)}"), _bars(was, now)]
    return _item("Latency", "measured", h("p", {"class": "big"}, wording.duration(shown)), details)


def drop(document: Document) -> Markup:
    """Return the interval of the drop against its limit, and what may be said about it."""
    d = document.drop
    if d is None:
        return Markup("")
    percent = wording.level(d.confidence)
    if d.limit is None:
        said = join([f"The measured drop is {wording.points(d.points)} points; no limit was asked."])
    elif d.proved:
        said = join([f"The whole interval lies within the limit of {wording.points(d.limit)} points: that the drop is no larger is ",
                     word("statistical"), f" and holds with {percent}."])  # fmt: skip
    elif d.points <= d.limit:
        said = join(["The ", word("measured"), f" drop is within the limit of {wording.points(d.limit)} points, but its interval"
                     f" reaches beyond: with {percent} confidence a larger drop is not ruled out."])  # fmt: skip
    else:
        said = join(["The ", word("measured"), f" drop is beyond the limit of {wording.points(d.limit)} points."])
    figure = h("figure", {}, drop_plot(d), h("figcaption", {}, said))
    return join([h("h3", {}, f"Drop: {wording.points(d.points)} points, {wording.drop_detail(d)}"), figure])


def speeds(document: Document) -> Markup:
    """Return the speed-ups, one row for each thing the result was timed against."""
    if not document.speedups:
        return Markup("")
    strip = Strip.over([(s.ratio, s.interval) for s in document.speedups], 1.0, wording.ratio)
    columns = [
        Column("Against"),
        Column("Ratio", True, "measured"),
        Column("Interval"),
        Column("1\u00d7 is the upright line"),
        Column("Claim"),
    ]
    return table(
        "Time of the other divided by time of the result, interleaved on this machine; above one the result is faster.",
        columns,
        [_speed_row(s, strip) for s in document.speedups],
        "speedups",
    )


def _speed_row(s: Speedup, strip: Strip) -> list[Cell | str]:
    detail = wording.speed_detail(s)
    drawn = strip.row(s.ratio, s.interval, f"{wording.ratio(s.ratio)}, {detail}")
    return [
        s.against,
        Cell(wording.ratio(s.ratio), s.ratio),
        detail,
        Cell(drawn),
        "claimed" if s.claimed else "not claimed",
    ]
