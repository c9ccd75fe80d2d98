"""Files that are either whole or absent, and the record of what a run has finished.

Every file is written under another name and moved into place; a run that is killed at any moment leaves only whole
files. A stage of a run is done when its file exists; a run that is continued must have been started with the same
recipe, which `Run` checks by its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Write a file as a whole.

    Args:
        path: Where it will be.
        content: Its bytes.

    Raises:
        OSError: if it cannot be written; what was there before stays.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} could not be written ({error.strerror}); nothing there was changed. Free space and continue with --resume",
        ) from error


def write_json(path: pathlib.Path, document: Any) -> None:
    """Write a JSON document as a whole.

    Args:
        path: Where it will be.
        document: Plain values; numbers that are not finite are refused.
    """
    write_bytes(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: pathlib.Path) -> Any:
    """Read a JSON document.

    Args:
        path: The file.

    Returns:
        Its content.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or start again in a new folder.") from error


def write_tensors(path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as a whole.

    Args:
        path: Where they will be.
        tensors: By name; made contiguous.
        metadata: Stored in the header.
    """
    partial = path.with_name(f".{path.name}.tensors")
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(plain, partial, metadata=dict(metadata))
        partial.replace(path)
    except Exception as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) or "Error" in type(error).__name__:
            raise OSError(
                f"{path} could not be written ({error}); nothing there was changed. Free space and continue with --resume"
            ) from error
        raise


def read_tensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read tensors and metadata.

    Args:
        path: The file.

    Returns:
        Tensors by name, and the header's metadata.
    """
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Run:
    """The folder of a run that can be continued.

    Args:
        folder: Where stages are kept; None keeps them in memory only.
        recipe: What the run was started with.
        resume: Continue what is there; otherwise a new run begins and old stages are removed.

    Raises:
        ValueError: if the run to be continued was started with another recipe.
    """

    def __init__(self, folder: pathlib.Path | None, recipe: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        if folder is None:
            return
        recipe = json.loads(json.dumps(recipe))
        start = folder / "recipe.json"
        if resume and start.exists():
            before = read_json(start)
            changed = sorted(k for k in {*before, *recipe} if before.get(k) != recipe.get(k))
            if changed:
                raise ValueError(
                    f"The run in {folder} was started with another recipe; {changed[0]} was {before.get(changed[0])!r} and is "
                    f"now {recipe.get(changed[0])!r}. Resume with the same, or start again without resume."
                )
            return
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        write_json(start, recipe)

    def path(self, name: str) -> pathlib.Path | None:
        """Path of a stage's file, or None if the run is in memory only."""
        return self.folder / name if self.folder is not None else None

    def get(self, stage: str) -> Any | None:
        """Content of a finished stage, or None."""
        path = self.path(f"{stage}.json")
        return read_json(path) if path is not None and path.exists() else None

    def put(self, stage: str, document: Any) -> Any:
        """Record a stage as finished and return its content as it will be read back."""
        path = self.path(f"{stage}.json")
        if path is not None:
            write_json(path, document)
        return json.loads(json.dumps(document))

    def finish(self) -> None:
        """Remove the stages: the artifact stands for them."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
