"""`eke doctor`: what is installed, what this machine can do, what is missing and what would bring it."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import pathlib
import re
import sys
import tempfile
from typing import Any

import typer

from .._version import __version__
from .options import DebugOption, JsonOption
from .session import emit, leave, session

PACKAGES = ("torch", "numpy", "scipy", "safetensors", "torch-pruning", "typer", "rich", "pyyaml")
_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+).*;.*extra\s*==\s*['\"]([a-z]+)['\"]")
_TOOLS = ("dev", "docs")


def doctor(*, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Say what is installed and what works here.

    Missing extras are no error. Exit code 1: the demo's data are damaged.
    """
    with session(as_json=as_json, debug=debug):
        found = examined()
    if as_json:
        emit(found)
    else:
        for name, value in found.items():
            typer.echo(f"{name}: {_line(value)}")
    leave(0 if found["demo data"] == "whole" else 1)


def examined() -> dict[str, Any]:
    """Return everything that doctor knows, as plain values."""
    import torch

    from ..cost import environment
    from ..ops import pair_splits, sparse_recovery
    from ..ops.clustered_attention.native import describe as clustered_attention
    from ..ops.decode.native import describe as decode
    from ..ops.ks_matmul import describe
    from ..ops.linear_attention.native import describe as linear_attention
    from ..ops.sparse_matmul import describe as sparse_products

    machine = environment().to_json()
    return {
        "eke": f"{__version__} in {pathlib.Path(__file__).parent.parent}",
        "python": f"{machine['python']} in {sys.executable}",
        "packages": {name: version(name) for name in PACKAGES},
        "torch": f"{torch.__version__} in {pathlib.Path(torch.__file__).parent}",
        "system": machine["system"],
        "processor": machine["cpu"],
        "cores": machine["cores"],
        "threads": machine["threads"],
        "instruction sets": machine["instruction_sets"],
        "torch kernels": machine["torch_kernels"],
        "accelerator": machine["accelerator"],
        "native kernels": {"Kronecker-sparse products": describe()},
        "factorization kernel": pair_splits.describe(),
        "sparse product kernel": sparse_products(),
        "sparse solver kernel": sparse_recovery.describe(),
        "linear attention kernel": linear_attention(),
        "decoding kernel": decode(),
        "clustered attention kernel": clustered_attention(),
        "extras": extras(),
        "demo data": _demo_data(),
        "writable": {str(path): writable(path) for path in (pathlib.Path(tempfile.gettempdir()), _cache())},
    }


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, Any]:
    """Return for each of eke's extras the packages it brings, which are there, and how to install it."""
    found: dict[str, dict[str, str | None]] = {}
    for requirement in metadata.requires("eke") or []:
        match = _REQUIREMENT.match(requirement)
        if match and match[2] not in _TOOLS:
            found.setdefault(match[2], {})[match[1]] = version(match[1])
    return {
        extra: {
            "packages": packages,
            "missing": [name for name, there in packages.items() if there is None],
            "install": f"pip install 'eke[{extra}]'",
        }
        for extra, packages in found.items()
    }


def _demo_data() -> str:
    from ..demo import build, images

    try:
        build()
        for split in ("calibration", "selection", "report"):
            images(split)
    except (OSError, ValueError) as error:
        return f"damaged: {error}"
    return "whole"


def _cache() -> pathlib.Path:
    """Return the folder in which torchvision keeps downloaded weights."""
    import torch

    return pathlib.Path(torch.hub.get_dir())


def writable(folder: pathlib.Path) -> bool:
    """Return whether a folder, or the one in which it would be made, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def _line(value: Any) -> str:
    """Return a value as text; an extra as what is there or how to get it."""
    if isinstance(value, dict):
        return "".join(f"\n  {name}: {_entry(entry)}" for name, entry in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _entry(entry: Any) -> str:
    if isinstance(entry, dict):
        if entry["missing"]:
            return f"missing {', '.join(entry['missing'])}; {entry['install']}"
        return ", ".join(f"{name} {there}" for name, there in entry["packages"].items())
    return {True: "yes", False: "no", None: "missing"}.get(entry, str(entry))
