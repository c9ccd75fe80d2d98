"""Measure the result against the original, and open the report split once."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .. import cost
from .._types import Counts, Quality, Samples
from ..patterns import Chain
from ..report import Calibrated, PlanLine, Speedup, Split
from ..sites import find
from ..structures import NM, Both, EntrySparse, KroneckerSparse, LowRank, Rows, Structure, UniformGrid, Unstructured
from . import apply, measure
from .artifact import Blueprint, stored_bits
from .calibrate import Calibration, Meter
from .candidates import Attention, Block, Forms, Widths
from .checkpoint import Run
from .entries import shape_of
from .intervals import samples_to_prove
from .job import Job
from .plan import Plan
from .result import Evidence
from .rounds import Planned
from .solver import fitting
from .space import STATISTICS, Space
from .spread import FEW
from .task import evaluating


def verify(
    job: Job,
    space: Space,
    net: nn.Module,
    blueprint: Blueprint,
    *,
    found: Planned,
    run: Run,
    scores: Mapping[str, Quality],
    notes: Sequence[str] = (),
) -> Evidence:
    """Measure the result against the original and open the report split.

    Args:
        job: What was asked.
        space: What could be changed.
        net: The result, deployed.
        blueprint: What was done to the architecture.
        found: What was chosen, and how.
        run: Counts how often the splits are opened, and keeps the report split's scores once they are known.
        scores: Scores of the selection split, by label.
        notes: Remarks so far.

    Returns:
        Everything that was measured.
    """
    job.progress("verify", 0.0, "latency against the original")
    after = measure.costs(net, job.inputs)
    after["size"] = float(measure.packed_bytes(net, blueprint.structures))
    base = space.shaped({})
    batch = measure.batch_size(job.inputs)
    rivals = {"the original": job.model, "the original, folded, in the same memory format": base}
    compared = {}
    with evaluating(job.model):
        for against, rival in rivals.items():
            compared[against] = cost.compare_latency(
                measure.runner(rival, job.inputs),
                measure.runner(net, job.inputs),
                seconds=job.seconds,
                threads=job.threads,
                seed=job.seed,
            )
    speedups = [
        Speedup(c.ratio, c.interval, c.confidence, c.faster, c.threads, batch, against)
        for against, c in compared.items()
    ]
    first, second = compared.values()
    before = {**space.before, "latency": first.a.lower_quartile}
    after["latency"] = before["latency"] / first.ratio
    scores = {**scores, **_reported(job, run, {"before": job.model, "after": net, "folded": base}, scores)}
    warnings: list[str] = []
    needed = samples_to_prove(job.budget.drop) if job.budget.drop is not None else 0
    after_score = scores["after"]
    total = after_score.total if isinstance(after_score, Counts) else None
    warnings += few_samples(after_score)
    if total is not None and total < needed:
        warnings.append(
            f"{total} report samples cannot prove a drop of at most {job.budget.max_drop}: {needed} are needed."
        )
    lossless = {"seconds": second.a.lower_quartile, "size": float(cost.model_bytes(base))}
    job.progress("verify", 1.0, "done")
    return Evidence(
        before=before,
        after=after,
        scores=scores,
        speedups=tuple(speedups),
        plan=_plan_lines(job, space, net, found.plan),
        rounds=found.rounds,
        splits=_splits(job, scores, run.openings()),
        notes=tuple(notes),
        warnings=tuple(warnings),
        environment=_environment(job, space),
        lossless=lossless,
        threads=torch.get_num_threads(),
        calibration=calibrated(space.calibration),
    )


def calibrated(calibration: Calibration) -> tuple[Calibrated, ...]:
    """Return what was predicted and measured for single decisions and whole plans, as reports show it."""
    alone = [
        Calibrated(f"{a.choice}, option {a.option}", a.family, a.predicted, a.measured) for a in calibration.anchors
    ]
    whole = [
        Calibrated(f"random plan {number}", "plan", calibration.whole(loss), measured)
        for number, (loss, measured) in enumerate(calibration.plans, start=1)
    ]
    return (*alone, *whole)


def _reported(job: Job, run: Run, models: Mapping[str, nn.Module], scores: Mapping[str, Quality]) -> dict[str, Quality]:
    """Return all scores on the report split, opened once for all; a continued run does not open it again."""
    if job.report is None:
        before = scores["selection before"]
        return {"before": before, "after": scores["selection after"], "folded": before}
    stored = run.get("report")
    like = scores["selection before"]
    if stored is None or not all(_readable(value, like) for value in stored.values()):
        job.progress("verify", 0.7, "opening the report split")
        run.opening("report")
        names = {
            "before": "the original model",
            "after": "the compressed model",
            "folded": "the original model, folded",
        }
        found = {
            label: measure.evaluate_on(model, job.report, of=f"{names[label]} on the report split")
            for label, model in models.items()
        }
        stored = run.put("report", {label: _plain(score) for label, score in found.items()})
        # As it is read back: a run that is continued must end with the same.
        like = found["before"]
    return {label: _score(value, like) for label, value in stored.items()}


def few_samples(score: Quality) -> tuple[str, ...]:
    """Return the warning that intervals from so few samples may promise too much, if they are few."""
    if not isinstance(score, Samples) or len(score.sums) >= FEW:
        return ()
    return (
        f"The {score.metric.name} rests on {len(score.sums)} samples: intervals hold their 95 % from about {FEW} on, "
        "and miss more often below where a few samples weigh much.",
    )


def _readable(value: float | dict[str, Any], like: Quality) -> bool:
    """Return whether a recorded score can be read: samples need their metric, which the selection's score brings."""
    name = value.get("metric") if isinstance(value, dict) else None
    return name is None or (isinstance(like, Samples) and like.metric.name == name)


