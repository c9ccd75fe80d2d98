"""A table of scores of one untrained network: proxies by name, over several initialisations, with intervals.

One network is no sample: weights and random inputs are drawn with seeds 0..k-1, and a proxy whose interval over
seeds is as wide as the differences it is to decide says nothing. All scores are such that larger is better, none is
comparable with that of another proxy (see `fuse`).

Cost: about one forward and backward pass a batch for all proxies of gradients together, and what each module says.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from .. import cost
from .._errors import suggest
from .._types import Batch, Loss
from . import codes, features, flow, size, sweep
from .subject import Factory, apart, built, cross_entropy, inputs_of, listed, seeded
from .sweep import Subject

Proxy = Callable[[Subject], float | Mapping[str, float]]
"""Scores a subject; several scores are listed as "proxy.name"."""


def log_numel(subject: Subject) -> float:
    """Return `size.log_numel` with the first batch's shape, or of all layers without one."""
    inputs = inputs_of(subject.batches[0]) if subject.batches else ()
    return size.log_numel(subject.model, *tree_map(lambda leaf: leaf[:1], inputs))


def parameters(subject: Subject) -> float:
    """Return the number of parameters."""
    return float(cost.parameters(subject.model))


def flops(subject: Subject) -> float:
    """Return the FLOPs of the first batch, a sample."""
    inputs = inputs_of(subject.first("flops"))
    leading = next(iter(inputs[0].values())) if isinstance(inputs[0], Mapping) else inputs[0]
    return cost.flops(subject.model, *inputs) / len(leading)


PROXIES: dict[str, Proxy] = {
    "zico": sweep.zico_of,
    "log_numel": log_numel,
    "params": parameters,
    "flops": flops,
    "gradnorm": sweep.gradnorm,
    "snip": sweep.snip,
    "grasp": sweep.grasp,
    "fisher": sweep.fisher,
    "synflow": flow.synflow,
    "logsynflow": flow.logsynflow,
    "naswot": codes.naswot,
    "zen": features.zen,
    "swap": codes.swap,
    "meco": features.meco,
    "az_nas": features.az_nas,
    "zico_bc": sweep.zico_bc,
}
"""Proxies by name."""

PARTS = {"az_nas": ("expressivity", "progressivity", "trainability")}
"""Proxies of several scores; each can be asked for alone, as "az_nas.trainability"."""

MATURITY = {name: "reconstructed" if name in ("zico_bc", "az_nas") else "exact" for name in PROXIES}
"""How near each proxy is to its source: "exact", or "reconstructed" where the source was not at hand in full."""

DEFAULT = ("zico", "log_numel", "naswot", "params")

FUSION = ("meco", "swap", "az_nas.expressivity", "zen", "az_nas.trainability")
"""What a search fuses unless it is told otherwise: the rule that half of the networks of the benchmark chose."""


@dataclass(frozen=True)
class Score:
    """One proxy's score.

    Args:
        name: Of the proxy.
        mean: Over the seeds.
        deviation: Standard deviation over the seeds; `nan` for one seed.
        interval: Student's interval of the mean; `nan` for one seed.
        values: One a seed.
        seconds: Processor time of this thread, a seed; passes that proxies share are in the first of them.
    """

    name: str
    mean: float
    deviation: float
    interval: tuple[float, float]
    values: tuple[float, ...]
    seconds: float


@dataclass(frozen=True)
class ScoreTable:
    """Scores by proxy; `table["zico"].mean`, `table.means`, `str(table)`.

    Args:
        rows: In the order asked for.
        confidence: Of the intervals.
    """

    rows: tuple[Score, ...]
    confidence: float

    def __getitem__(self, name: str) -> Score:
        """Return the row of a proxy.

        Args:
            name: Of the proxy.

        Raises:
            KeyError: if it was not asked for.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no score {name!r}.{suggest(name, [row.name for row in self.rows])}")

    @property
    def means(self) -> dict[str, float]:
        """Mean score by name."""
        return {row.name: row.mean for row in self.rows}

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a JSON file; what is not finite is None."""
        return {
            "confidence": self.confidence,
            "scores": {
                row.name: {
                    "mean": _finite(row.mean),
                    "deviation": _finite(row.deviation),
                    "interval": [_finite(end) for end in row.interval],
                    "values": [_finite(value) for value in row.values],
                    "seconds": row.seconds,
                }
                for row in self.rows
            },
        }

    def __str__(self) -> str:
        head = f"{'proxy':<22}{'mean':>14}{'deviation':>12}   {self.confidence:.0%} interval"
        lines = [
            f"{row.name:<22}{row.mean:>14.6g}{row.deviation:>12.3g}   {row.interval[0]:.6g} .. {row.interval[1]:.6g}"
            for row in self.rows
        ]
        return "\n".join([head, *lines])


