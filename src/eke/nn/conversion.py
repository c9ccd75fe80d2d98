"""Convert a trained softmax model: put linear attention in place of its attention and teach it what that did.

    found = linearize(model, batches, window=64, steps=200)       # a copy; see found.layers for each layer's error
    logits = found.model(tokens)

Attention transfer: while the softmax model runs, each substitute sees the very queries, keys and values of its layer
and learns the softmax's outputs beside it (objective "output": squared error relative to the outputs' energy) or its
weights ("weights": cross-entropy of the rows). Only feature maps and balances learn, every layer by itself: no
gradients pass between layers. What remains is mended by tuning the whole (`low_rank_tuning_`).
Sources: Kasai and others, "Finetuning pretrained transformers into RNNs", 2021; Zhang and others, "The hedgehog and the
porcupine", 2024 (weights); Zhang and others, "LoLCATs", 2024 (outputs, window, low rank) [recalled].
Cost: per step a forward pass of the model and, for each layer, forward and backward of its substitute; objective
"weights" meets all pairs of positions.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .._errors import suggest
from .._types import Batch
from .attention_transfer import Objective, balance_, output_errors, transfer_attention_, weight_divergences
from .hf_decoder import step_decoders_
from .hybrid_attention import MapName, MapRule
from .softmax_sites import AttentionSite, Forward, MaskReader, attention_sites, call_on
from .substitute import Substitute, substitute_
from .swap import without_fast_path

_MEASURED = 4
"""Batches on which errors are measured."""


@dataclass(frozen=True)
class LinearizedLayer:
    """What became of one attention.

    Args:
        name: Of its module.
        causal: Whether positions see the past alone.
        window: Positions that are seen through the softmax.
        error_before: Relative error of its outputs before transfer, given the softmax model's queries, keys and values:
            sqrt(sum |y' - y|^2 / sum |y|^2).
        error: The same after transfer.
        divergence: Mean Kullback-Leibler divergence of its weights from the softmax's, in nats a query; None if it was
            not asked for.
    """

    name: str
    causal: bool
    window: int
    error_before: float
    error: float
    divergence: float | None = None


@dataclass(frozen=True)
class Linearized:
    """A converted model, and what became of each attention.

    Args:
        model: The new model.
        layers: The attentions that were converted, in the order of their calls.
        left: Those that were not, with the reason.
        steps: Batches that transfer learned from, all windows together.
    """

    model: nn.Module
    layers: tuple[LinearizedLayer, ...]
    left: tuple[AttentionSite, ...]
    steps: int


def linearize(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    feature_map: MapName | MapRule = "hedgehog",
    window: int | Sequence[int] = 64,
    tolerance: float = 0.1,
    steps: int = 200,
    learning_rate: float = 1e-2,
    objective: Objective = "output",
    match: str | None = None,
    skip: Iterable[str] = (),
    forward: Forward = call_on,
    divergence: bool = False,
    seed: int = 0,
) -> Linearized:
    """Return a copy of a model whose softmax attention is linear, or linear beyond a window, after attention transfer.

    Args:
        model: Any module that calls `scaled_dot_product_attention` or holds `MultiheadAttention`; not changed. Hugging
            Face models are set to `attn_implementation="sdpa"` in the copy.
        batches: What the model is run on: any iterable, of which `steps` batches are kept, four at least. Labels are
            not needed.
        feature_map: See `HybridAttention`.
        window: Positions on either side that stay with the softmax, 0 for none. Of several each layer gets the
            smallest that comes within the tolerance, or the largest.
        tolerance: Relative error of a layer's outputs that is small enough not to try a larger window.
        steps: Batches to learn from for each window; 0 for the substitutes as they are drawn, to load a state into.
        learning_rate: Of Adam; falls to zero as a cosine.
        objective: "output" or "weights".
        match: Regular expression that a module's name must contain; None for all.
        skip: Names of modules to leave as they are.
        forward: `forward(model, batch)` runs the model; None of its outputs are used.
        divergence: Whether to measure the divergence of weights, which meets all pairs of positions.
        seed: Of the maps and of the order of batches.

    Returns:
        The new model with a report a layer.

    Raises:
        ValueError: if there is nothing to convert, a name is unknown or a number is out of range.
    """
    windows = (window,) if isinstance(window, int) else tuple(sorted(set(window)))
    _check(windows, steps, objective)
    kept = list(itertools.islice(batches, max(steps, _MEASURED)))
    if not kept:
        raise ValueError(
            "batches is empty: give at least one batch to run the model on (a list, not a spent iterator)."
        )
    new = on_fused_attention(copy.deepcopy(model))
    sites = attention_sites(new, kept[0], forward=forward)
    chosen, left = wanted_sites(new, sites, match, tuple(skip))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = _put_in_(new, chosen, windows[0], feature_map)
        without_fast_path(new, Substitute)
        balance_(new, kept[:1], forward=forward)
        before = output_errors(new, kept[:_MEASURED], forward=forward)
        errors, used, at = before, 0, dict.fromkeys(parts, windows[0])
        for size in windows:
            late = [name for name in parts if size == windows[0] or errors[name] > tolerance]
            if not late:
                break
            for name in late:
                at[name] = parts[name].widen_(size)
            if size != windows[0]:
                balance_(new, kept[:1], forward=forward)
            if steps:
                transfer_attention_(
                    new, kept, steps=steps, learning_rate=learning_rate, objective=objective, only=late,
                    forward=forward, seed=seed,
                )  # fmt: skip
                used += steps
            if steps or size != windows[0]:
                errors = output_errors(new, kept[:_MEASURED], forward=forward)
    step_decoders_(new)
    apart = weight_divergences(new, kept[:1], forward=forward) if divergence else {}
    layers = tuple(
        LinearizedLayer(
            site.name, site.causal, at[site.name], before[site.name], errors[site.name], apart.get(site.name)
        )
        for site in chosen
    )
    return Linearized(new, layers, left, used)


def _check(windows: Sequence[int], steps: int, objective: str) -> None:
    """Refuse numbers out of range.

    Raises:
        ValueError: naming them.
    """
    if not windows or windows[0] < 0:
        raise ValueError(f"window is a number of positions or several, 0 for none, got {list(windows)}.")
    if steps < 0:
        raise ValueError(f"steps is a number of batches to learn from, 0 for none, got {steps!r}.")
    if objective not in {"output", "weights"}:
        raise ValueError(f"objective is 'output' or 'weights', got {objective!r}.")


def on_fused_attention(model: nn.Module) -> nn.Module:
    """Return the model, Hugging Face's attention set to the kind that is watched."""
    # Only models that compute their softmax by hand change by it, and these by rounding alone.
    setter = getattr(model, "set_attn_implementation", None)
    for module in model.modules() if setter is None else (model,):
        change = getattr(module, "set_attn_implementation", None)
        config = getattr(module, "config", None)
        if change is not None and getattr(config, "_attn_implementation", "sdpa") != "sdpa":
            change("sdpa")
    return model


def wanted_sites(
    model: nn.Module, sites: Sequence[AttentionSite], match: str | None, skip: tuple[str, ...]
) -> tuple[list[AttentionSite], tuple[AttentionSite, ...]]:
    """Return the sites to convert and those that cannot be.

    Args:
        model: The model.
        sites: Its attention sites.
        match: Regular expression that a module's name must contain; None for all.
        skip: Names of modules to leave as they are, with what is inside them.

    Raises:
        ValueError: if a name is unknown or no site is left.
    """
    names = [site.name for site in sites]
    modules = dict(model.named_modules())
    for name in skip:
        if name not in modules:
            raise ValueError(
                f"skip names {name!r}, which is no module of {type(model).__name__}.{suggest(name, names)}"
            )
    wanted = [
        site for site in sites
        if (match is None or re.search(match, site.name))
        and not any(site.name == other or site.name.startswith(f"{other}.") for other in skip)
    ]  # fmt: skip
    chosen = [site for site in wanted if site.reason is None]
    left = tuple(site for site in wanted if site.reason is not None)
    if not chosen:
        reasons = "; ".join(f"{site.name!r}: {site.reason}" for site in left[:4])
        seen = f"{len(sites)} calls of softmax attention were seen"
        advice = reasons or f"match={match!r} and skip={list(skip)} leave none of {names[:4]}"
        if not sites:
            advice = (
                "it must run through torch.nn.functional.scaled_dot_product_attention or nn.MultiheadAttention (timm: "
                "fused attention on)"
            )
        raise ValueError(f"No attention of {type(model).__name__} can be converted; {seen}: {advice}.")
    return chosen, left


def _put_in_(
    model: nn.Module, sites: Sequence[AttentionSite], window: int, feature_map: MapName | MapRule
) -> dict[str, Substitute]:
    reader, parts = MaskReader(), {}
    for site in sites:
        parts[site.name] = Substitute(site, reader, window=window, feature_map=feature_map)
        substitute_(model.get_submodule(site.name), parts[site.name])
    return parts
