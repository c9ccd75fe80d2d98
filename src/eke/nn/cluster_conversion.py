"""Run the attention of a trained model on clusters, nothing trained: timm's, torch's, Hugging Face's, hand-written.

    found = cluster_attention(model, batches, tolerance=0.2)      # a copy; clusters and keys of each head by its rows
    found = cluster_attention(model, batches, clustering=Clustering(clusters=25, topk=32))
    logits = found.model(images)

Every module that calls `scaled_dot_product_attention`, and every `MultiheadAttention`, is found as a batch runs.
Parameters keep their names: states of the original load. Causal attention to padded batches and generation with a cache
stay exact.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._types import Batch
from .cluster_choice import HeadChoice, choose_clusters
from .clustered_attention import Clustering
from .conversion import wanted_sites
from .hybrid_attention import HybridState
from .softmax_sites import AttentionSite, Forward, MaskReader, attention_sites, call_on
from .substitute import Substitute, substitute_
from .swap import without_fast_path

SAMPLES = 8
"""Sequences from which a layer's clusters are chosen."""


class ClusteredSubstitute(Substitute):
    """Takes the calls of softmax attention in one module and answers them by clusters.

    Args:
        site: Where it stands.
        reader: Of masks, shared by the model's layers.
        clustering: How.
    """

    def __init__(self, site: AttentionSite, reader: MaskReader, clustering: Clustering) -> None:
        nn.Module.__init__(self)  # no feature maps, no window
        self.heads, self.dim, self.causal = site.heads, site.dim, site.causal
        self._reader, self.beside = reader, site.beside
        self.clustering, self.lesson, self.kept = clustering, None, None
        self.seen: list[tuple[Tensor, Tensor, Tensor | None, float | None]] | None = None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool,
        real: Tensor | None = None,
        scale: float | None = None,
        state: HybridState | None = None,
    ) -> tuple[Tensor, HybridState | None]:
        """Attend; shapes (batch, heads, length, dim).

        Args:
            q: Queries.
            k: Keys.
            v: Values.
            causal: Whether positions see the past alone.
            real: Which keys are real, (batch, keys).
            scale: Of the logits.
            state: Not used.

        Returns:
            Outputs, and the state as it was given.
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.seen is not None:
            self.seen.append((q, k, real, scale))
        both = real if self.beside and q.shape[1] == k.shape[1] and not causal else None
        out = self.clustering(q, k, v, mask=real, query_mask=both, causal=causal, scale=scale)
        return out.transpose(1, 2), state

    def extra_repr(self) -> str:
        """Return what print(model) shows."""
        return f"{self.heads} heads of {self.dim}, causal={self.causal}, {self.clustering}"


@dataclass(frozen=True)
class ClusteredLayer:
    """What became of one attention.

    Args:
        name: Of its module.
        clustering: Its clusters and keys.
        heads: The choice a head with the errors of its rows on the samples; none where the clustering was given.
    """

    name: str
    clustering: Clustering
    heads: tuple[HeadChoice, ...]


@dataclass(frozen=True)
class Clustered:
    """A model on clusters, and what became of each attention.

    Args:
        model: The new model.
        layers: The attentions that were converted, in the order of their calls.
        left: Those that were not, with the reason.
    """

    model: nn.Module
    layers: tuple[ClusteredLayer, ...]
    left: tuple[AttentionSite, ...]


def cluster_attention(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    clustering: Clustering | None = None,
    tolerance: float | None = None,
    match: str | None = None,
    skip: Iterable[str] = (),
    forward: Forward = call_on,
) -> Clustered:
    """Return a copy of a model whose softmax attention runs on clusters.

    Args:
        model: Any module that calls `scaled_dot_product_attention` or holds `MultiheadAttention`; not changed. Hugging
            Face models are set to `attn_implementation="sdpa"` in the copy.
        batches: What the model is run on, of the lengths in use; the first suffices where the clustering is given.
        clustering: For every attention; None with a tolerance, or for its defaults.
        tolerance: Largest mean L1 distance of a row of weights from the exact one, 0 to 2: each head gets the cheapest
            clusters and keys within it (`choose_clusters`). Layers see the exact queries and keys. Causal layers keep
            the `clustering`: their clusters change from block to block.
        match: Regular expression that a module's name must contain; None for all.
        skip: Names of modules to leave as they are.
        forward: `forward(model, batch)` runs the model.

    Returns:
        The new model with a report a layer.

    Raises:
        ValueError: if there is nothing to convert, or a clustering and a tolerance are both given.
    """
    if clustering is not None and tolerance is not None:
        raise ValueError(f"Give a clustering or a tolerance, not both, got {clustering} and {tolerance}.")
    kept = list(itertools.islice(batches, 1 if tolerance is None else SAMPLES))
    if not kept:
        raise ValueError(
            "batches is empty: give at least one batch to run the model on (a list, not a spent iterator)."
        )
    new = copy.deepcopy(model)
    for module in new.modules():
        # Only models that compute their softmax by hand change by it, and these by rounding alone.
        change = getattr(module, "set_attn_implementation", None)
        if change is not None and getattr(module.config, "_attn_implementation", "sdpa") != "sdpa":
            change("sdpa")
    sites = attention_sites(new, kept[0], forward=forward)
    chosen, left = wanted_sites(new, sites, match, tuple(skip))
    reader, given = MaskReader(), Clustering() if clustering is None else clustering
    exact = Clustering(clusters=0)
    parts = {}
    for site in chosen:
        parts[site.name] = ClusteredSubstitute(site, reader, given if tolerance is None else exact)
        substitute_(new.get_submodule(site.name), parts[site.name])
    without_fast_path(new, Substitute)
    layers = []
    if tolerance is not None:
        _watch(new, parts, kept, forward)
    for name, part in parts.items():
        heads: list[HeadChoice] = []
        if tolerance is not None and not part.causal:
            part.clustering, heads = _choose(part, tolerance)
        elif tolerance is not None:
            part.clustering = given
        part.seen = None
        layers.append(ClusteredLayer(name, part.clustering, tuple(heads)))
    return Clustered(new, tuple(layers), left)


def _watch(model: nn.Module, parts: dict[str, ClusteredSubstitute], batches: list[Batch], forward: Forward) -> None:
    """Note queries and keys of every attention, which are exact so far."""
    training = {module: module.training for module in model.modules()}
    for part in parts.values():
        part.seen = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            if all(part.seen and sum(len(call[0]) for call in part.seen) >= SAMPLES for part in parts.values()):
                break
            forward(model, batch)
    for module, was in training.items():
        module.training = was


def _choose(part: ClusteredSubstitute, tolerance: float) -> tuple[Clustering, list[HeadChoice]]:
    """Return the choice for the longest sequences that were seen."""
    assert part.seen
    longest = max(part.seen, key=lambda call: call[0].shape[1])
    wanted = longest[0].shape[1:], longest[1].shape[1:]
    alike = [call for call in part.seen if (call[0].shape[1:], call[1].shape[1:]) == wanted]
    q, k = torch.cat([call[0] for call in alike])[:SAMPLES], torch.cat([call[1] for call in alike])[:SAMPLES]
    masks = [call[2] for call in alike if call[2] is not None]
    mask = None
    if masks:
        mask = torch.cat([
            torch.ones(call[1].shape[:2], dtype=torch.bool) if call[2] is None else call[2].expand(len(call[1]), -1)
            for call in alike
        ])[:SAMPLES]
    return choose_clusters(q, k, tolerance=tolerance, mask=mask, scale=longest[3])
