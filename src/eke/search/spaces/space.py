"""What a search space is: architectures as plain values, their costs in closed form, and how to build one.

An architecture is a hashable value of strings, numbers and tuples, so that it is a key and a line of JSON at once.
A space says how one is drawn (`compose`), changed (`mutate`), priced without building it (`parameters`, `flops`) and
built (`decode`). Everything else in the room works on these verbs.

`compose` asks for each choice by name; a random architecture answers with a die, a shared search with what its storage
suggests.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Architecture = Hashable
"""A plain value: strings, numbers, and tuples of them."""

Choose = Callable[[str, Sequence[Any]], Any]
"""`choose(name, options)`: one of the options; they are strings, numbers or booleans."""


class Space(ABC):
    """A set of architectures with their costs.

    FLOPs are 2 a multiply-add, products only, as `cost.flops` counts them: what papers call 450M FLOPs is 900M here.
    """

    name: str = "space"

    @abstractmethod
    def compose(self, choose: Choose) -> Any:
        """Return the architecture that a sequence of choices makes.

        Args:
            choose: Called for each choice with a name and the options; names are unique within an architecture.
        """

    @abstractmethod
    def decode(self, architecture: Any) -> nn.Module:
        """Return the network with fresh weights.

        Args:
            architecture: A value of this space.
        """

    @abstractmethod
    def parameters(self, architecture: Any) -> int:
        """Return the number of parameters, without building anything where a formula is known."""

    @abstractmethod
    def flops(self, architecture: Any) -> int:
        """Return the FLOPs of one sample, without building anything where a formula is known."""

    @abstractmethod
    def example(self, batch: int = 1) -> Tensor:
        """Return an input of the networks, standard normal.

        Args:
            batch: Number of samples.
        """

    @property
    @abstractmethod
    def smallest(self) -> Any:
        """An architecture with the least FLOPs, named when a limit cannot be kept."""

    def bare(self, architecture: Any) -> nn.Module:
        """Return the network that is scored; the same as `decode` unless a space scores another one."""
        return self.decode(architecture)

    def fault(self, architecture: Any) -> str | None:
        """Return why an architecture is of no use whatever the budget, or None; such ones are not proposed."""
        return None

    def sample(self, rng: random.Random) -> Any:
        """Return a random architecture.

        Args:
            rng: Source of randomness.
        """
        return self.compose(lambda _name, options: rng.choice(options))

    def mutate(self, architecture: Any, rng: random.Random, *, changes: int = 1) -> Any:
        """Return a neighbour: another value for `changes` of the choices, which may coincide.

        Args:
            architecture: A value of this space.
            rng: Source of randomness.
            changes: Number of choices that are drawn again.
        """
        made = self.choices(architecture)
        changed = {rng.choice(list(made)) for _ in range(changes)}

        def choose(name: str, options: Sequence[Any]) -> Any:
            if name in changed or name not in made or made[name] not in options:
                others = [option for option in options if option != made.get(name)]
                return rng.choice(others or list(options))
            return made[name]

        return self.compose(choose)

    def choices(self, architecture: Any) -> dict[str, Any]:
        """Return the choices that `compose` needs to make an architecture, by name.

        Args:
            architecture: A value of this space.

        Raises:
            NotImplementedError: if a space has its own `mutate` and cannot tell.
        """
        raise NotImplementedError(f"{type(self).__name__} has no choices() for {architecture!r}: write it.")

    def describe(self, architecture: Any) -> str:
        """Return an architecture as people read it."""
        return architecture if isinstance(architecture, str) else json.dumps(architecture)

    def settings(self) -> dict[str, Any]:
        """Return what makes this space again: its name and the arguments of its class."""
        return {"space": self.name}


def plain(value: Any) -> Any:
    """Return what JSON made of an architecture as the architecture again: lists become tuples."""
    return tuple(plain(item) for item in value) if isinstance(value, list) else value


def images(batch: int, channels: int, resolution: int) -> Tensor:
    """Return standard normal images (batch, channels, resolution, resolution), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, channels, resolution, resolution, generator=generator)
