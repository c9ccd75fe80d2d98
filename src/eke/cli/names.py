"""Names that people type: checked against what there is, with the nearest one in the message."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from .._errors import suggest
from .session import UsageError


def check(given: str, allowed: Collection[str], what: str) -> str:
    """Return a name that is allowed.

    Args:
        given: What was typed.
        allowed: What there is; "a.b" is also meant by "b".
        what: Start of the message, such as "The recipe has no key".

    Returns:
        The name.

    Raises:
        UsageError: if it is not allowed, with the nearest one that is.
    """
    if given in allowed:
        return given
    inside = next((name for name in allowed if name.rpartition(".")[2] == given), None)
    hint = f" Did you mean {inside!r}?" if inside else suggest(given, allowed)
    raise UsageError(f"{what} {given!r}.{hint}")


def check_all(given: Iterable[str], allowed: Collection[str], what: str) -> None:
    """Check several names as `check` does."""
    for name in given:
        check(str(name), allowed, what)
