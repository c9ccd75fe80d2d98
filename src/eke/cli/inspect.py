"""`eke inspect`: what a model weighs, place by place, and what could be saved there.

Parameters and FLOPs are counted, the share of time is measured, the sensitivity is estimated: the loss that rounding
the matrix to 4 bits is predicted to cost, 1/2 tr(D^T G D A). Numbers of a module with several matrices stand at its
first.
"""

from __future__ import annotations

import datetime
import json
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._version import __version__
from . import exported
from .examples import Inputs, described, example_inputs
from .load import load_model, load_task, resolve
from .options import DataOption, DebugOption, JsonOption, ModelArgument, TaskOption, ThreadsOption
from .progress import shown
from .recipe import Recipe
from .session import UsageError, emit, session
from .show import draw

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..compression import Task
    from ..report import Calibrated, Document, SiteLine
    from ..sites import ChannelGroup, Site

BITS = 4
_SAMPLES, _LOCATIONS = 1024, 64


def inspect(
    *,
    model: ModelArgument = None,
    data: DataOption = None,
    task: TaskOption = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="SHAPE", help="Without data: 1,3,224,224; whole numbers: 1,128:int64; repeat."),
    ] = None,
    html: Annotated[
        pathlib.Path | None, typer.Option("--html", metavar="FILE", help="Write a page too.", show_default=False)
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Compare predicted with measured losses; minutes, needs data.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="Time of each measurement of latency.")] = 1.0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List what a model consists of and costs.

    One line for each matrix: parameters, FLOPs, measured share of the time, and the loss that rounding it to 4 bits is
    estimated to cost; then the channels that can be cut together, and what is left alone and why.
    """  # noqa: DOC501
    with session(as_json=as_json, debug=debug):
        from ..cost import pinned_threads, write_bytes
        from ..report import html as pages

        recipe = Recipe(model, data, task)
        if calibrate and recipe.task is None and recipe.data is None:
            raise UsageError(f"inspect --calibrate measures losses of {model}: give --data FILE.py:FUNCTION.")
        net, given = _loaded(recipe)
        known = load_task(recipe) if recipe.task or recipe.data else None
        if inputs:
            given = tuple(_example(text) for text in inputs)
        elif known is None and (given := given or example_inputs(net)) is None:
            raise UsageError(
                f"inspect needs what {model} is called with: --data FILE.py:FUNCTION or --input 1,3,224,224."
            )
        with pinned_threads(threads):
            document, groups, left_out = inspected(
                net,
                known,
                inputs=given or (),
                title=str(recipe.model or recipe.task),
                seconds=seconds,
            )
            if calibrate:
                document = calibrated(net, known, document, threads=threads, seconds=seconds)
        if html is not None:
            write_bytes(html, pages.render(document).encode())
    if as_json:
        emit({**json.loads(document.to_json()), "channel_groups": groups, "skipped": left_out})
        return
    draw(document)
    for found in document.calibration:
        typer.echo(f"{found.kind}: {found.label}: predicted {found.predicted:+.3g}, measured {found.measured:+.3g}")
    for note in document.notes:
        typer.echo(note)
    if html is not None:
        typer.echo(str(html))


def _loaded(recipe: Recipe) -> tuple[nn.Module, Inputs | None]:
    """Return the model, and the inputs that came with it in its file."""
    if recipe.model is not None and exported.is_exported(recipe.model):
        return exported.load_exported(pathlib.Path(resolve(recipe.model)))
    return load_model(recipe), None


def _example(text: str) -> Tensor:
    """Return a tensor of a shape such as "1,3,224,224" or "1,128:int64"."""  # noqa: DOC501
    import torch

    shape, colon, kind = text.partition(":")
    kinds = {"": torch.float32, "float32": torch.float32, "int64": torch.int64}
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1 or kind not in kinds or (colon and not kind):
        raise UsageError(f"--input needs a shape such as 1,3,224,224 or 1,128:int64, got {text!r}.")
    if kind == "int64":
        return torch.zeros(sizes, dtype=torch.int64)
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def inspected(
    model: nn.Module, task: Task | None, *, inputs: Inputs, title: str, seconds: float
) -> tuple[Document, list[dict[str, Any]], dict[str, str]]:
    """Look at a model.

    Args:
        model: Any module; not changed.
        task: Its data; None leaves the sensitivity out.
        inputs: What it is called with, positional or keywords; empty for the first calibration batch.
        title: Of the report.
        seconds: Of each of two measurements.

    Returns:
        The report, the channel groups as plain values, and what is no site with the reason.
    """
    from .. import cost
    from ..compression.measure import costs, runner
    from ..compression.task import evaluating, split_batch
    from ..compression.trial import check_called
    from ..report import Document, Measured, Verdict
    from ..sites import channel_groups, find, skipped, unwrap

    model = unwrap(model)
    arguments: Any = inputs if inputs or task is None else split_batch(next(iter(task.calibration)))[0]
    positional: tuple[Any, ...] = (arguments,) if isinstance(arguments, dict) else arguments
    program = exported.is_program(model)
    check_called(
        model, arguments, which="what it is called with", do="Give data, or --input shapes, such as 1,3,224,224."
    )
    with evaluating(model):
        sites = find(model)
        flops = cost.flops_by_module(model, *positional)
        times = cost.module_times(model, *positional, seconds=seconds)
        latency = cost.latency(runner(model, arguments), seconds=seconds)
        counted = costs(model, arguments)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            groups = [] if program else channel_groups(model, arguments)
            losses = {} if task is None else sensitivities(model, task, sites)
    left_out = {} if program else skipped(model)
    document = Document(
        kind="inspect", title=title, eke_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        verdict=Verdict(None, False, exported.SENTENCE if program else _sentence(model, sites, groups)),
        before=Measured(
            "model", bytes=round(counted["size"]), parameters=round(counted["parameters"]), flops=flops[""],
            milliseconds=1e3 * latency.median, peak_bytes=round(counted["peak_memory"]),
        ),
        sites=exported.lines(model, flops, times) if program else _lines(sites, flops, times, losses),
        notes=(
            f"called with {described(arguments)}", *(_group_words(group) for group in groups),
            *(f"not a site: {n}: {why}" for n, why in left_out.items()),
        ),
        warnings=tuple(dict.fromkeys(" ".join(str(w.message).split()) for w in caught)),
        environment={str(k): str(v) for k, v in cost.environment().to_json().items()},
    )  # fmt: skip
    return document, [_group_json(group) for group in groups], left_out


def calibrated(
    model: nn.Module, task: Task | None, document: Document, *, threads: int | None, seconds: float
) -> Document:
    """Add predicted and measured losses of single changes and whole plans to a report.

    Args:
        model: The model; not changed.
        task: Its data.
        document: The report so far.
        threads: Torch threads of latency measurements.
        seconds: Time of one measurement of latency.

    Returns:
        The report with them.
    """
    from ..compression import survey

    assert task is not None
    with shown() as progress:
        found = survey(model, task, threads=threads, seconds=seconds, progress=progress).calibrate()
    return replace(document, calibration=tuple(found), notes=(*document.notes, *agreement(found)))


def agreement(found: Sequence[Calibrated]) -> list[str]:
    """Return in words how well predictions agree with measurements: rank correlation and typical factor."""
    from scipy.stats import spearmanr

    notes = []
    for name, chosen in (
        ("single changes", [c for c in found if c.kind != "plan"]),
        ("whole plans", [c for c in found if c.kind == "plan"]),
    ):
        if len(chosen) < 3:
            continue
        rank = float(spearmanr([c.predicted for c in chosen], [c.measured for c in chosen]).statistic)
        seen = [c for c in chosen if c.measured > 0 and c.predicted > 0]
        factors = sorted(max(c.predicted / c.measured, c.measured / c.predicted) for c in seen)
        typical = f", median factor {factors[len(factors) // 2]:.2f}" if factors else ""
        notes.append(f"predicted against measured loss of {len(chosen)} {name}: Spearman {rank:.3f}{typical}")
    return notes


def sensitivities(model: nn.Module, task: Task, sites: Sequence[Site]) -> dict[str, float]:
    """Predict the loss that rounding each matrix to 4 bits costs.

    Args:
        model: In evaluation mode.
        task: Its loss and calibration batches.
        sites: Those whose inputs and outputs can be seen are looked at.

    Returns:
        Predicted increase of the loss by site name.
    """
    from ..curvature import Curvature
    from ..structures import UniformGrid

    visible = [site for site in sites if site.visible]
    curvature = Curvature.estimate(
        model, task.loss, task.calibration, visible, max_samples=_SAMPLES, max_locations=_LOCATIONS
    )
    grid = UniformGrid(BITS)
    weights = {site.name: site.read(model) for site in visible if site.name in curvature.names}
    return {name: curvature.quadratic(name, grid.project(weight) - weight) for name, weight in weights.items()}


def _lines(
    sites: Sequence[Site], flops: Mapping[str, int], times: Mapping[str, float], losses: Mapping[str, float]
) -> tuple[SiteLine, ...]:
    from ..report import SiteLine

    whole, seen, lines = sum(times.values()), set[str](), []
    for site in sites:
        first = site.module_name not in seen
        seen.add(site.module_name)
        share = times[site.module_name] / whole if first and site.module_name in times else None
        operations = flops.get(site.module_name) if first else None
        lines.append(
            SiteLine(
                site.name, site.kind, site.shape, parameters=site.shape[0] * site.shape[1], flops=operations,
                share_of_time=share, sensitivity=losses.get(site.name),
            )
        )  # fmt: skip
    return tuple(lines)


def _sentence(model: nn.Module, sites: Sequence[Site], groups: Sequence[ChannelGroup]) -> str:
    units = sum(group.size for group in groups)
    return (
        f"{type(model).__name__}: {len(sites)} matrices can be put on grids, {units} channels, heads or "
        f"hidden units in {len(groups)} groups can be cut. Sensitivity: predicted loss of rounding to {BITS} bits."
    )


def _group_words(group: ChannelGroup) -> str:
    return f"group {group.name}: {group.size} {group.unit}, cut together in {', '.join(group.modules)}"


def _group_json(group: ChannelGroup) -> dict[str, Any]:
    members = [{"module": member.module_name, "side": member.side} for member in group.members]
    return {"name": group.name, "size": group.size, "members": members}
