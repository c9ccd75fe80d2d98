"""`eke search`: a network found without training, with its recipe and a report.

    eke search --space nb201 --macs 50MMAC --out found
    eke search --space my_space.py:space --data my_data.py:batches --proxies zico,naswot --latency 5ms --out found
    eke search --space nb201 --storage journal:search.log --out found      in as many processes as there are

The folder gets the winner (`architecture.json`, `model.safetensors`), `recipe.yaml`, all trials and the report. Started
again with the same question the search goes on; `eke.search.load(FOLDER)` builds the winner.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from .load import call, resolve
from .names import check, check_all
from .options import DebugOption, JsonOption, ThreadsOption
from .progress import shown
from .session import UsageError, emit, session
from .show import draw

if TYPE_CHECKING:
    from ..report import Document
    from ..report.document import PointKind
    from ..search import Found, Limits, Trial
    from ..search.spaces import Space

LOG = "search.jsonl"
_TYPED = {"flops": "macs", "parameters": "parameters", "latency_seconds": "latency", "memory_bytes": "peak_memory"}
"""Limits by the names of `Limits`, and how they are typed."""

_NOISE = 32
_DRAWN = 200


class _Method(Enum):
    """Ways to propose."""

    EVOLUTION = "evolution"
    REGULARIZED = "regularized"
    RANDOM = "random"
    NSGA2 = "nsga2"


def search(
    *,
    space: Annotated[
        str | None,
        typer.Option(metavar="SPACE", help="nb201, mobile, resnet, vit or FILE.py:FUNCTION.", show_default=False),
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(metavar="FOLDER", help="Gets winner, recipe, trials and report.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE.py:FUNCTION", help="Returns batches; noise if not given.", show_default=False),
    ] = None,
    proxies: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="What is fused; a tested fusion if not given.", show_default=False),
    ] = None,
    macs: Annotated[str | None, typer.Option(help="Multiply-adds of a sample, 50MMAC.", show_default=False)] = None,
    parameters: Annotated[str | None, typer.Option(help="Such as 1.5M.", show_default=False)] = None,
    latency: Annotated[str | None, typer.Option(help="Measured, of one sample: 5ms.", show_default=False)] = None,
    peak_memory: Annotated[str | None, typer.Option(help="Of one sample: 20MB.", show_default=False)] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Outputs of a named space.", show_default=False)] = None,
    resolution: Annotated[int | None, typer.Option(min=1, help="Pixels a side.", show_default=False)] = None,
    image_channels: Annotated[int | None, typer.Option(min=1, help="Of the images.", show_default=False)] = None,
    method: Annotated[_Method | None, typer.Option(help="How to propose.", show_default="evolution")] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Networks scored.", show_default="300")] = None,
    storage: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Shared: journal:FILE, sqlite:///FILE, postgresql://...", show_default=False),
    ] = None,
    study: Annotated[str | None, typer.Option(help="Name in the storage.", show_default="eke")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of proposals and weights.", show_default="0")] = None,
    recipe: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Search as a recipe.yaml says.", show_default=False)
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Find a network within limits without training any.

    Scores untrained networks, keeps the limits by closed formulas before anything is built, measures latency and memory
    where they are limited, and goes on where it stopped.
    """  # noqa: DOC501
    given = {
        "space": space, "data": data, "proxies": proxies, "macs": macs, "parameters": parameters, "latency": latency,
        "peak_memory": peak_memory, "classes": classes, "resolution": resolution, "image_channels": image_channels,
        "method": None if method is None else method.value, "evaluations": evaluations, "storage": storage,
        "study": study, "seed": seed, "threads": threads,
    }  # fmt: skip
    with session(as_json=as_json, debug=debug):
        from ..cost import pinned_threads, write_bytes
        from ..report import html

        wanted = _recipe(recipe, given)
        if out.exists() and not out.is_dir():
            raise UsageError(f"--out {out} is a file: give a folder.")
        with pinned_threads(wanted.get("threads")):
            found = _searched(wanted, out)
        found.save(out, seed=wanted.get("seed", 0))
        document = _document(found, wanted)
        write_bytes(out / "report.json", document.to_json().encode())
        write_bytes(out / "report.html", html.render(document).encode())
    if as_json:
        best = found.best
        emit({
            "architecture": best.architecture, "description": found.space.describe(best.architecture),
            "values": {name: value if abs(value) < float("inf") else None for name, value in best.values.items()},
            "costs": best.costs, "scored": len(found.trials), "proposed": found.trials[-1].proposals,
            "folder": str(out),
        })  # fmt: skip
        return
    draw(document, notes=True)
    typer.echo(str(out / "report.html"))


