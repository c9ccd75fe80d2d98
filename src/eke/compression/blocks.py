"""Blocks that may be left out: what they are, and the loss that leaving one out is predicted to cost.

A block is a module with at least two matrices that is called once and maps a tensor to a tensor of the same shape (or
to one beside a None, as attentions do that could return their weights). Of modules inside one another the innermost are
blocks, unless most of what the outer one holds is in none of them. Left out, it passes its input on, or gives zero (a
branch whose shortcut is added outside): the output changes by dy = x - y or dy = -y. With g the gradient of a sample's
own loss there, u = sum over locations of <g, dy> is measured sample by sample, and

    predicted loss = max(0, E[u]) + 1/2 E[u^2],

the slope and the curvature along dy, without any approximation by factors. Along some dy the loss is flat only at its
beginning (an output that is normalised afterwards does not change with its size until it is zero), so the model is run
without each block once as well, and the larger of prediction and measurement counts. The kind that costs less is
proposed; what is predicted to cost more than the other is seen to cost is not run. Blocks that are over before the one
that is left out begins give what they gave with it. A block is none where the model does not run without it, or where
channels can be cut on one side of it alone: its input could then not stand for its output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._types import Batch, Loss
from ..curvature import Recorder
from ..sites import ChannelGroup, Site
from ..sites.proof import cut
from .candidates import Block, BlockKind
from .task import evaluating


class _LeftOut(nn.Module):
    """What stands in for a block: gives its first tensor, or zeros of that shape, and None beside it if asked.

    Args:
        kind: What it gives.
    """

    def __init__(self, kind: BlockKind) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first tensor among the arguments, or zeros like it."""
        x = _first_tensor(args, kwargs)
        assert x is not None
        y = torch.zeros_like(x) if self.kind.startswith("zero") else x
        return (y, None) if self.kind.endswith("none") else y

    def extra_repr(self) -> str:
        """Return the kind."""
        return self.kind

    def _get_name(self) -> str:
        return "LeftOut"


class _Given(nn.Module):
    """What stands in for a module whose output is known.

    Args:
        output: A tensor, or one beside None.
    """

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Return a copy of the output, which may be changed in place."""
        return self.output.clone() if isinstance(self.output, Tensor) else (self.output[0].clone(), None)


def leave_out_(model: nn.Module, name: str, kind: BlockKind) -> None:
    """Replace a module by what passes its input on or gives zero, in place.

    Args:
        model: The model.
        name: Of the module.
        kind: What it becomes.

    Raises:
        ValueError: if there is no such module or kind.
    """
    if kind not in get_args(BlockKind) or not name or name not in dict(model.named_modules()):
        raise ValueError(f"Cannot leave out {name!r} as {kind!r}: build the architecture that was compressed.")
    parent, _, attribute = name.rpartition(".")
    left = _LeftOut(kind).train(model.get_submodule(name).training)
    model.get_submodule(parent)._modules[attribute] = left


def removable(
    model: nn.Module, sites: Sequence[Site], call: Callable[[nn.Module], Any], *, groups: Sequence[ChannelGroup] = ()
) -> dict[str, bool]:
    """Return the blocks that may be left out, in the order of the model.

    Args:
        model: Any module; not changed.
        sites: Its matrices that may be changed.
        call: Runs the model once and returns its outputs.
        groups: Its channels that may be cut.

    Returns:
        By name of a module: whether it returns None beside its tensor.
    """
    holding = {
        name: [s for s in sites if s.module_name.startswith(f"{name}.")] for name, _ in model.named_modules() if name
    }
    several = [name for name, inside in holding.items() if len(inside) >= 2]
    whole = [n for n in several if len(holding[n]) == sum(1 for _ in _matrices(model.get_submodule(n)))]
    private = copy.deepcopy(model)
    known = _keep_shape(private, whole, call)
    known = {name: pair for name, pair in known.items() if _runs_without(private, name, pair, call)}
    names = _best_level(known, {n: {s.name: s.shape[0] * s.shape[1] for s in holding[n]} for n in known})
    # Two cuts in which every group loses another number of units: a block between two groups changes its shape.
    for turn in (1, 3):
        if not names or not groups:
            break
        kept = [(g, range((1 + turn * i) % (g.size - 1) + 1, g.size)) for i, g in enumerate(groups) if g.size > 1]
        with cut(private, kept):
            names = [name for name in _keep_shape(private, names, call) if name in names]
    return {name: known[name] for name in names}


def _best_level(known: Mapping[str, bool], held: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return the innermost blocks, and outer ones in their place where these hold mostly other matrices."""
    chosen: list[str] = []
    for name in sorted(known, key=lambda n: -n.count(".")):
        inside = [other for other in chosen if other.startswith(f"{name}.")]
        covered = {site for other in inside for site in held[other]}
        other_entries = sum(size for site, size in held[name].items() if site not in covered)
        if not inside or 2 * other_entries >= sum(held[name].values()):
            chosen = [other for other in chosen if other not in inside] + [name]
    return [name for name in known if name in chosen]


def _first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


