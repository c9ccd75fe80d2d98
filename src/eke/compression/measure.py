"""Measure what a model costs and how good it is, with the words that belong to each number."""

from __future__ import annotations

import copy
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import cost
from .._types import Counts, Evaluate, Quality, Samples
from ..report import Drop, Measured, Score
from ..structures import Structure
from . import pace
from .apply import Layout, blueprint, shaped
from .artifact import FORMAT, pack
from .candidates import Decisions
from .deploy import Pair, fold_batchnorm_, foldable, set_memory_format_
from .intervals import paired_outcomes, unpaired_difference, wilson
from .plan import Term
from .spread import influences, interval, worsening
from .tables import Counter, designs, shapes, share_terms
from .task import evaluating
from .timing import Timing, fit_timing

_ANCHORS = 4
_FEWEST_DESIGNS = 12

Inputs = tuple[Any, ...] | dict[str, Any]
"""Positional or keyword arguments of a model."""


def positional(inputs: Inputs) -> tuple[Any, ...]:
    """Return the inputs as `cost` takes them: positional, or one mapping."""
    return (inputs,) if isinstance(inputs, dict) else inputs


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Return what the model returns for the inputs."""
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def runner(model: nn.Module, inputs: Inputs) -> Callable[[], object]:
    """Return a function that runs the model once without gradients."""

    def run() -> object:
        with torch.inference_mode():
            return call(model, inputs)

    return run


def batch_size(inputs: Inputs) -> int | None:
    """Return the leading dimension of the first tensor."""
    values = inputs.values() if isinstance(inputs, dict) else inputs
    return next((int(v.shape[0]) for v in values if isinstance(v, Tensor) and v.ndim), None)


def own_macs(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the multiply-adds of each module without those of its children, by name.

    Args:
        model: The model.
        inputs: Example inputs.
    """
    inside = cost.flops_by_module(model, *positional(inputs))
    own = {name: count / 2 for name, count in inside.items()}
    for name, count in inside.items():
        if not name:
            continue
        # Containers that are never called themselves (a ModuleList, the parametrizations of a weight) count nothing.
        above = name.rpartition(".")[0]
        while above and not inside[above]:
            above = above.rpartition(".")[0]
        own[above] -= count / 2
    return {name: count for name, count in own.items() if count}


def costs(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the costs that are the same on every machine: multiply-adds, parameters, bytes, peak memory.

    Args:
        model: In evaluation mode.
        inputs: Example inputs.

    Returns:
        By resource; "size" is that of a plain safetensors file.
    """
    arguments = positional(inputs)
    return {
        "macs": cost.flops(model, *arguments) / 2,
        "parameters": float(cost.parameters(model)),
        "size": float(cost.model_bytes(model)),
        "peak_memory": float(cost.peak_memory(model, *arguments)),
    }


def packed_bytes(net: nn.Module, structures: Mapping[str, Structure]) -> int:
    """Return the bytes of the file that an artifact would store.

    Args:
        net: The deployed model, its matrices members of their structures.
        structures: Structure by site name.
    """
    return len(
        serialise(
            {name: tensor.detach().contiguous().clone() for name, tensor in pack(net, structures).items()},
            {"format": FORMAT},
        )
    )


def checked_score(value: Quality, *, of: str) -> Quality:
    """Refuse what is no score.

    Args:
        value: What `evaluate` returned.
        of: What was evaluated, for the message.

    Returns:
        The value.

    Raises:
        TypeError: if it is neither a number nor counts nor samples.
        ValueError: if it is not finite, counts nothing, or rests on a single sample.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = float(value)
    if isinstance(value, Counts):
        if value.total == 0:
            raise ValueError(f"evaluate counted 0 samples for {of}: pass a loader that can be iterated more than once.")
        return value
    if isinstance(value, Samples):
        _check_samples(value, of)
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"evaluate must return a float, eke.Counts or eke.compression.Samples, got {type(value).__name__} for {of}"
            f"{': (correct, total) is eke.Counts(correct, total)' if isinstance(value, tuple) else ''}."
        )
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"evaluate returned {value} for {of}: check the metric and the data.")
    return float(value)


def _check_samples(value: Samples, of: str) -> None:
    """Refuse a metric that has no value, or none without one of its samples.

    Raises:
        ValueError: if so.
    """
    if not math.isfinite(value.value):
        raise ValueError(f"The {value.metric.name} is {value.value} for {of}: check the metric and the data.")
    if len(value.sums) < 2 or not bool(torch.isfinite(influences(value.sums, value.metric.of)[1]).all()):
        raise ValueError(
            f"The {value.metric.name} of {len(value.sums)} samples cannot be computed without one of them for {of}, so "
            "it has no interval: give more samples."
        )


