"""Hidden units of recurrent layers: LSTM, GRU and plain RNN, of any number of layers and directions, and their cells.

Unit i of H is row i of every gate (rows i, H + i, 2H + i, ...) of both matrices and biases, column i of the recurrent
matrix, column i (and H + i, of two directions) of the next layer's input matrix, and what later layers read of it. All
layers and directions of one module share a single size, so unit i of each goes together; so do those of a layer that
starts from another's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from .channels import Axes, ChannelGroup, Member, NotCuttableError
from .taint import STATE, MixedError, follow, reading_members

GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}
"""Rows of a recurrent weight per hidden unit, by class."""


def gates_of(module: nn.Module) -> int:
    """Return the gates of a recurrent module, 0 of any other."""
    return next((gates for kind, gates in GATES.items() if isinstance(module, kind)), 0)


def suffixes(module: nn.Module) -> list[list[str]]:
    """Return the endings of the parameters' names by layer: one per direction; "" of a cell."""
    if isinstance(module, nn.RNNCellBase):
        return [[""]]
    assert isinstance(module, nn.RNNBase)
    ends = ["", "_reverse"] if module.bidirectional else [""]
    return [[f"_l{layer}{end}" for end in ends] for layer in range(module.num_layers)]


def hidden_groups(
    model: nn.Module, call: Callable[[nn.Module], object]
) -> tuple[list[ChannelGroup], list[tuple[str, str]]]:
    """Propose the hidden units of every recurrent module.

    Args:
        model: In evaluation mode.
        call: Runs the model on example inputs.

    Returns:
        Groups to be proved, and (module, reason) where there is none.
    """  # noqa: DOC501
    members: dict[str, list[Member]] = {}
    failures: dict[str, str] = {}
    started: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.RNNBase | nn.RNNCellBase):
            continue
        gates = gates_of(module)
        if not gates or bool(vars(module).get("proj_size")):
            failures[name] = f"{type(module).__name__}{' with a projection' if gates else ''} is kept whole"
            continue
        units = torch.arange(int(module.hidden_size))
        try:
            held = follow(model, call, {name: (units, units[:, None])})
            states = {key.removesuffix(STATE): held.pop(key) for key in list(held) if key.endswith(STATE)}
            if any(not torch.equal(unit, units) for unit in states.values()):
                raise MixedError("a recurrent layer starts from them in another order")
            members[name] = [*inner_members(module, name, gates), *reading_members(model, held)]
            started[name] = list(states)
        except (MixedError, NotCuttableError) as error:
            failures[name] = str(error)
    groups = []
    for names in _coupled(started, failures):
        size = int(model.get_submodule(names[0]).hidden_size)  # type: ignore[arg-type]
        groups.append(ChannelGroup(names[0], size, tuple(m for n in names for m in members[n]), unit="hidden units"))
    return groups, list(failures.items())


def _coupled(started: Mapping[str, Sequence[str]], failures: dict[str, str]) -> list[tuple[str, ...]]:
    """Return the layers whose units are one because one starts from another's state; add those that cannot be cut."""
    group = {name: {name} for name in started}
    for name, others in started.items():
        for other in others:
            union = group[name] | group.get(other, {other})
            for member in union & group.keys():
                group[member] = union
    whole = [sorted(names, key=[*started, *failures].index) for names in group.values()]
    for names in whole:
        for name in names if failures.keys() & set(names) else ():
            failures.setdefault(name, f"it shares its units with {next(n for n in names if n in failures)}")
    return [names for names in dict.fromkeys(map(tuple, whole)) if not failures.keys() & set(names)]


def inner_members(module: nn.Module, name: str, gates: int) -> list[Member]:
    """Return what the units are inside their recurrent module."""
    assert isinstance(module.hidden_size, int)
    units = torch.arange(module.hidden_size)[:, None]
    rows = units + len(units) * torch.arange(gates)
    members = []
    layers = suffixes(module)
    for number, ends in enumerate(layers):
        for end in ends:
            tensors = [(f"{kind}{end}", 0) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            made = tuple((a, dim) for a, dim in tensors if module._parameters.get(a) is not None)
            members.append(Member.of(module, name, rows, Axes("out", made, ())))
            count = ("hidden_size", f"weight_hh{end}", 1, 1)
            state = Axes("in", ((f"weight_hh{end}", 1),), (count,), matrix=True)
            members.append(Member.of(module, name, units, state))
            if number:
                both = units + len(units) * torch.arange(len(layers[number - 1]))
                members.append(Member.of(module, name, both, Axes("in", ((f"weight_ih{end}", 1),), (), matrix=True)))
    return members
