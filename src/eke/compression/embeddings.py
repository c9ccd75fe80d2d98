"""Embedding tables: grids for their rows, priced by what the change does to the rows that the data look up.

A table W is read by row, y = W[token]. A change D of it changes the outputs by dy = D[token], which costs
1/2 E[sum over locations of dy^T G dy] with G the second moment of the gradients at the table's output. Rows that no
sample looked up cost nothing in this estimate; a grid rounds them as finely as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._types import Batch
from ..curvature import Curvature
from ..sites import Site
from ..structures import Structure, UniformGrid
from .candidates import Forms, offered
from .task import Forward, evaluating


def embedding_sites(model: nn.Module, sites: Iterable[Site]) -> list[Site]:
    """Return the tables that nothing else shares and that are read plainly.

    Args:
        model: The model.
        sites: Its matrices.
    """
    return [
        site for site in sites
        if site.kind == "embedding" and not site.tied and type(site.module(model)) is nn.Embedding and site.module_name
    ]  # fmt: skip


def embedding_candidates(
    model: nn.Module,
    sites: Sequence[Site],
    curvature: Curvature,
    structures: Sequence[Structure],
    *,
    batches: Iterable[Batch],
    forward: Forward,
    max_samples: int = 256,
) -> list[Forms]:
    """Propose grids for tables.

    Args:
        model: The model; not changed.
        sites: From `embedding_sites`.
        curvature: With the outputs of their modules.
        structures: Structures to consider; only uniform grids are.
        batches: Calibration batches.
        forward: Calls the model on a batch.
        max_samples: Samples after which to stop.

    Returns:
        Candidates, one entry a table that the loss depends on.
    """
    sites = [site for site in sites if site.module_name in curvature.outputs]
    if not sites:
        return []
    seen = _lookups(model, sites, batches, forward, max_samples)
    proposed = []
    for site in sites:
        matrix = site.read(model)
        fit = offered(site, [s for s in structures if isinstance(s, UniformGrid)], ())
        losses = [0.0]
        for structure in fit:
            change = structure.project(matrix) - matrix
            costs = [curvature.output_quadratic(site.module_name, change[tokens]) for tokens in seen[site.name]]
            losses.append(sum(costs) / max(1, len(costs)))
        proposed.append(Forms(site, (None, *fit), tuple(losses)))
    return proposed


def _lookups(
    model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], forward: Forward, max_samples: int
) -> dict[str, list[Tensor]]:
    """Return what is looked up in each table, (samples, ...) a batch."""
    seen: dict[str, list[Tensor]] = {site.name: [] for site in sites}

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, inputs: Any) -> None:
            seen[name].append(inputs[0].detach().clone())

        return hook

    handles = [site.module(model).register_forward_pre_hook(note(site.name)) for site in sites]
    samples = 0
    try:
        with evaluating(model), torch.no_grad():
            for batch in batches:
                forward(model, batch)
                samples += max(len(found[-1]) for found in seen.values() if found) if any(seen.values()) else 1
                if samples >= max_samples:
                    break
    finally:
        for handle in handles:
            handle.remove()
    return seen