def _recipe(path: pathlib.Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is asked: the recipe's entries, and over them those that were typed."""  # noqa: DOC501
    import yaml

    known: dict[str, Any] = {}
    if path is not None:
        try:
            read = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise UsageError(f"{path} is no YAML: {error}") from error
        section = read.get("search") if isinstance(read, Mapping) else None
        if not isinstance(section, Mapping):
            raise UsageError(f"{path} has no section 'search'; give the recipe.yaml of a search.")
        check_all(section, given, f"{path} has no entry")
        known = dict(section)
    wanted = known | {name: value for name, value in given.items() if value is not None}
    if "space" not in wanted:
        raise UsageError(f"Where to search? Got {wanted}; give --space nb201, mobile, resnet, vit or FILE.py:FUNCTION.")
    return wanted


def _space(wanted: Mapping[str, Any]) -> Space:
    """Return the space that is named."""  # noqa: DOC501
    from ..search.spaces import SPACES, Space

    name = wanted["space"]
    sizes = {key: wanted[key] for key in ("classes", "resolution", "image_channels") if key in wanted}
    if ":" in name:
        made = call(resolve(name))
        if not isinstance(made, Space):
            raise TypeError(f"{name} must return an eke.search.spaces.Space, got {type(made).__name__}.")
        if sizes:
            raise UsageError(f"{name} says itself what the networks are; leave out {', '.join(sizes)}, got {sizes}.")
        return made
    kind = SPACES[check(name, SPACES, "There is no space")]
    return kind(**sizes)


def _limits(wanted: Mapping[str, Any]) -> Limits:
    """Return the limits that were typed."""  # noqa: DOC501
    from ..compression import Budget
    from ..search import Limits

    asked = {name: wanted[name] for name in _TYPED.values() if name in wanted}
    if not asked:
        return Limits(threads=wanted.get("threads") or 1)
    budget, found = Budget(**asked), {}
    for name in asked:
        found[name], other = (budget.limit(name, before=before) for before in (1.0, 2.0))
        if found[name] != other:
            raise UsageError(f"A search has no original to compare with: --{name.replace('_', '-')} {asked[name]}.")
    macs = found.get("macs")
    return Limits(
        flops=None if macs is None else 2 * macs,
        parameters=found.get("parameters"),
        latency_seconds=found.get("latency"),
        memory_bytes=found.get("peak_memory"),
        threads=wanted.get("threads") or 1,
    )


def _searched(wanted: Mapping[str, Any], out: pathlib.Path) -> Found:
    """Return what the search finds."""  # noqa: DOC501
    from ..search import FUSION, PROXIES, Scorer, evolve, share
    from ..search.run import METHODS
    from ..search.tables import PARTS

    space, limits, seed = _space(wanted), _limits(wanted), wanted.get("seed", 0)
    names = tuple(wanted["proxies"].split(",")) if "proxies" in wanted else FUSION
    dotted = {f"{name}.{part}" for name, parts in PARTS.items() for part in parts}
    check_all(names, {*PROXIES, *dotted}, "There is no proxy")
    batches = call(resolve(wanted["data"])) if "data" in wanted else [space.example(_NOISE)]
    if not isinstance(batches, Iterable):
        raise TypeError(f"{wanted['data']} must return batches, got {type(batches).__name__}.")
    objective = Scorer(space, list(batches), names, seed)
    shares = "storage" in wanted or wanted.get("method") == "nsga2"
    if shares and wanted.get("method", "nsga2") != "nsga2":
        raise UsageError(f"--storage is for --method nsga2, got --method {wanted['method']}.")
    evaluations = wanted.get("evaluations", 300)
    out.mkdir(parents=True, exist_ok=True)
    with shown() as progress:
        if shares:
            whole = [name for name in names if name in PARTS]
            scores = [n for n in names if n not in whole] + [f"{n}.{part}" for n in whole for part in PARTS[n]]
            found = share(
                space, objective, limits, storage=wanted.get("storage", f"journal:{out / 'search.log'}"),
                study=wanted.get("study", "eke"), evaluations=evaluations, scores=scores, progress=progress,
                seed=None if "storage" in wanted else seed,
            )  # fmt: skip
        else:
            method = METHODS[wanted.get("method", "evolution")]()
            if hasattr(method, "start"):
                method.start = getattr(space, "start", None)
            found = evolve(
                space, objective, limits, evaluations=evaluations, method=method, seed=seed, log=out / LOG,
                progress=progress,
            )  # fmt: skip
    return dataclasses.replace(found, settings=dict(wanted))


def _document(found: Found, wanted: Mapping[str, Any]) -> Document:
    """Return the report."""
    import yaml

    from ..cost import environment
    from ..report import BudgetLine, Document, FrontPoint, Measured, Score, Verdict
    from ..search.limits import COSTS
    from ..search.proposals import fused

    limits, best = _limits(wanted), found.best
    values = dict(zip([trial.architecture for trial in found.trials], fused(found.trials)))
    front = {trial.architecture for trial in found.front()}

    def point(trial: Trial) -> FrontPoint:
        kind: PointKind = "plan" if trial.architecture in front else "candidate"
        seconds = trial.costs.get("latency_seconds")
        return FrontPoint(
            found.space.describe(trial.architecture),
            "chosen" if trial is best else kind,
            values[trial.architecture],
            milliseconds=None if seconds is None else 1000 * seconds,
            flops=int(trial.costs["flops"]),
        )

    kept = [
        found.trials[place] for place in found.ranking if abs(values[found.trials[place].architecture]) < float("inf")
    ]
    names = list(best.values)
    scored = names[0] if len(names) == 1 else "fused rank of " + ", ".join(names)
    seconds = best.costs.get("latency_seconds")
    budget = tuple(
        BudgetLine(name, str(wanted[_TYPED[name]]), limit, best.costs[name], COSTS[name], True)
        for name, limit in limits.limited.items()
    )
    text = (
        f"{found.space.describe(best.architecture)} is the best of {len(found.trials)} networks that were scored "
        f"without training, {len(front)} of them on the front of score and FLOPs."
    )
    machine = environment()
    return Document(
        "search",
        f"{found.space.name}: {found.space.describe(best.architecture)}",
        __version__,
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        Verdict(True if budget else None, False, text),
        budget=budget,
        after=Measured(
            "winner",
            Score(values[best.architecture], name=scored) if kept else None,
            parameters=int(best.costs["parameters"]),
            flops=int(best.costs["flops"]),
            milliseconds=None if seconds is None else 1000 * seconds,
            peak_bytes=int(best.costs["memory_bytes"]) if "memory_bytes" in best.costs else None,
        ),
        front=tuple(point(trial) for trial in kept if trial.architecture in front or trial in kept[:_DRAWN]),
        notes=(
            "Scores of untrained networks rank them; none is an accuracy. Train the winner as recipe.yaml says, and "
            "beside it some random networks of the same FLOPs.",
            *((found.note,) if found.note else ()),
        ),
        environment={"processor": machine.cpu, "threads": str(machine.threads), "torch": machine.torch},
        recipe=yaml.safe_dump({"search": dict(wanted)}, sort_keys=False),
    )
