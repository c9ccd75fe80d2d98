"""Coupled channel groups of a model, every one of them proved.

Attention heads (`heads`), hidden units of recurrent layers (`recurrent`) and, with Torch-Pruning, all other channels
(`dependencies`) are proposed; a masked-against-cut comparison in float64 decides (`proof`), of many groups in few
passes (`joint`). Channels whose readers Torch-Pruning places wrongly are followed by marking them (`taint`) and tried
again. At the end all groups are cut at once on inputs of the example's full shape; where that fails, the groups that
break it are left out. One warning names what was left out and why.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._errors import suggest
from .channels import ChannelGroup, NotCuttableError
from .dependencies import Candidate, candidates
from .heads import LAYOUTS, counts_heads, head_groups
from .joint import Joint
from .proof import Bench, Inputs, call, cuda_devices, double_copy, prepare
from .recurrent import hidden_groups
from .site import unwrap
from .taint import MixedError, follow, reading_members

_SEED = 20240229
_SHOWN = 12

Failure = tuple[str, tuple[str, ...], str]


def channel_groups(
    model: nn.Module,
    example_inputs: Tensor | Sequence[object] | Mapping[str, object],
    *,
    ignore: Iterable[str] = (),
) -> list[ChannelGroup]:
    """Find the sets of channels that can be cut together, and prove each.

    Args:
        model: Any module; not changed (all work is on a float64 copy, in eval mode). Wrappers of `torch.compile` and
            DDP are looked through.
        example_inputs: What the model is called with: a tensor, a sequence of positional or a mapping of keyword
            arguments. Only shapes matter, and for integer tensors the values that occur.
        ignore: Names of modules that must stay as they are, with all that is inside them.

    Returns:
        Proved groups in module order; any subset of them may be cut, together.

    Raises:
        ValueError: if a name in `ignore` does not exist, the model cannot be copied or does not run on the inputs.
    """  # noqa: DOC502
    model = unwrap(model)
    ignored = _checked_names(model, ignore)
    inputs = _as_inputs(example_inputs)
    double = double_copy(model)
    full = prepare(double, inputs, seed=_SEED)
    generator = torch.Generator().manual_seed(_SEED)
    joint = Joint(full.smaller(inputs), generator)
    proved, failures = _prove_units(joint, ignored)
    taken = frozenset(member.module_name for group in proved for member in group.producers)
    try:
        with torch.random.fork_rng(cuda_devices(double)):
            torch.manual_seed(0)
            proposed = candidates(
                double, lambda net: call(net, _with_gradients(full.inputs)), ignore=ignored, taken=taken
            )
    except Exception as error:
        failures.append((type(model).__name__, (), f"its operations could not be traced ({_named(error)})"))
        proposed = []
    for parameter in double.parameters():
        parameter.requires_grad_(False)
    more, unproved = _prove_channels(joint, proposed)
    coupled = dict(joint.separate())
    failures += [(group.name, group.modules, reason) for group, reason in coupled.items()]
    order = {name: number for number, (name, _) in enumerate(double.named_modules())}
    proved = [group for group in (*proved, *more) if group not in coupled]
    proved.sort(key=lambda group: order[group.modules[0]])
    failures += unproved
    if proved:
        proved, late = prove_jointly(full, proved, generator)
        failures += late
    _warn(failures)
    return proved


def _prove_units(joint: Joint, ignored: Sequence[str]) -> tuple[list[ChannelGroup], list[Failure]]:
    """Return the attention heads and hidden units of recurrent layers that are proved, and what is not."""
    if not any(counts_heads(m) or isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in joint.where.model.modules()):
        return [], []
    marks = joint.where.single()
    proved: list[ChannelGroup] = []
    refused: dict[str, Failure] = {}
    lost: dict[str, Failure] = {}

    def run(net: nn.Module) -> object:
        return call(net, marks.inputs)

    def prove(tries: Sequence[Sequence[ChannelGroup]]) -> None:
        """Prove of each of the tries the first that holds."""
        left = [list(groups) for groups in tries if not any(_inside(name, ignored) for name in groups[0].modules)]
        while left:
            first = [groups.pop(0) for groups in left]
            reasons = joint.prove(first)
            for group, reason in zip(first, reasons):
                if reason:
                    refused.setdefault(group.name, (group.name, group.modules, f"{group.unit}: {reason}"))
                else:
                    proved.append(group)
            left = [groups for groups, reason in zip(left, reasons) if reason and groups]

    for layout in LAYOUTS:
        tries, without = head_groups(marks.model, run, layout=layout, without={group.name for group in proved})
        prove(tries)
        lost = {**{name: (name, (), why) for name, why in without}, **lost}
        if not (refused.keys() | lost.keys()) - {group.name for group in proved}:
            break
    hidden, others = hidden_groups(marks.model, run)
    prove([[group] for group in hidden])
    lost |= {name: (name, (), why) for name, why in others}
    done = {group.name for group in proved}
    failures = {**{name: failure for name, failure in lost.items() if not _inside(name, ignored)}, **refused}
    return proved, [failure for name, failure in failures.items() if name not in done]


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in modules)


def prove_jointly(
    where: Bench, groups: Sequence[ChannelGroup], generator: torch.Generator
) -> tuple[list[ChannelGroup], list[Failure]]:
    """Cut all groups at once; where that fails, leave out the groups that break it, found by halving.

    Args:
        where: The bench to prove on.
        groups: Groups that were proved.
        generator: Chooses the units to keep.

    Returns:
        The groups that can be cut together, and (name, modules, reason) of the others.
    """
    accepted = list(groups)
    failures: list[Failure] = []
    while accepted and (reason := where.prove(accepted, generator)):
        low, high = 0, len(accepted)  # the first `low` groups hold together, the first `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            why = where.prove(accepted[:middle], generator)
            low, high, reason = (low, middle, why) if why else (middle, high, reason)
        group = accepted.pop(high - 1)
        failures.append((group.name, group.modules, f"together with the groups before it, {reason}"))
    return accepted, failures


def _prove_channels(joint: Joint, proposed: Sequence[Candidate]) -> tuple[list[ChannelGroup], list[Failure]]:
    """Return the groups that are proved; parts of one layer's channels alone, as they may be bound to each other."""
    proved: list[ChannelGroup] = []
    failures: list[Failure] = []
    marks: list[Bench] = []
    usable = [candidate for candidate in proposed if not candidate.silent and not candidate.reason]
    whole = [group for c in usable if len(c.groups) == 1 for group in c.groups if group.size > 1]
    known = dict(zip(whole, joint.prove(whole)))
    for candidate in proposed:
        if candidate.silent:
            continue
        if candidate.reason:
            failures.append((candidate.root, candidate.modules, candidate.reason))
            continue
        cuttable = [group for group in candidate.groups if group.size > 1]
        reasons = {group: known[group] if group in known else joint.alone(group) for group in cuttable}
        paired = candidate.paired
        if any(reasons.values()) and paired is not None and paired.size > 1 and not joint.alone(paired):
            proved.append(paired)
            continue
        for group, reason in reasons.items():
            if not reason:
                proved.append(group)
                continue
            marks = marks or [joint.where.single()]
            if (marked := _followed(marks[0], group)) is not None and not joint.alone(marked):
                proved.append(marked)
            else:
                failures.append((group.name, group.modules, reason))
    return proved, failures


