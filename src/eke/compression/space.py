"""Everything that may be changed about a model, and tables of what it costs.

Statistics, candidates and measured costs are recorded as soon as they are known; a run that is continued reads them
back, so that it plans from the very same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..curvature import Curvature
from ..sites import ChannelGroup, Site, channel_groups, find
from . import candidates, measure, tables
from .checkpoint import Run
from .deploy import Pair
from .job import Job
from .plan import Term
from .task import evaluating

STATISTICS = 1024
"""Most samples from which statistics are estimated."""


@dataclass(frozen=True)
class Space:
    """All that may be changed and what it costs."""

    sites: tuple[Site, ...]
    curvature: Curvature
    widths: tuple[candidates.Widths, ...]
    grids: tuple[candidates.Grids, ...]
    folded: tuple[Pair, ...]
    memory_format: str
    lossless: Mapping[str, float]
    before: Mapping[str, float]
    terms: tuple[Term, ...]


def explore(job: Job, run: Run) -> Space:
    """Estimate statistics, propose candidates and measure costs; what is already recorded is read back.

    Args:
        job: What was asked.
        run: Where results are recorded.

    Returns:
        The space of plans.

    Raises:
        ValueError: if nothing can be changed.
    """
    sites = tuple(site for site in find(job.model, skip=job.skip) if site.hookable)
    if not sites:
        raise ValueError(_nothing(job, sites))
    path = run.path("statistics.safetensors")
    job.progress("statistics", 0.0, f"curvature at {len(sites)} matrices")
    if path is not None and path.exists():
        curvature = Curvature.load(path)
    else:
        curvature = Curvature.estimate(
            job.model,
            job.loss,
            job.batches,
            sites=sites,
            max_samples=STATISTICS,
            max_locations=49,
            corrected_samples=128,
        )
        if path is not None:
            curvature.save(path)
    job.progress("candidates", 0.0, "channel groups: proving every cut")
    groups: list[ChannelGroup] = channel_groups(
        job.model,
        measure.positional(job.inputs) if not isinstance(job.inputs, dict) else job.inputs,
        ignore=_modules(job),
    )
    found = run.get("candidates")
    if found is None:
        widths = candidates.channel_candidates(job.model, groups, sites, curvature)
        grids = candidates.grid_candidates(job.model, sites, curvature, job.grids)
        run.put("candidates", candidates.to_json(widths, grids))
    else:
        widths, grids = candidates.from_json(found, groups, sites, job.grids)
    if not widths and not grids:
        raise ValueError(_nothing(job, sites))
    return _with_costs(job, run, sites, curvature, widths=widths, grids=grids)


def _nothing(job: Job, sites: Sequence[Site]) -> str:
    """Return the message for a model without candidates."""
    return (
        f"There is nothing to compress: 0 channel groups and 0 matrices of {type(job.model).__name__} with "
        f"{len(sites)} sites can be changed (skip={list(job.skip)}). `eke inspect` says why for each module."
    )


def _modules(job: Job) -> list[str]:
    names = {name for name, _ in job.model.named_modules()}
    return [name for name in job.skip if name in names]


def _with_costs(
    job: Job,
    run: Run,
    sites: tuple[Site, ...],
    curvature: Curvature,
    *,
    widths: Sequence[candidates.Widths],
    grids: Sequence[candidates.Grids],
) -> Space:
    job.progress("costs", 0.0, "measuring cut nets in place")
    dimensions, counter = tables.shapes(job.model, widths), tables.Counter.of(widths)
    known = run.get("costs")
    if known is None:
        with evaluating(job.model):
            folded, memory_format, times = measure.lossless(
                job.model, job.inputs, seconds=0.7 * job.seconds, threads=job.threads
            )
            before = {**measure.costs(job.model, job.inputs), "latency": times["original"]}
            fit = _fitted(job, widths, dimensions, (folded, memory_format, times["original"])) if job.timed else None
        known = run.put(
            "costs", {"folded": folded, "memory_format": memory_format, "times": times, "before": before, "fit": fit}
        )
    folded = [(str(layer), str(norm)) for layer, norm in known["folded"]]
    macs = measure.own_macs(job.model, job.inputs)
    terms = [
        *tables.loss_terms(widths, grids),
        *tables.parameter_terms(job.model, dimensions, counter),
        *tables.mac_terms(macs, dimensions, counter),
        *tables.size_terms(job.model, dimensions, counter, grids=grids, folded=folded),
        *_memory_terms(job, widths, folded, known["memory_format"]),
        *_timing_terms(known["fit"], dimensions, counter),
    ]
    lossless = {"seconds": _folded_seconds(known["times"], folded, known["memory_format"])}
    return Space(
        sites,
        curvature,
        tuple(widths),
        tuple(grids),
        tuple(folded),
        known["memory_format"],
        lossless,
        known["before"],
        tuple(terms),
    )


def _fitted(
    job: Job,
    widths: Sequence[candidates.Widths],
    dimensions: tables.Shapes,
    base: tuple[Sequence[Pair], str, float],
) -> dict[str, Any]:
    folded, memory_format, original = base
    timing = measure.timing(
        job.model,
        job.inputs,
        widths,
        dimensions=dimensions,
        folded=folded,
        memory_format=memory_format,
        original=original,
        seconds=2.5 * job.seconds,
        seed=job.seed,
        threads=job.threads,
    )
    return {"modules": timing.modules, "rest": timing.rest, "scale": timing.scale, "offset": timing.offset}


def _memory_terms(
    job: Job, widths: Sequence[candidates.Widths], folded: Sequence[Pair], memory_format: str
) -> list[Term]:
    if job.budget.peak_memory is None:
        return []
    return measure.memory_terms(
        job.model, job.inputs, widths, folded=folded, memory_format=memory_format, seed=job.seed
    )


def _timing_terms(fit: Mapping[str, Any] | None, dimensions: tables.Shapes, counter: tables.Counter) -> list[Term]:
    if fit is None:
        return []
    modules = {name: tuple(coefficients) for name, coefficients in fit["modules"].items()}
    return tables.Timing(modules, tuple(fit["rest"]), fit["scale"], fit["offset"]).terms(dimensions, counter)


def _folded_seconds(times: Mapping[str, float], folded: Sequence[Pair], memory_format: str) -> float:
    name = f"{'folded, ' if folded else ''}{memory_format}"
    return times.get(name, times["original"])
