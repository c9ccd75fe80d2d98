"""Clustered attention inside of Hugging Face models, whose weights and code stay as they are.

    register_hf_attention("clustered", Clustering(clusters=25, topk=32))
    model = AutoModel.from_pretrained(..., attn_implementation="clustered")     # or
    model.set_attn_implementation("clustered")

Goes through `AttentionInterface` and `AttentionMaskInterface` of transformers (an extra, imported when called). Padding
and causal masks are read; where neither holds, and for generation with a cache, attention is exact or refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import require
from .clustered_attention import Clustering


def register_hf_attention(
    name: str,
    clustering: Clustering,
    *,
    layers: Mapping[nn.Module, Clustering] | None = None,
) -> None:
    """Make clustered attention known to transformers under a name.

    Args:
        name: For `attn_implementation`. An earlier registration of the same name is replaced; built-in names are not.
        clustering: For all attentions that are not in `layers`.
        layers: Settings of single attention modules of a model, as `choose_clusters` finds them.

    Raises:
        MissingExtraError: if transformers is not installed.
        ValueError: if the name is one of transformers' own.
    """  # noqa: DOC502
    transformers: Any = require("transformers", extra="hf", purpose="register_hf_attention")
    masking: Any = require("transformers.masking_utils", extra="hf", purpose="register_hf_attention")
    taken = {"eager", *transformers.AttentionInterface._global_mapping} - _OURS
    if name in taken or not name:
        raise ValueError(f"name must not be one of transformers' own attentions, got {name!r}: {sorted(taken)}.")
    own = weakref.WeakKeyDictionary(dict(layers or {}))

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        dropout, is_causal = options.get("dropout", 0.0), options.get("is_causal")
        if dropout and module.training:
            raise ValueError(
                f"Clustered attention has no dropout of weights, got {dropout}: set the model's attention dropout "
                "(attention_probs_dropout_prob, attention_dropout) to 0."
            )
        causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if k.shape[2] != q.shape[2]:
            k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        return _attend(own.get(module, clustering), (q, k, v), attention_mask, causal, options.get("scaling")), None

    transformers.AttentionInterface.register(name, attention)
    masking.AttentionMaskInterface.register(name, _padding)
    _OURS.add(name)


_OURS: set[str] = set()


def _attend(
    clustering: Clustering,
    parts: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Return outputs as masks allow.

    Raises:
        ValueError: if the mask is of pairs of positions.
    """
    q, k, v = parts
    if mask is not None and (mask.ndim != 2 or mask.dtype != torch.bool):
        raise ValueError(
            f"Clustered attention reads padding, a bool mask (batch, keys), got {mask.dtype} of {tuple(mask.shape)}: "
            "this model makes masks of its own; keep its attention as it is."
        )
    if causal and mask is not None and not bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        mask = None  # padding after the real positions is never seen by them
    same = mask is not None and q.shape[1] == k.shape[1] and not causal
    return clustering(q, k, v, mask=mask, query_mask=mask if same else None, causal=causal, scale=scale)


def _padding(*, q_length: int | Tensor, kv_length: int, **asked: Any) -> Tensor | None:
    """Return which keys are real, (batch, keys), or None for all.

    Raises:
        ValueError: if pairs of positions are masked in another way than causally.
    """
    length = len(q_length) if isinstance(q_length, Tensor) else q_length
    mask_function: Callable[..., Tensor] | None = asked.get("mask_function")
    attention_mask: Tensor | None = asked.get("attention_mask")
    if mask_function is not None and length:
        queries = torch.tensor(sorted({0, length // 2, length - 1})) + asked.get("q_offset", 0)
        keys = torch.arange(kv_length) + asked.get("kv_offset", 0)
        seen = torch.stack([
            torch.as_tensor(mask_function(torch.tensor(0), torch.tensor(0), query, keys)).expand(kv_length)
            for query in queries
        ])
        if not (bool(seen.all()) or torch.equal(seen, keys <= queries[:, None])):
            raise ValueError(
                "Clustered attention knows no windows, chunks or packed sequences, which this model asks for: keep its "
                "attention as it is (attn_implementation='sdpa')."
            )
    if attention_mask is None:
        return None
    real = attention_mask[:, -kv_length:].bool()
    return None if real.shape[1] == kv_length and bool(real.all()) else real
