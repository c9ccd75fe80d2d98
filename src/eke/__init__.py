"""eke makes PyTorch models cheaper and proves it.

    result = eke.compress(model, batches, loss=loss, budget=eke.Budget(max_drop="1%", latency="0.5x"))
    result.save("compressed")
    model = eke.load("compressed", architecture)

The names below are loaded on first use, so that `import eke` costs little and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from . import (
        compression,
        cost,
        curvature,
        demo,
        linalg,
        nn,
        ops,
        optim,
        patterns,
        report,
        search,
        sites,
        solvers,
        sparsity,
        structures,
        unrolled,
    )
    from ._types import Counts
    from .compression import Budget, Result, Task, compress, front, load, survey
    from .linalg import best_chain, factorize
    from .patterns import Chain, KSPattern, enumerate_chains

_LOCATIONS = {
    "Budget": "compression",
    "Chain": "patterns",
    "Counts": "_types",
    "KSPattern": "patterns",
    "Result": "compression",
    "Task": "compression",
    "best_chain": "linalg",
    "compress": "compression",
    "enumerate_chains": "patterns",
    "factorize": "linalg",
    "front": "compression",
    "load": "compression",
    "survey": "compression",
    "compression": "",
    "cost": "",
    "curvature": "",
    "demo": "",
    "linalg": "",
    "nn": "",
    "ops": "",
    "optim": "",
    "patterns": "",
    "report": "",
    "search": "",
    "sites": "",
    "solvers": "",
    "sparsity": "",
    "structures": "",
    "unrolled": "",
}
"""Where each public name lives: the room that defines it, or nothing for a room itself."""

__all__ = [
    "Budget",
    "Chain",
    "Counts",
    "KSPattern",
    "Result",
    "Task",
    "__version__",
    "best_chain",
    "compress",
    "compression",
    "cost",
    "curvature",
    "demo",
    "enumerate_chains",
    "factorize",
    "front",
    "linalg",
    "load",
    "nn",
    "ops",
    "optim",
    "patterns",
    "report",
    "search",
    "sites",
    "solvers",
    "sparsity",
    "structures",
    "survey",
    "unrolled",
]


def __getattr__(name: str) -> object:
    """Load a public name on first use.

    Args:
        name: Name of an attribute.

    Returns:
        The room, class or function.

    Raises:
        AttributeError: if the name is not public, with the nearest one that is.
    """
    if name not in _LOCATIONS:
        from ._errors import suggest

        hint = suggest(name, _LOCATIONS) if not name.startswith("_") else ""
        raise AttributeError(f"module 'eke' has no attribute {name!r}.{hint}", name=name)
    room = _LOCATIONS[name]
    module = importlib.import_module(f".{room or name}", __name__)
    value: object = getattr(module, name) if room else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted(__all__)
