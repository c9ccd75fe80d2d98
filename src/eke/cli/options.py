"""Options that several verbs share, written once."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="FILE.py:FUNCTION that returns a torch.nn.Module, or the module itself, torchvision:NAME, timm:NAME or "
        "hf:NAME_OR_FOLDER.",
        show_default=False,
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="FILE.py:FUNCTION",
        help="Returns an eke.Task or a dictionary with calibration, selection and report.",
        show_default=False,
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="NAME", help="A trained network with its data: demo, or a published one.", show_default=False
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads of torch (its own choice if not given).", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document; everything else goes to stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
