"""Files that are either whole or absent, and the record of what a run has finished.

Every file is written under another name and moved into place; a run that is killed at any moment leaves only whole
files (and at most one hidden `.part`). A stage of a run is done when its file exists; a run that is continued must have
been started with the same recipe, which `Run` compares key by key.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from ..cost import write_bytes


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or start again in a new folder.") from error


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder with all that it is in.

    Args:
        folder: May be there already.

    Raises:
        OSError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        blocking = next((path for path in (folder, *folder.parents) if path.is_file()), None)
        reason = f"{blocking} is a file" if blocking else error.strerror
        raise OSError(
            error.errno, f"{folder} cannot be made ({reason}): give the path of a folder where you may write"
        ) from error


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def together(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Write several files and move them into place at the end, so that a full disk leaves what was there before.

    Args:
        folder: Where the files will be; made if it is not there.

    Yields:
        An empty folder to write them to. The file named plan.json is taken away first and moved last: a kill in between
        leaves a folder that is no artifact, never one whose files do not belong together.
    """
    staged = folder / ".new"
    make_folder(folder)
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
        (folder / "plan.json").unlink(missing_ok=True)
        for path in sorted(staged.iterdir(), key=lambda path: path.name == "plan.json"):
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


class Run:
    """The folder of a run that can be continued.

    Args:
        folder: Where stages are kept; None keeps them in memory only.
        recipe: What the run was started with.
        resume: Continue what is there; otherwise a new run begins and old stages are removed.

    Raises:
        ValueError: if the run to be continued was started with another recipe, or the folder holds other files.
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: pathlib.Path | None, recipe: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self._counts: dict[str, int] = {}
        if folder is None:
            return
        recipe = json.loads(json.dumps(recipe))
        start = folder / _START
        make_folder(folder)
        if any(folder.iterdir()) and not (folder / _MARK).exists():
            raise ValueError(
                f"{folder} holds files that are not of a run ({min(path.name for path in folder.iterdir())}, ...): "
                "give a new or empty folder."
            )
        if resume and start.exists():
            _check_same(folder, read_json(start), recipe)
            return
        (folder / _MARK).touch()
        _clear(folder)
        write_json(start, recipe)

    def opening(self, split: str) -> None:
        """Count that a split is about to be looked at; the count survives a kill."""
        counts = self.openings()
        self._counts = {**counts, split: counts.get(split, 0) + 1}
        self.put("openings", self._counts)

    def openings(self) -> dict[str, int]:
        """Return how often each split was looked at, earlier parts of a continued run included."""
        return dict(self.get("openings") or self._counts)

    def path(self, name: str) -> pathlib.Path | None:
        """Return the path of a stage's file, or None if the run is in memory only."""
        return self.folder / name if self.folder is not None else None

    def get(self, stage: str) -> Any | None:
        """Return the content of a finished stage, or None."""
        path = self.path(f"{stage}.json")
        return read_json(path) if path is not None and path.exists() else None

    def put(self, stage: str, document: Any) -> Any:
        """Return a stage's content as it will be read back, once it is recorded as finished."""
        path = self.path(f"{stage}.json")
        if path is not None:
            write_json(path, document)
        return json.loads(json.dumps(document))

    def finish(self) -> None:
        """Remove the stages: the artifact stands for them."""
        if self.folder is not None and self.folder.exists():
            _clear(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)


_START, _MARK = "recipe.json", ".eke-run"


def _check_same(folder: pathlib.Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with another recipe.

    Raises:
        ValueError: if an entry differs; names it.
    """
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise ValueError(
            f"The run in {folder} was started with another recipe; {changed[0]} was {before.get(changed[0])!r} and is "
            f"now {now.get(changed[0])!r}. Resume with the same, or start again without resume."
        )


def _clear(folder: pathlib.Path) -> None:
    """Remove all stages: first the record that makes them count, so that a kill in between leaves no half run."""
    (folder / _START).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name != _MARK:
            path.unlink()
