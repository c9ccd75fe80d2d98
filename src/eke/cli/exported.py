"""Programs saved by torch.export (FILE.pt2), to be looked at.

Such a program is a graph of operations. Its modules keep their names and tensors, but not their classes, so there is
nothing that eke could cut or replace; what each module weighs, computes and takes can be said.

A file that holds pickles or compiled libraries is refused, since reading these runs what they say. torch.export's own
reader is used for the rest: read only files that you trust.
"""

from __future__ import annotations

import io
import json
import pathlib
import zipfile
from typing import TYPE_CHECKING

from .examples import Inputs
from .session import UsageError

if TYPE_CHECKING:
    from torch import nn

    from ..report import SiteLine

SUFFIX = ".pt2"
_KINDS = {"conv": "conv", "linear": "linear", "addmm": "linear", "matmul": "linear", "embedding": "embedding"}
SENTENCE = "An exported program: its modules are counted and timed. Nothing in it can be cut or replaced."
_CODE = ("custom_obj", "opaque_obj", "/aotinductor/", "/executorch/", "serialized_")


def is_exported(spec: str) -> bool:
    """Return whether a spec names a file of torch.export."""
    return spec.endswith(SUFFIX)


def is_program(model: nn.Module) -> bool:
    """Return whether a model came from `load_exported`."""
    from torch.export.unflatten import UnflattenedModule

    return isinstance(model, UnflattenedModule)


def load_exported(path: pathlib.Path) -> tuple[nn.Module, Inputs | None]:
    """Read a program as a module with its modules inside.

    Args:
        path: What torch.export.save wrote.

    Returns:
        A module that is called as the program was, and the inputs that it was exported with, if the file has them.

    Raises:
        UsageError: if the file is none, reading it would run code, or its inputs are of both kinds.
    """
    import torch

    _refuse_code(path)
    try:
        program = torch.export.load(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(f"torch.export.load of torch {torch.__version__} cannot read {path}: {reason}.") from error
    arguments, named = program.example_inputs or ((), {})
    if arguments and named:
        raise UsageError(
            f"{path} was exported with positional and named inputs ({', '.join(named)}): export it with one kind."
        )
    model = torch.export.unflatten(program).eval()
    for module in model.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            node.meta = {}  # shapes as tensors without data, which copies of the model stumble over
    return model, tuple(arguments) or dict(named) or None


def _refuse_code(path: pathlib.Path) -> None:
    """Raise UsageError unless the file is an archive of plain tensors and graphs."""  # noqa: DOC501
    import torch

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            found = [name for name in names if any(part in name.lower() for part in _CODE)]
            if len({name.lower() for name in names}) < len(names):
                found.append("two entries of one name")
            for name in names:
                if name.endswith("_config.json") and "/data/" in name:
                    entries = json.loads(archive.read(name)).get("config", {})
                    found += [f"{name}: {key}" for key, entry in entries.items() if entry.get("use_pickle")]
                elif name.endswith(".pt"):
                    try:
                        torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                    except Exception:
                        found.append(name)
    except (zipfile.BadZipFile, ValueError) as error:
        raise UsageError(f"{path} is not a file of torch.export.save: {error}.") from error
    if found:
        raise UsageError(
            f"{path} holds objects that run code when they are read ({', '.join(found[:3])}): export the model again "
            "without them, or give FILE.py:FUNCTION."
        )


def lines(model: nn.Module, flops: dict[str, int], times: dict[str, float]) -> tuple[SiteLine, ...]:
    """Describe the matrices of a program.

    Args:
        model: From `load_exported`.
        flops: By module.
        times: By innermost module; "" is the rest.

    Returns:
        One line for each parameter with two dimensions or more; numbers of a module stand at its first.
    """
    from ..report import SiteLine

    whole, found = sum(times.values()), []
    for name, module in model.named_modules():
        matrices = [(k, p) for k, p in module._parameters.items() if p is not None and p.dim() > 1]
        for index, (key, tensor) in enumerate(matrices):
            first = index == 0
            found.append(
                SiteLine(
                    name if len(matrices) == 1 and name else f"{name}.{key}".lstrip("."),
                    _kind(module, key),
                    (tensor.shape[0], tensor.numel() // tensor.shape[0]),
                    parameters=tensor.numel(),
                    flops=flops.get(name) if first else None,
                    share_of_time=times[name] / whole if first and name in times else None,
                )
            )
    return tuple(found)


def _kind(module: nn.Module, key: str) -> str:
    """Return what reads a parameter, by the first operation that does."""
    for node in getattr(getattr(module, "graph", None), "nodes", ()):
        if node.op == "get_attr" and node.target == key:
            words = [str(user.target) for user in node.users]
            return next((kind for word in words for part, kind in _KINDS.items() if part in word), "parameter")
    return "parameter"