def score(
    model: nn.Module | Factory,
    batches: Iterable[Batch] = (),
    *,
    proxies: Sequence[str | Proxy] = DEFAULT,
    seeds: int = 1,
    loss: Loss = cross_entropy,
    confidence: float = 0.95,
) -> ScoreTable:
    """Score an untrained network.

    Nothing of a model that is given changes: not its weights, buffers, gradients or flags, nor the global random
    numbers.

    Args:
        model: A module, scored with the weights it has; or a function that builds one, called for each seed.
        batches: (inputs, labels), or mappings with "labels"; the first one's shape stands for the inputs where a proxy
            makes its own. Not needed for "params" and "log_numel".
        proxies: Names from `PROXIES`, or functions of a `Subject`; "az_nas.trainability" is one score of several.
        seeds: Number of initialisations.
        loss: `loss(model, batch)`, the mean loss.
        confidence: Of the intervals.

    Returns:
        Mean, deviation and interval by proxy.

    Raises:
        ValueError: if a proxy is unknown or cannot be computed, or several seeds are asked of a module.
        TypeError: if the function returns no module.
        FloatingPointError: if a loss or a gradient is not finite.
    """  # noqa: DOC502
    chosen = _named(proxies)
    if not chosen or seeds < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"score needs at least one proxy, seeds >= 1 and 0 < confidence < 1, got proxies={tuple(chosen)}, "
            f"seeds={seeds}, confidence={confidence}."
        )
    if isinstance(model, nn.Module) and seeds > 1:
        raise ValueError(
            f"seeds={seeds} draws weights anew, and {type(model).__name__} was given with its own; pass a function "
            "that builds it, such as `lambda: Net()`, or seeds=1."
        )
    data = batches if isinstance(batches, Sequence) else list(batches)
    if not data and set(chosen) - {"params", "log_numel"}:
        listed(data)
    values: dict[str, list[float]] = {}
    seconds: dict[str, float] = {}
    for seed in range(seeds):
        with apart(model if isinstance(model, nn.Module) else built(model, seed)) as copy:
            subject = Subject(copy, data, loss, torch.Generator().manual_seed(seed))
            for name, (proxy, parts) in chosen.items():
                begun = time.thread_time()
                with seeded(seed):
                    found = _flat(name, proxy(subject))
                spent = time.thread_time() - begun
                for key in parts or found:
                    values.setdefault(key, []).append(found[key])
                    seconds[key] = seconds.get(key, 0.0) + spent / seeds
    rows = tuple(_row(name, tuple(found), confidence, seconds[name]) for name, found in values.items())
    return ScoreTable(rows, confidence)


def _named(proxies: Sequence[str | Proxy]) -> dict[str, tuple[Proxy, list[str]]]:
    """Return proxies by name, each with the parts that are wanted, or none for all.

    Args:
        proxies: As given.

    Returns:
        By name: the function and the parts.

    Raises:
        ValueError: if a name is unknown.
    """
    chosen: dict[str, tuple[Proxy, list[str]]] = {}
    for proxy in proxies:
        name = proxy if isinstance(proxy, str) else getattr(proxy, "__name__", repr(proxy))
        whole, _, part = name.partition(".")
        if not isinstance(proxy, str):
            chosen[name] = proxy, []
        elif name in PROXIES:
            chosen[name] = PROXIES[name], []
        elif part and part in PARTS.get(whole, ()):
            known = chosen[whole][1] if whole in chosen else None
            # no parts stand for all of them, which include this one
            chosen[whole] = PROXIES[whole], [name] if known is None else known and [*known, name]
        else:
            raise ValueError(f"There is no proxy {name!r}.{suggest(name, [*PROXIES, *_dotted()])}")
    return chosen


def _dotted() -> list[str]:
    return [f"{name}.{part}" for name, parts in PARTS.items() for part in parts]


def _flat(name: str, found: float | Mapping[str, float]) -> dict[str, float]:
    if isinstance(found, Mapping):
        return {f"{name}.{key}": float(value) for key, value in found.items()}
    return {name: float(found)}


def _row(name: str, values: tuple[float, ...], confidence: float, seconds: float) -> Score:
    finite = all(math.isfinite(value) for value in values)
    mean = statistics.fmean(values) if finite else sum(values)
    if len(values) < 2 or not finite:
        return Score(name, mean, math.nan, (math.nan, math.nan), values, seconds)
    from scipy.stats import t

    deviation = statistics.stdev(values)
    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * deviation / math.sqrt(len(values))
    return Score(name, mean, deviation, (mean - half, mean + half), values, seconds)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
