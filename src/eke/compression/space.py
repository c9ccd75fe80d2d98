"""Everything that may be changed about a model, and tables of what it costs.

Statistics, candidates, corrections and measured costs are recorded as soon as they are known; a run that is continued
reads them back, so that it plans from the very same numbers.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .. import cost
from ..curvature import Curvature
from ..sites import ChannelGroup, Site, channel_groups, find
from . import apply, candidates, measure, tables
from .apply import Draft, Layout
from .attentions import attention_candidates, attention_costs, with_attention, with_parts
from .blocks import block_candidates, removable
from .calibrate import Calibration, Meter, affordable, calibrate, plan_loss, share
from .candidates import Decisions
from .checkpoint import Run
from .embeddings import embedding_candidates, embedding_sites
from .entries import sparsable
from .factor import factorable
from .job import Job
from .plan import Term
from .remember import Remembering
from .solver import Solver, careful, finest
from .task import evaluating
from .timing import Timing

STATISTICS = 1024
"""Most samples from which statistics are estimated."""

LEADING = 16
"""Directions of largest curvature a matrix that predictions know beside the corrected eigenvalues."""

_FEWEST, _SHARE = 128, 12  # samples in any case, and as a multiple of those on which a loss increase is measured


@dataclass(frozen=True)
class Space:
    """All that may be changed and what it costs.

    Args:
        model: The original.
        sites: Its matrices.
        curvature: At these.
        decisions: The candidates, with corrected losses.
        calibration: The corrections.
        layout: Folding and memory format.
        solver: Finds members of structures.
        lossless: Seconds of the untouched net in this layout.
        before: Costs of the original by resource.
        terms: Tables for the planner.
        finish: Finds the members of the plan that is taken; None for `solver`.
    """

    model: nn.Module
    sites: tuple[Site, ...]
    curvature: Curvature
    decisions: Decisions
    calibration: Calibration
    layout: Layout
    solver: Solver
    lossless: Mapping[str, float]
    before: Mapping[str, float]
    terms: tuple[Term, ...]
    finish: Solver | None = None

    def draft(self, picks: Mapping[str, int]) -> Draft:
        """Return the model of a plan before recovery."""
        return self._draft(picks, self.solver)

    def last(self, picks: Mapping[str, int]) -> Draft:
        """Return the model of the plan that is taken, its members sought to the end where nothing is learned."""
        return self._draft(picks, self.finish or self.solver)

    def _draft(self, picks: Mapping[str, int], solver: Solver) -> Draft:
        return apply.draft(
            self.model, self.decisions, picks, sites=self.sites, curvature=self.curvature, solver=solver,
            layout=self.layout,
        )  # fmt: skip

    def shaped(self, picks: Mapping[str, int]) -> nn.Module:
        """Return a net of a plan's shape, for measurements of costs."""
        return apply.shaped(self.model, apply.blueprint(self.decisions, picks, self.layout))

    def loss(self, picks: Mapping[str, int]) -> float:
        """Return the loss increase predicted for a whole plan, before recovery."""
        return self.calibration.whole(plan_loss(self.decisions, picks))


def explore(job: Job, run: Run) -> Space:
    """Estimate statistics, propose candidates, correct predictions and measure costs; what is recorded is read back.

    Args:
        job: What was asked.
        run: Where results are recorded.

    Returns:
        The space of plans.

    Raises:
        ValueError: if nothing can be changed.
    """
    finish = finest if job.solver is careful else None
    job = replace(job, solver=Remembering(job.solver))
    everything = find(job.model, skip=job.skip)
    tables_of_rows = embedding_sites(job.model, everything)
    visible = [site for site in everything if site.visible]
    sites = (*tables_of_rows, *visible)
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
            sites=visible,
            outputs={site.module_name: -1 for site in tables_of_rows},
            max_samples=min(STATISTICS, max(_FEWEST, _SHARE * affordable(job))),
            max_locations=49,
            corrected_samples=128,
            leading=LEADING,
        )
        if path is not None:
            curvature.save(path)
    job.progress("candidates", 0.0, "channel groups: proving every cut")
    groups: list[ChannelGroup] = channel_groups(job.model, measure.few(job.model, job.inputs), ignore=_modules(job))
    if job.attentions is not None:
        groups = [group for group in groups if group.unit != "heads"]  # feature maps are those of all heads
    found = run.get("candidates")
    if found is None:
        decisions = _proposed(job, groups, sites, curvature)
        cost.give_back()
        run.put("candidates", candidates.to_json(decisions))
    else:
        decisions = candidates.from_json(found, groups, sites, job.structures)
        if job.attentions is not None:
            known = with_parts(attention_candidates(job, job.attentions), found["losses"], found["rises"])
            decisions = replace(decisions, attentions=known)
    if not decisions.losses:
        raise ValueError(_nothing(job, sites))
    return replace(_with_costs(job, run, sites, curvature, decisions), finish=finish)


def _proposed(job: Job, groups: Sequence[ChannelGroup], sites: Sequence[Site], curvature: Curvature) -> Decisions:
    less = measure.few(job.model, job.inputs)

    def call(model: nn.Module) -> Any:
        return measure.runner(model, less)()

    widths = candidates.channel_candidates(job.model, groups, sites, curvature)
    job.progress("candidates", 0.4, f"{len(job.structures)} structures at {len(curvature.names)} matrices")
    known = [site for site in sites if site.name in curvature.names]
    forms = candidates.form_candidates(
        job.model, known, curvature, job.structures, solver=job.solver, factorable=factorable(job.model, known, call),
        sparsable=sparsable(job.model, known),
    )  # fmt: skip
    _warn_unused(job, forms, known)
    forms += embedding_candidates(
        job.model,
        embedding_sites(job.model, sites),
        curvature,
        job.structures,
        batches=job.batches,
        forward=job.forward,
    )
    job.progress("candidates", 0.8, "blocks that may be left out")
    blocks = block_candidates(job.model, job.loss, job.batches, removable(job.model, known, call, groups=groups))
    attentions = [] if job.attentions is None else attention_candidates(job, job.attentions)
    return Decisions(tuple(widths), tuple(forms), tuple(blocks), tuple(attentions))