def _plain(score: Quality) -> float | dict[str, Any]:
    if isinstance(score, Samples):
        return {"metric": score.metric.name, "sums": score.sums.tolist(), "order": score.order}
    if not isinstance(score, Counts):
        return score
    outcomes = None if score.outcomes is None else [int(right) for right in score.outcomes]
    return {**vars(score), "outcomes": outcomes}


def _score(value: float | dict[str, Any], like: Quality) -> Quality:
    if not isinstance(value, dict):
        return value
    if isinstance(like, Samples) and value.get("metric") == like.metric.name:
        return Samples(torch.tensor(value["sums"], dtype=torch.float64), like.metric, value["order"])
    outcomes = None if value["outcomes"] is None else torch.tensor(value["outcomes"], dtype=torch.bool)
    return Counts(**{**value, "outcomes": outcomes})


class _Alone:
    """The measured loss increase of single decisions on some calibration samples, as long as its time lasts."""

    def __init__(self, job: Job, space: Space) -> None:
        self._space, self._meter = space, Meter(job)
        self._end = time.monotonic() + 1.5 * job.seconds
        self._known = {(a.choice, a.option): a.measured for a in space.calibration.anchors}

    def __call__(self, choice: str, option: int) -> float | None:
        if (choice, option) in self._known:
            return self._known[choice, option]
        if time.monotonic() > self._end:
            return None
        return self._meter(self._space.draft({choice: option}).finished())[0]


def _plan_lines(job: Job, space: Space, net: nn.Module, plan: Plan) -> tuple[PlanLine, ...]:
    alone, decisions = _Alone(job, space), space.decisions
    lines = [_block_line(block, plan.picks[block.choice], alone) for block in decisions.blocks]
    lines += [_attention_line(attention, plan.picks[attention.choice], alone) for attention in decisions.attentions]
    lines += [_width_line(width, plan.picks[width.choice], alone) for width in decisions.widths]
    removed, factored = decisions.removed(plan.picks), apply.blueprint(decisions, plan.picks, space.layout).factored
    after = {site.name: site.shape for site in find(net)}
    arguments = measure.positional(job.inputs)
    with evaluating(job.model):
        seconds = [
            cost.module_times(m, *arguments, seconds=0.2 * job.seconds, threads=job.threads) for m in (job.model, net)
        ]
    for form in decisions.forms:
        if any(form.site.module_name == name or form.site.module_name.startswith(f"{name}.") for name in removed):
            continue
        name = form.site.module_name
        shape = after.get(form.site.name) or shape_of(net, name)
        parts = [name]
        other = factored.get(name)
        if isinstance(other, Chain):
            shape = other.shape
        elif other is not None:
            parts = [f"{name}.0", f"{name}.1"]
            shape = (after[parts[1]][0], after[parts[0]][1])
        assert shape is not None
        times = [_milliseconds(seconds[0], [name]), _milliseconds(seconds[1], parts)]
        lines.append(_form_line(form, plan.picks[form.choice], shape, (times[0], times[1]), alone))
    return tuple(lines)


def _milliseconds(found: Mapping[str, float], names: Sequence[str]) -> float | None:
    return 1e3 * sum(found[name] for name in names) if all(name in found for name in names) else None


