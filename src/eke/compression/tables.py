"""What every combination of options costs: tables for the planner, all but peak memory exact.

Entries that stay in a tensor follow from the decisions alone, so parameters, multiply-adds and packed bytes are exact
tables over the channel groups, the form of the matrix and the block that a tensor depends on. Peak memory is counted on
some cut nets and fitted to the groups' shares. Time is another matter: see `timing`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from ..patterns import Chain
from ..sites import find
from ..structures import EntrySparse, KroneckerSparse, LowRank, Structure
from .artifact import stored_bits
from .candidates import Block, Decisions, Forms, Widths
from .deploy import Pair
from .factor import stand_in
from .graph import Table
from .plan import Choice, Term
from .solver import fitting

HEADER_BYTES = 90.0
"""Bytes that a stored tensor's entry in the file's header takes, about."""


def non_negative(rows: Table, values: Table) -> Table:
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


def matrices_of(module: str, dimensions: Shapes) -> list[str]:
    """Return the names of a module's own matrices: its weight, or those of a recurrent layer or an attention."""
    prefix = f"{module}." if module else ""
    if f"{prefix}weight" in dimensions:
        return [f"{prefix}weight"]
    own = (name for name in dimensions if name.startswith(prefix) and "." not in name[len(prefix) :])
    return [name for name in own if "weight" in name and len(dimensions[name]) > 1]


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
        blocks: Blocks that may be left out.
        forms: Candidates of matrices by the name of their parameter.
        cores: Decision on the heads of each attention, by the module's name: its own work goes with them.
    """

    removed: Mapping[str, tuple[int, ...]]
    sizes: Mapping[str, int]
    blocks: tuple[Block, ...] = ()
    forms: Mapping[str, Forms] = field(default_factory=dict)
    cores: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, decisions: Decisions) -> Counter:
        """Return a counter for these candidates."""
        removed = {w.choice: tuple(w.group.size - kept for kept in w.kept) for w in decisions.widths}
        sizes = {w.choice: w.group.size for w in decisions.widths}
        cores = {w.group.name: w.choice for w in decisions.widths if w.group.unit == "heads"}
        return cls(removed, sizes, decisions.blocks, {f.site.parameter_name: f for f in decisions.forms}, cores)

    def share(self, choice: str) -> Table:
        """Return the share of a group's units that each option keeps."""
        return 1 - np.asarray(self.removed[choice], dtype=float) / self.sizes[choice]

    def over(self, dimensions: Sequence[Dimension]) -> tuple[str, ...]:
        """Return the groups that these dimensions depend on."""
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

    def block_of(self, module: str) -> Block | None:
        """Return the block that holds a module."""
        return next((block for block in self.blocks if block.holds(module)), None)

    def term(
        self, resource: str, module: str, over: tuple[str, ...], tables: Sequence[Table], form: Forms | None
    ) -> Term:
        """Return a table over groups, the form of a matrix and the block that holds it.

        Args:
            resource: Of the term.
            module: Whose cost it is; nothing if the block that holds it is left out.
            over: Groups that the tables are over.
            tables: Over these; one for each option of the form.
            form: Candidates of a matrix, None for a single table.
        """
        table = np.stack(tables, -1) if form is not None else tables[0]
        names = (*over, form.choice) if form is not None else over
        block = self.block_of(module)
        if block is None:
            return Term(names, resource, table)
        return Term((*names, block.choice), resource, np.stack([table, np.zeros_like(table)], -1))

    def matrix(self, form: Forms, dimensions: Sequence[Dimension]) -> Matrix:
        """Return what each candidate of a matrix takes, over the groups that cut it."""
        site, over = form.site, self.over(dimensions)
        row = 1 if site.transposed or site.kind == "conv_transpose" else 0
        rows = self.full(self.stay(dimensions[row], over), over) * (site.shape[0] / dimensions[row].size)
        columns = self.product([d for i, d in enumerate(dimensions) if i != row], over)
        columns = columns * (site.shape[1] / math.prod(d.size for i, d in enumerate(dimensions) if i != row))
        entries, stored, ranks, alone = (np.zeros((*rows.shape, len(form.structures))) for _ in range(4))
        for index in itertools.product(*map(range, rows.shape)):
            shape = (round(float(rows[index])), round(float(columns[index])))
            for option, wanted in enumerate(form.structures):
                structure = None if wanted is None else fitting(wanted, shape)
                place = (*index, option)
                entries[place] = shape[0] * shape[1]
                stored[place] = stored_bits(structure, shape) / 8
                other = stand_in(structure, shape)
                if isinstance(other, Chain | EntrySparse):
                    alone[place] = 1
                    entries[place] = other.parameters if isinstance(other, Chain) else other.kept(shape)
                elif other is not None:
                    ranks[place], entries[place] = other, other * (shape[0] + shape[1])
        return Matrix(over, rows, columns, entries, stored, ranks, alone)


