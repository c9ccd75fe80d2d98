"""The compiled kernel beside an operation's Python files, loaded by ctypes; without one torch does the work."""

from __future__ import annotations

import ctypes
import logging
from importlib import machinery
from pathlib import Path

_LOGGER = logging.getLogger(__name__)


def load(folder: Path, symbol: str, *, what: str) -> ctypes.CDLL | None:
    """Load the kernel of one operation.

    Args:
        folder: Of the operation.
        symbol: A function that this version's kernel has.
        what: What is slower without it, in the plural, for the log.

    Returns:
        The library, or None where there is none that works (why is said in the log).
    """
    # Another Python's build may lie beside this one's.
    for path in (folder / f"_cpu{suffix}" for suffix in machinery.EXTENSION_SUFFIXES):
        if not path.exists():
            continue
        try:
            loaded = ctypes.CDLL(str(path))
        except OSError as error:
            _LOGGER.warning("The compiled kernel %s cannot be loaded (%s).", path.name, error)
            continue
        if hasattr(loaded, symbol):
            return loaded
        _LOGGER.warning("The compiled kernel %s belongs to an older version; build it anew.", path.name)
    _LOGGER.warning(
        "%s run on torch's own operations: no compiled kernel was found in %s. Install eke where a C++ compiler is "
        "present to have it built.",
        what,
        folder,
    )
    return None
