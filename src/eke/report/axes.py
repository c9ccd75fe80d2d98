"""Axes: from numbers to places on paper, with ticks a person would choose.

A logarithmic axis is used when its values span more than a factor of eight, or when it is asked for; ticks stand at 1,
2 and 5 times powers of ten. Drawing is done in SVG user units, y down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import wording
from .markup import Markup, h

LOG_FROM = 8.0


@dataclass(frozen=True)
class Scale:
    """An affine or logarithmic map from [low, high] to [start, end] in user units."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, rounded to a tenth; values outside lie on the nearer end."""
        value = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return about `wanted` round values inside the scale."""
        if self.log:
            return self._log_ticks(wanted)
        step = _round_step((self.high - self.low) / wanted)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [round(i * step, 12) for i in range(first, last + 1)]

    def _log_ticks(self, wanted: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7)):
            values = [m * 10.0**d for d in decades for m in multiples]
            inside = [v for v in values if self.low * (1 - 1e-9) <= v <= self.high * (1 + 1e-9)]
            if len(found) >= 3 and len(inside) > wanted:
                break
            found = inside
        return found[:: math.ceil(len(found) / (wanted + 2))] if found else []


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(math.log(s / rough)))


def fit(values: Iterable[float], start: float, end: float, *, log: bool | None = None, pad: float = 0.06) -> Scale:
    """Fit a scale around values.

    Args:
        values: What must be visible.
        start: Place of the lower end.
        end: Place of the upper end.
        log: Logarithmic or not; None decides by the values.
        pad: Free share on both sides.

    Returns:
        The scale; a single value gets room around it.

    Raises:
        ValueError: if there are no values, or a logarithmic scale is asked for values that are not positive.
    """
    known = list(values)
    if not known:
        raise ValueError(f"fit needs at least one value, got {known!r}.")
    low, high = min(known), max(known)
    if log and low <= 0:
        raise ValueError(f"A logarithmic scale needs positive values, got {low!r}.")
    if log is None:
        log = low > 0 and high / low > LOG_FROM
    if log:
        room = max((high / low) ** pad, 1.15)
        return Scale(low / room, high * room, start, end, log=True)
    room = max(pad * (high - low), 1e-12, (0.02 * abs(high) or 1.0) if high == low else 0.0)
    return Scale(low - room, high + room, start, end)


def svg(width: float, height: float, attributes: dict[str, object], *children: Markup | str | None) -> Markup:
    """Return an svg element with its view box."""
    return h("svg", {"viewBox": f"0 0 {width:g} {height:g}", **attributes}, children)


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """Return one straight line."""
    return h("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "class": css})


def label(x: float, y: float, text: str, css: str = "", anchor: str = "middle") -> Markup:
    """Return text at a place."""
    return h("text", {"x": x, "y": y, "class": css or None, "text-anchor": anchor}, text)


def grid(
    x: Scale, y: Scale, write: tuple[Callable[[float], str], Callable[[float], str]], ticks: int = 5
) -> list[Markup]:
    """Return hairlines and tick labels of a plane whose axes are `x` and `y`."""
    out = []
    for value in x.ticks(ticks):
        out += [
            line(x.at(value), y.start, x.at(value), y.end, "hair"),
            label(x.at(value), y.start + 20, wording.brief(value, write[0]), "tick"),
        ]
    for value in y.ticks(ticks):
        out += [line(x.start, y.at(value), x.end, y.at(value), "hair")]
        out += [label(x.start - 10, y.at(value) + 4, wording.brief(value, write[1]), "tick", "end")]
    out.append(line(x.start, y.start, x.end, y.start, "axis"))
    return out
