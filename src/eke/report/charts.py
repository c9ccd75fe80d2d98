"""The two planes: quality against cost, and measured against predicted loss.

Shape tells the kind of a point, fill tells its source (solid: measured, hollow: predicted), so nothing rests on colour.
The trade-off chart is drawn once for every cost that is known; the page shows one at a time. Its axes are an image, its
points a list box: one tab stop, arrow keys move along the cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from . import wording
from .axes import Scale, fit, grid, label, line, svg
from .document import Calibrated, FrontPoint
from .markup import Markup, h
from .strips import picture

COSTS = (
    ("latency", "milliseconds", wording.duration),
    ("size", "bytes", wording.size),
    ("FLOPs", "flops", wording.count),
)
"""What the trade-off chart can be drawn over: name, field, how it is written."""

Box = tuple[float, float, float, float]
WIDTH, HEIGHT = 760, 440
SHAPES = {
    "original": "M-6.5-6.5h13v13h-13z",
    "plan": "M0-5.5A5.5 5.5 0 1 1 0 5.5A5.5 5.5 0 1 1 0-5.5z",
    "candidate": "M0-3.5A3.5 3.5 0 1 1 0 3.5A3.5 3.5 0 1 1 0-3.5z",
    "control": "M0-8L8 0L0 8L-8 0z",
    "chosen": "M0-9.5L2.6-3.6L9-2.9L4.2 1.4L5.6 7.7L0 4.4L-5.6 7.7L-4.2 1.4L-9-2.9L-2.6-3.6z",
}
CALIBRATION_SHAPES = (
    SHAPES["plan"],
    "M-5-5h10v10h-10z",
    "M0-6.5L6.2 4.6H-6.2z",
    "M0-7L7 0L0 7L-7 0z",
    "M-5-5L5 5M5-5L-5 5",
)


@dataclass(frozen=True)
class Placed:
    """A point of the trade-off chart with its number on the page, its place and what it says."""

    index: int
    point: FrontPoint
    x: float
    y: float
    said: str


def known_costs(points: Sequence[FrontPoint]) -> list[tuple[str, str]]:
    """Return name and field of each cost that at least two scored points know."""
    counted = [
        (name, key, sum(getattr(p, key) is not None and p.score is not None for p in points)) for name, key, _ in COSTS
    ]
    return [(name, key) for name, key, known in counted if known >= 2]


def front_chart(points: Sequence[FrontPoint], cost: str, *, as_percent: bool, lower_is_better: bool = False) -> Markup:
    """Draw quality over one cost.

    Args:
        points: The points; those without a score or this cost are left out.
        cost: Field of `FrontPoint`, one of "milliseconds", "bytes", "flops".
        as_percent: Whether scores are written as per cent.
        lower_is_better: Whether the lowest score is the best one; it is drawn at the top all the same.

    Returns:
        The drawing.
    """
    name, _, write_x = next(c for c in COSTS if c[1] == cost)
    plain = wording.percent if as_percent else lambda v: wording.number(v, 4)
    write_y = (lambda v: plain(-v)) if lower_is_better else plain
    upwards = [_mirrored(p) for p in points] if lower_is_better else points
    used = [(i, p) for i, p in enumerate(upwards) if p.score is not None and getattr(p, cost) is not None]
    x = fit([getattr(p, cost) for _, p in used], 92, WIDTH - 28)
    heights = [v for _, p in used for v in (p.score, *(p.score_interval or ())) if v is not None]
    y = fit(heights, HEIGHT - 62, 22, log=False)
    placed = [_place(i, p, cost, (x, y), (write_x, write_y)) for i, p in used]
    placed.sort(key=lambda p: p.x)
    back: list[Markup | str] = [*grid(x, y, (write_x, write_y))]
    back += [label((x.start + x.end) / 2, HEIGHT - 12, name + (", logarithmic" if x.log else ""), "title")]
    back += [label(x.start, 12, "lower is better" if lower_is_better else "quality", "title", "start")]
    back += [_steps(placed), *_whiskers(placed, y)]
    told = f"{len(placed)} models, quality upwards, {name} to the right; up and to the left is better."
    attributes, title, description = picture(f"front-{cost}", f"Quality against {name}", told)
    axes = h("g", {**attributes}, title, description, back, _labels(placed))
    options = [_option(p, first=i == 0) for i, p in enumerate(placed)]
    listed = h("g", {"role": "listbox", "aria-label": f"Models by {name}", "aria-orientation": "horizontal"}, options)
    return svg(WIDTH, HEIGHT, {"class": "chart front"}, axes, listed)


def _mirrored(point: FrontPoint) -> FrontPoint:
    """Return the point with its score below zero, so that the best one is the highest."""
    ends = point.score_interval
    return replace(
        point,
        score=None if point.score is None else -point.score,
        score_interval=None if ends is None else (-ends[1], -ends[0]),
    )


def _place(index: int, point: FrontPoint, cost: str, scales: tuple[Scale, Scale], write: tuple) -> Placed:  # type: ignore[type-arg]
    value, quality = getattr(point, cost), point.score or 0.0
    said = f"{point.label}, {point.kind}, {point.source}: {write[1](quality)}, {write[0](value)}"
    return Placed(index, point, scales[0].at(value), scales[1].at(quality), said)


def _steps(placed: Sequence[Placed]) -> Markup | str:
    """Return the best measured quality up to each cost, as a staircase."""
    corners: list[tuple[float, float]] = []
    for p in placed:
        if p.point.source == "measured" and (not corners or p.y < corners[-1][1]):
            corners.append((p.x, p.y))
    if len(corners) < 2:
        return ""
    path = f"M{corners[0][0]:g} {corners[0][1]:g}" + "".join(f"H{b[0]:g}V{b[1]:g}" for _, b in pairwise(corners))
    return h("path", {"d": path, "class": "frontier"})


def _whiskers(placed: Sequence[Placed], y: Scale) -> list[Markup]:
    return [
        line(p.x, y.at(p.point.score_interval[0]), p.x, y.at(p.point.score_interval[1]), "whisker")
        for p in placed
        if p.point.score_interval is not None
    ]


def _labels(placed: Sequence[Placed]) -> list[Markup]:
    """Return names beside the points that matter, where they cover the fewest points and no other name."""
    order = {"chosen": 0, "original": 1, "control": 2}
    taken: list[Box] = []
    out = []
    for p in sorted((p for p in placed if p.point.kind in order), key=lambda p: order[p.point.kind]):
        text = p.point.label if len(p.point.label) <= 34 else p.point.label[:32] + "\u2026"
        spots = [s for s in _spots(p, 7.2 * len(text)) if not any(_meet(s[0], box) for box in taken)]
        if not spots:
            continue
        box, x, anchor = min(
            spots, key=lambda s: sum(_meet(s[0], (q.x - 6, q.y - 6, q.x + 6, q.y + 6)) for q in placed)
        )
        taken.append(box)
        out.append(label(round(x, 1), round(box[3] - 3, 1), text, f"name {p.point.kind}", anchor))
    return out


def _spots(p: Placed, wide: float) -> list[tuple[Box, float, str]]:
    """Return where on the paper a name of this width may stand around a point: box, place of the text, its anchor."""
    out: list[tuple[Box, float, str]] = []
    for up in (8, -8, 24, -24, 40):
        for x, left, anchor in (
            (p.x + 15, p.x + 15, "start"),
            (p.x - 15, p.x - 15 - wide, "end"),
            (p.x, p.x - wide / 2, "middle"),
        ):
            box = (left, p.y + up - 16, left + wide, p.y + up)
            if (
                box[0] > 92
                and box[2] < WIDTH
                and box[1] > 14
                and box[3] < HEIGHT - 62
                and (anchor != "middle" or abs(up) > 20)
            ):
                out.append((box, x, anchor))
    return out


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _option(p: Placed, *, first: bool) -> Markup:
    attributes = {
        "role": "option",
        "aria-selected": "false",
        "aria-label": p.said,
        "tabindex": 0 if first else -1,
        "data-p": p.index,
        "class": f"{p.point.kind} {p.point.source}",
        "transform": f"translate({p.x:g} {p.y:g})",
    }
    return h("g", attributes, h("use", {"href": f"#mark-{p.point.kind}"}))


def marks() -> Markup:
    """Return the marks of all kinds, drawn once and used everywhere; the halo shows which point has the focus."""
    halo = h("circle", {"r": 13, "class": "halo"})
    drawn = [h("g", {"id": f"mark-{kind}"}, halo, h("path", {"d": shape})) for kind, shape in SHAPES.items()]
    return svg(1, 1, {"class": "marks", "width": 0, "height": 0, "aria-hidden": "true"}, h("defs", {}, drawn))


def key(kind: str, source: str = "measured") -> Markup:
    """Return the mark of a kind of point, for the legend and the table."""
    mark = h("use", {"href": f"#mark-{kind}", "x": 11, "y": 11})
    return svg(22, 22, {"class": f"key {kind} {source}", "aria-hidden": "true"}, mark)


def calibration_chart(pairs: Sequence[Calibrated]) -> Markup | None:
    """Draw measured over predicted loss increases, both logarithmic, with the lines of equality and of a factor of two.

    Args:
        pairs: The pairs; only those with both numbers positive have a place here.

    Returns:
        The drawing, or None when fewer than two pairs have a place.
    """
    used = [p for p in pairs if p.predicted > 0 and p.measured > 0]
    if len(used) < 2:
        return None
    values = [v for p in used for v in (p.predicted, p.measured)]
    x, y = fit(values, 92, 552, log=True), fit(values, 500, 40, log=True)
    told = (
        f"{len(used)} changes; on the diagonal the prediction was right, between the dashed lines within a factor of 2."
    )
    attributes, title, description = picture("calibration", "Measured against predicted loss increase", told)
    parts: list[Markup] = [title, description, *grid(x, y, (wording.number, wording.number), 4)]
    parts += [_diagonal(x, y, factor) for factor in (1.0, 2.0, 0.5)]
    parts += [label(322, 545, "predicted loss increase (estimated)", "title")]
    parts += [label(92, 24, "measured loss increase", "title", "start")]
    kinds = list(dict.fromkeys(p.kind for p in pairs))
    for p in used:
        shape = {
            "d": calibration_shape(kinds.index(p.kind)),
            "transform": f"translate({x.at(p.predicted):g} {y.at(p.measured):g})",
        }
        parts.append(h("path", {**shape, "class": "pair"}))
    return svg(600, 556, {**attributes, "class": "chart calibration"}, *parts)


def calibration_shape(index: int) -> str:
    """Return the path of the mark for the kind number `index`."""
    return CALIBRATION_SHAPES[index % len(CALIBRATION_SHAPES)]


def _diagonal(x: Scale, y: Scale, factor: float) -> Markup:
    low, high = max(x.low, y.low / factor), min(x.high, y.high / factor)
    return line(x.at(low), y.at(low * factor), x.at(high), y.at(high * factor), "axis" if factor == 1.0 else "twice")