def _followed(marks: Bench, group: ChannelGroup) -> ChannelGroup | None:
    """Return a group with the same producers, its other members found by marking the channels; None if they mix."""
    units = torch.arange(group.size)
    sources = {member.module_name: (units, member.indices) for member in group.producers}
    try:
        held = follow(marks.model, lambda net: call(net, marks.inputs), sources, strict=True)
        readers = reading_members(marks.model, held)
    except (MixedError, NotCuttableError):
        return None
    if not any(member.axes.matrix for member in readers):
        return None
    return replace(group, members=(*group.producers, *readers))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _warn(failures: Sequence[Failure]) -> None:
    if not failures:
        return
    lines = []
    for name, modules, reason in failures[:_SHOWN]:
        others = [module for module in modules if module != name]
        named = ", ".join(others[:6]) + (f" and {len(others) - 6} more" if len(others) > 6 else "")
        lines.append(f"  {name}{f' (with {named})' if others else ''}: {reason}")
    if len(failures) > _SHOWN:
        lines.append(f"  and {len(failures) - _SHOWN} more: {', '.join(name for name, _, _ in failures[_SHOWN:])}")
    warnings.warn(
        f"Channels that stay whole, because no cut of them could be proved ({len(failures)}):\n" + "\n".join(lines),
        stacklevel=3,
    )


def _as_inputs(example_inputs: Tensor | Sequence[object] | Mapping[str, object]) -> Inputs:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if isinstance(example_inputs, Mapping):
        return dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a sequence of positional arguments or a mapping of keyword arguments, "
        f"got {type(example_inputs).__name__}."
    )


def _with_gradients(inputs: Inputs) -> Inputs:
    """Return inputs with a history, so that operations on them before the first layer are traced as well."""

    def track(leaf: object) -> object:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.clone().requires_grad_() * 1
        return leaf

    tracked: Inputs = pytree.tree_map(track, inputs)
    return tracked


def _checked_names(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    allowed = {name for name, _ in model.named_modules() if name}
    for name in (chosen := tuple(names)):
        if name not in allowed:
            raise ValueError(f"There is no module {name!r} to ignore in this model.{suggest(name, allowed)}")
    return chosen
