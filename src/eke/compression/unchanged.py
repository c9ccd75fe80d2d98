"""What of a model has no option at all: named where a budget is too small, so that the reader knows what is in the way.

A matrix has an option if it is a candidate's site, a side of a channel group, or inside a block that may be left out.
Vectors (biases, normalisations) are not named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..sites import skipped
from .candidates import Decisions

_NAMES, _SHARE = 3, 0.01
"""Most that are named, and the least share of a model's entries that is worth it."""


def unchanged(model: nn.Module, decisions: Decisions, *, skip: Iterable[str] = ()) -> str:
    """Name the largest parameters that no plan makes smaller.

    Args:
        model: The original.
        decisions: The candidates.
        skip: Names that were to be left alone.

    Returns:
        A sentence with at most three names and why each stays, after a space; "" if all that is large has options.
    """
    changed = {form.site.parameter_name for form in decisions.forms}
    changed |= {member.parameter for width in decisions.widths for member in width.group.members}
    total = sum(parameter.numel() for parameter in model.parameters())
    left = [
        (parameter.numel(), name)
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and name not in changed and not any(block.holds(name) for block in decisions.blocks)
    ]
    large = sorted((item for item in left if item[0] >= _SHARE * total), reverse=True)
    if not large:
        return ""
    reasons = dict.fromkeys(skip, "in skip=") | skipped(model)
    named = [f"{name!r} ({_reason(name, reasons)})" for _, name in large[:_NAMES]]
    more = f" and {len(large) - _NAMES} more" if len(large) > _NAMES else ""
    share = 100 * sum(size for size, _ in large) / total
    return f" {share:.0f} % of the parameters have no option: {', '.join(named)}{more}."


def _reason(name: str, reasons: Mapping[str, str]) -> str:
    """Return why a parameter stays: what is said of it or of a module that holds it, in short."""
    while name and name not in reasons:
        name = name.rpartition(".")[0]
    return reasons[name].partition(": call ")[0] if name else "no structure saves bytes in it, no cut of it is proved"