@dataclass(frozen=True)
class Matrix:
    """What each candidate of a matrix takes: tables over the groups that cut it, the candidate last.

    Args:
        over: The groups.
        rows: Rows that stay, without the candidate's axis.
        columns: Columns that stay, likewise.
        entries: Parameters, and multiply-adds a location.
        stored: Bytes in the file.
        ranks: Rank of two factors, 0 for one matrix.
        alone: 1 where one layer of another kind stands for the matrix (Kronecker-sparse, or without zeros), else 0.
    """

    over: tuple[str, ...]
    rows: Table
    columns: Table
    entries: Table
    stored: Table
    ranks: Table
    alone: Table

    @property
    def left(self) -> Table:
        """Share of the matrix that stays after cuts, without the candidate's axis."""
        return self.rows * self.columns / float(self.rows.max() * self.columns.max())


def loss_terms(decisions: Decisions) -> list[Term]:
    """Return the tables of predicted loss; what is done inside a block that is left out costs nothing."""
    counter = Counter.of(decisions)
    terms = [Term((w.choice,), "loss", np.asarray(w.losses)) for w in decisions.widths]
    terms += [Term((b.choice,), "loss", np.asarray([0.0, b.loss])) for b in decisions.blocks]
    for attention in decisions.attentions:
        losses = np.asarray(attention.losses)
        terms.append(counter.term("loss", attention.name, (attention.choice,), [losses], None))
    for form in decisions.forms:
        losses = np.asarray(form.losses)
        block = counter.block_of(form.site.module_name)
        if block is None:
            terms.append(Term((form.choice,), "loss", losses))
        else:
            terms.append(Term((form.choice, block.choice), "loss", np.stack([losses, np.zeros_like(losses)], -1)))
    return terms


def by_option(table: Table) -> list[Table]:
    """Return the table of each candidate, the last axis."""
    return [table[..., option] for option in range(table.shape[-1])]


def parameter_terms(model: nn.Module, dimensions: Shapes, counter: Counter) -> list[Term]:
    """Return exact tables of parameters."""
    terms = []
    for name, _ in model.named_parameters():
        module, form = name.rpartition(".")[0], counter.forms.get(name)
        if form is not None and form.factored:
            matrix = counter.matrix(form, dimensions[name])
            terms.append(counter.term("parameters", module, matrix.over, by_option(matrix.entries), form))
        else:
            over = counter.over(dimensions[name])
            terms.append(counter.term("parameters", module, over, [counter.product(dimensions[name], over)], None))
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
        if module in counter.cores:
            choice = counter.cores[module]
            terms.append(counter.term("macs", module, (choice,), [count * counter.share(choice)], None))
            continue
        names = matrices_of(module, dimensions)
        weights = [dimensions[name] for name in names]
        size, form = (
            sum(math.prod(d.size for d in w) for w in weights),
            counter.forms.get(f"{module}.weight".lstrip(".")),
        )
        if form is not None and form.factored:
            matrix = counter.matrix(form, weights[0])
            terms.append(counter.term("macs", module, matrix.over, by_option(count * matrix.entries / size), form))
        else:
            over = counter.over([d for w in weights for d in w])
            left = sum((counter.product(w, over) for w in weights), counter.full(np.zeros([1] * len(over)), over))
            terms.append(counter.term("macs", module, over, [count * left / size if size else left + count], None))
    return terms


