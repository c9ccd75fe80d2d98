"""What every combination of options costs: tables for the planner, most of them exact, time fitted to measurements.

Entries that stay in a tensor follow from the channel groups alone, so parameters, multiply-adds and packed bytes are
exact tables over the groups (and bits) that a tensor depends on. Time is measured in place: some tens of cut nets
(designs) run as a whole, with a clock at every module, and each module's time is fitted as
t = c0 + c1 in + c2 out + c3 in*out with non-negative c (in, out: shares of its channels that stay); what is left of
the whole net's time is fitted to the groups' shares. Clocks cost time and the machine drifts meanwhile, so the sum is
scaled and shifted to a few whole nets, among them the uncut and the smallest one, measured interleaved without clocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from ..sites import Site
from .candidates import Grids, Widths
from .deploy import Pair
from .plan import Choice, Table, Term, total


def _non_negative(rows: Table, values: Table) -> Table:
    """Return the non-negative coefficients of least squares; SciPy is imported when it is needed first."""
    from scipy.optimize import nnls

    found: Table = nnls(rows, values)[0]
    return found


@dataclass(frozen=True)
class Dimension:
    """How one dimension of a tensor shrinks.

    Args:
        size: Entries in the original.
        cuts: (decision, indices that go with one unit) of each group that cuts it.
    """

    size: int
    cuts: tuple[tuple[str, int], ...] = ()


Shapes = dict[str, list[Dimension]]


def shapes(model: nn.Module, widths: Sequence[Widths]) -> Shapes:
    """Describe every parameter and buffer of a model by its dimensions and the groups that cut them.

    Args:
        model: The original model.
        widths: Candidates of its channel groups.

    Returns:
        Dimensions by tensor name.
    """
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    cuts: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for width in widths:
        surgery = width.group.cut(range(1, width.group.size))
        for name, by_dim in surgery.slices.items():
            for dim, kept in by_dim.items():
                cuts.setdefault((name, dim), []).append((width.choice, surgery.shapes[name][dim] - len(kept)))
    return {
        name: [Dimension(size, tuple(cuts.get((name, dim), ()))) for dim, size in enumerate(tensor.shape)]
        for name, tensor in tensors.items()
    }


@dataclass(frozen=True)
class Counter:
    """Counts what stays under each option.

    Args:
        removed: Units that each option of a decision removes, by decision.
        sizes: Units of the group of each decision.
    """

    removed: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, widths: Sequence[Widths]) -> Counter:
        """Return a counter for these candidates."""
        removed = {w.choice: tuple(w.group.size - kept for kept in w.kept) for w in widths}
        return cls(removed, {w.choice: w.group.size for w in widths})

    def share(self, choice: str) -> Table:
        """Return the share of a group's units that each option keeps."""
        return 1 - np.asarray(self.removed[choice], dtype=float) / self.sizes[choice]

    def over(self, dimensions: Sequence[Dimension]) -> tuple[str, ...]:
        """Return the decisions that these dimensions depend on."""
        return tuple(sorted({choice for dimension in dimensions for choice, _ in dimension.cuts}))

    def stay(self, dimension: Dimension, over: Sequence[str]) -> Table:
        """Return the entries of a dimension that stay, broadcast over the options of `over`."""
        table = np.full([1] * len(over), float(dimension.size))
        for choice, unit in dimension.cuts:
            shape = [1] * len(over)
            shape[over.index(choice)] = -1
            table = table - unit * np.asarray(self.removed[choice], dtype=float).reshape(shape)
        return table

    def full(self, table: Table, over: Sequence[str]) -> Table:
        """Return a broadcast table in its whole shape."""
        return np.broadcast_to(table, [len(self.removed[choice]) for choice in over]).astype(float)

    def product(self, dimensions: Sequence[Dimension], over: Sequence[str]) -> Table:
        """Return the entries of a tensor that stay, over the options of `over`."""
        return self.full(math.prod((self.stay(d, over) for d in dimensions), start=np.ones([1] * len(over))), over)


def loss_terms(widths: Sequence[Widths], grids: Sequence[Grids]) -> list[Term]:
    """Return the tables of predicted loss."""
    terms = [Term((w.choice,), "loss", np.asarray(w.losses)) for w in widths]
    return terms + [Term((g.choice,), "loss", np.asarray(g.losses)) for g in grids]


