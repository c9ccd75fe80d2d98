"""The form of a softmax attention that became linear: plain values that rebuild it on the user's architecture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.conversion import on_fused_attention
from ..nn.softmax_sites import AttentionSite, MaskReader
from ..nn.substitute import Substitute, substitute_
from ..nn.swap import without_fast_path


def put_in_(
    model: nn.Module, forms: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Substitute] | None = None
) -> None:
    """Put linear attention in the place of softmax attention, in place.

    Args:
        model: Of the original architecture.
        forms: What each becomes, by name of the module, as `form_of` gives it.
        parts: What was learned; None for substitutes whose values are not right yet.

    Raises:
        ValueError: if the model lacks a module.
    """
    if not forms:
        return
    unknown = sorted(set(forms) - {name for name, _ in model.named_modules()})
    if unknown:
        raise ValueError(f"The plan converts {unknown[:4]}, which this model lacks: build the same architecture.")
    on_fused_attention(model)
    reader = MaskReader()
    for name, form in forms.items():
        if parts is not None:
            part = copy.deepcopy(parts[name])
        else:
            keys = int(bool(form["beside"]))
            site = AttentionSite(name, int(form["heads"]), int(form["dim"]), bool(form["causal"]), 1, keys)
            with torch.random.fork_rng(devices=[]):
                part = Substitute(site, reader, window=int(form["window"]), feature_map=form["feature_map"])
        like = next(model.get_submodule(name).parameters(), torch.empty(0))
        substitute_(model.get_submodule(name), part.to(like.device))
    without_fast_path(model, Substitute)


def form_of(part: Substitute, feature_map: str) -> dict[str, Any]:
    """Return what rebuilds a substitute, but for its values, as plain values."""
    return {
        "heads": part.heads, "dim": part.dim, "causal": part.causal, "beside": part.beside, "window": part.window,
        "feature_map": feature_map,
    }  # fmt: skip
