"""Strict plain data: frozen dataclasses from parsed JSON and back, every misfit refused by the name of its place.

`build` follows the annotations of a dataclass and wants exactly its keys; `check` walks a finished value and refuses
wrong types, numbers that are not finite and intervals that are upside down. Known annotations: int, float, bool, str,
`Literal`, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, str]` and dataclasses of these.
"""

from __future__ import annotations

import functools
import math
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def build(hint: Any, value: Any, where: str) -> Any:
    """Turn parsed JSON into the dataclasses and tuples that an annotation names.

    Args:
        hint: The annotation.
        value: Parsed JSON; leaves are taken as they are, `check` looks at them.
        where: Name of the place, for messages.

    Returns:
        The value; a missing key, an unknown key or something else than an object is a ValueError.
    """
    if is_dataclass(hint):
        hints = _hints(hint)  # type: ignore[arg-type]
        _same_keys(hints, value, where)
        return hint(**{key: build(h, value[key], f"{where}.{key}") for key, h in hints.items()})  # type: ignore[operator]
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return None if value is None else build(_other(arguments), value, where)
    if get_origin(hint) is tuple and isinstance(value, list):
        inner = arguments if arguments[-1] is not ... else (arguments[0],) * len(value)
        if len(inner) == len(value):
            return tuple(build(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
    return value


def _same_keys(hints: dict[str, Any], value: Any, where: str) -> None:
    allowed = ", ".join(hints)
    if not isinstance(value, dict):
        raise ValueError(
            f"{where} must be an object with the keys {allowed}, got {type(value).__name__} {value!r:.60}."
        )
    for key in value:
        if key not in hints:
            raise ValueError(f"{where} has an unknown key {key!r}; allowed: {allowed}.")
    for key in hints:
        if key not in value:
            raise ValueError(f"{where} lacks the key {key!r}; required: {allowed}.")


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _other(arguments: tuple[Any, ...]) -> Any:
    return next(a for a in arguments if a is not NoneType)


def check(value: Any, hint: Any, where: str) -> None:
    """Refuse what does not fit an annotation with a ValueError.

    Args:
        value: The value.
        hint: The annotation.
        where: Name of the place, for messages.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        _need(isinstance(value, hint), where, hint.__name__, value)  # type: ignore[arg-type, union-attr]
        for key, inner in _hints(hint).items():  # type: ignore[arg-type]
            check(getattr(value, key), inner, f"{where}.{key}")
    elif origin in (Union, UnionType):
        if value is not None:
            check(value, _other(arguments), where)
    elif origin is Literal:
        _need(value in arguments, where, "one of " + ", ".join(map(repr, arguments)), value)
    elif origin is tuple:
        _check_tuple(value, arguments, where)
    elif origin is dict:
        strings = isinstance(value, dict) and all(isinstance(x, str) for pair in value.items() for x in pair)
        _need(strings, where, "a dict of strings", value)
    else:
        _check_leaf(value, hint, where)


def _check_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> None:
    _need(isinstance(value, tuple), where, "a tuple", value)
    open_ended = arguments[-1] is ...
    _need(open_ended or len(value) == len(arguments), where, f"a tuple of {len(arguments)}", value)
    for i, item in enumerate(value):
        check(item, arguments[0] if open_ended else arguments[i], f"{where}[{i}]")
    if arguments == (float, float):
        _need(value[0] <= value[1], where, "(lower, upper) with lower <= upper", value)


def _check_leaf(value: Any, hint: Any, where: str) -> None:
    boolean = isinstance(value, bool)
    if hint is float:
        fine = isinstance(value, int | float) and not boolean and math.isfinite(value)
        _need(fine, where, "a finite float (None when it was not measured)", value)
    elif hint is int:
        _need(isinstance(value, int) and not boolean, where, "an int", value)
    else:
        _need(isinstance(value, hint), where, f"a {hint.__name__}", value)


def _need(fine: bool, where: str, needed: str, value: object) -> None:
    if not fine:
        raise ValueError(f"{where} must be {needed}, got {type(value).__name__} {value!r:.60}.")
