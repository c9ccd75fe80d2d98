"""Coupled channel groups of a model, every one of them proved.

Attention heads (`heads`), hidden units of recurrent layers (`recurrent`) and, with Torch-Pruning, all other channels
(`dependencies`) are proposed; a masked-against-cut comparison in float64 decides (`proof`). Channels whose readers
Torch-Pruning places wrongly are followed by marking them (`taint`) and tried again. First each group alone, then all at
once on inputs of the example's full shape; if the joint cut fails, groups are added one by one and the offenders are
left out. One warning names what was left out and why.
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
from .heads import head_groups
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
    small, generator = full.smaller(inputs), torch.Generator().manual_seed(_SEED)
    proved, failures = _prove_units(small, ignored, generator)
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
    more, unproved = _prove_each(small, proposed, generator)
    order = {name: number for number, (name, _) in enumerate(double.named_modules())}
    proved = sorted([*proved, *more], key=lambda group: order[group.modules[0]])
    failures += unproved
    if proved:
        proved, late = prove_jointly(full, proved, generator)
        failures += late
    _warn(failures)
    return proved


def _prove_units(
    where: Bench, ignored: Sequence[str], generator: torch.Generator
) -> tuple[list[ChannelGroup], list[Failure]]:
    """Return the attention heads and hidden units of recurrent layers that are proved, and what is not."""

    def run(net: nn.Module) -> object:
        return call(net, where.inputs)

    heads, without = head_groups(where.model, run)
    hidden, others = hidden_groups(where.model, run)
    proved: list[ChannelGroup] = []
    failures: list[Failure] = [(name, (), why) for name, why in [*without, *others] if not _inside(name, ignored)]
    for tries in [*heads, *([group] for group in hidden)]:
        if any(_inside(name, ignored) for name in tries[0].modules):
            continue
        reasons = []
        for group in tries:
            reasons.append(where.prove([group], generator))
            if not reasons[-1]:
                proved.append(group)
                break
        else:
            failures.append((tries[0].name, tries[0].modules, f"{tries[0].unit}: {reasons[0]}"))
    return proved, failures


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in modules)


def prove_jointly(
    where: Bench, groups: Sequence[ChannelGroup], generator: torch.Generator
) -> tuple[list[ChannelGroup], list[Failure]]:
    """Cut all groups at once; where that fails, leave out the groups that break it.

    Args:
        where: The bench to prove on.
        groups: Groups that were proved alone.
        generator: Chooses the units to keep.

    Returns:
        The groups that can be cut together, and (name, modules, reason) of the others.
    """
    if not where.prove(groups, generator):
        return list(groups), []
    accepted: list[ChannelGroup] = []
    failures: list[Failure] = []
    for group in groups:
        if reason := where.prove([*accepted, group], generator):
            failures.append((group.name, group.modules, f"together with the groups before it, {reason}"))
        else:
            accepted.append(group)
    return accepted, failures


def _prove_each(
    where: Bench, proposed: Sequence[Candidate], generator: torch.Generator
) -> tuple[list[ChannelGroup], list[Failure]]:
    proved: list[ChannelGroup] = []
    failures: list[Failure] = []
    for candidate in proposed:
        if candidate.silent:
            continue
        if candidate.reason:
            failures.append((candidate.root, candidate.modules, candidate.reason))
            continue
        cuttable = [group for group in candidate.groups if group.size > 1]
        reasons = {group.name: where.prove([group], generator) for group in cuttable}
        paired = candidate.paired
        if any(reasons.values()) and paired is not None and paired.size > 1:
            reason = where.prove([paired], generator)
            if not reason:
                proved.append(paired)
                continue
        for group in cuttable:
            if not reasons[group.name]:
                proved.append(group)
            elif (marked := _followed(where, group)) is not None and not where.prove([marked], generator):
                proved.append(marked)
            else:
                failures.append((group.name, group.modules, reasons[group.name]))
    return proved, failures


def _followed(where: Bench, group: ChannelGroup) -> ChannelGroup | None:
    """Return a group with the same producers, its other members found by marking the channels; None if they mix."""
    units = torch.arange(group.size)
    sources = {member.module_name: (units, member.indices) for member in group.producers}
    try:
        held = follow(where.model, lambda net: call(net, where.inputs), sources, strict=True)
        readers = reading_members(where.model, held)
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
