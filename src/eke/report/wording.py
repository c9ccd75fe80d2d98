"""Numbers as words: one way to write a size, a time, a share, a ratio, an interval.

Digits are kept where they carry information (three significant ones), units are decimal (1 kB = 1000 bytes), a
no-break space stands before a unit, and a minus is a minus sign.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .document import Drop, Interval, Score, Speedup

NBSP = "\u00a0"
THIN = "\u202f"
NONE = "\u2013"

GLOSSARY = (
    (
        "measured",
        "Observed on this machine, on the data named here. Times are interleaved with what they are compared to; sizes"
        " are the bytes of the real file; FLOPs and parameters are counted from the shapes.",
    ),
    ("statistical", "A statement about unseen data of the same kind that holds with the stated confidence."),
    (
        "proved",
        "A theorem, its hypotheses named. No number here is called proved unless the theorem is named beside it.",
    ),
    (
        "estimated",
        "Predicted from a model of the loss or of the cost. Shown in italics and hollow marks; it decides what is"
        " tried, never what is claimed.",
    ),
)
"""The four words and what each of them promises."""


def number(value: float, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, never more than needed."""
    if value == 0:
        return "0"
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    exponent = int(power)
    text = f"{value:.{max(0, digits - 1 - exponent)}f}" if -4 <= exponent < 7 else f"{mantissa}e{exponent}"
    return text.replace("-", "\u2212")


def brief(value: float, write: Callable[[float], str] = number) -> str:
    """Return a tick label: as `write` has it, without zeros that say nothing."""
    return re.sub(r"\.0+(?!\d)|(\.\d*?[1-9])0+(?!\d)", r"\1", write(value))


def whole(value: float) -> str:
    """Return an integer with its thousands set apart."""
    return f"{value:,.0f}".replace(",", THIN).replace("-", "\u2212")


def _scaled(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    for factor, unit in steps:
        if abs(value) >= 0.9995 * factor:
            return f"{number(value / factor)}{NBSP}{unit}"
    factor, unit = steps[-1]
    return f"{number(value / factor)}{NBSP}{unit}"


def size(value: float) -> str:
    """Return bytes in B, kB, MB or GB."""
    if abs(value) < 999.5:
        return f"{whole(value)}{NBSP}B"
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")))


def duration(milliseconds: float) -> str:
    """Return milliseconds in s, ms or µs."""
    return _scaled(milliseconds, ((1e3, "s"), (1, "ms"), (1e-3, "\u00b5s")))


def count(value: float) -> str:
    """Return a count with its decimal prefix."""
    return whole(value) if abs(value) < 999.5 else _scaled(value, ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")))


def percent(share: float) -> str:
    """Return a fraction of one as per cent with two decimals."""
    return f"{100 * share:.2f}{NBSP}%".replace("-", "\u2212")


def points(value: float) -> str:
    """Return a difference with its sign left as it is and two decimals."""
    return f"{value:.2f}".replace("-", "\u2212")


def difference(value: float, unit: str) -> str:
    """Return a difference in points, in per cent of what it refers to, or in a score's own unit."""
    if unit == "%":
        return f"{points(value)}{NBSP}% relative"
    return f"{points(value)} points" if unit == "points" else f"{value:.3g} {unit}".replace("-", "\u2212").strip()


def ratio(value: float) -> str:
    """Return a ratio with the times sign, two decimals where three significant digits would be more."""
    return f"{value:.2f}\u00d7" if 0.1 <= abs(value) < 10 else f"{number(value)}\u00d7"


def span(interval: Interval, write: Callable[[float], str]) -> str:
    """Return both ends of an interval."""
    return f"{write(interval[0])} to {write(interval[1])}"


def level(confidence: float) -> str:
    """Return a confidence as per cent, as many digits as it needs."""
    return f"{100 * confidence:.6g}{NBSP}%"


def is_share(score: Score) -> bool:
    """Return whether a score reads as per cent."""
    return score.total is not None or score.percent or (score.name == "accuracy" and 0 <= score.value <= 1)


def score_name(score: Score) -> str:
    """Return what is scored, and its direction where less is better."""
    return f"{score.name}, lower is better" if score.lower_is_better else score.name


def score(value: Score) -> str:
    """Return the score alone."""
    return percent(value.value) if is_share(value) else number(value.value, 4)


def score_detail(value: Score) -> str:
    """Return k/n and the interval of a score, as far as they are known."""
    parts = []
    if value.correct is not None and value.total is not None:
        parts.append(f"{whole(value.correct)}/{whole(value.total)}")
    if value.interval is not None:
        ends = span(value.interval, percent if is_share(value) else lambda x: number(x, 4))
        parts.append(f"{ends} ({_how(value.method, value.confidence)})")
    return ", ".join(parts)


def drop_detail(value: Drop) -> str:
    """Return the interval of a drop and how it was made."""
    if value.interval is None:
        return "no interval"
    write = number if not value.unit else points
    per_cent = f"{NBSP}%" if value.unit == "%" else ""
    return f"{span(value.interval, write)}{per_cent} ({_how(value.method, value.confidence)})"


def speed_detail(value: Speedup) -> str:
    """Return the interval of a speed-up and how it was timed."""
    parts = [f"{span(value.interval, ratio)} ({level(value.confidence)})"] if value.interval else ["no interval"]
    parts.append(f"{value.threads} thread" + ("s" if value.threads != 1 else ""))
    if value.batch is not None:
        parts.append(f"batch {value.batch}")
    return ", ".join(parts)


def _how(method: str, confidence: float) -> str:
    return f"{method}, {level(confidence)}" if method else level(confidence)


def quantity(value: float, unit: str) -> str:
    """Return a number in a unit: bytes, ms and FLOPs get their prefixes, the rest stands as it is."""
    known = {"bytes": size, "B": size, "ms": duration, "milliseconds": duration, "FLOPs": count, "parameters": count}
    if unit in known:
        return known[unit](value)
    if unit in {"points", "%"}:
        return f"{points(value)}{NBSP}{unit}"
    return f"{number(value)}{NBSP}{unit}" if unit else number(value)
