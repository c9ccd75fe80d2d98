"""Settings looked at before any work: what was given, what is allowed, what was probably meant."""

from __future__ import annotations

import inspect
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .._errors import error_line, own_words
from ..structures import Structure
from .budget import RESOURCES, Budget
from .recover import Recovery


def check_call(name: str, function: object, *arguments: str) -> None:
    """Refuse what cannot be called with so many positional arguments.

    Args:
        name: Of the argument of `compress`.
        function: What was given for it.
        *arguments: What it is called with, for the message.

    Raises:
        TypeError: if it is no function, or takes other arguments.
    """
    wanted = f"{name}({', '.join(arguments)})"
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{name} must be a function, called as {wanted}, got {function!r:.60}.")
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # Some callables have none; calling them will tell.
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(f"{name} is called as {wanted}, but what was given takes {signature}: {error}.") from error


def check_budget(budget: object) -> Budget:
    """Refuse what is no budget, and limits that were meant in another unit.

    Args:
        budget: What was given.

    Returns:
        The budget.

    Raises:
        TypeError: if it is no `Budget`.
        ValueError: if a limit allows more than the model costs now, or less than one byte or operation.
    """
    if not isinstance(budget, Budget):
        fields = ", ".join(f"{k}={v!r}" for k, v in budget.items()) if isinstance(budget, Mapping) else "size='0.5x'"
        raise TypeError(f"budget must be an eke.Budget, got {budget!r:.60}: write eke.Budget({fields}).")
    for name in RESOURCES:
        asked = getattr(budget, name)
        if asked is None:
            continue
        # A relative limit grows with the cost it refers to; an absolute one does not.
        once, twice = budget.limit(name, before=1.0), budget.limit(name, before=2.0)
        assert once is not None
        assert twice is not None
        if twice != once and once > 1:
            raise ValueError(
                f"Budget.{name}={asked!r} allows more than the model costs now, so it limits nothing: half of it is "
                "'0.5x' or '50%'."
            )
        if twice == once and once < 1 and name != "latency":
            raise ValueError(
                f"Budget.{name}={asked!r} has no unit and means less than one: for a share of what the model costs now "
                f"write '{asked}x'."
            )
    return budget


def check_settings(
    *,
    recovery: object,
    skip: object,
    seed: object,
    threads: object,
    seconds: object,
    recipe: object,
    folder: object,
    resume: bool = False,
) -> None:
    """Refuse settings that cannot be meant.

    Args:
        recovery: A `Recovery` or None.
        skip: Names.
        seed: Whole, not negative.
        threads: Whole and positive, or None.
        seconds: Positive.
        recipe: Plain values or None.
        folder: A path or None.
        resume: Needs a folder.

    Raises:
        TypeError: if one has the wrong type.
        ValueError: if one is out of range.
    """
    if recovery is not None and not isinstance(recovery, Recovery):
        steps = recovery if isinstance(recovery, int) else 900
        raise TypeError(
            f"recovery must be an eke.compression.Recovery or None, got {recovery!r:.60}: Recovery(steps={steps})."
        )
    if isinstance(skip, str) or not isinstance(skip, Iterable):
        raise TypeError(f"skip must be a list of names, got {skip!r:.60}: write skip=[{str(skip)!r:.60}].")
    if unnamed := [name for name in skip if not isinstance(name, str)]:
        raise TypeError(
            f"skip takes names of modules or sites as in model.named_modules(), got {type(unnamed[0]).__name__}."
        )
    for name, value, least in (("seed", seed, 0), ("threads", threads, 1)):
        if value is None and name == "threads":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number from {least} up, got {value!r}.")
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be a positive number of seconds, such as 3, got {seconds!r}.")
    if folder is not None and not isinstance(folder, (str, pathlib.Path)):
        raise TypeError(f"folder must be a path, got {folder!r:.60}.")
    if resume and folder is None:
        raise ValueError(f"resume={resume} needs folder=, where the interrupted run was kept.")
    _check_recipe(recipe)


def _check_recipe(recipe: object) -> None:
    if recipe is None:
        return
    if not isinstance(recipe, Mapping):
        raise TypeError(f"recipe must be a dictionary of plain values, kept with the result, got {recipe!r:.60}.")
    try:
        json.dumps(dict(recipe))
    except (TypeError, ValueError) as error:
        raise TypeError(f"recipe must hold plain values (text, numbers, lists, dictionaries): {error}.") from error


def check_structures(structures: object) -> tuple[Structure, ...]:
    """Refuse what are no structures.

    Args:
        structures: What was given.

    Returns:
        The structures.

    Raises:
        TypeError: if they are no list, one is no structure, or has no repr of its own.
    """
    if isinstance(structures, Structure) and not isinstance(structures, type):
        raise TypeError(f"structures must be a list, got {structures!r}: write structures=[{structures!r}].")
    if isinstance(structures, str) or not isinstance(structures, Iterable):
        raise TypeError(
            f"structures must be a list of structures, got {structures!r:.60}: write for example "
            "structures=[eke.structures.UniformGrid(8)]."
        )
    found = tuple(structures)
    wrong = [s for s in found if isinstance(s, type) or not isinstance(s, Structure)]
    if wrong:
        instead = f"{wrong[0].__name__}(...), an instance" if isinstance(wrong[0], type) else "UniformGrid(8)"
        raise TypeError(
            f"structures must have project, bits, check and exactness, got {wrong[0]!r} of {type(wrong[0]).__name__}: "
            f"write for example {instead}."
        )
    nameless = [s for s in found if f"0x{id(s):x}" in repr(s).lower()]
    if nameless:
        raise TypeError(
            f"structures are recognised by their repr, and that of {nameless[0]!r} is another one in every process: "
            "give its class a __repr__, or make it a dataclass."
        )
    return found


def checked_solver(solver: Callable[..., Any]) -> Callable[..., Tensor]:
    """Return the solver with its answers looked at: they must be tensors.

    Args:
        solver: `solver(structure, weight, metric)`.
    """
    check_call("solver", solver, "structure", "weight", "metric")

    def solve(structure: Any, weight: Tensor, metric: Any) -> Tensor:
        try:
            found = solver(structure, weight, metric)
        except Exception as error:
            if own_words(error):
                raise
            raise ValueError(
                f"The solver raised {type(error).__name__}: {error_line(error)}, for {structure} and a matrix "
                f"{tuple(weight.shape)}: return structure.project(weight) where nothing better is found."
            ) from error
        if not isinstance(found, Tensor):
            raise TypeError(
                f"The solver returned {type(found).__name__} for {structure}, where a member of it is needed, a tensor "
                f"{tuple(weight.shape)}: return structure.project(weight) where nothing better is found."
            )
        return found

    return solve


def check_budgets(budgets: object) -> Sequence[Budget]:
    """Refuse what is no list of budgets that each limit a cost.

    Args:
        budgets: What was given.

    Returns:
        The budgets.

    Raises:
        TypeError: if it is no list of budgets.
        ValueError: if there is none, or one limits no cost.
    """
    if isinstance(budgets, (Budget, str)) or not isinstance(budgets, Iterable):
        raise TypeError(f"budgets must be a list of eke.Budget, got {type(budgets).__name__}: write budgets=[...].")
    found = [check_budget(budget) for budget in budgets]
    costless = [budget for budget in found if not budget.limited]
    if not found or costless:
        raise ValueError(f"front needs budgets that each limit a cost, got {costless or found}.")
    return found
