"""The report as plain data: what was asked, what was measured, what was only predicted.

A `Document` is everything a reader may see; the page and the terminal are drawings of it and compute nothing new. It is
immutable, holds numbers and strings alone, and its JSON is strict: an unknown key, a missing key, a wrong type or a
number that is not finite is refused by name, so that a report read back is the report that was written.

Units are in the names or here: bytes, milliseconds, FLOPs (2 a multiply-add), scores and shares as fractions of one,
drops in points (hundredths of one) for an accuracy, in per cent of the first model's value for a metric of samples, in
the score's own unit otherwise; losses in the loss's own unit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

from .strict import build, check

SCHEMA = 2
"""The version of the JSON this file reads and writes."""

Interval = tuple[float, float]
Kind = Literal["compress", "gate", "inspect", "search"]
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
    """A quality; with counts it is shown as k/n with its interval.

    Args:
        value: The score; a fraction of one for an accuracy.
        correct: k of k/n.
        total: n of k/n.
        interval: Lower and upper end, in the unit of `value`.
        confidence: Of the interval, such as 0.95.
        method: How the interval was made, such as "Wilson".
        name: What is scored.
        lower_is_better: Whether less of it is better.
        percent: Whether it is shown as per cent.
    """

    value: float
    correct: int | None = None
    total: int | None = None
    interval: Interval | None = None
    confidence: float = 0.95
    method: str = ""
    name: str = "accuracy"
    lower_is_better: bool = False
    percent: bool = False


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
    """How much worse the second model is than the first; negative when it is better.

    Args:
        points: The measured difference.
        interval: Its lower and upper end, in points.
        confidence: Of the interval.
        method: How the interval was made, such as "paired bootstrap".
        proved: Whether the whole interval lies within `limit`: a statistical statement, and shown as one.
        limit: The largest drop that was allowed, in points.
        unit: "points" for counts, "%" of the first model's value, "" for the score's own unit; all numbers here are in
            it.
    """

    points: float
    interval: Interval | None = None
    confidence: float = 0.95
    method: str = ""
    proved: bool = False
    limit: float | None = None
    unit: str = "points"


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
        check(self, Document, f"Document (schema {SCHEMA})")

    def to_json(self) -> str:
        """Return the document as JSON text that `from_json` reads back to an equal document."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

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
        document: Self = build(cls, data, f"Document (schema {SCHEMA})")
        return document
