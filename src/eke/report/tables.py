"""The pages behind the first one: trade-offs, plan, controls, calibration, sites, data and how to repeat the run.

Every function returns the inside of one section for at most `rows` rows a table. What is left out is said, never
silent; the whole is in report.json.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

from . import charts, wording
from .axes import svg
from .document import Calibrated, Control, Document, FrontPoint, PlanLine, SiteLine
from .markup import Cell, Column, Markup, escape, h, join, table, word
from .strips import Strip

Row = TypeVar("Row")
RANK = {"chosen": 0, "original": 1, "control": 2, "plan": 3, "candidate": 4}


def _some(items: Sequence[Row], rows: int, importance: Callable[[Row], float]) -> tuple[list[Row], str]:
    """Return the `rows` most important items in their own order, and a sentence about the rest."""
    if len(items) <= rows:
        return list(items), ""
    kept = sorted(sorted(range(len(items)), key=lambda i: -importance(items[i]))[:rows])
    return [items[i] for i in kept], f" The {rows} that matter most of {len(items)}; all are in report.json."


def _maybe(value: float | None, write: Callable[[float], str]) -> Cell:
    return Cell(wording.NONE if value is None else write(value), value)


def front(document: Document, rows: int) -> Markup:
    """Return the trade-off charts, their legend, the panel of the selected point and the table."""
    points, rest = _some(document.front, rows, lambda p: -RANK[p.kind])
    scored = [m.score for m in (document.before, document.after) if m is not None and m.score is not None]
    known = [p.score for p in points if p.score is not None]
    as_percent = wording.is_share(scored[0]) if scored else all(0 <= s <= 1 for s in known)
    lower = bool(scored) and scored[0].lower_is_better
    quality = wording.score_name(scored[0]) if lower else "quality"
    costs = charts.known_costs(points)
    buttons = [
        h("button", {"type": "button", "data-axis": key, "aria-pressed": "true" if i == 0 else "false"}, name)
        for i, (name, key) in enumerate(costs)
    ]
    switch = h(
        "div",
        {"class": "switch", "role": "group", "aria-label": "Cost on the horizontal axis", "hidden": True},
        buttons,
    )
    figures = [
        h(
            "figure",
            {"data-cost": key},
            charts.front_chart(points, key, as_percent=as_percent, lower_is_better=lower),
        )
        for _, key in costs
    ]
    panel = h(
        "div",
        {"class": "panel", "id": "selected", "role": "status", "aria-live": "polite", "hidden": True},
        h("p", {}, "Choose a point: touch one, or Tab into the chart and use the arrow keys."),
    )
    return join([
        charts.marks(),
        switch if len(costs) > 1 else None,
        figures,
        _legend(points),
        panel if costs else None,
        _front_table(points, rest, as_percent, quality),
    ])


def _legend(points: Sequence[FrontPoint]) -> Markup:
    pairs = sorted({(p.kind, p.source) for p in points}, key=lambda pair: (RANK[pair[0]], pair[1]))
    items = [
        h("li", {}, charts.key(*pair), f"{pair[0]}, {pair[1]}" if pair[1] == "predicted" else pair[0]) for pair in pairs
    ]
    return h("ul", {"class": "legend"}, items)


def _front_table(points: Sequence[FrontPoint], rest: str, as_percent: bool, quality: str) -> Markup:
    write = wording.percent if as_percent else lambda v: wording.number(v, 4)
    columns = [
        Column("Model"),
        Column("Kind"),
        Column(quality[:1].upper() + quality[1:], True),
        Column("Interval"),
        Column("Latency", True),
        Column("Size", True),
        Column("FLOPs", True),
        Column("Source"),
    ]
    body: list[list[Cell | str]] = []
    for p in points:
        kind = Cell(join([charts.key(p.kind, p.source), p.kind]))
        interval = wording.span(p.score_interval, write) if p.score_interval else wording.NONE
        numbers = [
            _maybe(p.milliseconds, wording.duration),
            _maybe(p.bytes, wording.size),
            _maybe(p.flops, wording.count),
        ]
        source = Cell(word("measured" if p.source == "measured" else "estimated"))
        body.append([_name(p.label), kind, _maybe(p.score, write), interval, *numbers, source])
    return table(f"The same models in numbers.{rest}", columns, body, "front")


def _name(text: str) -> Cell:
    return Cell(Markup(re.sub(r"([._/])(?=\w)", r"\1<wbr>", escape(text, 120))))


def plan(document: Document, rows: int) -> Markup:
    """Return the plan, one row a site, predicted beside measured."""
    lines, rest = _some(document.plan, rows, lambda p: abs(p.predicted_loss or 0.0) + abs(p.measured_loss or 0.0))
    losses = [abs(v) for p in document.plan for v in (p.predicted_loss, p.measured_loss) if v is not None]
    weights = [v for p in document.plan for v in (p.bytes_before, p.bytes_after) if v is not None]
    times = [v for p in document.plan for v in (p.milliseconds_before, p.milliseconds_after) if v is not None]
    columns = [
        Column("Site"),
        Column("Change"),
        Column("Loss added", True, "estimated"),
        Column("Loss added", True, "measured"),
        Column("Size", True),
        Column("Time", True),
        Column("Maturity"),
    ]
    tops = (max(losses, default=0.0), max(weights, default=0), max(times, default=0.0))
    return table(f"What the plan does at each site.{rest}", columns, [_plan_row(p, tops) for p in lines], "plan")


def _plan_row(p: PlanLine, tops: tuple[float, float, float]) -> list[Cell | str]:
    predicted = Cell(
        _maybe(p.predicted_loss, wording.number).content, p.predicted_loss, _bar(p.predicted_loss, tops[0], "p")
    )
    measured = Cell(
        _maybe(p.measured_loss, wording.number).content, p.measured_loss, _bar(p.measured_loss, tops[0], "m")
    )
    bytes_cell = _pair(p.bytes_before, p.bytes_after, tops[1], wording.size)
    time_cell = _pair(p.milliseconds_before, p.milliseconds_after, tops[2], wording.duration)
    return [_name(p.site), _name(p.change), predicted, measured, bytes_cell, time_cell, escape(p.maturity, 40)]


def _bar(value: float | None, top: float, css: str) -> dict[str, object]:
    return {"class": css} if value is None or not top else {"class": css, "style": f"--w:{100 * abs(value) / top:.0f}%"}


def _pair(was: float | None, now: float | None, top: float, write: Callable[[float], str]) -> Cell:
    if was is None or now is None:
        return _maybe(now if now is not None else was, write)
    shares = {"class": "b", "style": f"--w:{100 * was / top:.0f}%;--r:{100 * now / was:.0f}%"} if top and was else {}
    return Cell(f"{write(was)} \u2192 {write(now)}", now, shares)


def controls(document: Document, rows: int) -> Markup:
    """Return the rivals, each with how far it is below the result."""
    rivals, rest = _some(document.controls, rows, lambda c: 0.0)
    differences = [(c.difference.points, c.difference.interval) for c in rivals if c.difference is not None]
    strip = Strip.over(differences, 0.0, wording.points) if differences else None
    columns = [
        Column("Control"),
        Column("Quality", True, "measured"),
        Column("Points below the result", True, "measured"),
        Column("Speed", True, "measured"),
        Column("Size", True),
        Column("Latency", True),
    ]
    caption = "Rivals measured the same way. Right of the upright line the result is better, left of it the rival is."
    return table(caption + rest, columns, [_control_row(c, strip) for c in rivals], "controls")


def _control_row(c: Control, strip: Strip | None) -> list[Cell | str]:
    name = Cell(join([h("b", {}, c.name), h("small", {}, c.description)]))
    score, gap, speed = Cell(wording.NONE), Cell(wording.NONE), Cell(wording.NONE)
    if c.score is not None:
        score = _detailed(wording.score(c.score), wording.score_detail(c.score), c.score.value)
    if c.difference is not None and strip is not None:
        value, detail = c.difference.points, wording.drop_detail(c.difference)
        drawn = strip.row(value, c.difference.interval, f"{wording.points(value)} points, {detail}")
        gap = _detailed(wording.points(value), detail, value, drawn)
    if c.speedup is not None:
        told = f"{wording.speed_detail(c.speedup)}, against {c.speedup.against}"
        speed = _detailed(
            wording.ratio(c.speedup.ratio), told + ("" if c.speedup.claimed else "; not claimed"), c.speedup.ratio
        )
    return [name, score, gap, speed, _maybe(c.bytes, wording.size), _maybe(c.milliseconds, wording.duration)]


def _detailed(text: str, detail: str, value: float, drawn: Markup | None = None) -> Cell:
    return Cell(join([text, drawn, h("small", {}, detail)]), value, {"class": "wrap"})


def calibration(document: Document, rows: int) -> Markup:
    """Return predicted against measured: the chart, how well it did, and the pairs."""
    pairs, rest = _some(document.calibration, rows, lambda p: abs(p.measured))
    drawn = charts.calibration_chart(pairs)
    kinds = list(dict.fromkeys(p.kind for p in pairs))
    legend = h("ul", {"class": "legend"}, [h("li", {}, _pair_key(i), k) for i, k in enumerate(kinds)])
    columns = [
        Column("Change"),
        Column("Kind"),
        Column("Loss added", True, "estimated"),
        Column("Loss added", True, "measured"),
        Column("Measured / predicted", True),
    ]
    said = agreement(document.calibration)
    shown = h("figure", {}, drawn, legend, h("figcaption", {}, said)) if drawn else h("p", {}, said)
    return join([shown, table(f"The pairs.{rest}", columns, [_pair_row(p) for p in pairs], "pairs")])


def _pair_row(p: Calibrated) -> list[Cell | str]:
    predicted = Cell(wording.number(p.predicted), p.predicted, {"class": "p"})
    quotient = _maybe(p.measured / p.predicted if p.predicted else None, wording.ratio)
    return [_name(p.label), escape(p.kind, 60), predicted, Cell(wording.number(p.measured), p.measured), quotient]


def _pair_key(index: int) -> Markup:
    mark = h("path", {"d": charts.calibration_shape(index), "class": "pair", "transform": "translate(11 11)"})
    return svg(22, 22, {"class": "key", "aria-hidden": "true"}, mark)


def agreement(pairs: Sequence[Calibrated]) -> str:
    """Return in one sentence how well predictions and measurements agree."""
    parts = [f"{len(pairs)} changes."]
    if len(pairs) >= 3:
        correlation = _spearman([p.predicted for p in pairs], [p.measured for p in pairs])
        if correlation is not None:
            parts.append(f"Spearman rank correlation {correlation:.3f}.".replace("-", "\u2212"))
    factors = [abs(math.log(p.measured / p.predicted)) for p in pairs if p.predicted > 0 and p.measured > 0]
    if factors:
        parts.append(f"The median prediction is off by a factor of {math.exp(statistics.median(factors)):.2f}.")
    if len(factors) < len(pairs):
        parts.append(f"{len(pairs) - len(factors)} with a value that is not positive are in the table only.")
    return " ".join(parts)


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    ranks = [_ranks(a), _ranks(b)]
    if any(len(set(r)) < 2 for r in ranks):
        return None
    return statistics.correlation(*ranks)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    first = {v: i for i, v in reversed(list(enumerate(ordered)))}
    last = {v: i for i, v in enumerate(ordered)}
    return [(first[v] + last[v]) / 2 for v in values]


def sites(document: Document, rows: int) -> Markup:
    """Return the sites of an inspected model."""
    lines, rest = _some(document.sites, rows, lambda s: (s.share_of_time or 0.0) * 1e18 + (s.parameters or 0))
    tops = [
        max((getattr(s, k) or 0 for s in document.sites), default=0)
        for k in ("parameters", "flops", "share_of_time", "sensitivity")
    ]
    columns = [
        Column("Site"),
        Column("Kind"),
        Column("Shape"),
        Column("Parameters", True),
        Column("FLOPs", True),
        Column("Share of time", True, "measured"),
        Column("Sensitivity", True, "estimated"),
    ]
    return table(f"What each site weighs and costs.{rest}", columns, [_site_row(s, tops) for s in lines], "sites")


def _site_row(s: SiteLine, tops: Sequence[float]) -> list[Cell | str]:
    shape = " \u00d7 ".join(map(str, s.shape))
    numbers: tuple[tuple[float | None, Callable[[float], str], str], ...] = (
        (s.parameters, wording.count, "m"),
        (s.flops, wording.count, "m"),
        (s.share_of_time, wording.percent, "m"),
        (s.sensitivity, wording.number, "p"),
    )
    cells = [Cell(_maybe(v, write).content, v, _bar(v, top, css)) for (v, write, css), top in zip(numbers, tops)]
    return [_name(s.name), escape(s.kind, 40), shape, *cells]


def splits(document: Document, rows: int) -> Markup:
    """Return what each part of the data was used for and how often it was opened."""
    parts, rest = _some(document.splits, rows, lambda s: float(s.opened))
    columns = [Column("Split"), Column("Samples", True), Column("Opened", True), Column("Used for")]
    body: list[list[Cell | str]] = []
    for s in parts:
        opened = Cell("once" if s.opened == 1 else f"{s.opened} times", s.opened)
        body.append([s.name, _maybe(s.samples, wording.whole), opened, s.use])
    caption = "The data, and how often each part was looked at. Numbers in the verdict come from the report split."
    return table(caption + rest, columns, body, "splits")
