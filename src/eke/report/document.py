"""The report as plain data: what was asked, what was measured, what was only predicted.

A `Document` is everything a reader may see; the page and the terminal are drawings of it and compute nothing new. It is
immutable, holds numbers and strings alone, and its JSON is strict: an unknown key, a missing key, a wrong type or a
number that is not finite is refused by name, so that a report read back is the report that was written.

Units are in the names or here: bytes, milliseconds, FLOPs (2 a multiply-add), scores and shares as fractions of one,
drops in points (hundredths of one for an accuracy, the metric's own unit otherwise), losses in the loss's own unit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

SCHEMA = 1
"""The version of the JSON this file reads and writes."""

Interval = tuple[float, float]
Kind = Literal["compress", "gate", "inspect"]
PointKind = Literal["original", "plan", "candidate", "control", "chosen"]
Source = Literal["measured", "predicted"]


@dataclass(frozen=True)
class Verdict:
    """What came out, in one sentence.

    Args:
        met: Whether every asked budget was met; None when nothing was asked.
        verified: Whether the saved result was loaded again in a fresh process and measured there.
        text: The sentence: what was asked, what was got. No estimated number belongs here.
    """

    met: bool | None
    verified: bool
    text: str


@dataclass(frozen=True)
class BudgetLine:
    """One asked limit and what was measured for it, both in `unit`; `asked` is the limit as it was typed."""

    name: str
    asked: str
    limit: float | None
    measured: float | None
    unit: str
    met: bool | None


@dataclass(frozen=True)
class Score:
    """A quality, larger is better; with counts it is shown as k/n with its interval.

    Args:
        value: The score; a fraction of one for an accuracy.
        correct: k of k/n.
        total: n of k/n.
        interval: Lower and upper end, in the unit of `value`.
        confidence: Of the interval, such as 0.95.
        method: How the interval was made, such as "Wilson".
        name: What is scored.
    """

    value: float
    correct: int | None = None
    total: int | None = None
    interval: Interval | None = None
    confidence: float = 0.95
    method: str = ""
    name: str = "accuracy"


@dataclass(frozen=True)
class Measured:
    """One model as it was measured here."""

    label: str
    score: Score | None = None
    bytes: int | None = None
    parameters: int | None = None
    flops: int | None = None
    milliseconds: float | None = None
    milliseconds_interval: Interval | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Drop:
    """How many points the second model is below the first; negative when it is above.

    Args:
        points: The measured difference.
        interval: Its lower and upper end, in points.
        confidence: Of the interval.
        method: How the interval was made, such as "paired bootstrap".
        proved: Whether the whole interval lies within `limit`: a statistical statement, and shown as one.
        limit: The largest drop that was allowed, in points.
    """

    points: float
    interval: Interval | None = None
    confidence: float = 0.95
    method: str = ""
    proved: bool = False
    limit: float | None = None


@dataclass(frozen=True)
class Speedup:
    """time(against) / time(result); larger than 1: the result is faster.

    Args:
        ratio: The measured ratio.
        interval: Its lower and upper end.
        confidence: Of the interval.
        claimed: Whether the lower end is high enough to be claimed.
        threads: Threads both were timed with.
        batch: Samples a call.
        against: What it was timed against, in words.
    """

    ratio: float
    interval: Interval | None = None
    confidence: float = 0.99
    claimed: bool = False
    threads: int = 1
    batch: int | None = None
    against: str = "the original"


@dataclass(frozen=True)
class PlanLine:
    """What the plan does at one site, what that was predicted to cost in loss and what it did cost."""

    site: str
    change: str
    predicted_loss: float | None = None
    measured_loss: float | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    maturity: str = ""


@dataclass(frozen=True)
class FrontPoint:
    """One model in the plane of quality and cost; `source` says whether it was measured or only predicted."""

    label: str
    kind: PointKind
    score: float | None = None
    score_interval: Interval | None = None
    bytes: int | None = None
    milliseconds: float | None = None
    flops: int | None = None
    source: Source = "measured"


@dataclass(frozen=True)
class Control:
    """A rival of the result; `difference` is how many points the rival is below the result."""

    name: str
    description: str
    score: Score | None = None
    difference: Drop | None = None
    speedup: Speedup | None = None
    bytes: int | None = None
    milliseconds: float | None = None


@dataclass(frozen=True)
class Calibrated:
    """The loss increase that was predicted for one change, and the one that was measured."""

    label: str
    kind: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class SiteLine:
    """One site of a model: what it weighs, what it costs, how much the loss feels a change there."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int | None = None
    flops: int | None = None
    share_of_time: float | None = None
    sensitivity: float | None = None


@dataclass(frozen=True)
class Split:
    """One part of the data, what it was for and how often it was looked at."""

    name: str
    samples: int | None
    opened: int
    use: str


@dataclass(frozen=True)
class Round:
    """What happened in one round of planning."""

    number: int
    text: str