def _keep_shape(model: nn.Module, names: Sequence[str], call: Callable[[nn.Module], Any]) -> dict[str, bool]:
    """Return those of the modules that are called once and map one tensor to one of its shape and dtype."""
    seen: dict[str, list[bool | None]] = {name: [] for name in names}

    def after(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            pair = isinstance(output, tuple) and len(output) == 2 and output[1] is None
            x, y = _first_tensor(args, kwargs), output[0] if pair else output
            fits = x is not None and isinstance(y, Tensor) and x.shape == y.shape and x.dtype == y.dtype
            seen[name].append(pair if fits else None)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(after(name), with_kwargs=True) for name in names]
    try:
        with evaluating(model):
            call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[0] for name, found in seen.items() if len(found) == 1 and found[0] is not None}


@contextmanager
def _without(model: nn.Module, name: str, kind: BlockKind) -> Iterator[None]:
    """Leave a module out as long as the context lasts."""
    with _standing_in(model, {name: _LeftOut(kind)}):
        yield


@contextmanager
def _standing_in(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of others as long as the context lasts."""
    places = [(model.get_submodule(name.rpartition(".")[0])._modules, name.rpartition(".")[2]) for name in modules]
    kept = [children[attribute] for children, attribute in places]
    try:
        for (children, attribute), module in zip(places, modules.values()):
            children[attribute] = module
        yield
    finally:
        for (children, attribute), module_before in zip(places, kept):
            children[attribute] = module_before


def _earlier(
    model: nn.Module, names: Sequence[str], run: Callable[[], float]
) -> tuple[float, dict[str, dict[str, nn.Module]]]:
    """Return what one run gives and, by module, what may stand in for those that are called once, before it begins."""
    calls = dict.fromkeys(names, 0)
    done: dict[str, nn.Module] = {}
    before: dict[str, dict[str, nn.Module]] = {}

    def begin(name: str) -> Callable[..., None]:
        def hook(*_given: Any) -> None:
            calls[name] += 1
            before.setdefault(name, dict(done))

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            done[name] = _Given(output.clone() if isinstance(output, Tensor) else (output[0].clone(), None))

        return hook

    modules = [(name, model.get_submodule(name)) for name in calls]
    handles = [module.register_forward_pre_hook(begin(name)) for name, module in modules]
    handles += [module.register_forward_hook(end(name)) for name, module in modules]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    once = {name: {n: given for n, given in found.items() if calls[n] == 1} for name, found in before.items()}
    return result, once


def _runs_without(model: nn.Module, name: str, pair: bool, call: Callable[[nn.Module], Any]) -> bool:
    try:
        with _without(model, name, _kinds(pair)[0]), evaluating(model):
            call(model)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _kinds(pair: bool) -> tuple[BlockKind, BlockKind]:
    return ("identity and none", "zero and none") if pair else ("identity", "zero")


def _matrices(module: nn.Module) -> Iterable[Tensor]:
    return (p for p in module.parameters() if p.dim() > 1)


def block_candidates(
    model: nn.Module, loss: Loss, batches: Iterable[Batch], names: Mapping[str, bool], *, max_samples: int = 256
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
    along: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}
    seen = 0
    first: list[Batch] = []
    with Recorder(private, names, outputs=True) as recorder, torch.enable_grad():
        for index, batch in enumerate(batches):
            first = first or [batch]
            calls, samples = recorder.run(loss, batch, index)
            for name in names:
                slopes: tuple[list[Tensor], list[Tensor]] = ([], [])
                for found in calls.get(name, ()):
                    assert found.output is not None
                    slope = (samples * found.gradient).double()
                    slopes[0].append((slope * (found.x - found.output)).flatten(1).sum(1))
                    slopes[1].append((slope * -found.output).flatten(1).sum(1))
                # Several calls of a batch are of the same samples.
                for parts, total in zip(slopes, along[name]):
                    total += [torch.stack(parts).sum(0)] if parts else []
            seen += samples
            if seen >= max_samples:
                break
    options = []
    for name, kinds in along.items():
        if kinds[0]:  # else the loss does not use it
            terms = [_predicted(torch.cat(parts)) for parts in kinds]
            options.append([Block(name, kind, sum(pair), pair[1]) for kind, pair in zip(_kinds(names[name]), terms)])
    with evaluating(private):
        blocks = _seen(private, options, lambda: float(loss(private, first[0]))) if options else []
    return [block for block in blocks if math.isfinite(block.loss)]


def _seen(model: nn.Module, options: Sequence[Sequence[Block]], run: Callable[[], float]) -> list[Block]:
    """Return of each module's options the one that costs least, predicted or seen, whichever is more."""
    base, earlier = _earlier(model, [kinds[0].name for kinds in options], run)
    blocks = []
    for kinds in options:
        found: list[Block] = []
        for option in sorted(kinds, key=lambda block: block.loss):
            if any(option.loss >= block.loss for block in found):
                break  # it cannot be the one that costs less
            with _standing_in(model, {**earlier.get(option.name, {}), option.name: _LeftOut(option.kind)}):
                increase = run() - base
            cost = max(option.loss, increase) if math.isfinite(increase) else math.inf
            found.append(replace(option, loss=cost))
        blocks.append(min(found, key=lambda block: block.loss))
    return blocks


def _predicted(u: Tensor) -> tuple[float, float]:
    return 0.5 * float(u.square().mean()), max(0.0, float(u.mean()))