def evaluate_on(model: nn.Module, evaluate: Evaluate, *, of: str) -> Quality:
    """Return the checked score of a model, evaluated in evaluation mode."""
    with evaluating(model):
        return checked_score(evaluate(model), of=of)


def as_number(value: Quality) -> float:
    """Return a score as one number, larger is better."""
    if isinstance(value, Samples):
        return value.score
    return value.share if isinstance(value, Counts) else value


def as_score(value: Quality) -> Score:
    """Return a score with its interval, as reports show it."""
    if isinstance(value, Counts):
        ends = wilson(value.correct, value.total)
        return Score(value.share, value.correct, value.total, ends, 0.95, "Wilson score", value.name, percent=True)
    if isinstance(value, Samples):
        metric, method = value.metric, f"jackknife over {len(value.sums)} samples"
        return Score(
            value.value,
            interval=interval(value),
            method=method,
            name=metric.name,
            lower_is_better=metric.lower_is_better,
            percent=metric.percent,
        )
    return Score(value, name="score")


def drop_between(before: Quality, after: Quality, *, limit: float | None) -> Drop:
    """Return by how much the second score is below the first.

    Args:
        before: Score of the original.
        after: Score of the compressed model.
        limit: Largest allowed drop as a share (of one for counts, of the first score otherwise).

    Returns:
        Points for counts (hundredths), per cent of the first metric for samples, units of the score otherwise.
    """
    if isinstance(before, Samples) and isinstance(after, Samples):
        return _sampled_drop(before, after, limit)
    if isinstance(before, Counts) and isinstance(after, Counts):
        same = before.total == after.total and before.order == after.order
        if before.outcomes is not None and after.outcomes is not None and same:
            difference, interval = paired_outcomes(before.outcomes, after.outcomes)
            method = "paired score interval (Tango)"
        else:
            pair = (before.correct, before.total), (after.correct, after.total)
            difference, interval = unpaired_difference(*pair)
            method = "hybrid score interval (Newcombe), unpaired"
        proved = limit is not None and interval[1] <= limit
        points = None if limit is None else 100 * limit
        return Drop(100 * difference, (100 * interval[0], 100 * interval[1]), 0.95, method, proved, points)
    first, second = as_number(before), as_number(after)
    allowed = None if limit is None else limit * abs(first)
    return Drop(first - second, None, 0.95, "no interval for a plain score", False, allowed, unit="")


def _sampled_drop(before: Samples, after: Samples, limit: float | None) -> Drop:
    """Return by how much a metric got worse, relative to what it was unless that is zero."""
    found = worsening(before, after)
    factor = 100.0 if found.relative else 1.0
    allowed = None if limit is None else factor * limit * (1.0 if found.relative else abs(before.value))
    method = f"jackknife over {len(after.sums)} samples, {'paired' if found.paired else 'unpaired'}"
    return Drop(
        factor * found.value,
        (factor * found.interval[0], factor * found.interval[1]),
        0.95,
        method,
        allowed is not None and factor * found.interval[1] <= allowed,
        allowed,
        unit="%" if found.relative else "",
    )


def as_measured(label: str, resources: Mapping[str, float], score: Quality | None) -> Measured:
    """Return measured costs and score as reports show them."""
    seconds = resources.get("latency")
    return Measured(
        label,
        as_score(score) if score is not None else None,
        bytes=round(resources["size"]),
        parameters=round(resources["parameters"]),
        flops=round(2 * resources["macs"]),
        milliseconds=1e3 * seconds if seconds is not None else None,
        peak_bytes=round(resources["peak_memory"]),
    )


def few(model: nn.Module, inputs: Inputs, *, samples: int = 2) -> Inputs:
    """Return the first samples of inputs, for questions about a model's structure, where the model runs on them.

    Args:
        model: The model.
        inputs: Example inputs.
        samples: Most samples.

    Returns:
        Inputs like the given ones; these themselves if they are as few or the model needs them all.
    """
    count = batch_size(inputs)
    if count is None or count <= samples:
        return inputs

    def cut(value: Any) -> Any:
        of_all = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count
        return value[:samples] if of_all else value

    less: Inputs = pytree.tree_map(cut, inputs)
    try:
        with evaluating(model), torch.no_grad():
            call(model, less)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return inputs
    return less