def parameter_terms(model: nn.Module, dimensions: Shapes, counter: Counter) -> list[Term]:
    """Return exact tables of parameters."""
    terms = []
    for name, _ in model.named_parameters():
        over = counter.over(dimensions[name])
        terms.append(Term(over, "parameters", counter.product(dimensions[name], over)))
    return terms


def mac_terms(macs: Mapping[str, float], dimensions: Shapes, counter: Counter) -> list[Term]:
    """Return tables of multiply-adds: a module's own, times the share of its weight that stays.

    Args:
        macs: Multiply-adds of each module without those of its children.
        dimensions: Of the model's tensors.
        counter: Of the candidates.
    """
    terms = []
    for module, count in macs.items():
        weight = dimensions.get(f"{module}.weight" if module else "weight", [])
        over = counter.over(weight)
        size = math.prod(d.size for d in weight)
        terms.append(Term(over, "macs", count * counter.product(weight, over) / max(1, size)))
    return terms


def size_terms(
    model: nn.Module, dimensions: Shapes, counter: Counter, *, grids: Sequence[Grids], folded: Sequence[Pair]
) -> list[Term]:
    """Return tables of stored bytes: packed matrices over widths and bits, the rest in its own dtype.

    Args:
        model: The original model.
        dimensions: Of its tensors.
        counter: Of the candidates.
        grids: Candidates of the matrices.
        folded: Pairs of layer and normalisation that are folded before storing.
    """
    packed = {grid.site.parameter_name: grid for grid in grids}
    norms = {norm for _, norm in folded}
    new_biases = {f"{layer}.bias": f"{norm}.running_mean" for layer, norm in folded}
    terms = []
    state = model.state_dict()
    for name, tensor in state.items():
        if name.rpartition(".")[0] in norms or name in new_biases:
            continue
        over = counter.over(dimensions[name])
        if name in packed:
            terms.append(_packed_term(packed[name], dimensions[name], counter, over))
        else:
            terms.append(Term(over, "size", tensor.element_size() * counter.product(dimensions[name], over)))
    for source in new_biases.values():
        over = counter.over(dimensions[source])
        terms.append(Term(over, "size", 4 * counter.product(dimensions[source], over)))
    header = 90.0 * (len(terms) + len(packed)) + 100
    return [*terms, Term((), "size", np.asarray(header))]


def _packed_term(grid: Grids, dimensions: Sequence[Dimension], counter: Counter, over: tuple[str, ...]) -> Term:
    site: Site = grid.site
    row = 1 if site.transposed or site.kind == "conv_transpose" else 0
    rows = counter.full(counter.stay(dimensions[row], over), over) * (site.shape[0] / dimensions[row].size)
    columns = counter.product([d for i, d in enumerate(dimensions) if i != row], over)
    columns = columns * (site.shape[1] / math.prod(d.size for i, d in enumerate(dimensions) if i != row))
    table = np.empty((*rows.shape, len(grid.structures)))
    for index in itertools.product(*map(range, rows.shape)):
        shape = (round(float(rows[index])), round(float(columns[index])))
        for option, structure in enumerate(grid.structures):
            bits = structure.bits(shape) if structure is not None else 32 * shape[0] * shape[1]
            table[(*index, option)] = bits / 8
    return Term((*over, grid.choice), "size", table)


@dataclass(frozen=True)
class Timing:
    """Fitted time of a net under any widths.

    Args:
        modules: Coefficients of each timed module: one a product of shares, see `_features`.
        rest: Coefficients of the rest of the forward pass: a constant and one a group.
        scale: Time of a whole net without clocks, per second of the fit's sum.
        offset: Seconds that every whole net takes besides.
    """

    modules: Mapping[str, tuple[float, ...]]
    rest: tuple[float, ...]
    scale: float = 1.0
    offset: float = 0.0

    def terms(self, dimensions: Shapes, counter: Counter) -> list[Term]:
        """Return tables of seconds."""
        found = []
        for module, coefficients in self.modules.items():
            over, features = _features(module, dimensions, counter)
            table = sum((c * f for c, f in zip(coefficients, features)), np.zeros([1] * len(over)))
            found.append(Term(over, "latency", self.scale * counter.full(np.asarray(table), over)))
        found.append(Term((), "latency", np.asarray(self.offset + self.scale * self.rest[0])))
        for choice, coefficient in zip(counter.removed, self.rest[1:]):
            found.append(Term((choice,), "latency", self.scale * coefficient * counter.share(choice)))
        return found