@dataclass(frozen=True)
class Document:
    """A whole report.

    Args:
        kind: What was run.
        title: What it was run on.
        eke_version: Version that ran.
        created: When, ISO 8601.
        verdict: What came out.
        budget: What was asked, one line a limit.
        before: The first model.
        after: The second model.
        drop: From the first to the second.
        speedups: Of the second, against each thing it was timed against; the first one is the headline.
        plan: One line a site.
        front: Models in the plane of quality and cost.
        controls: Rivals.
        calibration: Predicted against measured.
        sites: For an inspection.
        splits: The data.
        rounds: Planning rounds.
        notes: Anything else worth reading.
        warnings: What the reader must know before believing the rest.
        environment: Machine, threads, versions.
        recipe: YAML that repeats the run.
        schema: Version of this format.

    Raises:
        ValueError: if a field has the wrong type, a number is not finite or an interval is upside down.
    """

    kind: Kind
    title: str
    eke_version: str
    created: str
    verdict: Verdict
    budget: tuple[BudgetLine, ...] = ()
    before: Measured | None = None
    after: Measured | None = None
    drop: Drop | None = None
    speedups: tuple[Speedup, ...] = ()
    plan: tuple[PlanLine, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    controls: tuple[Control, ...] = ()
    calibration: tuple[Calibrated, ...] = ()
    sites: tuple[SiteLine, ...] = ()
    splits: tuple[Split, ...] = ()
    rounds: tuple[Round, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    recipe: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"Document.schema must be {SCHEMA}, the only version this eke knows, got {self.schema!r}.")
        _check(self, Document, "Document")

    def to_json(self) -> str:
        """Return the document as JSON text that `from_json` reads back to an equal document."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, source: str | bytes | Mapping[str, Any]) -> Self:
        """Read a document.

        Args:
            source: JSON text, or what `json.loads` made of it.

        Returns:
            The document.

        Raises:
            ValueError: if the text is no JSON object, its schema is another version, or a key is unknown, missing or
                of the wrong type.
        """
        if isinstance(source, Mapping):
            data: object = dict(source)
        else:
            try:
                data = json.loads(source)
            except ValueError as error:
                raise ValueError(f"A report must be JSON text, but reading it failed: {error}.") from error
        if not isinstance(data, dict):
            raise ValueError(f"A report must be a JSON object, got {type(data).__name__} {data!r:.60}.")
        if data.get("schema") != SCHEMA:
            given = repr(data["schema"]) if "schema" in data else "no key 'schema'"
            raise ValueError(f"This eke reads reports of schema {SCHEMA}, got {given}; write the report again with it.")
        document: Self = _build(cls, data, "Document")
        return document


def _build(hint: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into the dataclasses and tuples that `hint` names; `_check` looks at the leaves afterwards."""
    if is_dataclass(hint):
        return _build_dataclass(hint, value, where)
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        return _build(next(a for a in arguments if a is not NoneType), value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        inner = arguments if arguments[-1] is not ... else (arguments[0],) * len(value)
        if len(inner) == len(value):
            return tuple(_build(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    return value


def _build_dataclass(hint: Any, value: Any, where: str) -> Any:
    hints = _hints(hint)
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} must be an object with the keys {', '.join(hints)} (schema {SCHEMA}), got {value!r:.60}."
        )
    for key in value:
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {key!r}; schema {SCHEMA} allows {', '.join(hints)}.")
    for key in hints:
        if key not in value:
            raise ValueError(f"{where} lacks the key {key!r}, which schema {SCHEMA} requires.")
    return hint(**{key: _build(h, value[key], f"{where}.{key}") for key, h in hints.items()})


def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _check(value: Any, hint: Any, where: str) -> None:
    """Refuse what does not fit `hint`, by name."""
    if is_dataclass(hint):
        if not isinstance(value, hint):  # type: ignore[arg-type]
            raise _wrong(where, hint.__name__, value)  # type: ignore[union-attr]
        for key, inner in _hints(hint).items():
            _check(getattr(value, key), inner, f"{where}.{key}")
        return
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is not None:
            _check(value, next(a for a in arguments if a is not NoneType), where)
    elif origin is Literal:
        if value not in arguments:
            raise _wrong(where, "one of " + ", ".join(map(repr, arguments)), value)
    elif origin is tuple:
        _check_tuple(value, arguments, where)
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(x, str) for pair in value.items() for x in pair):
            raise _wrong(where, "a dict of strings", value)
    else:
        _check_leaf(value, hint, where)


def _check_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> None:
    if not isinstance(value, tuple):
        raise _wrong(where, "a tuple", value)
    open_ended = arguments[-1] is ...
    if not open_ended and len(value) != len(arguments):
        raise _wrong(where, f"a tuple of {len(arguments)}", value)
    for i, item in enumerate(value):
        _check(item, arguments[0] if open_ended else arguments[i], f"{where}[{i}]")
    if arguments == (float, float) and value[0] > value[1]:
        raise _wrong(where, "(lower, upper) with lower <= upper", value)


def _check_leaf(value: Any, hint: Any, where: str) -> None:
    if hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise _wrong(where, "a finite float (None when it was not measured)", value)
    elif hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong(where, "an int", value)
    elif not isinstance(value, hint):
        raise _wrong(where, f"a {hint.__name__}", value)


def _wrong(where: str, needed: str, value: object) -> ValueError:
    return ValueError(f"{where} must be {needed} (schema {SCHEMA}), got {type(value).__name__} {value!r:.60}.")
