"""The form of a softmax attention that became linear or clustered: plain values that rebuild it on the user's model.

What a linear one learned is in the state of the model; a clustered one learned nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..nn.cluster_conversion import ClusteredSubstitute
from ..nn.clustered_attention import Clustering
from ..nn.conversion import on_fused_attention
from ..nn.softmax_sites import AttentionSite, MaskReader
from ..nn.substitute import Substitute, substitute_
from ..nn.swap import without_fast_path

_SITE = {"heads": (int,), "dim": (int,), "causal": (bool,), "beside": (bool,)}
_LINEAR = {**_SITE, "window": (int,), "feature_map": (str,)}
_CLUSTERED = {**_SITE, "clusters": (int,), "topk": (int,), "exact_below": (int, type(None))}


def put_in_(
    model: nn.Module, forms: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Substitute] | None = None
) -> None:
    """Put linear or clustered attention in the place of softmax attention, in place.

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
        part = _new(name, form, reader) if parts is None else copy.deepcopy(parts[name])
        substitute_(model.get_submodule(name), part)
    without_fast_path(model, Substitute)


def _new(name: str, form: Mapping[str, Any], reader: MaskReader) -> Substitute:
    keys = int(bool(form["beside"]))
    site = AttentionSite(name, int(form["heads"]), int(form["dim"]), bool(form["causal"]), 1, keys)
    if is_clustered(form):
        given = {setting: form[setting] for setting in ("clusters", "topk", "exact_below")}
        return ClusteredSubstitute(site, reader, Clustering(**given))
    with torch.random.fork_rng(devices=[]):
        return Substitute(site, reader, window=int(form["window"]), feature_map=form["feature_map"])


def form_of(part: Substitute, feature_map: str = "") -> dict[str, Any]:
    """Return what rebuilds a substitute, but for its values, as plain values.

    Args:
        part: The substitute.
        feature_map: Of a linear one.
    """
    site = {"heads": part.heads, "dim": part.dim, "causal": part.causal, "beside": part.beside}
    if isinstance(part, ClusteredSubstitute):
        how = part.clustering
        return {**site, "clusters": how.clusters, "topk": how.topk, "exact_below": how.exact_below}
    return {**site, "window": part.window, "feature_map": feature_map}


def is_clustered(form: Mapping[str, Any]) -> bool:
    """Return whether a form is that of clusters."""
    return "clusters" in form


def described(form: Mapping[str, Any]) -> str:
    """Return a form in words."""
    if is_clustered(form):
        return f"clustered: {form['clusters']} clusters, {form['topk']} keys"
    return f"linear: {form['feature_map']}, window {form['window']}"


def check_form(form: object) -> None:
    """Refuse what no attention can be rebuilt from.

    Args:
        form: From a plan.

    Raises:
        ValueError: if a value is missing or has another type.
    """
    kinds = _CLUSTERED if isinstance(form, Mapping) and is_clustered(form) else _LINEAR
    # bool is an int for isinstance. A key that may be None must still be there.
    if not isinstance(form, Mapping) or any(
        name not in form or type(form[name]) not in kind for name, kind in kinds.items()
    ):
        raise ValueError(
            f"The plan converts an attention to {form!r:.80}, which lacks one of {list(kinds)}: restore it."
        )
