"""Softmax attentions that may become linear or clustered, and the loss that this is predicted to cost.

    eke.compress(model, task, budget=..., attentions=(Conversion(windows=(0, 64)), Clusters(clusters=(25, 100))))

For every window all attentions are converted and taught at once (`nn.linearize`, on calibration batches); for every
number of clusters nothing is taught. Each is then a decision of its own. With dy the change of an attention's output
given the original's queries, keys and values, measured sample by sample, and g the gradient of a sample's own loss
there, u = sum over locations of <g, dy> gives

    predicted loss = max(0, E[u]) + 1/2 E[u^2]

as for blocks that are left out. Time and multiply-adds are those of whole nets with all attentions converted, beside
the original in turns; what they save or add is dealt out by heads * dim * queries * keys. So it is the length of the
inputs that decides: short ones are slower, and then no plan takes it. Heads of these models are not cut.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import cost
from .._types import Batch
from ..nn.attention_transfer import lessons
from ..nn.cluster_conversion import cluster_attention
from ..nn.clustered_attention import Clustering
from ..nn.conversion import linearize, on_fused_attention
from ..nn.hybrid_attention import MapName
from ..nn.softmax_sites import attention_sites
from ..nn.substitute import Asked, Substitute, substitutes
from . import measure, pace
from .attention_forms import form_of, is_clustered, put_in_
from .candidates import Attention
from .checks import count_samples
from .plan import Term
from .tables import HEADER_BYTES, Counter
from .task import evaluating

if TYPE_CHECKING:
    from .job import Job

_SAMPLES = 256
"""Samples on which the loss is predicted."""


@dataclass(frozen=True)
class Conversion:
    """How attentions may be converted.

    Args:
        windows: Positions on either side that stay with the softmax, one option each; 0 for none.
        feature_map: Of `nn.HybridAttention`.
        steps: Batches that transfer learns from, for each window.
        learning_rate: Of the transfer.
        match: Regular expression that a module's name must contain; None for all.

    Raises:
        ValueError: if there is no window or one is negative, or steps is negative.
    """

    windows: tuple[int, ...] = (0, 64)
    feature_map: MapName = "hedgehog"
    steps: int = 100
    learning_rate: float = 1e-2
    match: str | None = None

    def __post_init__(self) -> None:
        if not self.windows or min(self.windows) < 0 or self.steps < 0:
            raise ValueError(
                f"Conversion needs windows of 0 or more positions and steps of 0 or more, got windows={self.windows} "
                f"and steps={self.steps}."
            )


@dataclass(frozen=True)
class Clusters:
    """How attentions may be clustered; nothing is taught. Multiply-adds are counted without those of k-means.

    Args:
        clusters: Of queries, for all heads alike, one option each.
        topk: Keys of a cluster that each of its queries weighs itself; 0 for none.
        exact_below: As of `nn.Clustering`: None for exact attention where that is expected to be faster, 0 for never.
        match: Regular expression that a module's name must contain; None for all.

    Raises:
        ValueError: if there is no number of clusters or one is below 1, or topk or exact_below is negative.
    """

    clusters: tuple[int, ...] = (25, 100)
    topk: int = 32
    exact_below: int | None = None
    match: str | None = None

    def __post_init__(self) -> None:
        if not self.clusters or min(self.clusters) < 1 or self.topk < 0 or (self.exact_below or 0) < 0:
            raise ValueError(
                "Clusters needs clusters of 1 or more, topk of 0 or more and exact_below of 0 or more or None, got "
                f"clusters={self.clusters}, topk={self.topk} and exact_below={self.exact_below}."
            )


def several(asked: object) -> tuple[Conversion | Clusters, ...]:
    """Return what was asked of attentions, one of each kind at most.

    Args:
        asked: A `Conversion`, a `Clusters`, or both.

    Raises:
        TypeError: if something is neither.
        ValueError: if there is none, or two of a kind.
    """
    found = tuple(asked) if isinstance(asked, (tuple, list)) else (asked,)
    for one in found:
        if not isinstance(one, Conversion | Clusters):
            raise TypeError(
                f"attentions takes eke.compression.Conversion(...), Clusters(...) or a tuple of both, got {one!r:.60}."
            )
    if not found or len({type(one) for one in found}) < len(found):
        raise ValueError(
            f"attentions takes one Conversion and one Clusters at most, with all their options, got {found!r:.200}: "
            "give several windows or several numbers of clusters to one, or None for no candidates."
        )
    return found


def attention_candidates(job: Job, asked: Conversion | Clusters | Sequence[Conversion | Clusters]) -> list[Attention]:
    """Convert all attentions in each way and predict what each alone costs.

    Args:
        job: What `compress` was asked for.
        asked: Windows, clusters and settings.

    Returns:
        One candidate an attention.

    Raises:
        ValueError: if no attention can be converted.
    """  # noqa: DOC502
    options: dict[str, list[tuple[Substitute, float, float]]] = {}
    for one in several(asked):
        for model in _linear(job, one) if isinstance(one, Conversion) else _clustered(job, one):
            parts, terms = substitutes(model), _predicted(job, model)
            for name, part in parts.items():
                options.setdefault(name, []).append((part, *terms[name]))
    maps = [one.feature_map for one in several(asked) if isinstance(one, Conversion)]
    return [
        Attention(
            name,
            (None, *(form_of(part, *maps) for part, _, _ in found)),
            (0.0, *(bend + rise for _, bend, rise in found)),
            (0.0, *(rise for _, _, rise in found)),
            tuple(part for part, _, _ in found),
        )
        for name, found in options.items()
    ]


def _linear(job: Job, asked: Conversion) -> Iterator[nn.Module]:
    """Yield the model for each window, taught."""
    batches = _few(job.batches, max(asked.steps, 4))
    for window in asked.windows:
        yield linearize(
            job.model, batches, window=window, feature_map=asked.feature_map, steps=asked.steps,
            learning_rate=asked.learning_rate, match=asked.match, skip=job.skip, forward=job.forward, seed=job.seed,
        ).model  # fmt: skip


def _clustered(job: Job, asked: Clusters) -> Iterator[nn.Module]:
    """Yield the model for each number of clusters."""
    batches = _few(job.batches, 1)
    for clusters in asked.clusters:
        clustering = Clustering(clusters=clusters, topk=asked.topk, exact_below=asked.exact_below)
        yield cluster_attention(
            job.model, batches, clustering=clustering, match=asked.match, skip=job.skip, forward=job.forward
        ).model


def _few(batches: Any, count: int) -> list[Batch]:
    return [batch for batch, _ in zip(batches, range(count))]


def _predicted(job: Job, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Return the curved and the first-order part of the loss that each substitute alone costs."""
    private = copy.deepcopy(model).requires_grad_(False)
    probes: dict[Substitute, list[tuple[Tensor, Tensor]]] = {}

    def lesson(part: Substitute, asked: Asked, out: Tensor) -> Tensor:
        with torch.no_grad():
            other, _ = part(asked.q, asked.k, asked.v, causal=part.causal, real=asked.real, scale=asked.scale)
            change = (other - out).nan_to_num(0)
            if asked.real is not None and part.beside:
                change = change * asked.real[:, None, :, None]
        probe = torch.zeros_like(out).requires_grad_()
        probes.setdefault(part, []).append((probe, change))
        return out + probe

    along: dict[Substitute, list[Tensor]] = {}
    seen = 0
    with lessons(private, lesson):
        for batch in job.batches:
            probes.clear()
            samples = count_samples(batch)
            with torch.enable_grad():
                value = job.loss(private, batch)
            pairs = [(part, probe, change) for part, calls in probes.items() for probe, change in calls]
            gradients = torch.autograd.grad(value, [probe for _, probe, _ in pairs], allow_unused=True)
            slopes: dict[Substitute, Tensor] = {}
            for (part, _, change), gradient in zip(pairs, gradients):
                if gradient is not None:
                    slope = (samples * gradient * change).double().flatten(1).sum(1)
                    slopes[part] = slopes[part] + slope if part in slopes else slope
            for part, slope in slopes.items():
                along.setdefault(part, []).append(slope)
            seen += samples
            if seen >= _SAMPLES:
                break
    found = {}
    for name, part in substitutes(private).items():
        u = torch.cat(along[part]) if part in along else torch.zeros(1, dtype=torch.float64)
        found[name] = (0.5 * float(u.square().mean()), max(0.0, float(u.mean())))
    return found


