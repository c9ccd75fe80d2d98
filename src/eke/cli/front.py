"""`eke compress --front N`: N results between the original and the limits, each an artifact, and the table of all.

The limits of result k of N are limit**(k/N), so the last one has the limits that were given. Statistics, candidates and
measured costs are shared; every result is recovered, saved and verified in a fresh process of its own.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import typer

from .load import load_model, load_task
from .progress import shown
from .recipe import Recipe
from .session import UsageError

if TYPE_CHECKING:
    from ..compression import Budget
    from ..report import Document

FRONT = "front.json"


def budgets_between(budget: Budget, count: int) -> list[Budget]:
    """Return budgets from near the original to the given one, in equal steps of ratios.

    Args:
        budget: The tightest; its limits are relative, such as "0.3x".
        count: How many.

    Returns:
        From loosest to tightest, the last being the given one.

    Raises:
        UsageError: if no cost is limited, or a limit is not relative or not below the original.
    """
    from ..compression import Budget

    if not budget.limited:
        raise UsageError(f"--front needs a limit on a cost, such as --latency 0.3x, got {budget.to_json()}.")
    ratios = {}
    for name in budget.limited:
        small, large = (budget.limit(name, before=before) for before in (1.0, 2.0))
        assert small is not None
        if small == large or not 0 < small < 1:
            raise UsageError(f"--front needs relative limits below 1x, such as 0.3x, got {getattr(budget, name)!r}.")
        ratios[name] = small
    steps = range(1, count)
    looser = [Budget(**{name: f"{ratio ** (k / count):.6g}x" for name, ratio in ratios.items()}) for k in steps]
    return [*looser, budget]


def compress_front(
    wanted: Recipe,
    folder: pathlib.Path,
    count: int,
    *,
    nested: bool,
    base: pathlib.Path | None,
    verify: Callable[[pathlib.Path, Recipe], str | None],
) -> list[Document]:
    """Compress for several budgets and save each result in its own folder.

    Args:
        wanted: What was asked.
        folder: Gets one folder a result, named 1, 2, ..., and front.json.
        count: Number of results.
        nested: Whether tighter plans build on looser ones.
        base: Where the recipe was read from.
        verify: Loads and measures an artifact elsewhere; returns what is wrong.

    Returns:
        The reports, from loosest to tightest.
    """
    from ..compression import Budget, Recovery, front
    from ..compression.result import mark_verified
    from ..cost import pinned_threads, write_bytes

    budgets = budgets_between(Budget(**wanted.budget), count)
    model, task = load_model(wanted, folder=base), load_task(wanted, folder=base)
    wanted = wanted.with_recovery_of(task)
    recovery: Mapping[str, Any] = wanted.recovery
    with pinned_threads(wanted.threads), shown() as progress:
        results = front(
            model, task, budgets=budgets, nested=nested, recovery=replace(task.recovery or Recovery(), **recovery),
            skip=wanted.skip, seed=wanted.seed, threads=wanted.threads, seconds=wanted.seconds, progress=progress,
            title=task.name if wanted.task else f"{type(model).__name__} of {wanted.model}",
        )  # fmt: skip
    documents = []
    for number, result in enumerate(results, start=1):
        place = folder / str(number)
        own = replace(wanted, budget=result.budget.to_json())
        replace(result, recipe=own.to_json()).save(place)
        problem = verify(place, own)
        if problem is not None:
            typer.echo(f"error: result {number} could not be verified: {problem}", err=True)
            documents.append(result.document())
        else:
            documents.append(mark_verified(place))
    summary = [
        {"folder": str(number), "budget": result.budget.to_json(), **vars(result.front_point)}
        for number, result in enumerate(results, start=1)
    ]
    write_bytes(folder / FRONT, (json.dumps(summary, indent=1) + "\n").encode())
    return documents
