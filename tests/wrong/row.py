"""One row of the table, and the small net and data that all rows spoil."""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import eke
from eke.compression import Recovery, cross_entropy

STEPS = Recovery(steps=2, batch_size=32)
BUDGET = eke.Budget(size="0.6x")
EASY = eke.Budget(size="0.9x")


@dataclass(frozen=True)
class Row:
    """Something wrong.

    Args:
        given: What was given.
        call: Gives it, in an empty folder.
        error: Type of the error.
        says: Its text, with "..." for what may vary.
        why: Why that cannot be meant, for readers.
        do: What to do, for readers.
        python: Whether Python itself refuses the call, by its signature.
    """

    given: str
    call: Callable[[Path], object]
    error: type[Exception]
    says: str
    why: str
    do: str
    python: bool = False


@dataclass(frozen=True)
class Command:
    """Something wrong that is typed.

    Args:
        words: After `eke`.
        says: Text on stderr, with "..." for what may vary.
        why: For readers.
        do: For readers.
        code: Exit code: 2 where the command cannot be meant, 1 otherwise.
    """

    words: str
    says: str
    why: str
    do: str
    code: int = 2


def pattern(says: str) -> str:
    """The expression that finds a text in which "..." stands for anything."""
    return ".*".join(re.escape(part) for part in re.sub(r"\s+", " ", says).split("..."))


def net(classes: int = 3, width: int = 64) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, classes)).eval()


def batches(count: int = 96, *, seed: int = 0, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator)
    return list(zip(x.split(size), y.split(size)))


def splits() -> tuple[list, list, list]:
    return batches(seed=1), batches(seed=2), batches(seed=3)


def changed(inputs=lambda x: x, targets=lambda y: y) -> list:
    return [(inputs(x), targets(y)) for x, y in batches()]


def compress(model=None, data=None, **options):
    options = {"loss": cross_entropy, "budget": BUDGET, "recovery": STEPS, "seconds": 0.02, **options}
    return eke.compress(net() if model is None else model, batches() if data is None else data, **options)


def on_task(**options):
    return eke.compress(net(), eke.Task(*splits(), **options), budget=BUDGET, recovery=STEPS, seconds=0.02)


class Wrapped(nn.Module):
    """The net inside a module whose forward is a function of the net and the inputs."""

    def __init__(self, function) -> None:
        super().__init__()
        self.net, self.function = net(), function

    def forward(self, x):
        return self.function(self.net, x)


@functools.cache
def _artifact() -> tempfile.TemporaryDirectory[str]:
    place = tempfile.TemporaryDirectory()
    compress().save(Path(place.name) / "saved")
    return place


def saved(folder: Path) -> Path:
    """A copy of a result, to be spoiled."""
    return Path(shutil.copytree(Path(_artifact().name) / "saved", folder / "saved"))
