"""Time under any decisions, fitted to nets that were measured in place.

Some tens of changed nets (designs) run as a whole, with a clock at every module, and each module's time is fitted as
t = c0 + c1 in + c2 out + c3 in*out + c4 in'*out' with non-negative c (in, out: shares of its channels that stay; in',
out': the same in whole vectors of 16), bent by a power where it outgrows its caches; that of two factors of rank r as
c0 + c1 r in + c2 r out; that of a chain of factors or of a sparse layer is what was measured, a share of it where the
layer is cut; the rest of the whole net's time is fitted to
the shares of groups and blocks that stay. Clocks cost time and the machine drifts meanwhile, so the sum is scaled and
shifted to a few whole nets, among them the uncut and the smallest one, each timed without clocks against
the original.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .candidates import Forms
from .graph import Table
from .plan import Term, total
from .tables import Counter, Matrix, Shapes, by_option, matrices_of, non_negative

VECTOR = 16
"""Channels that a kernel works on at once: a cut to 40 takes about as long as one to 48."""


@dataclass(frozen=True)
class Timing:
    """Fitted time of a net under any decisions.

    Args:
        modules: Coefficients of each timed module: one a product of shares, see `_features`.
        factored: Coefficients of the two factors in a module's place: 1, rank * columns, rank * rows.
        alone: Seconds of each candidate that is another layer in a module's place, uncut; 0 for others.
        curves: Factor and exponent of each module's fit: its time is factor * fit**exponent.
        rest: Coefficients of the rest of the forward pass: a constant, one a group, one a block.
        scale: Time of a whole net without clocks, per second of the fit's sum.
        offset: Seconds that every whole net takes besides.
    """

    modules: Mapping[str, tuple[float, ...]]
    factored: Mapping[str, tuple[float, ...]]
    alone: Mapping[str, tuple[float, ...]]
    curves: Mapping[str, tuple[float, float]]
    rest: tuple[float, ...]
    scale: float = 1.0
    offset: float = 0.0

    def terms(self, dimensions: Shapes, counter: Counter) -> list[Term]:
        """Return tables of seconds."""
        found = []
        for module, coefficients in self.modules.items():
            over, features = _features(module, dimensions, counter)
            dense = sum((c * f for c, f in zip(coefficients, features)), np.zeros([1] * len(over)))
            factor, exponent = self.curves.get(module, (1.0, 1.0))
            dense = self.scale * factor * counter.full(np.asarray(dense), over) ** exponent
            name = f"{module}.weight"
            form = counter.forms.get(name)
            if form is None or (module not in self.factored and module not in self.alone):
                found.append(counter.term("latency", module, over, [dense], None))
                continue
            matrix = counter.matrix(form, dimensions[name])
            pair = np.zeros_like(matrix.ranks)
            pair = sum((c * f for c, f in zip(self.factored.get(module, ()), _factored_features(matrix))), pair)
            tables = [
                np.where(rank > 0, self.scale * time, dense)
                for rank, time in zip(by_option(matrix.ranks), by_option(np.asarray(pair)))
            ]
            # What was never measured is taken to save no time.
            for option, seconds in enumerate(self.alone.get(module, ())):
                stands = (by_option(matrix.alone)[option] > 0) & (seconds > 0)
                tables[option] = np.where(stands, self.scale * seconds * matrix.left, tables[option])
            found.append(counter.term("latency", module, matrix.over, tables, form))
        found.append(Term((), "latency", np.asarray(self.offset + self.scale * self.rest[0])))
        groups = self.rest[1 : 1 + len(counter.removed)]
        for choice, coefficient in zip(counter.removed, groups):
            found.append(Term((choice,), "latency", self.scale * coefficient * counter.share(choice)))
        for block, coefficient in zip(counter.blocks, self.rest[1 + len(groups) :]):
            found.append(Term((block.choice,), "latency", self.scale * coefficient * np.asarray([1.0, 0.0])))
        return found


def _features(module: str, dimensions: Shapes, counter: Counter) -> tuple[tuple[str, ...], list[Table]]:
    """Return the groups a module's time depends on, and the tables 1, in, out, in*out (those that vary), the last one
    also with channels rounded up to whole vectors.
    """  # noqa: D205
    if module in counter.cores:
        choice = counter.cores[module]
        return (choice,), [np.ones(1), counter.share(choice)]
    names = matrices_of(module, dimensions)
    weight = dimensions[names[-1]] if names else []
    over = counter.over(weight)
    stays = [(counter.stay(d, over), d.size) for d in weight if d.cuts]
    shares = [stay / size for stay, size in stays]
    features: list[Table] = [np.ones([1] * len(over)), *shares]
    if shares:
        ones = np.ones([1] * len(over))
        if len(shares) > 1:
            features.append(math.prod(shares, start=ones))
        whole = [np.ceil(stay / VECTOR) / math.ceil(size / VECTOR) for stay, size in stays]
        features.append(math.prod(whole, start=ones))
    return over, features


def _factored_features(matrix: Matrix) -> list[Table]:
    """Return the tables 1, rank * columns, rank * rows of two factors, in units of the whole matrix."""
    size = float(matrix.rows.max() * matrix.columns.max())
    columns = matrix.ranks * matrix.columns[..., None] / size
    return [np.ones_like(columns), columns, matrix.ranks * matrix.rows[..., None] / size]


def fit_timing(
    designs: Sequence[Mapping[str, int]],
    times: Sequence[Mapping[str, float]],
    *,
    dimensions: Shapes,
    counter: Counter,
    whole: Sequence[float],
) -> Timing:
    """Fit the times of modules measured in place.

    Args:
        designs: Option index of each decision, one mapping a measured net; absent ones are 0.
        times: Seconds by module name, "" for the rest, one mapping a measured net.
        dimensions: Of the model's tensors.
        counter: Of the candidates.
        whole: Seconds of the first designs as whole nets without clocks.

    Returns:
        The fit.
    """
    modules: dict[str, tuple[float, ...]] = {}
    factored: dict[str, tuple[float, ...]] = {}
    alone: dict[str, tuple[float, ...]] = {}
    curves: dict[str, tuple[float, float]] = {}
    rest = np.asarray([measured.get("", 0.0) for measured in times])
    for name in times[0]:
        if not name:
            continue
        form = counter.forms.get(f"{name}.weight")
        ranked = form if form is not None and form.factored else None
        over, features = _features(name, dimensions, counter)
        if not over and ranked is None and counter.block_of(name) is None:
            rest = rest + np.asarray([measured.get(name, 0.0) for measured in times])
            continue
        full = [counter.full(f, over) for f in features]
        seen = [i for i, measured in enumerate(times) if name in measured]
        if ranked is not None:
            matrix = counter.matrix(ranked, dimensions[f"{name}.weight"])
            spots = {i: _place(matrix, ranked, designs[i]) for i in seen}
            others = {
                i: times[i][name] / matrix.left[place[:-1]] for i, place in spots.items() if matrix.alone[place] > 0
            }
            alone |= {name: _by_option(ranked, designs, others)} if others else {}
            seen = [i for i in seen if i not in others]
        rows = np.asarray([[f[tuple(designs[i].get(c, 0) for c in over)] for f in full] for i in seen])
        seconds = np.asarray([times[i][name] for i in seen])
        modules[name] = _relative_fit(rows, seconds)
        curves[name] = _curve(rows @ np.asarray(modules[name]), seconds)
        pairs = [i for i, measured in enumerate(times) if f"{name}.0" in measured]
        if ranked is not None and pairs:
            tables = _factored_features(matrix)
            places = [_place(matrix, ranked, designs[i]) for i in pairs]
            seconds = np.asarray([times[i][f"{name}.0"] + times[i].get(f"{name}.1", 0.0) for i in pairs])
            factored[name] = _relative_fit(np.asarray([[t[p] for t in tables] for p in places]), seconds)
    shares = {choice: counter.share(choice) for choice in counter.removed}
    rows = np.asarray([
        [
            1.0,
            *(shares[c][design.get(c, 0)] for c in counter.removed),
            *(1.0 - design.get(b.choice, 0) for b in counter.blocks),
        ]
        for design in designs
    ])
    timing = Timing(modules, factored, alone, curves, tuple(float(c) for c in non_negative(rows, np.maximum(rest, 0))))
    terms = timing.terms(dimensions, counter)
    names = {name for term in terms for name in term.over}
    fitted = np.asarray([total(terms, {n: picks.get(n, 0) for n in names})["latency"] for picks in designs])
    clocks = np.asarray([sum(measured.values()) for measured in times])
    # Two steps: clocks to whole nets by the anchors, where both are measured; the fit to the clocks in the median.
    sums = clocks[: len(whole)]
    anchors = np.stack([sums, np.ones_like(sums)], 1) / np.asarray(whole)[:, None]
    scale, offset = non_negative(anchors, np.ones_like(sums))
    scale *= float(np.median(clocks / np.maximum(fitted, 1e-12)))
    return replace(timing, scale=float(scale), offset=float(offset))


def _place(matrix: Matrix, form: Forms, design: Mapping[str, int]) -> tuple[int, ...]:
    """Return where a measured net stands in the tables of a matrix."""
    return (*(design.get(choice, 0) for choice in matrix.over), design.get(form.choice, 0))


def _by_option(form: Forms, designs: Sequence[Mapping[str, int]], seconds: Mapping[int, float]) -> tuple[float, ...]:
    """Return the median seconds of a module under each candidate; 0 where there is none.

    Args:
        form: The matrix.
        designs: Options of each net.
        seconds: Of the module, by number of the net.

    Returns:
        One number a candidate.
    """
    options = {i: designs[i].get(form.choice, 0) for i in seconds}
    measured = [[seconds[i] for i, o in options.items() if o == option] for option in range(len(form.structures))]
    return tuple(float(np.median(found)) if found else 0.0 for found in measured)


def _relative_fit(rows: Table, seconds: Table) -> tuple[float, ...]:
    """Return non-negative coefficients; relative errors count: small nets are the ones that plans choose."""
    weight = 1 / np.maximum(seconds, seconds.max() * 0.02 + 1e-12)
    return tuple(float(c) for c in non_negative(rows * weight[:, None], seconds * weight))


def _curve(fitted: Table, seconds: Table) -> tuple[float, float]:
    """Return factor and exponent of seconds = factor * fitted**exponent: large nets outgrow their caches."""
    usable = (fitted > 0) & (seconds > 0)
    if usable.sum() < 4 or float(np.log(fitted[usable]).std()) < 0.2:
        return 1.0, 1.0
    x, y = np.log(fitted[usable]), np.log(seconds[usable])
    exponent = float(np.clip(np.polyfit(x, y, 1)[0], 0.8, 1.4))
    return math.exp(float(np.median(y - exponent * x))), exponent
