"""How a verb speaks: errors as one paragraph, warnings as one line, JSON alone on stdout.

An error of eke's own becomes `error: ...` and an exit code: 2 where what was typed cannot be meant, 1 otherwise. An
exception out of the user's file is theirs to see: its traceback is printed, from their file on. What is neither is a
defect of eke and keeps its whole traceback.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import sysconfig
import traceback
import warnings
from collections.abc import Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, NoReturn, TextIO

import typer

MARK = "__eke_spec__"
"""Global name that the modules loaded from a user's file carry: how they were asked for."""

_HOME = str(pathlib.Path(__file__).resolve().parent.parent)
_EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError)


class UsageError(ValueError):
    """What was typed cannot be meant: an unknown name, a missing argument, a contradiction."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with the line that says how to go on."""


def exit_code(error: BaseException) -> int:
    """Return the exit code that stands for an error; 3 where plans were measured and none kept the budget."""
    if getattr(error, "proved", True) is False:
        return 3
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UsageError) else 1


def describe(error: BaseException) -> str | None:
    """Return what a person is told about an error, or None if it is a defect of eke.

    Args:
        error: What was raised.
    """
    if isinstance(error, KeyboardInterrupt):
        return str(error) or "interrupted"
    if frames := _from_user_file(error.__traceback__):
        return f"error in {_file(frames)}:\n{_shown(error, frames)}"
    # What a loss, a score or a loader of the user's raised is the cause of what eke says about it.
    cause = error.__cause__
    if cause is not None and isinstance(error, _EXPECTED) and (frames := _from_user_file(cause.__traceback__)):
        return f"error: {_sentence(error)}\nin {_file(frames)}:\n{_shown(cause, frames)}"
    if isinstance(error, SyntaxError):
        return "error: " + "".join(traceback.format_exception_only(error)).strip()
    return f"error: {_sentence(error)}" if isinstance(error, _EXPECTED) else None


def _file(frames: TracebackType) -> str:
    """Return the user's file as it was asked for; a file may hold several functions that were."""
    return str(frames.tb_frame.f_globals[MARK]).rpartition(":")[0]


def _shown(error: BaseException, frames: TracebackType) -> str:
    """Return the traceback down to the last line of a file of the user's; what libraries do below it says little."""
    told = traceback.TracebackException(type(error), error, frames)
    own = [place for place, (frame, _) in enumerate(traceback.walk_tb(frames)) if not _is_library(frame)]
    told.stack = traceback.StackSummary.from_list(told.stack[: own[-1] + 1])
    return "".join(told.format()).rstrip()


def _is_library(frame: FrameType) -> bool:
    """Return whether a frame runs code of an installed package, of Python itself or of eke."""
    file = frame.f_code.co_filename
    return "site-packages" in file or file.startswith((sysconfig.get_path("stdlib"), _HOME, "<frozen"))


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}." if error.filename is None else f"{error.filename}: {error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


def _from_user_file(frames: TracebackType | None) -> TracebackType | None:
    while frames is not None and MARK not in frames.tb_frame.f_globals:
        frames = frames.tb_next
    return frames


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    typer.echo(f"warning: {' '.join(str(message).split())}", err=True)


@contextlib.contextmanager
def session(*, as_json: bool, debug: bool) -> Iterator[None]:
    """Run a verb's work.

    Args:
        as_json: Keep stdout free for one JSON document: what the work prints goes to stderr, and an error is a
            document too.
        debug: Let errors through with their traceback.

    Yields:
        Nothing.

    Raises:
        Exit: after an error was told.
    """  # noqa: DOC501
    quiet = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    try:
        with warnings.catch_warnings(), quiet:
            warnings.showwarning = _warn
            yield
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        told = describe(error)
        if debug or told is None:
            raise
        typer.echo(told, err=True)
        if as_json:
            emit({"error": told.removeprefix("error: "), "exit_code": exit_code(error)})
        leave(exit_code(error))


def leave(code: int) -> NoReturn:
    """End the verb with an exit code.

    Raises:
        Exit: always.
    """
    raise typer.Exit(code)


def emit(document: Mapping[str, Any]) -> None:
    """Print a JSON document on stdout."""
    typer.echo(json.dumps(document, indent=1, allow_nan=False))