def _block_line(block: Block, option: int, alone: _Alone) -> PlanLine:
    if not option:
        return PlanLine(block.choice, "stays", predicted_loss=0.0, maturity="exact")
    change = "left out: passes its input on" if block.kind.startswith("identity") else "left out: gives zero"
    measured = alone(block.choice, option)
    return PlanLine(block.choice, change, predicted_loss=block.loss, measured_loss=measured, maturity="exact")


def _attention_line(attention: Attention, option: int, alone: _Alone) -> PlanLine:
    if not option:
        return PlanLine(attention.choice, "keeps its softmax", predicted_loss=0.0, maturity="exact")
    change, loss = attention.labels[option], attention.losses[option]
    measured = alone(attention.choice, option)
    return PlanLine(attention.choice, change, predicted_loss=loss, measured_loss=measured, maturity="reproduced")


def _width_line(width: Widths, option: int, alone: _Alone) -> PlanLine:
    size = width.group.size
    if not option:
        return PlanLine(width.choice, f"keeps all {size} {width.group.unit}", predicted_loss=0.0, maturity="exact")
    measured = alone(width.choice, option)
    change = f"keeps {width.kept[option]} of {size} {width.group.unit}"
    return PlanLine(width.choice, change, predicted_loss=width.losses[option], measured_loss=measured, maturity="exact")


def _form_line(
    form: Forms,
    option: int,
    shape: tuple[int, int],
    milliseconds: tuple[float | None, float | None],
    alone: _Alone,
) -> PlanLine:
    site, wanted = form.site, form.structures[option]
    structure = None if wanted is None else fitting(wanted, shape)
    shapes = f"{shape[0]} x {shape[1]}"
    if shape != site.shape:
        shapes = f"{site.shape[0]} x {site.shape[1]} to {shapes}"
    return PlanLine(
        site.name,
        f"{shapes}, {described(structure, shape)}",
        predicted_loss=form.losses[option],
        measured_loss=alone(form.choice, option) if structure is not None else None,
        bytes_before=4 * site.shape[0] * site.shape[1],
        bytes_after=stored_bits(structure, shape) // 8,
        milliseconds_before=milliseconds[0],
        milliseconds_after=milliseconds[1],
        maturity="exact",
    )


def described(structure: Structure | None, shape: tuple[int, int]) -> str:
    """Return a structure of a matrix (m, n) in words."""
    if structure is None:
        return "float32"
    if isinstance(structure, UniformGrid):
        scales = f", a scale for {structure.group} columns" if structure.group else ""
        return f"{structure.code_bits} bits{scales}"
    if isinstance(structure, LowRank):
        factors = described(structure.grid, shape)
        return f"rank {structure.rank_of(shape)}, {factors}"
    if isinstance(structure, KroneckerSparse):
        share = structure.chain.parameters / (shape[0] * shape[1])
        return f"{len(structure.chain)} Kronecker-sparse factors, {100 * share:.3g} % of the entries"
    if isinstance(structure, EntrySparse):
        return f"{described(structure.stored, shape)}, run without the others"
    if isinstance(structure, NM):
        return f"{structure.n} of {structure.m}"
    if isinstance(structure, Unstructured | Rows):
        what = "rows" if isinstance(structure, Rows) else "entries"
        return f"{100 * structure.density:.3g} % of the {what}"
    if isinstance(structure, Both):
        return f"{described(structure.first, shape)}, {described(structure.second, shape)}"
    return repr(structure)


def _splits(job: Job, scores: Mapping[str, Quality], openings: Mapping[str, int]) -> tuple[Split, ...]:
    def total(label: str) -> int | None:
        score = scores[label]
        if isinstance(score, Samples):
            return len(score.sums)
        return score.total if isinstance(score, Counts) else None

    uses = {
        "calibration": (job.samples, f"statistics (at most {STATISTICS} samples), the original's answers, recovery"),
        "selection": (total("selection after"), "checks of the original, the cut and the recovered model"),
        "report": (total("after"), "the published scores, of original and result together"),
    }
    return tuple(Split(name, *uses[name][:1], openings[name], uses[name][1]) for name in uses if name in openings)


def _environment(job: Job, space: Space) -> dict[str, str]:
    found = {str(key): str(value) for key, value in cost.environment().to_json().items()}
    found["memory format"] = space.layout.memory_format
    found["folded"] = str(len(space.layout.folded))
    found["threads"] = str(job.threads)
    return found