def lossless(
    model: nn.Module, inputs: Inputs, *, seconds: float = 2.0, threads: int | None = None
) -> tuple[list[Pair], str, dict[str, float]]:
    """Choose what costs no quality by measurement: folding, and the memory format.

    Args:
        model: The original in evaluation mode.
        inputs: Example inputs.
        seconds: Budget of the measurement.
        threads: Torch threads.

    Returns:
        Pairs to fold, the memory format, and the measured seconds of each variant ("original" is the model itself).
    """
    less = few(model, inputs)

    def quietly(net: nn.Module) -> Any:
        with torch.no_grad():
            return call(net, less)

    pairs = foldable(model, quietly)
    nets = {"original": model}
    for fold in (False, True) if pairs else (False,):
        for name in ("contiguous", "channels_last"):
            if not fold and name == "contiguous":
                continue
            net = copy.deepcopy(model).eval()
            if fold:
                fold_batchnorm_(net, pairs)
            set_memory_format_(net, name)
            nets[f"{'folded, ' if fold else ''}{name}"] = net
    runs = {name: runner(net, inputs) for name, net in nets.items()}
    expected = pace.once(runs["original"], threads=threads)
    measured = pace.interleaved(runs, expected=expected, usual=8, budget=seconds, threads=threads)
    times = {name: latency.lower_quartile for name, latency in measured.items()}
    # What can be folded is folded: it saves bytes and work for certain, whatever the clock says; and so the stored
    # weights do not depend on the noise of a measurement. A tie within noise goes to the plain format.
    plain = "folded, contiguous" if pairs else "original"
    best = min((name for name in times if name.startswith("folded") or not pairs), key=lambda name: times[name])
    if times[plain] <= 1.02 * times[best]:
        best = plain
    return pairs, "channels_last" if best.endswith("channels_last") else "contiguous", times


def timing(
    model: nn.Module,
    inputs: Inputs,
    decisions: Decisions,
    *,
    layout: Layout,
    original: float,
    seconds: float = 8.0,
    seed: int = 0,
    threads: int | None = None,
) -> Timing:
    """Measure changed nets in place and fit the time of every module.

    Args:
        model: The original.
        inputs: Example inputs.
        decisions: The candidates.
        layout: Folding and memory format.
        original: Seconds that the original is taken to need; whole nets are measured against it, interleaved.
        seconds: Budget of the measurements.
        seed: Of the designs.
        threads: Torch threads.

    Returns:
        The fit.
    """
    counter = Counter.of(decisions)
    count = 2 + 2 * max((len(w.kept) for w in decisions.widths), default=2)
    count += 8 if any(form.factored for form in decisions.forms) else 0
    # A slow net's clocks need no repetition, and fewer nets must do: some ten times the budget is spent on it.
    slow = original > 0.02 * seconds
    if slow:
        count = max(_FEWEST_DESIGNS, min(count, int(8 * seconds / (3 * 0.6 * original))))
    chosen = designs(decisions, count=count, seed=seed)
    arguments = positional(inputs)
    # Each against the original alone, as plans are measured later: how fast a large net runs depends on what runs
    # between its turns (memory that was given back must be taken anew).
    nets = (shaped(model, blueprint(decisions, picks, layout)) for picks in chosen[:_ANCHORS])
    run, share = runner(model, inputs), 0.4 * seconds / _ANCHORS
    ratios = [
        pace.speedup(run, runner(net, inputs), expected=original, budget=share, threads=threads, seed=seed)
        for net in nets
    ]
    whole = [original / ratio for ratio in ratios]
    times = []
    for picks in chosen:
        net, share = shaped(model, blueprint(decisions, picks, layout)), 0.6 * seconds / len(chosen)
        times.append(cost.module_times(net, *arguments, seconds=share, threads=threads, fewest_pairs=1 if slow else 3))
    dimensions = shapes(model, decisions.widths)
    return fit_timing(chosen, times, dimensions=dimensions, counter=counter, whole=whole)


def memory_terms(
    model: nn.Module, inputs: Inputs, decisions: Decisions, *, layout: Layout, seed: int = 0
) -> list[Term]:
    """Count the peak memory of cut nets and fit it to the groups' shares.

    Args:
        model: The original.
        inputs: Example inputs.
        decisions: The candidates; only widths are varied.
        layout: Folding and memory format.
        seed: Of the designs.

    Returns:
        Tables of peak memory.
    """
    counter = Counter.of(decisions)
    chosen = designs(decisions, count=4 + 2 * len(decisions.widths), seed=seed, widths_only=True)
    nets = (shaped(model, blueprint(decisions, picks, layout)) for picks in chosen)
    peaks = [float(cost.peak_memory(net, *positional(inputs))) for net in nets]
    return share_terms("peak_memory", chosen, peaks, counter)
