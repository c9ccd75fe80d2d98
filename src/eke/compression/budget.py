"""What may be spent: limits on time, bytes, work and loss of quality, several at once.

A quantity is a number with a unit. Relative ones refer to the model that is compressed: "0.5x" and "50%" are half of
what it costs now. Absolute ones: "3ms", "400kB", "1.5GMAC", plain numbers for counts. `max_drop` is a loss of quality:
"1%" is one percentage point where the evaluation counts correct samples, and one percent of the original's metric
elsewhere: an error or a perplexity of at most 1.01 times, a mean IoU of at least 0.99 times what it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields

_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_UNITS: Mapping[str, Mapping[str, float]] = {
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6},
    "size": _BYTES,
    "macs": {"": 1.0, "mac": 1.0, "kmac": 1e3, "mmac": 1e6, "gmac": 1e9, "tmac": 1e12},
    "parameters": {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9},
    "peak_memory": _BYTES,
}
_NUMBER = re.compile(
    r"^\s*([0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)(?:\s*/\s*([0-9]*\.?[0-9]+))?\s*([a-z%]*)\s*$", re.IGNORECASE
)

RESOURCES = ("latency", "size", "macs", "parameters", "peak_memory")
"""Costs that a budget can limit, in the order in which reports show them."""


def _split(name: str, quantity: str | float) -> tuple[float, str]:
    """Return the number and the lower-case unit of a quantity.

    Args:
        name: Field of `Budget`, for messages.
        quantity: What was given.

    Returns:
        The number, positive and finite, and the unit ("" for none).

    Raises:
        TypeError: if it is neither a number nor text.
        ValueError: if it cannot be read, or is not positive and finite.
    """
    if isinstance(quantity, bool) or not isinstance(quantity, (int, float, str)):
        raise TypeError(f"Budget.{name} must be a number or text such as '0.5x', got {quantity!r}.")
    match = _NUMBER.match(str(quantity))
    if match is None:
        raise ValueError(f"Budget.{name} could not be read: {quantity!r}. Write for example {_example(name)}.")
    divisor = float(match[2] or 1)
    value = float(match[1]) / divisor if divisor else math.inf
    if not math.isfinite(value) or value <= 0:
        advice = "; samples never prove a drop of 0: give '0.5%', or leave it out" if name == "max_drop" else ""
        raise ValueError(f"Budget.{name} must be positive and finite, got {quantity!r}{advice}.")
    return value, match[3].lower()


def _example(name: str) -> str:
    """Return valid ways to write the budget `name`."""
    absolute = {"latency": "3ms", "size": "400kB", "macs": "1.5GMAC", "parameters": "2.5M", "peak_memory": "64MB"}
    return f"'0.5x', '50%' or '{absolute[name]}'" if name in absolute else "'1%' or 0.01"


def show(name: str, value: float) -> str:
    """Write a resource's value with a unit that suits its magnitude.

    Args:
        name: One of `RESOURCES`.
        value: Seconds, bytes, multiply-adds or a count.

    Returns:
        Text such as "4.7 MB".
    """
    if name == "latency":
        factor, unit = next(((f, u) for f, u in ((1.0, "s"), (1e-3, "ms")) if value >= f), (1e-6, "us"))
        return f"{value / factor:.4g} {unit}"
    unit = {"size": "B", "peak_memory": "B", "macs": "MAC", "parameters": ""}[name]
    for thousand, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= thousand:
            return f"{value / thousand:.4g} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()


@dataclass(frozen=True)
class Budget:
    """Limits for `compress`; what is None is not limited.

    Args:
        max_drop: Largest loss of quality, such as "1%".
        latency: Time of one forward pass of the example batch, such as "0.5x" or "3ms".
        size: Bytes of the stored weights, such as "1/12x" or "400kB".
        macs: Multiply-adds of one forward pass of the example batch, such as "0.3x" or "1.5GMAC".
        parameters: Number of parameters, such as "0.5x" or "2.5M".
        peak_memory: Bytes of weights and live activations, such as "0.5x" or "64MB".

    Raises:
        TypeError: if a limit is neither a number nor text.
        ValueError: if a limit cannot be read, or if there is none at all.
    """

    max_drop: str | float | None = None
    latency: str | float | None = None
    size: str | float | None = None
    macs: str | float | None = None
    parameters: str | float | None = None
    peak_memory: str | float | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, field.name) is None for field in fields(self)):
            raise ValueError(
                "Budget() limits nothing, got None for every field: give at least one, for example "
                "Budget(max_drop='1%', latency='0.5x')."
            )
        for name in self.limited:
            self.limit(name, before=1.0)
        if self.max_drop is not None:
            _ = self.drop

    @property
    def limited(self) -> tuple[str, ...]:
        """Names of the limited resources, without `max_drop`."""
        return tuple(name for name in RESOURCES if getattr(self, name) is not None)

    @property
    def drop(self) -> float | None:
        """Largest loss of quality as a share (0.01 for "1%").

        Raises:
            ValueError: if its unit is not a percent sign, or it is one or more.
        """
        if self.max_drop is None:
            return None
        value, unit = _split("max_drop", self.max_drop)
        if unit not in ("", "%"):
            raise ValueError(f"Budget.max_drop has the unknown unit {unit!r} in {self.max_drop!r}: write '1%' or 0.01.")
        share = value / 100 if unit == "%" else value
        if share >= 1:
            raise ValueError(f"Budget.max_drop must be below 100 %, got {self.max_drop!r}: one point is '1%' or 0.01.")
        return share

    def limit(self, name: str, *, before: float) -> float | None:
        """Limit of one resource in seconds, bytes, multiply-adds or counts.

        Args:
            name: One of `RESOURCES`.
            before: What the original model costs, in the same unit; relative quantities refer to it.

        Returns:
            The limit, or None if the resource is not limited.

        Raises:
            ValueError: if the unit is not known for this resource.
        """
        quantity = getattr(self, name)
        if quantity is None:
            return None
        value, unit = _split(name, quantity)
        if unit in ("x", "%"):
            return value * before / (100 if unit == "%" else 1)
        units = _UNITS[name]
        if unit not in units:
            allowed = ", ".join(repr(u) for u in ("x", "%", *units) if u)
            what = f"the unknown unit {unit!r}" if unit else "no unit"
            raise ValueError(f"Budget.{name} has {what} in {quantity!r}; allowed: {allowed}.")
        return value * units[unit]

    def to_json(self) -> dict[str, str | float]:
        """Return the limits that are set, as written."""
        return {
            field.name: getattr(self, field.name) for field in fields(self) if getattr(self, field.name) is not None
        }
