"""Scores and the loss for retrieval by embeddings: how high the answer to a query stands among all passages.

A batch is a pair (queries, passages), each what the model takes: a tensor, a tuple or a dictionary of arguments.
Passage i answers query i; the passages of all batches are searched, by cosine. A sample is a query; the passages are
taken as given, so intervals speak of other queries to the same passages. Cost: queries times passages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from .._types import Batch, Counts, Metric, Samples, quotient
from .metrics import fingerprint
from .task import Forward, counting, evaluating, forward, split_batch

Embed = Callable[[Any, Any], Tensor]
"""`embed(outputs, inputs)`: embeddings (batch, width) from what the model returned for its inputs."""

_ROWS = 1024


def embedding_of(outputs: Any, inputs: Any) -> Tensor:
    """The embeddings in a model's outputs.

    A tensor is taken as it is; of other outputs `sentence_embedding`, `embeddings` or `pooler_output` is taken, and
    otherwise the mean of `last_hidden_state` over the tokens that the attention mask shows.

    Args:
        outputs: What the model returned.
        inputs: What it was called with.

    Returns:
        Embeddings, (batch, width).

    Raises:
        TypeError: if there is nothing of the kind.
    """

    def entry(name: str) -> Any:
        return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)

    if isinstance(outputs, Tensor):
        return outputs
    for name in ("sentence_embedding", "embeddings", "pooler_output"):
        if isinstance(found := entry(name), Tensor):
            return found
    hidden = entry("last_hidden_state")
    if not isinstance(hidden, Tensor):
        raise TypeError(
            f"No embeddings in the model's output of type {type(outputs).__name__}: pass embed=, a function "
            "embed(outputs, inputs)."
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor):
        return hidden.mean(1)
    weight = mask.to(hidden)[..., None]
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)


@counting
def recall_at(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    k: int = 1,
    embed: Embed = embedding_of,
    forward: Forward = forward,
) -> Counts:
    """Share of queries whose passage is among the k nearest.

    Args:
        model: Embeds queries and passages.
        batches: Pairs (queries, passages).
        k: How many passages count.
        embed: Finds the embeddings in the outputs.
        forward: Calls the model on `(inputs, None)`.

    Returns:
        Counts with the outcome of every query.

    Raises:
        ValueError: if k is not in [1, passages - 1].
    """
    ranks, order = _ranks(model, batches, embed=embed, forward=forward)
    if not 1 <= k < len(ranks):
        raise ValueError(f"recall_at needs k in [1, {len(ranks) - 1}] for {len(ranks)} passages, got {k!r}.")
    right = ranks <= k
    return Counts(int(right.sum()), right.numel(), right, order, f"recall at {k}")


def mean_reciprocal_rank(
    model: nn.Module, batches: Iterable[Batch], *, embed: Embed = embedding_of, forward: Forward = forward
) -> Samples:
    """Mean over queries of 1 / rank of its passage.

    Args:
        model: Embeds queries and passages.
        batches: Pairs (queries, passages).
        embed: Finds the embeddings in the outputs.
        forward: Calls the model on `(inputs, None)`.

    Returns:
        The score.
    """
    ranks, order = _ranks(model, batches, embed=embed, forward=forward)
    sums = torch.stack([1 / ranks, torch.ones_like(ranks)], 1)
    return Samples(sums, Metric("mean reciprocal rank", quotient, span=1.0), order)


def contrastive_loss(
    model: nn.Module,
    batch: Batch,
    *,
    temperature: float = 0.05,
    embed: Embed = embedding_of,
    forward: Forward = forward,
) -> Tensor:
    """Cross-entropy of each query's own passage among those of the batch (van den Oord et al., InfoNCE, 2018).

    Args:
        model: Embeds queries and passages.
        batch: A pair (queries, passages).
        temperature: Divides the cosines.
        embed: Finds the embeddings in the outputs.
        forward: Calls the model on `(inputs, None)`.

    Returns:
        Scalar tensor.
    """
    queries, passages = _embedded(model, batch, embed=embed, forward=forward, where="the batch")
    return F.cross_entropy(queries @ passages.T / temperature, torch.arange(len(queries), device=queries.device))


def _ranks(model: nn.Module, batches: Iterable[Batch], *, embed: Embed, forward: Forward) -> tuple[Tensor, str]:
    """Return the rank of each query's passage (queries,), float64, and the fingerprint of the queries.

    Equal similarities share the mean of their ranks: a model that embeds all alike ranks in the middle.

    Raises:
        ValueError: if there is no batch, or an embedding is not finite.
    """
    pairs, order = [], hashlib.sha256()
    with evaluating(model):
        for index, batch in enumerate(batches):
            pair = _embedded(model, batch, embed=embed, forward=forward, where=f"batch {index}")
            bad = sum(int((~torch.isfinite(side)).any(1).sum()) for side in pair)
            if bad:
                raise ValueError(f"Batch {index} of the evaluation gave {bad} embeddings that are not finite.")
            pairs.append(pair)
            for leaf in pytree.tree_leaves(batch):
                if isinstance(leaf, Tensor):
                    fingerprint(order, leaf)
    if not pairs:
        raise ValueError(
            f"The evaluation got {len(pairs)} batches: pass a list or a DataLoader, not an iterator that is used up."
        )
    queries, passages = (torch.cat(side) for side in zip(*pairs))
    ranks = []
    for start in range(0, len(queries), _ROWS):
        likeness = queries[start : start + _ROWS] @ passages.T
        rows = torch.arange(len(likeness), device=likeness.device)
        # Its own similarity is read from the same product: computed otherwise it would differ in the last bits.
        own = likeness[rows, start + rows, None]
        ranks.append(1 + (likeness > own).sum(1) + ((likeness == own).sum(1) - 1) / 2)
    return torch.cat(ranks).to("cpu", torch.float64), order.hexdigest()


def _embedded(model: nn.Module, batch: Batch, *, embed: Embed, forward: Forward, where: str) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of queries and passages.

    Raises:
        TypeError: if the batch is no pair.
        ValueError: if there are not as many queries as passages.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or batch[1] is None:
        raise TypeError(
            f"A batch of retrieval must be a pair (queries, passages), got {type(batch).__name__} in {where}: "
            "passage i answers query i."
        )
    found = []
    for side in batch:
        inputs, _ = split_batch((side, None))
        found.append(embed(forward(model, (side, None)), inputs))
    if found[0].ndim != 2 or found[0].shape != found[1].shape:
        raise ValueError(
            "Queries and passages need embeddings (batch, width) of one shape, got "
            f"{tuple(found[0].shape)} and {tuple(found[1].shape)} in {where}: pass embed= to choose or pool them."
        )
    wide = torch.promote_types(found[0].dtype, torch.float32)
    return F.normalize(found[0].to(wide), dim=1), F.normalize(found[1].to(wide), dim=1)
