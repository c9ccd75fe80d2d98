"""Seconds that each innermost module takes in place, inside the whole network's forward pass.

Times of modules run alone do not add up to the network's (caches and threads differ), so modules are timed by hooks
while the network runs. Passes without hooks alternate with passes with them and give the total, so what the hooks
themselves cost falls to nobody.

Eager CPU only: on an accelerator a hook sees launches, not work.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .forward import call
from .latency import Clock, keep_memory, pinned_threads


def module_times(
    model: nn.Module,
    *inputs: Any,
    seconds: float = 2.0,
    threads: int | None = None,
    fewest_pairs: int = 3,
    clock: Clock = time.perf_counter_ns,
) -> dict[str, float]:
    """Measure the modules that call no other module, in place.

    Args:
        model: Module in eval mode, on the CPU, not compiled. It gets hooks while measured; all are removed.
        *inputs: Inputs of `forward`, or one mapping of its keyword inputs.
        seconds: Budget of the measurement.
        threads: Torch threads while measuring, restored after; `None` keeps their number.
        fewest_pairs: Pairs of passes that are made whatever they take.
        clock: Nanoseconds; for tests.

    Returns:
        Median seconds in one pass for each innermost module that ran (several calls of one module are added), and under
        "" the rest of the pass. They sum to the median pass, unless the modules alone exceed it: then "" is 0.

    Raises:
        ValueError: if the model is in train mode or compiled, or budget or pairs are not positive.
    """
    if model.training:
        raise ValueError(
            f"module_times needs {type(model).__name__} in eval mode, but model.training is True; call model.eval() "
            "first (a forward pass in train mode would also change its batch statistics)."
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ValueError(f"{type(model).__name__} is compiled and has no modules at run time; pass model._orig_mod.")
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be a positive number, got {seconds!r}.")
    if fewest_pairs < 1:
        raise ValueError(f"module_times needs at least one pair of passes, got fewest_pairs={fewest_pairs!r}.")
    keep_memory()
    with torch.no_grad(), pinned_threads(threads):
        start = clock()
        leaves = _innermost(model, inputs)
        plain: list[float] = []
        inside: dict[str, list[float]] = {name: [] for name in leaves}
        while len(plain) < fewest_pairs or clock() - start < seconds * 1e9:
            begun = clock()
            call(model, inputs)
            plain.append((clock() - begun) / 1e9)
            for name, spent in _one_pass(model, inputs, leaves, clock).items():
                inside[name].append(spent)
    times = {name: statistics.median(spent) for name, spent in inside.items()}
    return times | {"": max(0.0, statistics.median(plain) - sum(times.values()))}


def _innermost(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, nn.Module]:
    """Return the modules that ran and called no other; attention is one, as it never calls the projection it owns."""
    names = {module: name for name, module in model.named_modules()}
    stack: list[nn.Module] = []
    ran: dict[str, nn.Module] = {}
    outer: set[str] = {""}

    def enter(module: nn.Module, _: Any) -> None:
        """Its callers are not innermost."""
        outer.update(names[caller] for caller in stack)
        ran[names[module]] = module
        stack.append(module)

    def leave(module: nn.Module, *_: Any) -> None:
        """Back to its caller."""
        stack.pop()

    with _hooked(names, enter, leave):
        call(model, inputs)
    return {name: module for name, module in ran.items() if name not in outer}


def _one_pass(
    model: nn.Module, inputs: tuple[Any, ...], leaves: dict[str, nn.Module], clock: Clock
) -> dict[str, float]:
    names = {module: name for name, module in leaves.items()}
    spent = dict.fromkeys(leaves, 0)
    begun = 0

    def enter(*_: Any) -> None:
        """Start the clock."""
        nonlocal begun
        begun = clock()

    def leave(module: nn.Module, *_: Any) -> None:
        """Add what the module took."""
        spent[names[module]] += clock() - begun

    with _hooked(names, enter, leave):
        call(model, inputs)
    return {name: nanoseconds / 1e9 for name, nanoseconds in spent.items()}


@contextmanager
def _hooked(modules: dict[nn.Module, str], enter: Any, leave: Any) -> Iterator[None]:
    """Hooks nearest to the forward itself: the last before it and the first after it."""
    handles: list[RemovableHandle] = []
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, prepend=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
