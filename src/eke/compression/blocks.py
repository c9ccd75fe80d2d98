"""Blocks that may be left out: what they are, and the loss that leaving one out is predicted to cost.

A block is an innermost module with at least two matrices that is called once and maps a tensor to a tensor of the same
shape. Left out, it passes its input on, or gives zero (a branch whose shortcut is added outside): the output changes by
dy = x - y or dy = -y. With g the gradient of a sample's own loss there, u = sum over locations of <g, dy> is measured
sample by sample, and

    predicted loss = max(0, E[u]) + 1/2 E[u^2],

the slope and the curvature along dy, without any approximation by factors. The kind that is predicted to cost less is
proposed. A block is none where the model does not run without it, or where channels can be cut on one side of it alone:
its input could then not stand for its output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..curvature import Recorder
from ..sites import ChannelGroup, Site
from .candidates import Block, BlockKind
from .task import evaluating


class Zero(nn.Module):
    """Gives zero in the shape of its input; what a removed branch becomes."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the shape of x."""
        return torch.zeros_like(x)


def leave_out_(model: nn.Module, name: str, kind: BlockKind) -> None:
    """Replace a module by the identity or by zero, in place.

    Args:
        model: The model.
        name: Of the module.
        kind: What it becomes.

    Raises:
        ValueError: if there is no such module or kind.
    """
    parent, _, attribute = name.rpartition(".")
    kinds = {"identity": nn.Identity, "zero": Zero}
    if kind not in kinds or not name or name not in dict(model.named_modules()):
        raise ValueError(f"Cannot leave out {name!r} as {kind!r}: build the architecture that was compressed.")
    old = model.get_submodule(name)
    setattr(model.get_submodule(parent), attribute, kinds[kind]().train(old.training))


def removable(
    model: nn.Module, sites: Sequence[Site], call: Callable[[nn.Module], Any], *, groups: Sequence[ChannelGroup] = ()
) -> list[str]:
    """Return the names of the blocks that may be left out, in the order of the model.

    Args:
        model: Any module; not changed.
        sites: Its matrices that may be changed.
        call: Runs the model once and returns its outputs.
        groups: Its channels that may be cut.

    Returns:
        Names of modules.
    """
    holding = {
        name: [s for s in sites if s.module_name.startswith(f"{name}.")] for name, _ in model.named_modules() if name
    }
    several = [name for name, inside in holding.items() if len(inside) >= 2]
    innermost = [name for name in several if not any(other.startswith(f"{name}.") for other in several)]
    whole = [n for n in innermost if len(holding[n]) == sum(1 for _ in _matrices(model.get_submodule(n)))]
    names = [name for name in _keep_shape(model, whole, call) if _runs_without(model, name, call)]
    for group in groups:
        if not names:
            break
        cut = copy.deepcopy(model)
        group.cut(range(1, group.size)).apply_(cut)
        names = _keep_shape(cut, names, call)
    return names


def _keep_shape(model: nn.Module, names: Sequence[str], call: Callable[[nn.Module], Any]) -> list[str]:
    """Return those of the modules that are called once and map one tensor to one of its shape and dtype."""
    seen: dict[str, list[bool]] = {name: [] for name in names}

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            fits = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            seen[name].append(fits and inputs[0].shape == output.shape and inputs[0].dtype == output.dtype)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(after(name)) for name in names]
    try:
        with evaluating(model):
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, fits in seen.items() if fits == [True]]


def _runs_without(model: nn.Module, name: str, call: Callable[[nn.Module], Any]) -> bool:
    trial = copy.deepcopy(model)
    leave_out_(trial, name, "identity")
    try:
        with evaluating(trial):
            call(trial)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _matrices(module: nn.Module) -> Iterable[Tensor]:
    return (p for p in module.parameters() if p.dim() > 1)


def block_candidates(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], names: Sequence[str], *, max_samples: int = 256
) -> list[Block]:
    """Predict what leaving out each block costs.

    Args:
        model: The model; not changed.
        loss: Mean loss of a batch.
        batches: Calibration batches.
        names: Blocks, from `removable`.
        max_samples: Samples after which to stop.

    Returns:
        One candidate a block.
    """
    if not names:
        return []
    private = copy.deepcopy(model).eval().requires_grad_(False)
    along: dict[str, dict[BlockKind, list[Tensor]]] = {name: {"identity": [], "zero": []} for name in names}
    seen = 0
    with Recorder(private, names) as recorder, torch.enable_grad():
        for index, batch in enumerate(batches):
            calls, samples = recorder.run(loss, batch, index)
            for name in names:
                slopes: dict[BlockKind, list[Tensor]] = {"identity": [], "zero": []}
                for found in calls[name]:
                    with torch.no_grad():
                        output = private.get_submodule(name).forward(found.x)
                    slope = (samples * found.gradient).double()
                    slopes["identity"].append((slope * (found.x - output)).flatten(1).sum(1))
                    slopes["zero"].append((slope * -output).flatten(1).sum(1))
                # Several calls of a batch are of the same samples.
                for kind, parts in slopes.items():
                    along[name][kind].append(torch.stack(parts).sum(0))
            seen += samples
            if seen >= max_samples:
                break
    blocks = []
    for name, kinds in along.items():
        costs = {kind: _predicted(torch.cat(parts)) for kind, parts in kinds.items()}
        best = min(costs, key=lambda kind: sum(costs[kind]))
        blocks.append(Block(name, best, sum(costs[best]), costs[best][1]))
    return blocks


def _predicted(u: Tensor) -> tuple[float, float]:
    return 0.5 * float(u.square().mean()), max(0.0, float(u.mean()))
