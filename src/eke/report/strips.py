"""Small drawings that carry one fact: an interval against a limit, a measured value against its budget, the seal.

Each is one `svg` with a title and a description that say the same in words, so nothing depends on seeing it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import wording
from .axes import Scale, fit, label, line, svg
from .document import Drop, Interval
from .markup import Markup, h


def picture(name: str, title: str, description: str) -> tuple[dict[str, object], Markup, Markup]:
    """Name a drawing for a screen reader.

    Args:
        name: Unique on the page.
        title: What it is.
        description: What it shows.

    Returns:
        Attributes for the element, and the title and description that belong inside it.
    """
    attributes: dict[str, object] = {"role": "img", "aria-labelledby": f"{name}-title {name}-desc"}
    return attributes, h("title", {"id": f"{name}-title"}, title), h("desc", {"id": f"{name}-desc"}, description)


def drop_plot(drop: Drop) -> Markup:
    """Return the drop with its interval; everything beyond the limit is hatched."""
    ends = drop.interval or (drop.points, drop.points)
    limit = drop.limit
    reach = [0.0, *ends, drop.points] + ([limit * 1.3] if limit is not None else [])
    scale = fit(reach, 8, 752, log=False, pad=0.1)
    middle, base = 58, 96
    shown = f"{wording.difference(drop.points, drop.unit)}, {wording.drop_detail(drop)}"
    told = shown + (f"; the limit is {wording.difference(limit, drop.unit)}" if limit is not None else "")
    attributes, title, description = picture("drop", "Drop in quality with its interval", told)
    parts: list[Markup] = [title, description]
    if limit is not None:
        at = scale.at(limit)
        hatch = h("path", {"d": "M0 8L8 0M-2 2L2 -2M6 10L10 6", "class": "hatch"})
        size = {"id": "hatch", "width": 8, "height": 8, "patternUnits": "userSpaceOnUse"}
        parts += [h("defs", {}, h("pattern", size, hatch))]
        parts += [
            h("rect", {"x": at, "y": 30, "width": round(752 - at, 1), "height": base - 30, "fill": "url(#hatch)"})
        ]
        parts += [
            line(at, 22, at, base, "limit"),
            label(at, 15, f"limit {_limit(limit, drop.unit)}", "strong"),
        ]
    for value in scale.ticks(6):
        parts += [line(scale.at(value), base, scale.at(value), base + 6, "axis")]
        parts += [label(scale.at(value), base + 22, wording.brief(value), "tick")]
    parts += [line(8, base, 752, base, "axis"), line(scale.at(0), 34, scale.at(0), base, "zero")]
    parts += _whisker(scale, ends, middle, 9) if drop.interval else []
    parts += [h("circle", {"cx": scale.at(drop.points), "cy": middle, "r": 7, "class": "dot"})]
    parts += [label(380, base + 50, _LOST[drop.unit], "tick")]
    return svg(760, 154, {**attributes, "class": "chart drop"}, *parts)


_LOST = {
    "points": "points lost (to the left of zero: gained)",
    "%": "per cent worse than before (to the left of zero: better)",
    "": "lost, in the unit of the score (to the left of zero: gained)",
}


def _limit(limit: float, unit: str) -> str:
    return wording.difference(limit, unit).removesuffix(" points").removesuffix(" relative")


def _whisker(scale: Scale, ends: Interval, y: float, tall: float) -> list[Markup]:
    low, high = scale.at(ends[0]), scale.at(ends[1])
    return [
        line(low, y, high, y, "range"),
        line(low, y - tall, low, y + tall, "cap"),
        line(high, y - tall, high, y + tall, "cap"),
    ]


@dataclass(frozen=True)
class Strip:
    """Intervals drawn one a row on a common scale, with one reference value such as 1 or 0."""

    scale: Scale
    reference: float
    write: Callable[[float], str]

    @classmethod
    def over(
        cls, rows: Sequence[tuple[float, Interval | None]], reference: float, write: Callable[[float], str]
    ) -> Strip:
        """Fit the common scale around values, intervals and the reference.

        Args:
            rows: Value and interval of each row.
            reference: Where the vertical line stands.
            write: How a value is written.

        Returns:
            The strip.
        """
        values = [reference, *(x for value, interval in rows for x in (value, *(interval or ())))]
        return cls(
            fit(values, 6, 194, log=min(values) > 0 and max(values) / min(values) > 4, pad=0.08), reference, write
        )

    def row(self, value: float, interval: Interval | None, said: str) -> Markup:
        """Return one row as an image."""
        parts = [line(self.scale.at(self.reference), 1, self.scale.at(self.reference), 23, "zero")]
        parts += _whisker(self.scale, interval, 12, 6) if interval else []
        parts.append(h("circle", {"cx": self.scale.at(value), "cy": 12, "r": 3.5, "class": "dot"}))
        return svg(200, 24, {"role": "img", "aria-label": said, "class": "strip"}, *parts)


def gauge(measured: float, limit: float, met: bool | None) -> Markup | None:
    """Return a measured value on a ruler a quarter longer than it and its limit; None unless the limit is positive."""
    if limit <= 0:
        return None
    shown = max(measured, 0.0)
    end = 1.25 * max(shown, limit)
    scale = Scale(0.0, end, 1, 199)
    at, stop = scale.at(shown), scale.at(limit)
    state = {True: "within", False: "beyond", None: "beside"}[met]
    said = f"{wording.percent(measured / limit)} of the limit, {state} it"
    ticks = [line(scale.at(i * end / 20), 15, scale.at(i * end / 20), 19, "hair") for i in range(21)]
    body = h(
        "rect",
        {
            "x": 1,
            "y": 5,
            "width": max(round(at - 1, 1), 0.5),
            "height": 8,
            "class": "fill" if met is not False else "over",
        },
    )
    return svg(
        200, 20, {"role": "img", "aria-label": said, "class": "strip"}, *ticks, body, line(stop, 0, stop, 18, "limit")
    )


def seal(mark: str, rim: str, said: str) -> Markup:
    """Draw the seal: a graduated ring, words on the rim, one mark.

    Args:
        mark: "check", "cross" or "dash".
        rim: Words that run around it.
        said: The same for those who cannot see it.

    Returns:
        The drawing.
    """
    ring = []
    for i in range(120):
        angle, long = math.tau * i / 120, i % 10 == 0
        inner = 88 if long else 91
        c, s = math.cos(angle), math.sin(angle)
        css = "axis" if long else "hair"
        ring.append(
            line(
                round(100 + inner * c, 1),
                round(100 + inner * s, 1),
                round(100 + 96 * c, 1),
                round(100 + 96 * s, 1),
                css,
            )
        )
    marks = {"check": "M70 102L92 124L132 78", "cross": "M76 76L124 124M124 76L76 124", "dash": "M72 100L128 100"}
    path = h("path", {"id": "rim", "d": "M100 100m-72 0a72 72 0 1 1 144 0a72 72 0 1 1 -144 0", "fill": "none"})
    words = h(
        "text", {"class": "rim"}, h("textPath", {"href": "#rim", "textLength": 446, "lengthAdjust": "spacing"}, rim)
    )
    inner_ring = h("circle", {"cx": 100, "cy": 100, "r": 62, "class": "ring" if mark == "check" else "ring open"})
    stroke = h("path", {"d": marks[mark], "class": "mark"})
    return svg(200, 200, {"role": "img", "aria-label": said, "class": "seal"}, *ring, path, words, inner_ring, stroke)
