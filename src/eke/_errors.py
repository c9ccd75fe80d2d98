"""Errors that say what was given, what is allowed and what to do.

One exception type for what only eke can raise (a missing optional part); for everything else Python's own types.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed."""


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return ' Did you mean ...?' for the allowed words nearest to `word`, or a list of them all.

    Args:
        word: What was given.
        allowed: What is allowed.

    Returns:
        A sentence that starts with a space, ready to be appended to a message.
    """
    words = sorted(allowed)
    near = difflib.get_close_matches(word, words, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Allowed: {', '.join(words)}." if words else ""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional package or say which extra brings it.

    Args:
        module: Module to import.
        extra: eke's extra that installs it.
        purpose: What needs it, as the start of a sentence.

    Returns:
        The imported module.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise MissingExtraError(
            f"{purpose} needs the package {module!r}, which is not installed ({error}). "
            f"Install it with: pip install 'eke[{extra}]'. Everything else works without it."
        ) from error


def error_line(error: BaseException) -> str:
    """Return the first line of an error's text, with its type where the text alone says too little."""
    line = str(error).strip().split("\n")[0].rstrip(".")
    plain = isinstance(error, (RuntimeError, TypeError, ValueError)) and line
    return line if plain else f"{type(error).__name__}: {line}"


def own_words(error: BaseException) -> bool:
    """Return whether eke itself raised an error and says what to do in it, and not what it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    home = __name__.partition(".")[0]
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).partition(".")[0] == home
