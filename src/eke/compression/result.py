"""What `compress` returns: the model, the plan, what was measured before and after, and how to keep it."""

from __future__ import annotations

import datetime
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import yaml
from torch import nn

from .._types import Counts, Quality, Samples
from .._version import __version__
from ..cost import write_bytes
from ..report import (
    BudgetLine,
    Calibrated,
    Control,
    Document,
    Drop,
    FrontPoint,
    Measured,
    PlanLine,
    Round,
    Speedup,
    Split,
    Verdict,
    html,
    wording,
)
from .artifact import Blueprint, save
from .budget import RESOURCES, Budget, show
from .checkpoint import together
from .measure import as_measured, as_score, drop_between
from .plan import Plan

_UNITS = {
    "latency": ("ms", 1e3),
    "size": ("bytes", 1.0),
    "macs": ("MAC", 1.0),
    "parameters": ("", 1.0),
    "peak_memory": ("bytes", 1.0),
}


@dataclass(frozen=True)
class Evidence:
    """Everything a run measured.

    Args:
        before: Costs of the original by resource.
        after: Costs of the result by resource.
        scores: Scores by label: "before" and "after" on the report split, "selection before", "selection after",
            "before recovery" on the selection split.
        speedups: Of the result against the original and against the untouched net, folded.
        plan: One line a decision.
        rounds: What each planning round did.
        splits: How the data were used.
        notes: Remarks for readers.
        warnings: What readers must know.
        environment: Machine and versions.
        lossless: Seconds and bytes of the untouched net, folded, in the result's memory format.
        threads: Threads with which the scores were computed.
        calibration: Predicted and measured losses of single decisions and of whole plans.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    scores: Mapping[str, Quality]
    speedups: tuple[Speedup, ...]
    plan: tuple[PlanLine, ...]
    rounds: tuple[Round, ...]
    splits: tuple[Split, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    environment: Mapping[str, str]
    lossless: Mapping[str, float]
    threads: int = 1
    calibration: tuple[Calibrated, ...] = ()


@dataclass(frozen=True, repr=False)
class Result:
    """A compressed model with its proof.

    Args:
        model: The compressed model, in evaluation mode.
        plan: The chosen options and what was predicted for them.
        budget: What was asked.
        blueprint: What was done to the architecture.
        evidence: What was measured.
        recipe: What repeats the run.
        title: Of the report.
        front: Results for other budgets of the same model.
    """

    model: nn.Module
    plan: Plan
    budget: Budget
    blueprint: Blueprint
    evidence: Evidence
    recipe: Mapping[str, Any] = field(default_factory=dict)
    title: str = "model"
    front: tuple[FrontPoint, ...] = ()

    def __repr__(self) -> str:
        """Return the verdict in a line; `before`, `after` and the report have the numbers."""
        return f"<Result of {self.title}: {self.document().verdict.text}>"

    @property
    def before(self) -> Measured:
        """The original as measured: score, bytes, parameters, FLOPs, milliseconds, peak bytes."""
        return as_measured("original", self.evidence.before, self.evidence.scores["before"])

    @property
    def after(self) -> Measured:
        """The result as measured."""
        return as_measured("compressed", self.evidence.after, self.evidence.scores["after"])

    @property
    def front_point(self) -> FrontPoint:
        """The result in the plane of quality and cost, named by its budget."""
        asked = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self.budget.to_json().items())
        return _point(asked, "plan", self.after)

    @property
    def budget_lines(self) -> tuple[BudgetLine, ...]:
        """One line a limit: asked, measured, met."""
        return budget_lines(self.budget, self.evidence)

    @property
    def met(self) -> bool:
        """Whether every limit is met by what was measured."""
        return all(line.met for line in self.budget_lines)

    def document(self, *, verified: bool = False) -> Document:
        """Return the report.

        Args:
            verified: Whether the saved artifact was loaded in a fresh process and measured there.
        """
        return document(self, verified=verified)

    def save(self, folder: str | pathlib.Path, *, verified: bool = False) -> pathlib.Path:
        """Write the artifact: weights, plan, recipe and report; each file whole or absent.

        Args:
            folder: Made if it is not there.
            verified: Whether the saved artifact was already loaded and measured in a fresh process.

        Returns:
            The folder.
        """
        folder = pathlib.Path(folder)
        decisions = [{"site": line.site, "change": line.change} for line in self.evidence.plan]
        checks = {"selection": plain(self.evidence.scores["selection after"]), "threads": self.evidence.threads}
        with together(folder) as staged:
            save(staged, self.model, self.blueprint, decisions=decisions, checks=checks)
            text = yaml.safe_dump(dict(self.recipe), sort_keys=False, allow_unicode=True)
            write_bytes(staged / "recipe.yaml", text.encode())
            write_report(staged, self.document(verified=verified))
        return folder


def write_report(folder: pathlib.Path, report: Document) -> None:
    """Write report.json and report.html.

    Args:
        folder: The artifact.
        report: The document.
    """
    write_bytes(folder / "report.json", report.to_json().encode())
    write_bytes(folder / "report.html", html.render(report).encode())


def mark_verified(folder: pathlib.Path) -> Document:
    """Record in an artifact's report that it was loaded and measured in a fresh process.

    Args:
        folder: The artifact.

    Returns:
        The new report.
    """
    report = Document.from_json((folder / "report.json").read_text())
    text = report.verdict.text.replace(_UNVERIFIED, _VERIFIED)
    report = replace(report, verdict=replace(report.verdict, verified=True, text=text))
    write_report(folder, report)
    return report


_UNVERIFIED = "Not yet reloaded in a fresh process."
_VERIFIED = "Reloaded in a fresh process: the same."


def budget_lines(budget: Budget, evidence: Evidence) -> tuple[BudgetLine, ...]:
    """Compare what was asked with what was measured.

    Args:
        budget: The limits.
        evidence: The measurements.

    Returns:
        One line a limit.
    """
    lines = []
    if budget.drop is not None:
        drop = drop_between(evidence.scores["before"], evidence.scores["after"], limit=budget.drop)
        met = drop.limit is not None and drop.points <= drop.limit
        lines.append(BudgetLine("drop", str(budget.max_drop), drop.limit, drop.points, drop.unit, met))
    for name in RESOURCES:
        limit = budget.limit(name, before=evidence.before[name])
        if limit is not None:
            unit, factor = _UNITS[name]
            value = evidence.after[name]
            asked = str(getattr(budget, name))
            lines.append(
                BudgetLine(name.replace("_", " "), asked, factor * limit, factor * value, unit, value <= limit)
            )
    return tuple(lines)


def _sentence(result: Result, lines: Sequence[BudgetLine], *, verified: bool) -> str:
    evidence = result.evidence
    speed = evidence.speedups[0]
    smaller = evidence.before["size"] / evidence.after["size"]
    faster = f"{speed.ratio:.2f}x faster" if speed.claimed else "no speed-up that could be claimed"
    drop = drop_between(evidence.scores["before"], evidence.scores["after"], limit=result.budget.drop)
    change = _change(evidence.scores["before"], evidence.scores["after"], drop)
    missed = [line.name for line in lines if not line.met]
    over = f" Over the limit: {', '.join(missed)}." if missed else ""
    first = f"{faster}, file {smaller:.1f}x smaller, {change}."
    return f"{first[0].upper()}{first[1:]}{over} {_VERIFIED if verified else _UNVERIFIED}"


def _change(before: Quality, after: Quality, drop: Drop) -> str:
    """Return what became of the quality, in words."""
    if isinstance(before, Samples) and isinstance(after, Samples):
        values = f"{wording.score(as_score(before))} to {wording.score(as_score(after))}"
        much = wording.difference(abs(drop.points), drop.unit).removesuffix(" relative")
        return f"{before.metric.name} {values} ({much} {'worse' if drop.points > 0 else 'better'})"
    unit = "points" if drop.unit == "points" else "of the score"
    lost = f"{abs(drop.points):.2f}" if drop.unit == "points" else f"{abs(drop.points):.3g}"
    return f"{lost} {unit} {'lost' if drop.points > 0 else 'gained'}"


def plain(score: Quality) -> dict[str, Any]:
    """Return a score as plain values, to be recorded and compared with.

    Args:
        score: The score.

    Returns:
        The value, with correct and total of counts, or with the metric's name and the number of samples.
    """
    if isinstance(score, Counts):
        return {"value": score.share, "correct": score.correct, "total": score.total}
    if isinstance(score, Samples):
        return {"value": score.value, "metric": score.metric.name, "samples": len(score.sums)}
    return {"value": score}


def document(result: Result, *, verified: bool) -> Document:
    """Build the report of a result.

    Args:
        result: The result.
        verified: Whether the saved artifact was loaded in a fresh process and measured there.

    Returns:
        The document.
    """
    evidence, lines = result.evidence, result.budget_lines
    before, after = result.before, result.after
    folded = evidence.lossless.get("seconds")
    control = Control(
        "original, folded",
        "The untouched network with what costs no quality: batch normalisation folded, memory format as in the result.",
        as_score(evidence.scores["folded"]),
        speedup=evidence.speedups[1] if len(evidence.speedups) > 1 else None,
        bytes=round(evidence.lossless["size"]) if "size" in evidence.lossless else None,
        milliseconds=1e3 * folded if folded is not None else None,
    )
    points = [
        _point("original", "original", before),
        _point("compressed", "chosen", after),
        _point(
            "original, folded",
            "control",
            replace(before, score=control.score, bytes=control.bytes, milliseconds=control.milliseconds),
        ),
    ]
    own = (points[1].bytes, points[1].milliseconds, points[1].score)
    points += [p for p in result.front if (p.bytes, p.milliseconds, p.score) != own]
    recovery = evidence.scores.get("before recovery")
    if recovery is not None:
        early = replace(after, score=as_score(recovery))
        points.append(_point("compressed, before recovery (selection split)", "plan", early))
    return Document(
        kind="compress",
        title=result.title,
        eke_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verdict=Verdict(all(line.met for line in lines), verified, _sentence(result, lines, verified=verified)),
        budget=lines,
        before=before,
        after=after,
        drop=drop_between(evidence.scores["before"], evidence.scores["after"], limit=result.budget.drop),
        speedups=evidence.speedups,
        plan=evidence.plan,
        front=tuple(points),
        calibration=evidence.calibration,
        controls=(control,),
        splits=evidence.splits,
        rounds=evidence.rounds,
        notes=evidence.notes,
        warnings=evidence.warnings,
        environment=dict(evidence.environment),
        recipe=yaml.safe_dump(dict(result.recipe), sort_keys=False) if result.recipe else None,
    )


def _point(label: str, kind: Literal["original", "chosen", "control", "plan"], measured: Measured) -> FrontPoint:
    score = measured.score
    return FrontPoint(
        label,
        kind,
        score.value if score else None,
        score.interval if score else None,
        measured.bytes,
        measured.milliseconds,
        measured.flops,
    )


def describe(resources: Mapping[str, float]) -> str:
    """Write costs in one line.

    Args:
        resources: Values by resource.

    Returns:
        Text such as "latency 3.1 ms, size 98.2 kB".
    """
    return ", ".join(
        f"{name.replace('_', ' ')} {show(name, resources[name])}" for name in RESOURCES if name in resources
    )