def size_terms(model: nn.Module, dimensions: Shapes, counter: Counter, *, folded: Sequence[Pair]) -> list[Term]:
    """Return tables of stored bytes: packed matrices over widths and forms, the rest in its own dtype.

    Args:
        model: The original model.
        dimensions: Of its tensors.
        counter: Of the candidates.
        folded: Pairs of layer and normalisation that are folded before storing.
    """
    norms = {norm for _, norm in folded}
    new_biases = {f"{layer}.bias": f"{norm}.running_mean" for layer, norm in folded}
    tied = {other for site in find(model) for other in site.tied}
    terms = []
    for name, tensor in model.state_dict().items():
        module = name.rpartition(".")[0]
        if module in norms or name in new_biases or name in tied:
            continue
        form = counter.forms.get(name)
        if form is not None:
            matrix = counter.matrix(form, dimensions[name])
            tables = [table + HEADER_BYTES * _tensors(s) for s, table in zip(form.structures, by_option(matrix.stored))]
            terms.append(counter.term("size", module, matrix.over, tables, form))
            continue
        over = counter.over(dimensions[name])
        stays = tensor.element_size() * counter.product(dimensions[name], over) + HEADER_BYTES
        terms.append(counter.term("size", module, over, [stays], None))
    for bias, source in new_biases.items():
        over = counter.over(dimensions[source])
        stays = 4 * counter.product(dimensions[source], over) + HEADER_BYTES
        terms.append(counter.term("size", bias.rpartition(".")[0], over, [stays], None))
    return [*terms, Term((), "size", np.asarray(100.0))]


def _tensors(structure: Structure | None) -> int:
    """Return how many tensors a matrix is stored as, about."""
    if isinstance(structure, KroneckerSparse):
        return len(structure.chain)
    return 1 + (structure is not None) + 2 * isinstance(structure, LowRank)


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
    found = non_negative(rows / np.asarray(values)[:, None], np.ones(len(values)))
    slopes = [Term((c,), resource, float(slope) * shares[c]) for c, slope in zip(shares, found[1:])]
    return [Term((), resource, np.asarray(found[0])), *slopes]


def designs(decisions: Decisions, *, count: int, seed: int, widths_only: bool = False) -> list[dict[str, int]]:
    """Choose nets to measure: the uncut one, the smallest one, and random combinations of options.

    Args:
        decisions: The candidates.
        count: Number of nets.
        seed: Of the random ones.
        widths_only: Whether forms and blocks stay as they are.

    Returns:
        Option index of each decision that changes the net's shape.
    """
    generator = np.random.default_rng(seed)
    options = {w.choice: list(range(len(w.kept))) for w in decisions.widths}
    others: dict[str, list[int]] = {}
    if not widths_only:
        for form in decisions.forms:
            found = form.factored
            others |= {form.choice: [*[0] * len(found), *found]} if found else {}
        # A block that is left out says nothing about the modules in it: mostly it stays.
        others |= {block.choice: [0, 0, 0, 1] for block in decisions.blocks}
    uncut = dict.fromkeys([*options, *others], 0)
    if len(uncut) == 0:
        return [uncut]
    chosen = [uncut, {**uncut, **{w.choice: len(w.kept) - 1 for w in decisions.widths}}]
    # Each decision runs through its options in a random order of its own, so that every option is measured.
    columns = {}
    for choice, values in {**options, **others}.items():
        repeats = -(-count // len(values))
        columns[choice] = np.concatenate([generator.permutation(values) for _ in range(repeats)])
    chosen += [{choice: int(column[i]) for choice, column in columns.items()} for i in range(count - 2)]
    return chosen


def choices(decisions: Decisions) -> list[Choice]:
    """Return the planner's decisions."""
    return [
        *(Choice(w.choice, tuple(str(kept) for kept in w.kept)) for w in decisions.widths),
        *(Choice(f.choice, tuple("as it is" if s is None else repr(s) for s in f.structures)) for f in decisions.forms),
        *(Choice(b.choice, ("stays", b.kind)) for b in decisions.blocks),
        *(Choice(a.choice, a.labels) for a in decisions.attentions),
    ]