def _features(module: str, dimensions: Shapes, counter: Counter) -> tuple[tuple[str, ...], list[Table]]:
    """Return the decisions a module's time depends on, and the tables 1, in, out, in*out (those that vary)."""
    weight = dimensions.get(f"{module}.weight" if module else "weight", [])
    over = counter.over(weight)
    shares = [counter.stay(d, over) / d.size for d in weight if d.cuts]
    features: list[Table] = [np.ones([1] * len(over)), *shares]
    if len(shares) > 1:
        features.append(math.prod(shares, start=np.ones([1] * len(over))))
    return over, features


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
        designs: Option index of each width decision, one mapping a measured net.
        times: Seconds by module name, "" for the rest, one mapping a measured net.
        dimensions: Of the model's tensors.
        counter: Of the candidates.
        whole: Seconds of the first designs as whole nets without clocks.

    Returns:
        The fit.
    """
    modules: dict[str, tuple[float, ...]] = {}
    rest = np.asarray([measured.get("", 0.0) for measured in times])
    for name in times[0]:
        if not name:
            continue
        seconds = np.asarray([measured.get(name, 0.0) for measured in times])
        over, features = _features(name, dimensions, counter)
        if not over:
            rest = rest + seconds
            continue
        full = [counter.full(f, over) for f in features]
        rows = np.asarray([[f[tuple(design[c] for c in over)] for f in full] for design in designs])
        # Relative errors count: small nets are the ones that plans choose.
        weight = 1 / np.maximum(seconds, seconds.max() * 0.02 + 1e-12)
        modules[name] = tuple(float(c) for c in _non_negative(rows * weight[:, None], seconds * weight))
    shares = {choice: counter.share(choice) for choice in counter.removed}
    rows = np.asarray([[1.0, *(shares[c][design[c]] for c in counter.removed)] for design in designs])
    timing = Timing(modules, tuple(float(c) for c in _non_negative(rows, np.maximum(rest, 0))))
    terms = timing.terms(dimensions, counter)
    sums = np.asarray([total(terms, picks)["latency"] for picks in designs[: len(whole)]])
    anchors = np.stack([sums, np.ones_like(sums)], 1) / np.asarray(whole)[:, None]
    scale, offset = _non_negative(anchors, np.ones_like(sums))
    return Timing(timing.modules, timing.rest, float(scale), float(offset))


def share_terms(
    resource: str, designs: Sequence[Mapping[str, int]], values: Sequence[float], counter: Counter
) -> list[Term]:
    """Fit a cost of whole nets to the groups' shares: a constant and one non-negative slope a group.

    Args:
        resource: Name of the cost.
        designs: Option index of each width decision, one mapping a net.
        values: Cost of each net.
        counter: Of the candidates.

    Returns:
        Tables of the cost.
    """
    shares = {choice: counter.share(choice) for choice in counter.removed}
    rows = np.asarray([[1.0, *(shares[c][design[c]] for c in shares)] for design in designs])
    found = _non_negative(rows / np.asarray(values)[:, None], np.ones(len(values)))
    slopes = [Term((c,), resource, float(slope) * shares[c]) for c, slope in zip(shares, found[1:])]
    return [Term((), resource, np.asarray(found[0])), *slopes]


def designs(counter: Counter, *, count: int, seed: int) -> list[dict[str, int]]:
    """Choose nets to measure: the uncut one, the smallest one, and random combinations of options.

    Args:
        counter: Of the candidates.
        count: Number of nets.
        seed: Of the random ones.

    Returns:
        Option index of each width decision.
    """
    generator = np.random.default_rng(seed)
    chosen = [dict.fromkeys(counter.removed, 0), {c: len(r) - 1 for c, r in counter.removed.items()}]
    # Each decision runs through its options in a random order of its own, so that every option is measured.
    columns = {}
    for choice, removed in counter.removed.items():
        repeats = -(-count // len(removed))
        columns[choice] = np.concatenate([generator.permutation(len(removed)) for _ in range(repeats)])
    chosen += [{choice: int(column[i]) for choice, column in columns.items()} for i in range(count - 2)]
    return chosen if counter.removed else chosen[:1]


def choices(widths: Sequence[Widths], grids: Sequence[Grids]) -> list[Choice]:
    """Return the planner's decisions."""
    return [
        *(Choice(w.choice, tuple(str(kept) for kept in w.kept)) for w in widths),
        *(Choice(g.choice, tuple("float32" if s is None else repr(s) for s in g.structures)) for g in grids),
    ]