def attention_costs(job: Job, attentions: Sequence[Attention], *, timed: bool) -> dict[str, list[list[float]]]:
    """Measure what converting attentions saves or adds.

    Args:
        job: What `compress` was asked for.
        attentions: The candidates.
        timed: Whether to measure time.

    Returns:
        By resource ("macs", "parameters", "size", "latency"): a row an attention, a number an option.
    """
    if not attentions:
        return {}
    base = {"macs": cost.flops(job.model, *measure.positional(job.inputs)) / 2}
    works = _works(job, attentions)
    rows: dict[str, list[list[float]]] = {
        name: [[0.0] * len(a.forms) for a in attentions]
        for name in ("macs", "parameters", "size", *(["latency"] if timed else []))
    }
    for options in _alike(attentions):
        net = copy.deepcopy(job.model).eval()
        put_in_(net, {attentions[i].name: _form(attentions[i], option) for i, option in options.items()})
        whole = {"macs": cost.flops(net, *measure.positional(job.inputs)) / 2 - base["macs"]}
        if timed:
            whole["latency"] = _slower(job, net)
        share = 1 / max(sum(works[i] for i in options), 1.0)
        for row, option in options.items():
            tensors = list(attentions[row].parts[option - 1].state_dict().values())
            rows["parameters"][row][option] = float(sum(t.numel() for t in tensors))
            rows["size"][row][option] = float(sum(t.numel() * t.element_size() + HEADER_BYTES for t in tensors))
            for name, total in whole.items():
                rows[name][row][option] = works[row] * share * total
    return rows