def _warn_unused(job: Job, forms: Sequence[candidates.Forms], sites: Sequence[Site]) -> None:
    """Warn of structures that were asked for and have no member of any matrix's shape."""
    used = {repr(structure) for form in forms for structure in form.structures}
    for structure in job.structures:
        if repr(structure) in used or structure in candidates.STRUCTURES:
            continue
        reason = "it saves no bytes there"
        for site in sites:
            try:
                structure.check(site.shape)
            except ValueError as error:
                reason = f"at {site.name!r}, {error}"
                break
        warnings.warn(f"{structure} is used at none of {len(sites)} matrices: {reason}", stacklevel=2)


def _nothing(job: Job, sites: Sequence[Site]) -> str:
    """Return the message for a model without candidates."""
    return (
        f"There is nothing to compress: 0 channel groups and 0 matrices of {type(job.model).__name__} with "
        f"{len(sites)} sites can be changed (skip={list(job.skip)}). `eke inspect` says why for each module."
    )


def _modules(job: Job) -> list[str]:
    names = {name for name, _ in job.model.named_modules()}
    return [name for name in job.skip if name in names]


def _with_costs(job: Job, run: Run, sites: tuple[Site, ...], curvature: Curvature, decisions: Decisions) -> Space:
    calibration = _calibrated(job, run, sites, curvature, decisions)
    cost.give_back()
    corrected = calibration.corrected(decisions)
    job.progress("costs", 0.0, "measuring changed nets in place")
    dimensions, counter = tables.shapes(job.model, decisions.widths), tables.Counter.of(decisions)
    known = run.get("costs")
    if known is None:
        with evaluating(job.model):
            folded, memory_format, times = measure.lossless(
                job.model, job.inputs, seconds=0.7 * job.seconds, threads=job.threads
            )
            layout = Layout(tuple(folded), memory_format)
            before = {**measure.costs(job.model, job.inputs), "latency": times["original"]}
            fit = _fitted(job, decisions, layout, times["original"]) if job.timed else None
            linear = attention_costs(job, decisions.attentions, timed=job.timed)
        known = run.put(
            "costs",
            {"folded": folded, "memory_format": memory_format, "times": times, "before": before, "fit": fit,
             "attentions": linear},
        )  # fmt: skip
    layout = Layout(tuple((str(layer), str(norm)) for layer, norm in known["folded"]), known["memory_format"])
    macs = measure.own_macs(job.model, job.inputs)
    terms = [
        *tables.loss_terms(corrected),
        *tables.parameter_terms(job.model, dimensions, counter),
        *tables.mac_terms(macs, dimensions, counter),
        *tables.size_terms(job.model, dimensions, counter, folded=layout.folded),
        *_memory_terms(job, decisions, layout),
        *_timing_terms(known["fit"], dimensions, counter),
    ]
    terms = with_attention(terms, corrected.attentions, known.get("attentions", {}), counter=counter)
    return Space(
        job.model,
        sites,
        curvature,
        corrected,
        calibration,
        layout,
        job.solver,
        {"seconds": _folded_seconds(known["times"], layout)},
        known["before"],
        tuple(terms),
    )


def _calibrated(job: Job, run: Run, sites: tuple[Site, ...], curvature: Curvature, decisions: Decisions) -> Calibration:
    known = run.get("calibration")
    if known is None:
        draft = functools.partial(
            apply.draft, job.model, decisions, sites=sites, curvature=curvature, solver=job.solver, layout=Layout()
        )
        found = calibrate(
            decisions,
            Meter(job),
            draft,
            effort=share(job),
            seed=job.seed,
            progress=lambda share, text: job.progress("calibration", share, text),
        )
        known = run.put("calibration", found.to_json())
    return Calibration.from_json(known)


def _fitted(job: Job, decisions: Decisions, layout: Layout, original: float) -> dict[str, Any]:
    timing = measure.timing(
        job.model,
        job.inputs,
        decisions,
        layout=layout,
        original=original,
        seconds=2.5 * job.seconds,
        seed=job.seed,
        threads=job.threads,
    )
    return vars(timing)


def _memory_terms(job: Job, decisions: Decisions, layout: Layout) -> list[Term]:
    if job.budget.peak_memory is None:
        return []
    return measure.memory_terms(job.model, job.inputs, decisions, layout=layout, seed=job.seed)


def _timing_terms(fit: Mapping[str, Any] | None, dimensions: tables.Shapes, counter: tables.Counter) -> list[Term]:
    if fit is None:
        return []
    by_module = [{name: tuple(c) for name, c in fit[key].items()} for key in ("modules", "factored", "alone")]
    curves = {name: (factor, exponent) for name, (factor, exponent) in fit["curves"].items()}
    timing = Timing(by_module[0], by_module[1], by_module[2], curves, tuple(fit["rest"]), fit["scale"], fit["offset"])
    return timing.terms(dimensions, counter)


def _folded_seconds(times: Mapping[str, float], layout: Layout) -> float:
    name = f"{'folded, ' if layout.folded else ''}{layout.memory_format}"
    return times.get(name, times["original"])