def _slower(job: Job, net: nn.Module) -> float:
    """Return the seconds that a net needs more than the original."""
    run, other = measure.runner(job.model, job.inputs), measure.runner(net, job.inputs)
    with evaluating(job.model):
        expected = pace.once(run, threads=job.threads)
        ratio = pace.speedup(run, other, expected=expected, budget=job.seconds, threads=job.threads, seed=job.seed)
    return expected / ratio - expected


def _alike(attentions: Sequence[Attention]) -> list[dict[int, int]]:
    """Return the options of each whole net that is measured, by place of the attention: a way of conversion at a time.

    Attentions that only one kind of conversion was asked for have fewer options than others.
    """
    found: dict[tuple[bool, int], dict[int, int]] = {}
    for place, attention in enumerate(attentions):
        kinds = [is_clustered(_form(attention, option)) for option in range(1, len(attention.forms))]
        for option, kind in enumerate(kinds, 1):
            found.setdefault((kind, kinds[:option].count(kind)), {})[place] = option
    return list(found.values())


def _form(attention: Attention, option: int) -> Mapping[str, Any]:
    form = attention.forms[option]
    assert form is not None
    return form


def _works(job: Job, attentions: Sequence[Attention]) -> list[float]:
    """Return the work of each attention."""
    model = on_fused_attention(copy.deepcopy(job.model))
    sites = attention_sites(model, job.inputs, forward=lambda net, inputs: measure.call(net, inputs))
    work = {site.name: float(site.heads * site.dim * site.queries * site.keys) for site in sites}
    return [work.get(attention.name, 0.0) for attention in attentions]


def with_attention(
    terms: Sequence[Term],
    attentions: Sequence[Attention],
    rows: Mapping[str, Sequence[Sequence[float]]],
    *,
    counter: Counter,
) -> list[Term]:
    """Add what converting attentions saves or adds to the tables of a model.

    Args:
        terms: Tables of the model with all its attentions as they are.
        attentions: The candidates.
        rows: From `attention_costs`.
        counter: Of the candidates.

    Returns:
        Tables with no number below zero: what an attention can save is taken from constant ones and is its own; it is
        taken to save no more than there is.
    """
    found = list(terms)
    for resource, rows_of in rows.items():
        for attention, row in zip(attentions, rows_of):
            table = np.asarray(row)
            block = counter.block_of(attention.name)
            found, own = _taken(found, resource, block.choice if block else None, max(0.0, -float(table.min())))
            mine = np.maximum(table + own, 0.0)
            found.append(counter.term(resource, attention.name, (attention.choice,), [mine], None))
    return found


def _taken(terms: Sequence[Term], resource: str, block: str | None, amount: float) -> tuple[list[Term], float]:
    """Return tables whose constants are less by an amount, and how much was there to take.

    Args:
        terms: Tables.
        resource: Of which.
        block: The block whose constants may be used besides, the largest first; None for none.
        amount: How much.
    """
    places = [i for i, t in enumerate(terms) if t.resource == resource and t.over in ((), (block,))]
    # What is inside the same block goes with it: it is taken first.
    places.sort(key=lambda i: (not terms[i].over, -float(np.max(terms[i].table))))
    found, left = list(terms), amount
    for i in places:
        table = np.array(terms[i].table)
        first = (0,) * table.ndim
        take = min(left, float(table[first]))
        table[first] -= take
        left -= take
        found[i] = Term(terms[i].over, resource, table)
    return found, amount - left


def with_parts(
    attentions: Sequence[Attention], losses: Mapping[str, Sequence[float]], rises: Mapping[str, Sequence[float]]
) -> tuple[Attention, ...]:
    """Return candidates with the predicted losses that were recorded."""
    return tuple(replace(a, losses=tuple(losses[a.choice]), rises=tuple(rises[a.choice])) for a in attentions)
